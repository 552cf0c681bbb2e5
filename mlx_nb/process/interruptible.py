"""The one place where an interrupt strikes at once: code of a person's own, which nothing else could end."""

from __future__ import annotations

import threading
from types import TracebackType


class Interruptible:
    """A context for such code, and the way to break it off from a signal handler.

    Everywhere else an interrupt is a request, so that nothing of ours ends between two lines that belong together.
    """

    def __init__(self) -> None:
        self._thread: int | None = None  # which runs it

    @property
    def inside(self) -> bool:
        """Whether this thread is in such code."""
        return self._thread == threading.get_ident()

    def __enter__(self) -> None:
        self._thread = threading.get_ident()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread = None

    def strike(self, error: BaseException) -> None:
        """Raise `error`, once, if this thread is in such code. Code of another thread cannot be broken off."""
        if self.inside:
            self._thread = None
            raise error
