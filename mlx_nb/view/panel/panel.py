"""The panel of one run: everything one wants to touch while it trains, under the cell. It asks; it never trains.

A click may arrive on another thread than the kernel's, and mlx belongs to that one: a callback only puts what is to be
done on the kernel's loop, where it happens between two steps.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets

from mlx_nb.config.methods import method_named
from mlx_nb.errors import CommandError, MlxNbError
from mlx_nb.events import (
    CheckpointSaved,
    Evaluate,
    Event,
    Pause,
    Progress,
    Request,
    RequestRefused,
    Rewind,
    Rewound,
    RunState,
    Save,
    SettingChanged,
    Skip,
    StepCompleted,
    Stop,
)
from mlx_nb.view.closing import close_widgets
from mlx_nb.view.curves.curves import Curves
from mlx_nb.view.panel.completions import CompletionsTab
from mlx_nb.view.panel.head import activity_text, head_html, progress_html
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.tabs import CheckpointsTab, LogTab, RowsTab, SamplesTab, SettingsTab, button, line, note_html

SECONDS_BETWEEN_REFRESHES = 0.4
SECONDS_TO_OPEN = 10.0  # for a browser to say that it shows a new panel
MOVABLE = ("built", "paused", "failed")


class Panel:
    """Widgets that show and steer one run. Displays as `widget`; where there are none, as the run's status.

    Any number may show the same run. It listens to the run's events, redraws at most a few times a second, only the
    page that is on show, and only while somebody has the panel open. `close` ends that. A panel does not keep its run:
    it closes when nobody else refers to that any more.
    """

    def __init__(self, run: RunHandle, *, device: str, warning: str | None = None) -> None:
        self._run = weakref.ref(run, lambda _: self._close_later())
        self._name = run.name
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._progress: Progress | None = None
        self._drawn_at = 0.0
        self._device, self._warning = device, warning
        self._build()
        run.listen(self._on_event)
        self.refresh()

    @property
    def run(self) -> Any:
        """The run. Raises CommandError when it is gone."""
        run = self._run()
        if run is None:
            raise CommandError(self._gone())
        return run

    def _gone(self) -> str:
        return (
            f"{self._name} is gone: nobody refers to it any more. Keep a run in a variable, as in `run = Run(...)`; "
            "`Run.resume` brings back one that was trained."
        )

    def _build(self) -> None:
        later, request, run = self._later, self._request, weakref.proxy(self.run)
        self.head, self.progress, self.note = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.run_button = button("▶ Run", "train to the end", "primary")
        self.pause = button("❚❚ Pause", "stop after this update; nothing is lost")
        self.step = button("Step", "exactly one update")
        self.step_10 = button("Step 10", "exactly ten updates")
        self.stop = button("■ Stop", "end the run after this update and save the adapter")
        self.save = button("Save", "write the adapter now")
        self.evaluate = button("Evaluate", "loss on the validation rows, now")
        self.back = widgets.BoundedIntText(
            value=10, min=1, max=10**9, layout={"width": "4.5em"}, tooltip="updates to go back"
        )
        self.rewind = button("⟲ Rewind", "go back by so many updates; the branch that is left stays visible")
        self.skip = button("Skip batch", "leave out the batch that the last message is about")
        self.run_button.on_click(lambda _: later(lambda: self._start(None)))
        self.step.on_click(lambda _: later(lambda: self._start(1)))
        self.step_10.on_click(lambda _: later(lambda: self._start(10)))
        # A pause is only noted and so may be asked from any thread at once.
        self.pause.on_click(lambda _: self.run.request(Pause()))
        for one, wish in ((self.stop, Stop()), (self.save, Save()), (self.evaluate, Evaluate()), (self.skip, Skip())):
            one.on_click(lambda _, wish=wish: later(lambda: request(wish)))
        self.rewind.on_click(lambda _: later(lambda: request(Rewind(max(0, self.run.step_count - self.back.value)))))
        method = method_named(self.run.config.method)
        self.curves = Curves(method.metrics)
        if method.kind.sampled:
            self.curves.group = "reward"  # the loss of what the model wrote stays near 0
        self.rows = RowsTab(run, later)
        self.samples = SamplesTab(run, later, self._ask, request)
        self.settings = SettingsTab(run, later, self.refresh)
        self.checkpoints = CheckpointsTab(run, later, request)
        self.log = LogTab()
        for event in self.run.history.events:
            self.log.add(event)
        self.curves.on_select(lambda step: later(lambda: self._open_rows(step)))
        self.completions = CompletionsTab(run, later) if method.kind.sampled else None
        self._pages: dict[str, Any] = {
            "Rows": self.rows,
            **({"Completions": self.completions} if self.completions else {}),
            "Samples": self.samples,
            "Settings": self.settings,
            "Checkpoints": self.checkpoints,
            "Log": self.log,
        }
        pages = [widgets.VBox([self.curves]), *(page.widget for page in self._pages.values())]
        for page in pages:
            page.layout.width = "100%"
        # Buttons and not a Tab: they can be reached with the keyboard, and wrap in a narrow cell.
        self.tabs = widgets.ToggleButtons(options=["Curves", *self._pages], style={"button_width": "auto"})
        self.page = widgets.Stack(pages, selected_index=0, layout={"border_top": "1px solid rgba(128,128,128,.4)"})
        self.tabs.observe(lambda _: later(self._turn), "index")
        buttons = (self.run_button, self.pause, self.step, self.step_10, self.stop, self.save, self.evaluate)
        self.widget = widgets.VBox(
            [
                self.head,
                self.progress,
                line(*buttons, self.rewind, self.back, self.skip),
                self.note,
                self.tabs,
                self.page,
            ]
        )
        # Counted by the browser, so that nothing is drawn for a panel that nobody has open.
        self.widget._view_count = 0
        self.widget.observe(lambda _: later(self.refresh), "_view_count")
        self._built_at = time.monotonic()

    # What a person does

    def _later(self, act: Callable[[], None]) -> None:
        """Do it on the kernel's thread, while the run is there; what goes wrong is shown, and touches nothing else."""

        def guarded() -> None:
            run = self._run()  # held until it is done
            if run is None:
                return
            try:
                act()
            except MlxNbError as error:
                self._say(str(error))

        if self._loop is None or self._loop.is_closed():
            guarded()
        else:
            self._loop.call_soon_threadsafe(guarded)

    def _start(self, updates: int | None) -> None:
        self._say("")
        self.run.start(updates)
        self._progress = None if self.run.prepared else Progress(0, "loading model and rows", 0, 1)
        self.refresh()

    def _request(self, request: Request) -> None:
        """Have something done at the next boundary; when the run does not move, now."""
        self._say("")
        self.run.request(request)
        self._applied()

    def _ask(self, question: Any) -> None:
        self.run.ask(question)
        self._applied()

    def _applied(self) -> None:
        """A run that stands still is woken to read its requests, without an update."""
        if self.run.state != RunState.RUNNING and (self.run.prepared or self.run.state == RunState.BUILT):
            self.run.start(0)

    def _turn(self) -> None:
        self.page.selected_index = self.tabs.index
        self.refresh()

    def _open_rows(self, step: int) -> None:
        self.tabs.value = "Rows"
        self.rows.select(step)

    def _say(self, text: str) -> None:
        self.note.value = note_html(text) if text else ""

    # What is shown

    def _on_event(self, event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.kind == "auto":
            return  # many, and the page of checkpoints lists them
        self._progress = event if isinstance(event, Progress) else None
        self.log.add(event)
        if isinstance(event, RequestRefused):
            self._say(event.error)
        if isinstance(event, SettingChanged):
            self.settings.refresh()
        if isinstance(event, Rewound):
            self.rows.select(None)
        quick = isinstance(event, StepCompleted | Progress)
        if not quick or (self._watched and time.monotonic() - self._drawn_at >= SECONDS_BETWEEN_REFRESHES):
            self.refresh()

    @property
    def is_open(self) -> bool:
        """Whether a browser shows it."""
        return bool(self.widget._view_count)

    @property
    def _watched(self) -> bool:
        """Whether a browser shows the panel. While a cell blocks the kernel, nobody can say."""
        new = time.monotonic() - self._built_at < SECONDS_TO_OPEN
        return new or self.run.state != RunState.RUNNING or self.is_open

    def refresh(self) -> None:
        """Draw what is on show as the run is now."""
        run, history = self.run, self.run.history
        iters = run.trainer.iters if run.prepared else run.config.iters
        state = run.state
        self.head.value = head_html(run, self._device, self._warning)
        tokens, seconds = (run.trainer.state.tokens, run.trainer.state.seconds) if run.prepared else (0, 0.0)
        self.progress.value = progress_html(history, iters, activity_text(self._progress), tokens, seconds)
        running, over = state == "running", state in ("finished", "stopped")
        can_move = not running and not run.over
        for one, useful in (
            (self.run_button, can_move),
            (self.step, can_move),
            (self.step_10, can_move),
            (self.pause, running),
            (self.stop, running or (state in MOVABLE and run.prepared)),
            (self.save, run.prepared),
            (self.evaluate, run.prepared and run.trainer.validates),
            (self.rewind, run.step_count > 0),
            (self.back, run.step_count > 0),
        ):
            one.disabled = not useful
        self.skip.layout.display = "" if state == "failed" and not over else "none"
        if self.tabs.value in self._pages:
            self._pages[self.tabs.value].refresh()
        else:
            self.curves.refresh(history, iters or max(1, run.step_count))
        self._drawn_at = time.monotonic()

    def close(self) -> None:
        """Take the widgets away and listen no more."""
        if (run := self._run()) is not None:
            run.unlisten(self._on_event)
        close_widgets(self.widget)

    def _close_later(self) -> None:
        """The run is gone, which may be noticed on any thread."""
        if self._loop is None or self._loop.is_closed():
            self.close()
        else:
            self._loop.call_soon_threadsafe(self.close)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if (run := self._run()) is None:
            return {"text/plain": self._gone()}
        bundle = self.widget._repr_mimebundle_(include=include, exclude=exclude)
        return {**bundle, "text/plain": run.status()}
