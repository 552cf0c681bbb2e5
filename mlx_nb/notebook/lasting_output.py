"""What stays of a background run in its cell: outputs made with the cell and filled in when the run stands still.

A saved, reopened, exported or untrusted notebook has no widgets; it shows these.
"""

from __future__ import annotations

import html
import sys
from typing import Any

from mlx_nb.events import Event, RunFailed, RunStarted, RunState, StateChanged
from mlx_nb.run.run import Run
from mlx_nb.view import event_text
from mlx_nb.view.reports.completions import last_rollout_html
from mlx_nb.view.theme import ORANGE, WRAP, tint


class Outcome:
    """Summary and figure of one run, below its panel. Filled in whenever the run stops moving.

    What there is to say about model and rows, such as which rows are left out, is there from the first update on.
    """

    def __init__(self, run: Run) -> None:
        from IPython.display import display

        self._run = run
        self._error = ""
        self._waiting = f"{run.name}: the result is written here when the run pauses or ends."
        self._summary: Any = display({"text/plain": self._waiting}, raw=True, display_id=True)
        self._figure: Any = display({"text/plain": ""}, raw=True, display_id=True)
        run.listen(self._on_event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, RunFailed):
            self._error = event.error
        if isinstance(event, RunStarted) and event.notes and self._waiting:
            self._put(f"<div>{html.escape(self._waiting)}</div>", self._waiting)
        if isinstance(event, StateChanged):
            if event.state == RunState.RUNNING:
                self._error = ""
            elif len(self._run.history) or self._error:
                self.publish()

    def close(self) -> None:
        """Leave the outputs as they are, or with how it ended where the run was let go."""
        self._run.unlisten(self._on_event)
        if self._run.let_go:
            self._error = self._run.let_go
            self.publish()

    def publish(self) -> None:
        """Write the run as it is now. A display that fails is given up; the run does not notice."""
        run, history = self._run, self._run.history
        title = f"{run.name}: {run.state} after update {run.step_count}"
        rich, plain = event_text.summary_html(history, title), event_text.summary_text(history, title)
        rich += last_rollout_html(history)
        if self._error:
            style = f"border-left:3px solid {tint(ORANGE, 1)};padding:0 0 0 10px;margin:4px 0;{WRAP}"
            rich += f'<div style="{style}">{html.escape(self._error)}</div>'
            plain += f"\n{self._error}"
        self._put(rich, plain)
        self._waiting = ""
        try:
            if len(history) > 1:
                self._figure.update(run.plot()._repr_mimebundle_(), raw=True)
        except Exception as error:
            self._say_unshown(error)

    def _put(self, rich: str, plain: str) -> None:
        """Show `rich` (HTML) or `plain`, and below it the remarks of the run so far, each once."""
        remarks = dict.fromkeys(remark for event in self._run.history.events for remark in event_text.remarks(event))
        style = f"opacity:0.8;margin:2px 0 0 0;{WRAP}"
        rich += "".join(f'<div style="{style}">{html.escape(remark)}</div>' for remark in remarks)
        try:
            self._summary.update({"text/html": rich, "text/plain": "\n".join([plain, *remarks])}, raw=True)
        except Exception as error:
            self._say_unshown(error)

    @staticmethod
    def _say_unshown(error: Exception) -> None:
        print(f"the result could not be shown ({error}); the run is not affected.", file=sys.stderr)
