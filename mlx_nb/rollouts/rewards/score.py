"""Scores completions with reward functions that may be wrong, slow or broken, without stopping the training."""

from __future__ import annotations

import inspect
import json
import math
import numbers
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_nb.errors import shortened
from mlx_nb.process.user_code import describe_error
from mlx_nb.rollouts.rewards.call import Outcome, Progress, call_reward
from mlx_nb.rollouts.rewards.resolve import CompletionBatch, Reward, check_rewards

PROBLEMS_SPELLED_OUT = 3  # for each function, then a count
_EXCERPT = 24  # characters of a completion in a problem
_RIGHT_SHAPE = (
    "It must return a list with one number for each completion, or take `completion` in place of `completions` and "
    "return a number"
)


@dataclass(frozen=True)
class RewardProblem:
    """An error of a reward function, in one line. completion_index: 0 to N - 1; None = not about one completion."""

    function: str
    completion_index: int | None
    error: str


@dataclass(frozen=True)
class Scores:
    """The scores that F reward functions gave N completions.

    rewards_NF  float64, NaN where a function gave no finite number
    total_N     float64, weighted sum over the functions; NaN where one with a weight other than 0 gave none
    seconds_F   float64, wall time of each function
    """

    rewards_NF: np.ndarray
    total_N: np.ndarray
    seconds_F: np.ndarray
    problems: tuple[RewardProblem, ...]


def score_completions(
    rewards: Sequence[Reward], weights: Sequence[float] | None, batch: CompletionBatch, *, timeout: float
) -> Generator[Progress, None, Scores]:
    """Score a batch: `scores = yield from score_completions(...)`.

    Raises ConfigError at once, before anything is called, if a function needs a missing parameter or the weights do not
    fit (None = 1 for each). The generator then calls one function after another and yields its progress, about every
    0.05 s while an asynchronous one is awaited. Nothing that a function raises or returns is raised, except interrupts
    (any BaseException that is not an Exception).

    timeout  seconds for each function. An asynchronous one is then cancelled; the numbers of a synchronous one count.

    A function for all completions that raises, or returns anything but one value for each, is called again with one
    completion at a time, to name the completion at fault and use the numbers of the others.
    """
    check_rewards(rewards, weights, batch.columns)
    return _score(rewards, np.ones(len(rewards)) if weights is None else np.array(weights, float), batch, timeout)


def _score(
    rewards: Sequence[Reward], weights_F: np.ndarray, batch: CompletionBatch, timeout: float
) -> Generator[Progress, None, Scores]:
    count = len(batch.completions)
    rewards_NF, seconds_F = np.full((count, len(rewards)), math.nan), np.zeros(len(rewards))
    problems: list[RewardProblem] = []
    for f, reward in enumerate(rewards):
        if not count:
            break
        yield Progress(reward.name, 0, count)
        started = time.monotonic()
        reading = yield from _read(reward, batch, timeout)
        seconds_F[f] = time.monotonic() - started
        rewards_NF[:, f] = reading.values_N
        if seconds_F[f] > timeout and not reward.is_async:
            reading.remarks.append(f"it took {seconds_F[f]:.1f} s, reward_timeout is {timeout:g} s; its numbers count")
        problems += _problems(reward, reading, batch)
        yield Progress(reward.name, count, count)
    counted_F = weights_F != 0
    total_N = (rewards_NF[:, counted_F] * weights_F[counted_F]).sum(axis=1)
    return Scores(rewards_NF, total_N, seconds_F, tuple(problems))


class _Unusable(Exception):
    """Why there is no number, as the end of a sentence."""


class _WrongShape(_Unusable):
    """Not a list with one value for each completion."""


