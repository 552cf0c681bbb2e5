"""The panel of one run: everything one wants to touch while it trains, under the cell. One widget; `page/` draws it.

What answers in the page (tabs, scales, lists) needs no kernel. A click may arrive on another thread than the kernel's,
and mlx belongs to that one: it is only put on the kernel's loop, where it happens between two steps.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from mlx_nb.config.methods import method_named
from mlx_nb.errors import CommandError, MlxNbError
from mlx_nb.events import (
    AdapterSaved,
    Cancel,
    CheckpointSaved,
    Event,
    Pause,
    Progress,
    RequestRefused,
    Rewound,
    RolloutCompleted,
    RunFailed,
    RunFinished,
    RunPaused,
    RunStarted,
    RunState,
    SampleGenerated,
    SettingChanged,
    StateChanged,
    StepCompleted,
)
from mlx_nb.view.closing import close_widgets
from mlx_nb.view.curves.curves import SeriesBuilder
from mlx_nb.view.event_text import describe, remarks
from mlx_nb.view.panel.changes import series_changes
from mlx_nb.view.panel.chat import Chat
from mlx_nb.view.panel.clicks import Clicks, Message, result_of, useful_clicks
from mlx_nb.view.panel.heartbeat import beat_for, no_beats_for
from mlx_nb.view.panel.looks import Looks
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.state import (
    Activity,
    checkpoints_of,
    head_of,
    progress_of,
    samples_of,
    settings_of,
)
from mlx_nb.view.panel.still import still_html
from mlx_nb.view.theme import one_line

SECONDS_BETWEEN_REFRESHES = 0.3
MOST_OF_THE_TIME = 0.01  # that refreshes may take
SECONDS_TO_OPEN = 10.0  # for a browser to say that it shows a new panel
LINES_OF_LOG = 200
KEPT = "a cell waits for it: interrupting the kernel pauses"
# One module for the browser, in the order in which its parts build on one another.
_PAGE = Path(__file__).with_name("page")
PARTS = ("dom.js", "store.js", "curves.js", "rows.js", "samples.js", "lists.js", "panel.js")
# What may not be followed by anything that would show it.
TURNS = (StateChanged, RunStarted, RunPaused, RunFinished, RunFailed, RequestRefused, Rewound, SettingChanged)
LISTS: dict[str, tuple[type[Event], ...]] = {
    "samples": (SampleGenerated, SettingChanged, Rewound),
    "settings": (SettingChanged, RunStarted),
    "checkpoints": (CheckpointSaved, AdapterSaved, Rewound, StateChanged),
    "completions": (RolloutCompleted, StepCompleted, Rewound),
}


def _refresh(panel: weakref.ref[Panel]) -> None:
    """One that is still there tells its page how the run is."""
    if (one := panel()) is not None:
        one._later(one.refresh)


def page_part(name: str) -> str:
    """One file of the page: a part of the script, or its style."""
    return (_PAGE / name).read_text(encoding="utf-8")


def page_script() -> str:
    """The whole module that draws the panel in a browser."""
    return "\n".join(page_part(part) for part in PARTS)


def _told(kind: Any) -> Any:
    """State that the kernel tells the page, empty at first."""
    return kind().tag(sync=True)


class Panel(anywidget.AnyWidget):
    """The widget that shows and steers one run. Where there are none, it displays as the run's last state.

    tab        the page on show: Curves, Rows, Completions, Samples, Chat, Settings, Checkpoints or Log
    selection  what was clicked: `update` (in the curve), `split`, `rows` (which list), `row` and its `color`
    group, scale, axis, lines   the curve on show, linear or log, against update, tokens or time; all, raw or smooth

    A page is told the rest by the other traits and by messages. The panel listens to the run's events and redraws a few
    times a second at most, only while somebody has it open, and in a hundredth of the time. `close` ends that. It does
    not keep its run: it closes when nobody else refers to that any more.
    """

    # As text: anywidget watches a path, and by that keeps every widget.
    _esm = page_script()
    _css = page_part("panel.css")

    tab = traitlets.Unicode("Curves").tag(sync=True)
    selection = traitlets.Dict({"update": None, "split": "train", "rows": "update", "row": None}).tag(sync=True)
    group = traitlets.Unicode("loss").tag(sync=True)
    scale = traitlets.Enum(("linear", "log"), "linear").tag(sync=True)
    axis = traitlets.Enum(("update", "tokens", "time"), "update").tag(sync=True)
    lines = traitlets.Enum(("all", "raw", "smooth"), "all").tag(sync=True)
    coloring = traitlets.Bool(False).tag(sync=True)

    panel_id = traitlets.Unicode().tag(sync=True)
    head, progress, activity, said = (_told(traitlets.Dict) for _ in range(4))
    latest, completions = _told(traitlets.Dict), _told(traitlets.Dict)
    tabs, clicks, samples, settings, checkpoints, talk = (_told(traitlets.List) for _ in range(6))
    # These two grow in place: a new page is told all of them, one that is there only what has changed.
    series, happened = _told(traitlets.Dict), _told(traitlets.Dict)

    def __init__(self, run: RunHandle, *, device: str, warning: str | None = None) -> None:
        self.closed = False
        self._run = weakref.ref(run, lambda _: self._close_later())
        self._name = run.name
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        self._device, self._warning = device, warning
        self.refresh_seconds = SECONDS_BETWEEN_REFRESHES
        self._views, self._drawn_at, self._cost = 0, 0.0, 0.0
        self._coming: asyncio.TimerHandle | None = None
        self._activity, self.awaited = Activity(), set[str]()
        method = method_named(run.config.method)
        self._builder = SeriesBuilder(run.history, method.metrics)
        self._stale = set(LISTS) if method.kind.sampled else set(LISTS) - {"completions"}
        handle: Any = weakref.proxy(run)
        self.looks = Looks(handle)
        me: Any = weakref.proxy(self)
        self._clicks = Clicks(me)
        self.chat = Chat(self._clicks.ask, self._show_talk)
        lists = ["Samples", "Chat", "Settings", "Checkpoints", "Log"]
        super().__init__(
            panel_id=uuid.uuid4().hex,
            tabs=["Curves", "Rows", *(["Completions"] if method.kind.sampled else []), *lists],
            # The loss of what the model wrote stays near 0.
            group="reward" if method.kind.sampled else "loss",
            series={**self._builder.series(0), "version": 0},
            happened={"count": 0, "lines": []},
            said={"count": 0, "text": "", "bad": False},
        )
        for event in run.history.events:
            self._log(event, "")  # when that was is not known
        self.on_msg(self._heard)
        self.observe(lambda _: self._later(lambda: self.show_again("completions")), "coloring")
        self._built_at = time.monotonic()
        run.listen(self._on_event)
        self.refresh()
        if self._loop is not None:  # in a kernel
            beat_for(self)

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

    # What a person does

    def _heard(self, _: Any, message: Message, __: Any) -> None:
        """A message of the page, on any thread."""
        if message.get("do") in ("pause", "cancel"):  # only noted, so that it may be asked from any thread at once
            if (run := self._run()) is not None:
                run.request(Pause() if message["do"] == "pause" else Cancel())
        elif message.get("do") == "enough":
            self.chat.enough()
        else:
            self._later(lambda: self._answer(message))

    def _answer(self, message: Message) -> None:
        if "look" in message:
            self._clicks.look(message)
        elif message.get("do") == "open":
            self._views += 1
            beat_for(self)
            self.refresh()
        elif message.get("do") == "shut":
            self._views = max(0, self._views - 1)
        elif message.get("do") == "whole":  # a page that missed something
            self.send({"kind": "whole", "series": self.series, "happened": self.happened})
        else:
            self._clicks.act(message)

    def _later(self, act: Callable[[], None]) -> None:
        """Do it on the kernel's thread, while the run is there; what goes wrong is shown, and touches nothing else."""

        def guarded() -> None:
            run = self._run()  # held until it is done
            if run is None or self.closed:
                return
            try:
                act()
            except MlxNbError as error:
                self.say(str(error), bad=True)

        if self._loop is None or self._loop.is_closed():
            guarded()
        else:
            self._loop.call_soon_threadsafe(guarded)

    def say(self, text: str, *, bad: bool = False) -> None:
        """Say what came of a click."""
        self.said = {"count": self.said["count"] + 1, "text": text, "bad": bad}

    # What is shown

    def _on_event(self, event: Event) -> None:
        if (run := self._run()) is None:  # it is saved while it goes
            return
        self._activity.note(event if isinstance(event, Progress) else None)
        self._stale.update(name for name, kinds in LISTS.items() if isinstance(event, kinds) and name in self._wanted)
        if isinstance(event, CheckpointSaved) and event.kind == "auto":
            return  # many, and the page of checkpoints lists them
        self._log(event)
        if text := result_of(event, self.awaited, run.config):
            self.say(text, bad=isinstance(event, RequestRefused))
        since = time.monotonic() - self._drawn_at
        wait = max(self.refresh_seconds, self._cost / MOST_OF_THE_TIME) - since
        # Work without parts keeps the kernel until it is done: nothing later could say what it is.
        is_one_piece = isinstance(event, Progress) and not event.total
        if isinstance(event, TURNS) or (self._watched and (is_one_piece or wait <= 0)):
            self.refresh()
        elif self._watched and self._coming is None and self._loop is not None and not self._loop.is_closed():
            # It may be the last event for a long time.
            self._coming = self._loop.call_later(wait, _refresh, weakref.ref(self))

    @property
    def _wanted(self) -> set[str]:
        return set(LISTS) if "Completions" in self.tabs else set(LISTS) - {"completions"}

    @property
    def is_open(self) -> bool:
        """Whether a browser shows it."""
        return self._views > 0

    @property
    def _watched(self) -> bool:
        """Whether a browser shows the panel, or may do so: while a cell keeps the kernel, none can say."""
        new = time.monotonic() - self._built_at < SECONDS_TO_OPEN
        return new or self.run.state != RunState.RUNNING or self.is_open or self.run.keeps_a_cell

    def refresh(self) -> None:
        """Tell the page how the run is now."""
        if self._coming is not None:
            self._coming.cancel()
        begun, self._coming = time.perf_counter(), None
        run, history = self.run, self.run.history
        iters = run.trainer.iters if run.prepared else run.config.iters
        tokens, seconds = (run.trainer.state.tokens, run.trainer.state.seconds) if run.prepared else (0, 0.0)
        with self.hold_sync():
            self.head = head_of(run, self._device, self._warning)
            self.progress = progress_of(history, iters, tokens, seconds)
            doing, kept = self._activity.told(run, iters), run.keeps_a_cell
            if doing and kept:
                doing["words"] += f"  ·  {KEPT}"
            self.activity = doing
            self.clicks = [] if kept else useful_clicks(run)
            if kept and self._coming is None and self._loop is not None and not self._loop.is_closed():
                self._coming = self._loop.call_later(0, _refresh, weakref.ref(self))  # once the cell has ended
            self.latest = self.looks.latest()
            for name in sorted(self._stale):
                self._list(name)
            self._stale.clear()
        self._send_series(history, iters or max(1, run.step_count))
        self._drawn_at, self._cost = time.monotonic(), time.perf_counter() - begun

    def show_again(self, name: str) -> None:
        """One of the lists, which may have changed."""
        self._list(name)

    def _list(self, name: str) -> None:
        run = self.run
        match name:
            case "samples":
                self.samples = samples_of(run.history, run.config)
            case "settings":
                self.settings = settings_of(run.config)
            case "completions":
                on_show = self.tab == "Completions"
                self.completions = self.looks.completions(colored=self.coloring and on_show, asked=on_show)
            case "checkpoints":
                try:
                    self.checkpoints = checkpoints_of(run.checkpoints()) if run.prepared else []
                except MlxNbError as error:
                    self.say(str(error), bad=True)

    def _send_series(self, history: Any, iters: int) -> None:
        if self._builder.history is not history:
            self._builder = SeriesBuilder(history, self._builder.metrics)
        new, version = self._builder.series(iters), self.series["version"]
        changes = series_changes(self.series, new)
        if changes == {"lines": [], "clocks": []}:
            return
        self.series.clear()
        self.series.update(new, version=version + 1)
        told = {"changes": changes} if changes is not None else {"series": self.series}
        self.send({"kind": "series", "from": version, "version": version + 1, **told})

    def _log(self, event: Event, when: str | None = None) -> None:
        """Note an event, but for the frequent ones; `when` is the time of day, None = now."""
        if isinstance(event, StepCompleted | Progress | StateChanged):
            return
        at = time.strftime("%H:%M:%S") if when is None else when
        new = [f"{at:8}  {one_line(describe(event))}"]
        new += [f"          {one_line(remark)}" for remark in remarks(event)]
        before, lines = self.happened["count"], self.happened["lines"]
        lines += new
        del lines[:-LINES_OF_LOG]
        self.happened["count"] = before + len(new)
        if hasattr(self, "_built_at"):
            self.send({"kind": "happened", "from": before, "lines": new[-LINES_OF_LOG:]})

    def _show_talk(self, turns: list[dict[str, Any]]) -> None:
        self.talk = turns

    # The end

    def close(self) -> None:
        """Take the widget away and listen no more."""
        if self.closed:
            return
        self.closed = True
        no_beats_for(self)
        if (run := self._run()) is not None:
            run.unlisten(self._on_event)
        close_widgets(self.layout)
        self.unobserve_all()
        super().close()
        self.__dict__.pop("_repr_mimebundle_", None)  # a closed panel still says why it is

    def _close_later(self) -> None:
        """The run is gone, which may be noticed on any thread."""
        if self._loop is None or self._loop.is_closed():
            self.close()
        else:
            self._loop.call_soon_threadsafe(self.close)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if (run := self._run()) is None:
            return {"text/plain": self._gone()}
        shown: Any = super()._repr_mimebundle_(**options)
        data, metadata = shown
        return {**data, "text/html": still_html(run, self._device), "text/plain": run.status()}, metadata
