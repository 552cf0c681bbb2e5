"""What stays of a background run in its cell: outputs made with the cell and filled in when the run stands still.

A saved, reopened, exported or untrusted notebook has no widgets; it shows these.
"""

from __future__ import annotations

import asyncio
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
from mlx_nb.view.panel.still import lasting_html
from mlx_nb.view.reports.completions import last_rollout_html
from mlx_nb.view.theme import ORANGE, WRAP, tint

# Events after which a run that moves in a cell stands still, or is another than it was.
STANDSTILL = (RunPaused, RunFinished, RunFailed, Rewound, SettingChanged, EvaluationCompleted)
_WHERE = {RunState.RUNNING: "running; as it was after", RunState.BUILT: "not started yet, at"}


def _page() -> str | None:
    """The page that the request which is executed came from; None where nothing says it."""
    return (request_header() or {}).get("session")


class Outcome:
    """Summary and figure of one run, below its panel. Filled in whenever the run stops moving, however it was moved.

    What there is to say about model and rows, such as which rows are left out, is there from the first update on.
    """

    def __init__(self, run: Run) -> None:
        from IPython.display import display

        self._run: Run | None = run
        self._kept: RunFolder | None = None  # of a run that was let go
        self._remarks: list[str] = []
        self._result: tuple[str, str] = ("", "")
        self._error = ""
        self._shown_to = _page()
        self._settling = False
        self._bundles: dict[int, tuple[Any, dict[str, Any]]] = {}  # what each output shows, once it is no promise
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._waiting = f"{run.name}: the result is written here when the run pauses or ends."
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
                    self.publish()  # as of now, so that it is no claim about later
            else:
                self.publish()
        elif not self._moving and not isinstance(event, Progress | CheckpointSaved):
            self._settle(event)

    @property
    def _moving(self) -> bool:
        return self._run is not None and self._run.background.active

    def _settle(self, event: Event) -> None:
        """The run moves, or is changed, in a cell: publish once that has ended; without a loop, where it stands."""
        if self._loop is not None and self._loop.is_running():
            if not self._settling:
                self._settling = True
                self._loop.call_soon_threadsafe(self._settled)
        elif isinstance(event, STANDSTILL):
            self.publish()

    def _settled(self) -> None:
        self._settling = False
        if not self._moving:
            self.publish()

    def close(self) -> None:
        """Leave the outputs as they are, or with where it is kept where the run was let go, and no promise of more.

        The run is held no more.
        """
        run = self._run
        if run is None:
            return
        run.unlisten(self._on_event)
        if run.let_go:
            self._kept = run.home
        if run.let_go or self._waiting:
            self.publish()
        self._run = None

    def say_where(self) -> None:
        """Of a run that was let go, write where it is kept by now."""
        if self._kept is not None:
            self._show_result()

    def show_again(self) -> None:
        """In the cell that is executed, where the page is another one than what was shown before went to.

        A page that was closed meanwhile has got nothing of it, and no kernel can write into the notebook it had saved.
        Both outputs have one name from then on, so that what is published later goes to both.
        """
        page = _page()
        if page == self._shown_to or page is None or not self._bundles:
            return
        self._shown_to = page
        for handle, bundle in self._bundles.values():
            handle.display(bundle, raw=True)

    def publish(self) -> None:
        """Write the run as it is now. A display that fails is given up; the run does not notice."""
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
        """The result, with the error that ended the run and where it is kept, each where there is one."""
        rich, plain = self._result
        for text in filter(None, (self._error, self._kept.lost if self._kept is not None else "")):
            style = f"border-left:3px solid {tint(ORANGE, 1)};padding:0 0 0 10px;margin:4px 0;{WRAP}"
            rich += f'<div style="{style}">{html.escape(text)}</div>'
            plain += f"\n{text}"
        self._put(rich, plain)

    def _put(self, rich: str, plain: str) -> None:
        """Show `rich` (HTML) or `plain`, and below it the remarks of the run so far, each once."""
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
