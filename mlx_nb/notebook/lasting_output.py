"""The lasting output of a run in its cell: a summary and a figure, updated when the run pauses or ends.

A saved, reopened, exported or untrusted notebook has no widgets and shows these.
"""

from __future__ import annotations

import html
import sys
from typing import Any

from mlx_nb.events import (
    CheckpointSaved,
    EvaluationCompleted,
    Event,
    Progress,
    Rewound,
    RunFailed,
    RunFinished,
    RunPaused,
    RunStarted,
    RunState,
    SettingChanged,
    StateChanged,
)
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.notebook.front_end import request_header
from mlx_nb.run.run import Run
from mlx_nb.view import event_text
from mlx_nb.view.event_loop import running_loop
from mlx_nb.view.panel.static_view import lasting_html
from mlx_nb.view.reports.completions import last_rollout_html
from mlx_nb.view.theme import ORANGE, WRAP, tint

# Events after which a run that is trained in a cell has stopped or changed.
STANDSTILL = (RunPaused, RunFinished, RunFailed, Rewound, SettingChanged, EvaluationCompleted)
_WHERE = {RunState.RUNNING: "running; as of", RunState.BUILT: "not started yet, at"}


def _page() -> str | None:
    """The page that sent the current request, if known."""
    return (request_header() or {}).get("session")


class Outcome:
    """Summary and figure of one run, below its panel. Updated whenever the run pauses or ends.

    Notes about model and rows, such as rows that are left out, appear with the first update.
    """

    def __init__(self, run: Run) -> None:
        from IPython.display import display

        self._run: Run | None = run
        self._kept: RunFolder | None = None  # the folder of a released run
        self._remarks: list[str] = []
        self._result: tuple[str, str] = ("", "")
        self._error = ""
        self._shown_to = _page()
        self._settling = False
        self._bundles: dict[int, tuple[Any, dict[str, Any]]] = {}  # the current content of each output
        self._loop = running_loop()
        self._waiting = f"{run.name}: the result appears here when the run pauses or ends."
        waiting = {"text/html": lasting_html(html.escape(self._waiting)), "text/plain": self._waiting}
        self._summary: Any = display(waiting, raw=True, display_id=True)
        self._figure: Any = display({"text/plain": ""}, raw=True, display_id=True)
        run.listen(self._on_event)
        if len(run.history):
            self.publish()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, RunFailed):
            self._error = event.error
        if isinstance(event, RunStarted) and event.notes and self._waiting:
            self._put(f"<div>{html.escape(self._waiting)}</div>", self._waiting)
        if isinstance(event, StateChanged):
            if event.state == RunState.RUNNING:
                self._error = ""
                if self._run is not None and len(self._run.history):
                    self.publish()  # marked as of now, since it will be out of date soon
            else:
                self.publish()
        elif not self._in_background and not isinstance(event, Progress | CheckpointSaved):
            self._settle(event)

    @property
    def _in_background(self) -> bool:
        return self._run is not None and self._run.background.active

    def _settle(self, event: Event) -> None:
        """Publish once the cell that trains or changes the run has ended; without an event loop, when the run stops."""
        if self._loop is not None and self._loop.is_running():
            if not self._settling:
                self._settling = True
                self._loop.call_soon_threadsafe(self._settled)
        elif isinstance(event, STANDSTILL):
            self.publish()

    def _settled(self) -> None:
        self._settling = False
        if not self._in_background:
            self.publish()

    def close(self) -> None:
        """Stop following the run. The outputs stay; for a released run they also show where it is stored."""
        run = self._run
        if run is None:
            return
        run.unlisten(self._on_event)
        if run.let_go:
            self._kept = run.home
        if run.let_go or self._waiting:
            self.publish()
        self._run = None

    def show_location(self) -> None:
        """Show where a released run is stored now."""
        if self._kept is not None:
            self._show_result()

    def show_again(self) -> None:
        """Show the outputs again in the current cell, if it belongs to another page than before.

        A page that was closed meanwhile has missed the updates, and a kernel cannot write into its saved notebook.
        The old and the new outputs share a display id, so later updates go to both.
        """
        page = _page()
        if page == self._shown_to or page is None or not self._bundles:
            return
        self._shown_to = page
        for handle, bundle in self._bundles.values():
            handle.display(bundle, raw=True)

    def publish(self) -> None:
        """Show the current state of the run. Errors of the display do not affect the run."""
        run = self._run
        if run is None:
            return
        history = run.history
        title = f"{run.name}: {_WHERE.get(run.state, f'{run.state} after')} update {run.step_count}"
        self._result = (
            event_text.summary_html(history, title) + last_rollout_html(history),
            event_text.summary_text(history, title),
        )
        self._show_result()
        self._waiting = ""
        try:
            figure = run.plot()._repr_mimebundle_() if len(history) > 1 else {"text/plain": ""}
        except Exception as error:
            self._say_unshown(error)
        else:
            self._update(self._figure, figure)

    def _show_result(self) -> None:
        """Show the result, with the error that ended the run and the place where it is stored, if any."""
        rich, plain = self._result
        for text in filter(None, (self._error, self._kept.lost if self._kept is not None else "")):
            style = f"border-left:3px solid {tint(ORANGE, 1)};padding:0 0 0 10px;margin:4px 0;{WRAP}"
            rich += f'<div style="{style}">{html.escape(text)}</div>'
            plain += f"\n{text}"
        self._put(rich, plain)

    def _put(self, rich: str, plain: str) -> None:
        """Show `rich` (HTML) or `plain`, and below it each distinct remark of the run."""
        if self._run is not None:
            events = self._run.history.events
            self._remarks = list(dict.fromkeys(remark for event in events for remark in event_text.remarks(event)))
        style = f"opacity:0.8;margin:2px 0 0 0;{WRAP}"
        rich += "".join(f'<div style="{style}">{html.escape(remark)}</div>' for remark in self._remarks)
        self._update(self._summary, {"text/html": lasting_html(rich), "text/plain": "\n".join([plain, *self._remarks])})

    def _update(self, handle: Any, bundle: dict[str, Any]) -> None:
        self._bundles[id(handle)] = (handle, bundle)
        try:
            handle.update(bundle, raw=True)
        except Exception as error:
            self._say_unshown(error)

    @staticmethod
    def _say_unshown(error: Exception) -> None:
        print(f"the result could not be shown ({error}); the run is not affected.", file=sys.stderr)
