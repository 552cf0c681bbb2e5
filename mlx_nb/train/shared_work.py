"""Work in pieces that several event loops share, so that it is done once however many loops come to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from mlx_nb.events import Event, Progress

SECONDS_BETWEEN_CHECKS = 0.001  # of a loop that waits for another thread


class Aborted(BaseException):
    """The current work is dropped as if it had not started. A BaseException, so that user code does not catch it."""


@dataclass(eq=False)
class _Work:
    """Work in pieces on one thread, and the number of loops that share it. `patience` is in seconds."""

    pieces: Generator[Event, None, Any]
    thread: int
    patience: float = 1.0
    loops: int = 0
    event: Event = Progress(0, "", 0, 0)
    advanced_at: float = field(default_factory=time.monotonic)

    def advance(self) -> None:
        """Do the next piece. Raises StopIteration with the result."""
        try:
            self.event = next(self.pieces)
        finally:
            self.advanced_at = time.monotonic()

    @property
    def stalled(self) -> bool:
        """Whether its thread has done nothing for longer than other threads wait."""
        return time.monotonic() - self.advanced_at > self.patience


class SharedWork:
    """The current work of one trainer, if there is any."""

    def __init__(self) -> None:
        self._current: _Work | None = None

    def drop(self) -> None:
        """Abort the current work in every loop that shares it."""
        self._current = None

    def share(self, begin: Callable[[], Generator[Event, None, Any]]) -> Generator[Event, None, Any]:
        """Join the current work, or begin new work, yielding its events. The generator's value is the result.

        Loops on the same thread continue the work together. Loops on other threads wait, because mlx arrays may belong
        to the thread that created them; if that thread stalls, they begin anew, and it has to wait instead. One loop
        gets the result. In the other loops, and in all after `drop`, Aborted is raised.
        """
        me = threading.get_ident()
        while (current := self._current) is not None and current.thread != me:
            if current.stalled:
                self._current = _Work(begin(), me, 2 * current.patience)
                break
            time.sleep(SECONDS_BETWEEN_CHECKS)
            yield current.event
            if self._current is not current:
                raise Aborted
        if self._current is None:
            self._current = _Work(begin(), me)
        mine = self._current
        mine.loops += 1
        try:
            while self._current is mine:
                try:
                    mine.advance()
                except BaseException:
                    self._current = None if self._current is mine else self._current
                    raise
                yield mine.event
            raise Aborted
        except StopIteration as ended:
            return ended.value
        finally:
            mine.loops -= 1
            if not mine.loops:
                mine.pieces.close()
                if self._current is mine:
                    self._current = None
