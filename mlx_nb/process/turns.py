"""One thread at a time works with a run: the one that trains it, and in between any other that asks something of it."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

PAUSE = 0.0005  # seconds in which a thread that waits takes its turn
LONGEST_PAUSE = 0.1  # seconds for which the one that trains waits for others at most: none can hold it up for ever

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Turns:
    """The turns of one run. A thread may take a turn inside its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: set[int] = set()  # threads, by number

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No other thread has a turn while inside."""
        me = threading.get_ident()
        try:
            self._waiting.add(me)
            with self._lock:  # which no interrupt leaves taken, as it could between taking it and a `try`
                self._waiting.discard(me)
                yield
        finally:
            self._waiting.discard(me)

    def take(self, seconds: float) -> bool:
        """Take a turn that ends with `give_back`, waiting for it at most so long. Returns whether it was taken."""
        self._waiting.add(threading.get_ident())
        try:
            return self._lock.acquire(timeout=seconds)
        finally:
            self._waiting.discard(threading.get_ident())

    def awaited_by(self, thread: int) -> bool:
        """Whether a thread waits for its turn."""
        return thread in self._waiting

    def give_back(self) -> None:
        """End a turn that was taken."""
        self._lock.release()

    def give_way(self) -> None:
        """Between two turns of a thread that takes one after the other: let those that wait have theirs.

        A lock alone would be taken again by the thread that has just released it. This thread waits for nobody: where
        it is among those that do, an interrupt broke off a turn that it was about to take.
        """
        me, until = {threading.get_ident()}, time.monotonic() + LONGEST_PAUSE
        while self._waiting - me and time.monotonic() < until:
            time.sleep(PAUSE)


class TakesTurns(Protocol):
    """What has turns."""

    turns: Turns


Owner = TypeVar("Owner", bound=TakesTurns)


def one_at_a_time(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """A method that has a turn: it reads or changes what an update changes, so it waits until one is done."""

    @functools.wraps(method)
    def in_turn(self: Owner, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with self.turns.turn():
            return method(self, *arguments, **options)

    return in_turn
