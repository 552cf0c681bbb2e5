"""The one place where an interrupt takes effect at once: user code, which nothing else could end."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from mlx_nb.process import exits

STRIKES = 3  # interrupts that user code may catch; the next one ends the process
SECONDS_TO_END = 0.2  # time for interrupted code to return, or to have caught the interrupt


class Interruptible:
    """A context for user code, and the means to interrupt it from a signal handler.

    Everywhere else an interrupt is a request, so that no code of ours stops between two lines that belong together.
    """

    def __init__(self) -> None:
        self._thread: int | None = None  # the thread that runs it
        self._strikes = 0
        self._struck_at = 0.0

    @property
    def inside(self) -> bool:
        """Whether this thread is inside user code."""
        return self._thread == threading.get_ident()

    def __enter__(self) -> None:
        self._thread, self._strikes = threading.get_ident(), 0

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread = None

    @property
    def stuck(self) -> bool:
        """Whether such code is still running although it was interrupted: it catches every exception."""
        there = self._thread is not None and self._strikes > 0
        return there and time.monotonic() - self._struck_at > SECONDS_TO_END

    def strike(self, error: BaseException) -> None:
        """Raise `error` if this thread is inside user code. Code on another thread cannot be interrupted.

        If the code has caught that too often, the runs are saved and the process ends.
        """
        if not self.inside or (self._strikes and not self.stuck):
            return
        if self._strikes == STRIKES:
            exits.end_stuck()
        self._strikes, self._struck_at = self._strikes + 1, time.monotonic()
        if self._strikes == STRIKES:
            print(
                "A user-defined function catches every interrupt (`except:` or `except BaseException`), so nothing can "
                "end it. One more interrupt saves what was done until the last update and ends this process.",
                file=sys.stderr,
            )
        raise error
