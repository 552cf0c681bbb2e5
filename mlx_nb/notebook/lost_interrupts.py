"""Notices an interrupt that Python drops: what is raised in a finalizer, which may run at any line, goes nowhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = False  # whether an interrupt came in the current context


@contextmanager
def interrupts_noted() -> Iterator[None]:
    """A context in which `raise_lost_interrupt` knows of each SIGINT, which goes to the handler before it as well."""
    global _came
    before = signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        global _came
        _came = True
        before(number, frame)

    _came = False
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        _came = False
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, before)


def raise_lost_interrupt() -> None:
    """Raise KeyboardInterrupt if an interrupt came in the current `interrupts_noted` and did not end it."""
    if _came:
        raise KeyboardInterrupt
