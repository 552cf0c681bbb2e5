"""One thread at a time computes with a model: the one that trains, and in between any other that asks it something."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PAUSE = 0.0005  # seconds in which a thread that waits takes its turn


class Turns:
    """The turns of one model. A thread may take a turn inside its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._counting = threading.Lock()
        self._waiting = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No other thread has a turn while inside."""
        with self._counting:
            self._waiting += 1
        try:
            self._lock.acquire()
        finally:
            with self._counting:
                self._waiting -= 1
        try:
            yield
        finally:
            self._lock.release()

    def give_way(self) -> None:
        """Between two turns of a thread that takes one after the other: let those that wait have theirs.

        A lock alone would be taken again by the thread that has just released it.
        """
        while self._waiting:
            time.sleep(PAUSE)
