"""The event loop of the kernel, for work that must not be done at the line where it becomes due."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs on this thread; None outside a kernel."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def in_a_turn_of(loop: asyncio.AbstractEventLoop | None, act: Callable[[], object]) -> None:
    """Do `act` in the next turn of `loop`, from any thread; now if there is no loop.

    For finalizers. One may run in the middle of any line, such as one that sends a message, and Python drops a
    KeyboardInterrupt that is raised in it.
    """
    if loop is None or loop.is_closed():
        act()
    else:
        loop.call_soon_threadsafe(act)
