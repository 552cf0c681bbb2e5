"""Training in the background, under a panel, where somebody looks; elsewhere in the foreground of the cell."""

from __future__ import annotations

import html
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import CommandError
from mlx_nb.events import (
    AdapterSaved,
    DataChanged,
    Event,
    LossSpiked,
    MemoryLow,
    NothingLearned,
    Progress,
    RolloutCompleted,
    RunFailed,
    RunFinished,
    RunPaused,
    StepCompleted,
)
from mlx_nb.notebook.front_end import is_console
from mlx_nb.notebook.progress_line import ProgressLine
from mlx_nb.notebook.shown_text import has_rich_display
from mlx_nb.run.background import hold_interrupts
from mlx_nb.run.run import raise_failure
from mlx_nb.view import event_text
from mlx_nb.view.curves.figure import live_svg
from mlx_nb.view.curves.quantity import live_words
from mlx_nb.view.reports.completions import last_rollout_html

if TYPE_CHECKING:
    from mlx_nb.notebook.session import Session
    from mlx_nb.run.run import Run

_SECONDS_BETWEEN_UPDATES = 0.4
_SECONDS_BETWEEN_SIGNS = 10.0
_BETWEEN = "  ·  "  # the parts of a progress line
_CLEAR_LINE = "\r\x1b[K"  # of a terminal: what stands in it is written over


def train(
    session: Session, run: Run, updates: int | None = None, *, wait: bool | None = None, ends_cell: bool = False
) -> None:
    """Move `run` by `updates` updates, or to its end, showing what happens.

    Where a person has the notebook open this returns at once, the run goes on in the background, and a panel stands
    under the cell; cells that are queued behind this one wait for it, unless `wait` is False. `wait` True stays in the
    cell, as it does by itself under nbconvert and papermill, where nobody would wait for the background. With
    `ends_cell`, where nothing of the person's own follows in the cell, an interrupt is the run's from its start on.
    Raises TrainingError when an update was not kept.
    """
    if wait is None:
        wait = session.preferences.wait
    if wait or (wait is None and not has_live_front_end()):
        try:
            train_here(run, updates, quiet=session.panel_of(run) is not None)
        finally:
            session.publish(run)
        return
    is_shown = session.panel_of(run) is not None
    if not is_shown:
        show_panel(session, run)
    with run.interrupts(print):
        run.start(updates)
        if is_shown:
            ProgressLine(run)
        if wait is None and session.queued is not None:
            session.queued.follow(run)
        if ends_cell:
            hold_interrupts()


def show_panel(session: Session, run: Run) -> None:
    """The panel of `run` in the current cell. Below the first one is the place for what lasts."""
    from IPython.display import display

    from mlx_nb.notebook.lasting_output import Outcome

    if not has_rich_display():
        print(run.status())
        return
    panel = session.panel_of(run)
    if panel is not None:
        session.show_further(run, panel)
        session.show_again(run)
        return
    panel = run.panel()
    panel.refresh_seconds = session.preferences.refresh_seconds
    display(panel)
    session.keep_shown(run, panel, Outcome(run))


def train_here(
    run: Run, updates: int | None = None, *, quiet: bool = False, way_on: str = "`%finetune run` goes on"
) -> Event | None:
    """In the foreground of the cell. With a panel open elsewhere, `quiet`, one line says what was done.

    The first interrupt pauses at the next step boundary; a second one drops the update in hand, which is then as if
    it had never begun. Returns the last event; `way_on` is said after a pause.
    """
    ended = _moved_quietly(run, updates) if quiet and has_rich_display() else _moved(run, updates)
    raise_failure(ended)
    if isinstance(ended, RunPaused):
        reason = "" if ended.reason == "interrupted" else f" ({ended.reason})"
        print(f"{run.name} is paused after update {ended.step}{reason}. {way_on}; nothing is lost.")
    return ended


def print_events(run: Run) -> Event | None:
    """Train, with each event as a line of JSON. Returns the last one. Raises TrainingError as `Run.run` does."""
    ended = None
    for ended in run.events():
        print(ended.to_json(), flush=True)
    raise_failure(ended)
    return ended


