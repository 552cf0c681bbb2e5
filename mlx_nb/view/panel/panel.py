"""The panel of one run: a widget with controls, curves, rows, samples and checkpoints. `page/` draws it.

Tabs, scales and lists are handled by the page without the kernel. A click may arrive on another thread than the
kernel's, but mlx may only be used on that thread. So it is scheduled on the kernel's event loop, between two steps.
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
from mlx_nb.view.curves.curves import SeriesBuilder
from mlx_nb.view.event_loop import call_in_loop, running_loop
from mlx_nb.view.event_text import describe, remarks
from mlx_nb.view.panel.chat import Chat
from mlx_nb.view.panel.clicks import Clicks, Message, result_of, useful_clicks
from mlx_nb.view.panel.heartbeat import start_beats, stop_beats
from mlx_nb.view.panel.page_requests import PageRequests
from mlx_nb.view.panel.run_handle import RunHandle
from mlx_nb.view.panel.series_changes import series_changes
from mlx_nb.view.panel.state import (
    Activity,
    checkpoints_of,
    head_of,
    progress_of,
    samples_of,
    settings_of,
)
from mlx_nb.view.panel.static_view import static_html
from mlx_nb.view.theme import one_line
from mlx_nb.view.widget_cleanup import close_widgets

SECONDS_BETWEEN_REFRESHES = 0.3
MAX_TIME_SHARE = 0.01  # share of the time that refreshes may take
SECONDS_TO_OPEN = 10.0  # time for a browser to report that it shows a new panel
LINES_OF_LOG = 200
KEPT = "a cell waits for the run; interrupt the kernel to pause"
# The parts of the browser module, in order of dependency.
_PAGE = Path(__file__).with_name("page")
PARTS = ("dom.js", "store.js", "curves.js", "rows.js", "samples.js", "lists.js", "panel.js")
# Events that must be shown at once, because no other event may follow.
TURNS = (StateChanged, RunStarted, RunPaused, RunFinished, RunFailed, RequestRefused, Rewound, SettingChanged)
LISTS: dict[str, tuple[type[Event], ...]] = {
    "samples": (SampleGenerated, SettingChanged, Rewound),
    "settings": (SettingChanged, RunStarted),
    "checkpoints": (CheckpointSaved, AdapterSaved, Rewound, StateChanged),
    "completions": (RolloutCompleted, StepCompleted, Rewound),
}


def _refresh(panel: weakref.ref[Panel]) -> None:
    """Refresh the panel if it still exists."""
    if (one := panel()) is not None:
        one._later(one.refresh)


def page_part(name: str) -> str:
    """One file of the page: a part of the script, or the style sheet."""
    return (_PAGE / name).read_text(encoding="utf-8")


def page_script() -> str:
    """The whole module that draws the panel in a browser."""
    return "\n".join(page_part(part) for part in PARTS)


def _synced(kind: Any) -> Any:
    """A trait that is synchronized with the page."""
    return kind().tag(sync=True)


class Panel(anywidget.AnyWidget):
    """The widget that shows and controls one run. Without widgets it displays the last state of the run.

    tab        the selected page: Curves, Rows, Completions, Samples, Chat, Settings, Checkpoints or Log
    selection  the selected `update` (in the curve), `split`, `rows` (which list), `row` and its `color`
    group, scale, axis, lines   the shown curve; linear or log; against update, tokens or time; all, raw or smooth

    The other traits and messages send the rest to the page. The panel listens to the run's events. It refreshes a few
    times per second at most, only while it is open in a browser, and uses at most 1% of the time, until `close`. It
    holds a weak reference to its run, and closes when the run is garbage-collected.
    """

    # As text, because anywidget watches a path and then keeps every widget alive.
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
    head, progress, activity, notice = (_synced(traitlets.Dict) for _ in range(4))
    latest, completions = _synced(traitlets.Dict), _synced(traitlets.Dict)
    tabs, clicks, samples, settings, checkpoints, talk = (_synced(traitlets.List) for _ in range(6))
    # These two grow in place: a new page receives all of it, an open page only the changes.
    series, event_log = _synced(traitlets.Dict), _synced(traitlets.Dict)

    def __init__(self, run: RunHandle, *, device: str, warning: str | None = None) -> None:
        self.closed = False
        self._run = weakref.ref(run, lambda _: self._close_later())
        self._name = run.name
        self._loop = running_loop()
        self._device, self._warning = device, warning
        self.refresh_seconds = SECONDS_BETWEEN_REFRESHES
        self._views, self._drawn_at, self._cost = 0, 0.0, 0.0
        self._coming: asyncio.TimerHandle | None = None
        self._activity, self.awaited = Activity(), set[str]()
        method = method_named(run.config.method)
        self._builder = SeriesBuilder(run.history, method.metrics)
        self._stale = set(LISTS) if method.kind.sampled else set(LISTS) - {"completions"}
        handle: Any = weakref.proxy(run)
        self.page_requests = PageRequests(handle)
        me: Any = weakref.proxy(self)
        self._clicks = Clicks(me)
        self.chat = Chat(self._clicks.ask, self._show_talk)
        lists = ["Samples", "Chat", "Settings", "Checkpoints", "Log"]
        super().__init__(
            panel_id=uuid.uuid4().hex,
            tabs=["Curves", "Rows", *(["Completions"] if method.kind.sampled else []), *lists],
            # The loss of sampled completions stays near 0.
            group="reward" if method.kind.sampled else "loss",
            series={**self._builder.series(0), "version": 0},
            event_log={"count": 0, "lines": []},
            notice={"count": 0, "text": "", "bad": False},
        )
        for event in run.history.events:
            self._log(event, "")  # without a time, which is not known
        self.on_msg(self._on_message)
        self.observe(lambda _: self._later(lambda: self.show_again("completions")), "coloring")
        self._built_at = time.monotonic()
        run.listen(self._on_event)
        self.refresh()
        if self._loop is not None:  # in a kernel
            start_beats(self)

    @property
    def run(self) -> Any:
        """The run. Raises CommandError if it no longer exists."""
        run = self._run()
        if run is None:
            raise CommandError(self._gone())
        return run

    def _gone(self) -> str:
        return (
            f"{self._name} no longer exists, because no variable holds it. Store a run in a variable, as in "
            "`run = Run(...)`. `Run.resume` restores one that was trained."
        )

    # Messages from the page

    def _on_message(self, _: Any, message: Message, __: Any) -> None:
        """Receive a message of the page, on any thread."""
        if message.get("do") in ("pause", "cancel"):  # requests may be sent from any thread
            if (run := self._run()) is not None:
                run.request(Pause() if message["do"] == "pause" else Cancel())
        elif message.get("do") == "enough":
            self.chat.stop_answer()
        else:
            self._later(lambda: self._answer(message))

    def _answer(self, message: Message) -> None:
        if "show" in message:
            self._clicks.reply_to(message)
        elif message.get("do") == "open":
            self._views += 1
            start_beats(self)
            self.refresh()
        elif message.get("do") == "shut":
            self._views = max(0, self._views - 1)
        elif message.get("do") == "whole":  # the page has missed a message
            self.send({"kind": "whole", "series": self.series, "event_log": self.event_log})
        else:
            self._clicks.act(message)

    def _later(self, act: Callable[[], None]) -> None:
        """Call `act` on the kernel's thread, if the run still exists, and show its error."""

        def guarded() -> None:
            run = self._run()  # keeps the run alive until `act` is done
            if run is None or self.closed:
                return
            try:
                act()
            except MlxNbError as error:
                self.say(str(error), bad=True)

        call_in_loop(self._loop, guarded)

    def say(self, text: str, *, bad: bool = False) -> None:
        """Show the result of a click."""
        self.notice = {"count": self.notice["count"] + 1, "text": text, "bad": bad}

    # Data for the page

    def _on_event(self, event: Event) -> None:
        if (run := self._run()) is None:  # the run is being deleted
            return
        begins = self._activity.note(event if isinstance(event, Progress) else None)
        is_one_piece = isinstance(event, Progress) and not event.total
        self._stale.update(name for name, kinds in LISTS.items() if isinstance(event, kinds) and name in self._wanted)
        if isinstance(event, CheckpointSaved) and event.kind == "auto":
            return  # frequent, and listed on the page Checkpoints
        self._log(event)
        if text := result_of(event, self.awaited, run.config):
            self.say(text, bad=isinstance(event, RequestRefused))
        since = time.monotonic() - self._drawn_at
        wait = max(self.refresh_seconds, self._cost / MAX_TIME_SHARE) - since
        # Work in one piece may block the kernel until it is done, so it is shown before it starts.
        if isinstance(event, TURNS) or (self._watched and ((begins and is_one_piece) or wait <= 0)):
            self.refresh()
        elif self._watched and self._coming is None and self._loop is not None and not self._loop.is_closed():
            # This may be the last event for a long time.
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
        """Whether a browser shows the panel, or may show it; while a cell is executed, no browser can report that."""
        new = time.monotonic() - self._built_at < SECONDS_TO_OPEN
        return new or self.run.state != RunState.RUNNING or self.is_open or self.run.keeps_a_cell

    def refresh(self) -> None:
        """Send the current state of the run to the page."""
        if self._coming is not None:
            self._coming.cancel()
        begun, self._coming = time.perf_counter(), None
        run, history = self.run, self.run.history
        iters = run.trainer.iters if run.prepared else run.config.iters
        tokens = run.trainer.state.tokens if run.prepared else 0
        with self.hold_sync():
            self.head = head_of(run, self._device, self._warning)
            self.progress = progress_of(history, iters, tokens)
            doing, kept = self._activity.as_data(run, iters), run.keeps_a_cell
            if doing and kept:
                doing["words"] += f"  ·  {KEPT}"
            self.activity = doing
            self.clicks = [] if kept else useful_clicks(run)
            if kept and self._coming is None and self._loop is not None and not self._loop.is_closed():
                self._coming = self._loop.call_later(0, _refresh, weakref.ref(self))  # once the cell has ended
            self.latest = self.page_requests.latest()
            for name in sorted(self._stale):
                self._list(name)
            self._stale.clear()
        self._send_series(history, iters or max(1, run.step_count))
        self._drawn_at, self._cost = time.monotonic(), time.perf_counter() - begun

    def show_again(self, name: str) -> None:
        """Send one of the lists again."""
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
                self.completions = self.page_requests.completions(colored=self.coloring and on_show, requested=on_show)
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
        content = {"changes": changes} if changes is not None else {"series": self.series}
        self.send({"kind": "series", "from": version, "version": version + 1, **content})

    def _log(self, event: Event, when: str | None = None) -> None:
        """Add an event and its remarks to the log as one entry; `when` is the time of day, None = now.

        Frequent events are left out.
        """
        if isinstance(event, StepCompleted | Progress | StateChanged):
            return
        at = time.strftime("%H:%M:%S") if when is None else when
        said = one_line(describe(event))
        more = [one for remark in remarks(event) if (one := one_line(remark)) not in said]
        new = "\n          ".join([f"{at:8}  {said}", *more])
        before, lines = self.event_log["count"], self.event_log["lines"]
        lines.append(new)
        del lines[:-LINES_OF_LOG]
        self.event_log["count"] = before + 1
        if hasattr(self, "_built_at"):
            self.send({"kind": "event_log", "from": before, "lines": [new]})

    def _show_talk(self, turns: list[dict[str, Any]]) -> None:
        self.talk = turns

    # The end

    def close(self) -> None:
        """Close the widget and stop listening to the run."""
        if self.closed:
            return
        self.closed = True
        stop_beats(self)
        if (run := self._run()) is not None:
            run.unlisten(self._on_event)
        close_widgets(self.layout)
        self.unobserve_all()
        super().close()
        self.__dict__.pop("_repr_mimebundle_", None)  # so that a closed panel can still display why

    def _close_later(self) -> None:
        """Close after the run, or this panel, was garbage-collected."""
        call_in_loop(self._loop, self.close)

    def __del__(self) -> None:
        if not self.closed:
            self._close_later()

    def _repr_mimebundle_(self, **options: Any) -> Any:
        if (run := self._run()) is None:
            return {"text/plain": self._gone()}
        shown: Any = super()._repr_mimebundle_(**options)
        data, metadata = shown
        return {**data, "text/html": static_html(run, self._device), "text/plain": run.status()}, metadata
