"""Calls reward functions safely: synchronous ones one after another, asynchronous ones together in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlx_nb.process.thread_streams import end_streams_with_thread
from mlx_nb.rollouts.rewards.resolve import Reward

TICK = 0.05  # seconds between two progress reports
GRACE = 1.0  # seconds that a cancelled function has to end


class Progress(NamedTuple):
    """How many of the completions a reward function has scored."""

    function: str
    done: int
    total: int


@dataclass(frozen=True)
class Outcome:
    """The result of a call: a value, or the exception it raised."""

    value: Any = None
    error: BaseException | None = None


Outcomes = list[Outcome | None]  # None: not called, or not finished, at the deadline
Call = dict[str, Any]


def call_reward(
    reward: Reward, calls: Sequence[Call], deadline: float, total: int
) -> Generator[Progress, None, Outcomes]:
    """Call a reward function once with each set of arguments; yields about every `TICK` seconds.

    deadline  on the clock `time.monotonic`: no call is started after it, and one that is awaited is cancelled
    total     completions, for the progress

    A synchronous function runs in the caller's thread, and may use the model. An asynchronous one is awaited for all
    calls together, on an event loop in a thread of its own. Raises only what is not an Exception (interrupts).
    """
    run = _await_together if reward.is_async else _call_in_turn
    return (yield from run(reward, calls, deadline, total))


def _call_in_turn(
    reward: Reward, calls: Sequence[Call], deadline: float, total: int
) -> Generator[Progress, None, Outcomes]:
    outcomes: Outcomes = []
    shown = time.monotonic()
    for call in calls:
        if time.monotonic() > deadline:
            break
        try:
            outcomes.append(Outcome(reward.function(**call)))
        except Exception as error:
            outcomes.append(Outcome(error=error))
        if time.monotonic() - shown >= TICK:
            yield Progress(reward.name, len(outcomes) * total // len(calls), total)
            shown = time.monotonic()
    return outcomes + [None] * (len(calls) - len(outcomes))


def _await_together(
    reward: Reward, calls: Sequence[Call], deadline: float, total: int
) -> Generator[Progress, None, Outcomes]:
    outcomes: Outcomes = [None] * len(calls)
    stop, ended = threading.Event(), threading.Event()

    async def await_one(k: int) -> None:
        try:
            outcomes[k] = Outcome(await reward.function(**calls[k]))
        except asyncio.CancelledError as error:
            if not stop.is_set():  # it cancelled itself
                outcomes[k] = Outcome(error=error)
        except BaseException as error:
            outcomes[k] = Outcome(error=error)

    async def await_all() -> None:  # returns at the deadline; `asyncio.run` then cancels the rest
        waiting = {asyncio.create_task(await_one(k)) for k in range(len(calls))}
        while waiting and not stop.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                stop.set()
            else:
                _, waiting = await asyncio.wait(waiting, timeout=min(TICK, left))

    def work() -> None:
        end_streams_with_thread()
        try:
            asyncio.run(await_all())
        except Exception as error:  # no event loop is available
            outcomes[:] = [one or Outcome(error=error) for one in outcomes]
        finally:
            ended.set()

    # A daemon: a function that blocks its event loop cannot be cancelled, and must not keep the kernel from ending.
    threading.Thread(target=work, name=f"reward {reward.name}", daemon=True).start()
    try:
        while not ended.wait(TICK) and None in outcomes and time.monotonic() < deadline + GRACE:
            yield Progress(reward.name, sum(one is not None for one in outcomes) * total // len(calls), total)
    finally:
        stop.set()
    for outcome in outcomes:
        if outcome and isinstance(outcome.error, (KeyboardInterrupt, SystemExit)):
            raise outcome.error
    return list(outcomes)