def exit_status(ended: Event | None) -> int:
    """The status of a command that trained until this event: 0 at the end, 130 after an interrupt, 1 if paused."""
    if not isinstance(ended, RunPaused):
        return 0
    return 130 if ended.reason == "interrupted" else 1


def _moved(run: Run, updates: int | None) -> Event | None:
    """Move the run under a display of its own, which stays as a figure and a table. Returns the last event."""
    display = _LiveDisplay(run)
    ended: Event | None = None
    with run.interrupts(display.print) as interrupts:
        if not run.prepared:
            display.say("loading model and rows …")
            try:
                _load(run, display.load)
            finally:
                if not run.prepared:
                    display.say(f"{run.name}: not loaded.", last=True)
        for event in run.events(updates):
            if run.prepared:
                display.show(event)
            ended = event
        interrupts.ignore()
        if run.prepared:
            display.finish(ended)
        elif run.history.last_step:
            display.print(event_text.describe(run.history.last_step))
    return ended


def _moved_quietly(run: Run, updates: int | None) -> Event | None:
    """Move the run under one line, where its panel is open elsewhere. Returns the last event."""
    line = ProgressLine(run)
    ended: Event | None = None
    try:
        with run.interrupts(print) as interrupts:
            _load(run, lambda progress: None)
            for event in run.events(updates):
                ended = event
            interrupts.ignore()
    finally:
        last = run.history.last_step
        words = event_text.describe(last) if last else "model and rows are loaded" if run.prepared else "not loaded"
        line.end(words if last else f"{run.name}: {words}.")
    return ended


def _load(run: Run, told: Callable[[Progress], None]) -> None:
    """Until all is loaded, or a pause is asked for. Raises CommandError when it is given up."""
    try:
        for progress in run.load():
            told(progress)
    except KeyboardInterrupt:
        raise CommandError(
            f"loading {run.name} was given up. Nothing has changed; `%finetune run` loads again."
        ) from None


