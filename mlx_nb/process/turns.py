"""One thread at a time computes with a model: the one that trains, and in between any other that asks it something."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PAUSE = 0.0005  # seconds in which a thread that waits takes its turn
LONGEST_PAUSE = 0.1  # seconds for which the one that trains waits for others at most: none can hold it up for ever


class Turns:
    """The turns of one model. A thread may take a turn inside its own."""

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

    def give_way(self) -> None:
        """Between two turns of a thread that takes one after the other: let those that wait have theirs.

        A lock alone would be taken again by the thread that has just released it. This thread waits for nobody: where
        it is among those that do, an interrupt broke off a turn that it was about to take.
        """
        me, until = {threading.get_ident()}, time.monotonic() + LONGEST_PAUSE
        while self._waiting - me and time.monotonic() < until:
            time.sleep(PAUSE)
