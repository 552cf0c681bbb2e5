"""A progress line in a cell, for a run whose panel is in another cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_nb.events import Event, Progress, RunState, StateChanged
from mlx_nb.notebook.text_output import Line
from mlx_nb.view import event_text

if TYPE_CHECKING:
    from mlx_nb.run.run import Run


def how_far(run: Run, activity: str = "") -> str:
    """`update 12 of 60  ·  loss 1.23  ...` with the current activity; only the activity while the run loads."""
    if not run.prepared:
        return activity or "loading model and rows"
    return "  ·  ".join(filter(None, [event_text.progress_line(run.history, run.trainer.iters), activity]))


class ProgressLine:
    """Follows `run` until `end`, or until its background training pauses or ends."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._in_background = run.background.active
        self._line = Line(f"{run.name}  ·  {how_far(run)}")
        run.listen(self._on_event)

    def _on_event(self, event: Event) -> None:
        if self._in_background and isinstance(event, StateChanged) and event.state != RunState.RUNNING:
            ended = f"{self._run.name} {event_text.STATES[self._run.state]} at update {event.step}"
            self.end(f"{ended}  ·  {how_far(self._run)}" if self._run.prepared else ended)
        elif self._line.is_due:
            activity = event_text.progress_words(event) if isinstance(event, Progress) else ""
            self._line.put(f"{self._run.name}  ·  {how_far(self._run, activity)}")

    def end(self, words: str) -> None:
        """Show the final text, and stop following the run."""
        self._run.unlisten(self._on_event)
        self._line.put(words)
