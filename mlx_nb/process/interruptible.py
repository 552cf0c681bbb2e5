"""The one place where an interrupt strikes at once: code of a person's own, which nothing else could end."""

from __future__ import annotations

from types import TracebackType


class Interruptible:
    """A context for such code, and the way to break it off from a signal handler.

    Everywhere else an interrupt is a request, so that nothing of ours ends between two lines that belong together.
    """

    def __init__(self) -> None:
        self.inside = False

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.inside = False

    def strike(self, error: BaseException) -> None:
        """Raise `error`, once, if such code is running."""
        if self.inside:
            self.inside = False
            raise error