def _worth_a_line(event: Event, iters: int, seconds_since: float) -> bool:
    """Whether a log without a live display should have it: twenty updates of a run, and signs of life."""
    if isinstance(event, Progress):
        return seconds_since >= _SECONDS_BETWEEN_SIGNS
    return not isinstance(event, StepCompleted | RolloutCompleted) or event.step % max(1, iters // 20) == 0


def _fitting(line: str, width: int) -> str:
    """The line in at most `width` characters; of its parts the last ones before the time left go first."""
    parts = line.split(_BETWEEN)
    while len(_BETWEEN.join(parts)) > width and len(parts) > 3:
        del parts[-2]
    fitting = _BETWEEN.join(parts)
    return fitting if len(fitting) <= width else f"{fitting[: width - 1]}…"


class _LiveDisplay:
    """One output that is updated in place and, at the end, replaced by a figure and a table that last."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._iters = 0
        self._shown_at = 0.0
        self._in_notebook = has_rich_display()
        self._in_terminal = not self._in_notebook and (sys.stdout.isatty() or is_console())
        self._handle: Any = None
        self._broken = False
        self._activity = ""
        self._remarked: set[str] = set()

    def print(self, text: str) -> None:
        """A line that stays."""
        if self._in_terminal:
            sys.stdout.write(_CLEAR_LINE)
        print(text, flush=True)

    def say(self, text: str, *, last: bool = False) -> None:
        """A line in place of the progress; the `last` one stays in a terminal."""
        if last and self._in_terminal:
            self.print(text)
            return
        self._put(html.escape(text), text)
        self._shown_at = time.monotonic()

    def load(self, progress: Progress) -> None:
        """How far loading is, in place of the line before; elsewhere than in a notebook a line now and then."""
        in_place = self._in_notebook or self._in_terminal
        seconds = _SECONDS_BETWEEN_UPDATES if in_place else _SECONDS_BETWEEN_SIGNS
        if time.monotonic() - self._shown_at >= seconds:
            words = event_text.progress_words(progress)
            if not in_place:
                print(words, flush=True)
            self.say(words)

    def show(self, event: Event) -> None:
        """Take note of `event`; draw at most a few times a second."""
        for remark in event_text.remarks(event):
            # A reward function that fails does so in every rollout.
            if remark not in self._remarked:
                self._remarked.add(remark)
                self.print(remark)
        is_said = isinstance(event, DataChanged | LossSpiked | MemoryLow | NothingLearned)
        if is_said:
            self.print(event_text.describe(event))
        since = time.monotonic() - self._shown_at
        self._iters = self._run.trainer.iters
        if not self._in_notebook and not self._in_terminal:
            if _worth_a_line(event, self._iters, since):
                print(event_text.describe(event), flush=True)
                self._shown_at = time.monotonic()
            return
        quick = isinstance(event, StepCompleted | RolloutCompleted | AdapterSaved | Progress)
        if self._in_terminal and not quick and not is_said:
            self.print(event_text.describe(event))
        self._activity = event_text.progress_words(event) if isinstance(event, Progress) else ""
        if since >= _SECONDS_BETWEEN_UPDATES or not quick:
            self._draw()
            self._shown_at = time.monotonic()

    def _draw(self) -> None:
        history = self._run.history
        line = event_text.progress_line(history, self._iters)
        line += f"  ·  {self._activity}" if self._activity else ""
        if self._in_terminal:
            self._put("", f"{self._run.name}  ·  {line}")
            return
        done = history.last_step.step / self._iters if history.last_step else 0.0
        bar = (
            '<div style="height:4px;max-width:560px;background:rgba(128,128,128,0.25);border-radius:2px;margin:4px 0">'
            f'<div style="height:4px;width:{100 * done:.1f}%;background:#0072B2;border-radius:2px"></div></div>'
        )
        head = f"<b>{html.escape(self._run.name)}</b>&ensp;{html.escape(line)}"
        legend = (
            '<div style="font-size:11px;opacity:0.75"><span style="color:#0072B2">━</span> '
            f'{live_words(history)}&ensp;<span style="color:#D55E00">╍●</span> validation</div>'
        )
        curve = live_svg(history, self._iters)
        self._put(
            f'<div style="font-variant-numeric:tabular-nums">{head}{bar}{curve}{legend if curve else ""}</div>',
            line,
        )

    def finish(self, ended: Event | None) -> None:
        """Replace the moving output by one that a saved, exported or untrusted notebook still shows."""
        history, run = self._run.history, self._run
        state = (
            "finished" if isinstance(ended, RunFinished) else "stopped" if isinstance(ended, RunFailed) else "paused"
        )
        title = f"{run.name}: {state} after update {run.step_count}"
        if not self._in_notebook:
            self.print(event_text.summary_text(history, title))
            return
        rich = event_text.summary_html(history, title) + last_rollout_html(history)
        self._put(rich, event_text.summary_text(history, title))
        if len(history) > 1:
            self._publish_figure()

    def _publish_figure(self) -> None:
        from IPython.display import display

        try:
            display(self._run.plot()._repr_mimebundle_(), raw=True)
        except Exception as error:
            print(f"the figure could not be drawn ({error}); the run is not affected.", file=sys.stderr)

    def _put(self, rich: str, plain: str) -> None:
        """Show, or update in place. A display that fails is given up; training goes on."""
        if self._in_terminal:
            sys.stdout.write(f"{_CLEAR_LINE}{_fitting(plain, shutil.get_terminal_size().columns - 1)}")
            sys.stdout.flush()
        if not self._in_notebook or self._broken:
            return
        from IPython.display import display

        bundle = {"text/html": rich, "text/plain": plain}
        try:
            if self._handle is None:
                self._handle = display(bundle, raw=True, display_id=True)
            else:
                self._handle.update(bundle, raw=True)
        except Exception as error:
            self._broken = True
            print(f"the live display failed ({error}); training goes on.", file=sys.stderr)


def has_live_front_end() -> bool:
    """Whether somebody has this notebook open: not a console, and not an executor, which cannot be asked for input."""
    from IPython.core.getipython import get_ipython

    return has_rich_display() and bool(getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False))
