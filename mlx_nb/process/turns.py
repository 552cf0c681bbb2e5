"""Turns: one thread at a time works with a run: the one that trains it or, in between, any other."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mlx_nb.process.thread_streams import end_streams_with_thread

PAUSE = 0.0005  # seconds in which a waiting thread takes its turn
LONGEST_PAUSE = 0.1  # most seconds that the training thread waits, so that nobody can block it for ever

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Turns:
    """The turns of one run; reentrant within a thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._waiting: set[int] = set()  # thread ids

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A context in which no other thread has a turn."""
        me = threading.get_ident()
        end_streams_with_thread()
        try:
            self._waiting.add(me)
            with self._lock:  # an interrupt cannot leave it locked, as it could between `acquire` and a `try`
                self._waiting.discard(me)
                yield
        finally:
            self._waiting.discard(me)

    def take(self, seconds: float) -> bool:
        """Take a turn, waiting at most `seconds`; end it with `give_back`. Returns whether it was taken."""
        self._waiting.add(threading.get_ident())
        end_streams_with_thread()
        try:
            return self._lock.acquire(timeout=seconds)
        finally:
            self._waiting.discard(threading.get_ident())

    def awaited_by(self, thread: int) -> bool:
        """Whether a thread waits for its turn."""
        return thread in self._waiting

    def give_back(self) -> None:
        """End a turn that was taken with `take`."""
        self._lock.release()

    def give_way(self) -> None:
        """Let waiting threads have their turn; called between two turns of a thread that takes one after another.

        With a lock alone, the thread that has just released it would get it again. A thread never waits for itself: if
        it is registered as waiting, an interrupt cut off a turn that it was about to take.
        """
        me, until = {threading.get_ident()}, time.monotonic() + LONGEST_PAUSE
        while self._waiting - me and time.monotonic() < until:
            time.sleep(PAUSE)


class TakesTurns(Protocol):
    """An object that has turns."""

    turns: Turns


Owner = TypeVar("Owner", bound=TakesTurns)


def one_at_a_time(
    method: Callable[Concatenate[Owner, Arguments], Result],
) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Decorate a method to run in a turn: it reads or changes what an update changes, so it waits until one is done."""

    @functools.wraps(method)
    def in_turn(self: Owner, /, *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with self.turns.turn():
            return method(self, *arguments, **options)

    return in_turn