@dataclass
class _Reading:
    """The numbers of one function; why some are missing, by completion; and further remarks."""

    values_N: np.ndarray
    failures: dict[int, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def _read(reward: Reward, batch: CompletionBatch, timeout: float) -> Generator[Progress, None, _Reading]:
    count, deadline = len(batch.completions), time.monotonic() + timeout
    first_deadline = deadline if reward.is_async else math.inf
    reading = _Reading(np.full(count, math.nan))
    if reward.scores_one:
        calls = [reward.arguments_for_one(batch, k) for k in range(count)]
        outcomes = yield from call_reward(reward, calls, first_deadline, count)
        for k, outcome in enumerate(outcomes):
            try:
                _take(reading, k, _value(outcome, reward, timeout), reward)
            except _Unusable as reason:
                reading.failures[k] = str(reason)
        return reading
    outcomes = yield from call_reward(reward, [reward.arguments(batch)], first_deadline, count)
    try:
        values = _list(_value(outcomes[0], reward, timeout), count)
    except _Unusable as reason:
        if time.monotonic() >= deadline:
            reading.remarks.append(str(reason))
        elif count > 1:
            yield from _read_again(reward, batch, reading, reason, deadline, timeout)
        elif isinstance(reason, _WrongShape):
            reading.remarks.append(f"{reason}. {_RIGHT_SHAPE}")
        else:
            reading.failures[0] = str(reason)
        return reading
    for k, value in enumerate(values):
        _take(reading, k, value, reward)
    return reading


def _read_again(
    reward: Reward, batch: CompletionBatch, reading: _Reading, reason: _Unusable, deadline: float, timeout: float
) -> Generator[Progress, None, None]:
    """Call for one completion at a time, after `reason` prevented a call for all at once."""
    count = len(batch.completions)
    calls = [reward.arguments(batch.only(k)) for k in range(count)]
    outcomes = yield from call_reward(reward, calls, deadline, count)
    misshapen: list[_WrongShape] = []
    for k, outcome in enumerate(outcomes):
        try:
            _take(reading, k, _list(_value(outcome, reward, timeout), 1)[0], reward)
        except _Unusable as single_reason:
            reading.failures[k] = str(single_reason)
            misshapen += [single_reason] if isinstance(single_reason, _WrongShape) else []
    if None in outcomes:
        reading.remarks.append(str(reason))
    if len(misshapen) == count:
        reading.failures.clear()
        reading.remarks.append(f"{reason}, and {misshapen[0]}. {_RIGHT_SHAPE}")
    elif not reading.failures:
        at_once = "" if isinstance(reason, _WrongShape) else f" for {count} completions at once"
        reading.remarks.append(f"{reason}{at_once}; called for one at a time it gave numbers")


def _value(outcome: Outcome | None, reward: Reward, timeout: float) -> Any:
    if outcome is None:
        raise _Unusable(f"no number within reward_timeout={timeout:g} s")
    if outcome.error is not None:
        raise _Unusable(describe_error(outcome.error, reward.function))
    if inspect.iscoroutine(outcome.value):
        outcome.value.close()
        raise _Unusable("it returned a coroutine. Define it with `async def`")
    return _plain(outcome.value, reward)


def _plain(value: Any, reward: Reward) -> Any:
    """Arrays, series and their scalars (numpy, pandas, mlx) as lists and numbers, without importing those libraries."""
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except Exception as error:
        raise _Unusable(describe_error(error, reward.function)) from None


def _list(value: Any, count: int) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise _WrongShape(f"it returned {_shown(value)} for {_completions(count)}")
    if len(value) != count:
        raise _WrongShape(f"it returned {len(value)} value{'s' * (len(value) != 1)} for {_completions(count)}")
    return value


def _completions(count: int) -> str:
    return f"{count} completion{'s' * (count != 1)}"


def _take(reading: _Reading, k: int, value: Any, reward: Reward) -> None:
    try:
        reading.values_N[k] = _number(_plain(value, reward))
    except _Unusable as reason:
        reading.failures[k] = str(reason)


def _number(value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise _Unusable(f"it returned {_shown(value)}, not a number")
    try:
        number = float(value)
    except Exception:
        number = math.inf
    if not math.isfinite(number):
        raise _Unusable(f"it returned {_shown(value)}, which is not finite")
    return number


def _shown(value: Any) -> str:
    if value is None or isinstance(value, numbers.Real):
        return str(value)
    if isinstance(value, str):
        return f"the text {json.dumps(_excerpt(value), ensure_ascii=False)}"
    return f"a {type(value).__name__}"


def _excerpt(text: str) -> str:
    return shortened(" ".join(text.split()), _EXCERPT)


def _problems(reward: Reward, reading: _Reading, batch: CompletionBatch) -> list[RewardProblem]:
    problems = [
        RewardProblem(reward.name, None, f"{reward.word} {reward.name}: {remark}.") for remark in reading.remarks
    ]
    for k in list(reading.failures)[:PROBLEMS_SPELLED_OUT]:
        error = f"{reward.word} {reward.name}: {_named_completion(batch, k)}: {reading.failures[k]}."
        problems.append(RewardProblem(reward.name, k, error))
    more = len(reading.failures) - PROBLEMS_SPELLED_OUT
    if more > 0:
        problems.append(
            RewardProblem(
                reward.name, None, f"{reward.word} {reward.name}: {_completions(more)} more without a number."
            )
        )
    return problems


def _named_completion(batch: CompletionBatch, k: int) -> str:
    """`completion 3 of row 17 ("The answer is…")`; both counted from 0."""
    row = batch.rows[k]
    excerpt = json.dumps(_excerpt(batch.completions[k]), ensure_ascii=False)
    return f"completion {list(batch.rows[:k]).count(row)} of row {row} ({excerpt})"
