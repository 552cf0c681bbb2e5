"""Trains runs from cells: in the background under a panel in an interactive notebook, else in the foreground."""

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
from mlx_nb.notebook.lost_interrupts import raise_lost_interrupt
from mlx_nb.notebook.progress_line import ProgressLine
from mlx_nb.notebook.text_output import has_rich_display, say
from mlx_nb.run.background import hold_interrupts
from mlx_nb.run.foreground import raise_failure
from mlx_nb.view import event_text
from mlx_nb.view.curves.figure import live_svg
from mlx_nb.view.curves.main_quantity import curve_legend
from mlx_nb.view.reports.completions import last_rollout_html

if TYPE_CHECKING:
    from mlx_nb.notebook.session import Session
    from mlx_nb.run.run import Run

_SECONDS_BETWEEN_UPDATES = 0.4
_SECONDS_BETWEEN_LOG_LINES = 10.0
_BETWEEN = "  ·  "  # separates the parts of a progress line
_CLEAR_LINE = "\r\x1b[K"  # clears the current line of a terminal


def train(
    session: Session, run: Run, updates: int | None = None, *, wait: bool | None = None, ends_cell: bool = False
) -> None:
    """Train `run` for `updates` updates, or to its end, and show the progress.

    In an interactive notebook this returns at once; the run trains in the background under a panel, and cells queued
    behind this one wait for it unless `wait` is False. With `wait` True it waits in the cell, which is also the default
    under nbconvert and papermill. `ends_cell` says that no user code follows in the cell, so that interrupts belong to
    the run from its start. Raises TrainingError if an update was not applied.
    """
    if wait is None:
        wait = session.preferences.wait
    if wait or (wait is None and not has_live_front_end()):
        try:
            raise_lost_interrupt()
            train_here(run, updates, quiet=session.panel_of(run) is not None)
        finally:
            session.publish(run)
        return
    is_shown = session.panel_of(run) is not None
    if not is_shown and has_rich_display():
        show_panel(session, run)
    with run.interrupts(print):
        raise_lost_interrupt()
        run.start(updates)
        if not has_rich_display():
            print(
                f"{run.name} trains in the background. `%finetune status` says how far it is, `%finetune pause` pauses "
                "it."
            )
        if is_shown:
            ProgressLine(run)
        if wait is None and session.queued is not None:
            session.queued.follow(run)
        if ends_cell:
            hold_interrupts()


def show_panel(session: Session, run: Run) -> None:
    """Show the panel of `run` in the current cell. The lasting output is below the first one."""
    from IPython.display import display

    from mlx_nb.notebook.lasting_output import Outcome

    if not has_rich_display():
        print(run.status())
        return
    panel = session.panel_of(run)
    if panel is not None:
        session.show_panel_again(run, panel)
        session.show_again(run)
        return
    panel = run.panel()
    panel.refresh_seconds = session.preferences.refresh_seconds
    display(panel)
    session.register_panel(run, panel, Outcome(run))


def train_here(
    run: Run, updates: int | None = None, *, quiet: bool = False, continue_hint: str = "`%finetune run` continues"
) -> Event | None:
    """Train in the foreground of the cell. `quiet` shows one line, for a run whose panel is open elsewhere.

    The first interrupt pauses at the next step boundary. A second one drops the current update, as if it had never
    started. Returns the last event. After a pause, `continue_hint` says how to continue.
    """
    ended = _train_with_line(run, updates) if quiet and has_rich_display() else _train_with_display(run, updates)
    raise_failure(ended)
    if isinstance(ended, RunPaused):
        reason = "" if ended.reason == "interrupted" else f" ({ended.reason})"
        say(f"{run.name} is paused after update {ended.step}{reason}. Nothing is lost: {continue_hint}.")
    return ended


def print_events(run: Run) -> Event | None:
    """Train, and print each event as a line of JSON. Returns the last event. Raises TrainingError as `Run.run` does."""
    ended = None
    for ended in run.events():
        print(ended.to_json(), flush=True)
    raise_failure(ended)
    return ended


def exit_status(ended: Event | None) -> int:
    """The exit status of a command whose last event this is: 0 at the end, 130 after an interrupt, 1 if paused."""
    if not isinstance(ended, RunPaused):
        return 0
    return 130 if ended.reason == "interrupted" else 1


