"""What stays of a background run in its cell: outputs made with the cell and filled in when the run stands still.

A saved, reopened, exported or untrusted notebook has no widgets; it shows these.
"""

from __future__ import annotations

import html
import sys
from typing import Any

from mlx_nb.events import Event, RunFailed, RunStarted, RunState, StateChanged
from mlx_nb.files.run_folder import RunFolder
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

        self._run: Run | None = run
        self._kept: RunFolder | None = None  # of a run that was let go
        self._remarks: list[str] = []
        self._result: tuple[str, str] = ("", "")
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
            elif self._error or (self._run is not None and len(self._run.history)):
                self.publish()

    def close(self) -> None:
        """Leave the outputs as they are, or with where it is kept where the run was let go; the run is held no more."""
        run = self._run
        if run is None:
            return
        run.unlisten(self._on_event)
        if run.let_go:
            self._kept = run.home
            self.publish()
        self._run = None

    def say_where(self) -> None:
        """Of a run that was let go, write where it is kept by now."""
        if self._kept is not None:
            self._show_result()

    def publish(self) -> None:
        """Write the run as it is now. A display that fails is given up; the run does not notice."""
        run = self._run
        if run is None:
            return
        history = run.history
        title = f"{run.name}: {run.state} after update {run.step_count}"
        self._result = (
            event_text.summary_html(history, title) + last_rollout_html(history),
            event_text.summary_text(history, title),
        )
        self._show_result()
        self._waiting = ""
        try:
            if len(history) > 1:
                self._figure.update(run.plot()._repr_mimebundle_(), raw=True)
        except Exception as error:
            self._say_unshown(error)

    def _show_result(self) -> None:
        """The result, with the error that ended the run and where it is kept, each where there is one."""
        rich, plain = self._result
        for said in filter(None, (self._error, self._kept.lost if self._kept is not None else "")):
            style = f"border-left:3px solid {tint(ORANGE, 1)};padding:0 0 0 10px;margin:4px 0;{WRAP}"
            rich += f'<div style="{style}">{html.escape(said)}</div>'
            plain += f"\n{said}"
        self._put(rich, plain)

    def _put(self, rich: str, plain: str) -> None:
        """Show `rich` (HTML) or `plain`, and below it the remarks of the run so far, each once."""
        if self._run is not None:
            events = self._run.history.events
            self._remarks = list(dict.fromkeys(remark for event in events for remark in event_text.remarks(event)))
        style = f"opacity:0.8;margin:2px 0 0 0;{WRAP}"
        rich += "".join(f'<div style="{style}">{html.escape(remark)}</div>' for remark in self._remarks)
        try:
            self._summary.update({"text/html": rich, "text/plain": "\n".join([plain, *self._remarks])}, raw=True)
        except Exception as error:
            self._say_unshown(error)

    @staticmethod
    def _say_unshown(error: Exception) -> None:
        print(f"the result could not be shown ({error}); the run is not affected.", file=sys.stderr)
