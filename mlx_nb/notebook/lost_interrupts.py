"""Notices an interrupt that Python drops: what is raised in a finalizer, which may run at any line, goes nowhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class NotingHandler:
    """Records that a SIGINT arrived, and passes it to the previous handler.

    in_place_of  the previous handler, once the context has ended: code that started inside it restores that one.
    """

    def __init__(self, before: Callable[[int, FrameType | None], Any]) -> None:
        self._before = before
        self.in_place_of: Callable[[int, FrameType | None], Any] | None = None
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.came = True
        if self.in_place_of is not None:  # another interrupt came in the middle of `end`
            self.end()
        self._before(number, frame)

    def end(self) -> None:
        """End the context: restore the previous handler, now or once a handler installed after this one has ended."""
        self.in_place_of = self._before
        in_force = signal.getsignal(signal.SIGINT) is self
        if in_force:
            signal.signal(signal.SIGINT, self._before)


_current: NotingHandler | None = None


@contextmanager
def interrupts_noted() -> Iterator[None]:
    """A context in which `raise_lost_interrupt` knows of each SIGINT. Nothing else changes."""
    global _current
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _current = _current, NotingHandler(before)
    signal.signal(signal.SIGINT, _current)
    try:
        yield
    finally:
        ended, _current = _current, outer  # first, because another interrupt may break off the rest
        ended.end()


def raise_lost_interrupt() -> None:
    """Raise KeyboardInterrupt if an interrupt came in the current `interrupts_noted` and did not end it."""
    if _current is not None and _current.came:
        raise KeyboardInterrupt