def _train_with_display(run: Run, updates: int | None) -> Event | None:
    """Train under a live display, which ends as a figure and a table. Returns the last event."""
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


def _train_with_line(run: Run, updates: int | None) -> Event | None:
    """Train with one progress line, if the panel is open elsewhere. Returns the last event."""
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


def _load(run: Run, on_progress: Callable[[Progress], None]) -> None:
    """Load until complete, or until a pause is requested. Raises CommandError if it is interrupted."""
    try:
        for progress in run.load():
            on_progress(progress)
    except KeyboardInterrupt:
        raise CommandError(
            f"loading {run.name} was interrupted. Nothing has changed; `%finetune run` loads again."
        ) from None


def _worth_a_line(event: Event, iters: int, seconds_since: float) -> bool:
    """Whether to log the event without a live display: about twenty updates per run, and progress now and then."""
    if isinstance(event, Progress):
        return seconds_since >= _SECONDS_BETWEEN_LOG_LINES
    return not isinstance(event, StepCompleted | RolloutCompleted) or event.step % max(1, iters // 20) == 0


def _fitting(line: str, width: int) -> str:
    """The line in at most `width` characters; the parts before the time left are dropped, the last of them first."""
    parts = line.split(_BETWEEN)
    while len(_BETWEEN.join(parts)) > width and len(parts) > 3:
        del parts[-2]
    fitting = _BETWEEN.join(parts)
    return fitting if len(fitting) <= width else f"{fitting[: width - 1]}…"


class _LiveDisplay:
    """An output that is updated in place and, at the end, replaced by a lasting figure and table."""

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
        """Print a permanent line."""
        if self._in_terminal:
            sys.stdout.write(_CLEAR_LINE)
        print(text, flush=True)

    def say(self, text: str, *, last: bool = False) -> None:
        """Show a line instead of the progress; the `last` one stays in a terminal."""
        if last and self._in_terminal:
            self.print(text)
            return
        self._put(html.escape(text), text)
        self._shown_at = time.monotonic()

    def load(self, progress: Progress) -> None:
        """Show the progress of loading in place; in a log, print a line now and then."""
        in_place = self._in_notebook or self._in_terminal
        seconds = _SECONDS_BETWEEN_UPDATES if in_place else _SECONDS_BETWEEN_LOG_LINES
        if time.monotonic() - self._shown_at >= seconds:
            words = event_text.progress_words(progress)
            if not in_place:
                print(words, flush=True)
            self.say(words)

    def show(self, event: Event) -> None:
        """Process `event`; draw at most a few times per second."""
        for remark in event_text.remarks(event):
            # A failing reward function fails in every rollout.
            if remark not in self._remarked:
                self._remarked.add(remark)
                self.print(remark)
        is_warning = isinstance(event, DataChanged | LossSpiked | MemoryLow | NothingLearned)
        if is_warning:
            self.print(event_text.describe(event))
        since = time.monotonic() - self._shown_at
        self._iters = self._run.trainer.iters
        if not self._in_notebook and not self._in_terminal:
            if _worth_a_line(event, self._iters, since):
                print(event_text.describe(event), flush=True)
                self._shown_at = time.monotonic()
            return
        quick = isinstance(event, StepCompleted | RolloutCompleted | AdapterSaved | Progress)
        if self._in_terminal and not quick and not is_warning:
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
            f'{curve_legend(history)}&ensp;<span style="color:#D55E00">╍●</span> validation</div>'
        )
        curve = live_svg(history, self._iters)
        self._put(
            f'<div style="font-variant-numeric:tabular-nums">{head}{bar}{curve}{legend if curve else ""}</div>',
            line,
        )

    def finish(self, ended: Event | None) -> None:
        """Replace the live output by one that a saved, exported or untrusted notebook still shows."""
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
        """Show or update the output. After an error it is not updated again; training continues."""
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
            print(f"the live display failed ({error}); training continues.", file=sys.stderr)


def has_live_front_end() -> bool:
    """Whether this notebook is interactive: not a console, and not an executor such as nbconvert."""
    from IPython.core.getipython import get_ipython

    return has_rich_display() and bool(getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False))
