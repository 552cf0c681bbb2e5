"""A progress line in a cell, for a run whose panel is in another cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlx_nb.events import Event, Progress, RunState, StateChanged
from mlx_nb.notebook.text_output import SECONDS_BETWEEN_CHANGES, Line, has_rich_display
from mlx_nb.view import event_text

if TYPE_CHECKING:
    from mlx_nb.run.run import Run


def progress_summary(run: Run, activity: str = "") -> str:
    """`update 12 of 60  ·  loss 1.23  ...` with the current activity; only the activity while the run loads."""
    if not run.prepared:
        return activity or "loading model and rows"
    return "  ·  ".join(filter(None, [event_text.progress_line(run.history, run.trainer.iters), activity]))


class ProgressLine:
    """Follows `run` until `end`, or until its background training pauses or ends."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._in_background = run.background.active
        self._line = Line(f"{run.name}  ·  {progress_summary(run)}")
        run.listen(self._on_event)

    def _on_event(self, event: Event) -> None:
        if self._in_background and isinstance(event, StateChanged) and event.state != RunState.RUNNING:
            ended = f"{self._run.name} {event_text.STATES[self._run.state]} at update {event.step}"
            self.end(f"{ended}  ·  {progress_summary(self._run)}" if self._run.prepared else ended)
        elif self._line.is_due:
            activity = event_text.progress_words(event) if isinstance(event, Progress) else ""
            self._line.put(f"{self._run.name}  ·  {progress_summary(self._run, activity)}")

    def end(self, words: str) -> None:
        """Show the final text, and stop following the run."""
        self._run.unlisten(self._on_event)
        self._line.put(words)


@contextmanager
def shown_progress(run: Run) -> Iterator[None]:
    """A context that shows the progress of what the run does now: in the cell, or on a line of the terminal."""
    with progress_shown() as show:
        run.listen(show)
        try:
            yield
        finally:
            run.unlisten(show)


@contextmanager
def progress_shown() -> Iterator[Callable[[Event], None]]:
    """A context with a function that shows Progress, in the cell or on a line of the terminal, until its end."""
    line = Line("") if has_rich_display() else _TerminalLine()

    def show(event: Event) -> None:
        if isinstance(event, Progress) and line.is_due:
            line.put(event_text.progress_words(event))

    try:
        yield show
    finally:
        line.put("")


class _TerminalLine:
    """A line on stderr that is written over; nothing where that is not a terminal."""

    def __init__(self) -> None:
        self._shown_at = 0.0
        self._width = 0

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed to write it again."""
        return sys.stderr.isatty() and time.monotonic() - self._shown_at >= SECONDS_BETWEEN_CHANGES

    def put(self, text: str) -> None:
        """Replace the text; an empty one removes the line."""
        if sys.stderr.isatty() and (text or self._width):
            end = "" if text else "\r"
            print(f"\r{text:<{self._width}}", end=end, file=sys.stderr, flush=True)
            self._shown_at, self._width = time.monotonic(), len(text)
