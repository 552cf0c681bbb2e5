"""Defers work to the next iteration of the kernel's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs on this thread; None outside a kernel."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def call_in_loop(loop: asyncio.AbstractEventLoop | None, act: Callable[[], object]) -> None:
    """Call `act` in the next iteration of `loop`, from any thread; call it now if there is no loop.

    Finalizers need this: one may run in the middle of any line, such as one that sends a message, and Python drops a
    KeyboardInterrupt that is raised in it.
    """
    if loop is None or loop.is_closed():
        act()
    else:
        loop.call_soon_threadsafe(act)
