"""Makes cells wait that are queued behind a cell that starts a run, as in Run All.

So a notebook gives the same results as under nbconvert and papermill, where a run trains in its own cell.
"""

from __future__ import annotations

import ast
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.error import InputRejected

from mlx_nb.errors import CommandError, error_lines
from mlx_nb.events import Event, Progress, RunFailed, RunPaused, RunState
from mlx_nb.notebook.front_end import request_header
from mlx_nb.notebook.progress_line import progress_summary
from mlx_nb.notebook.text_output import Line
from mlx_nb.view import event_text

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from mlx_nb.run.run import Run

NOW = "--now"


class CellNotRun(InputRejected):
    """The cell waited for a run that did not finish. Shown as one line in the notebook."""

    def _render_traceback_(self) -> list[str]:
        return error_lines(str(self))


@dataclass
class _Started:
    """A run that the cell of `request` started in the background, and when that cell ended (None until then)."""

    run: Run
    request: str
    ended: float | None = None


class QueuedCells:
    """Makes the cells of one shell wait for runs that earlier cells started, until `close`.

    A cell counts as queued if its request was sent before the cell that started the run had ended. The shortest time
    that any request took to arrive corrects for different clocks in kernel and browser. While there is such a run,
    IPython calls `visit` before it executes a cell.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._events = shell.events
        self._transformers: list[Any] = shell.ast_transformers  # objects with a method `visit`
        self._started: list[_Started] = []
        self._lag: float | None = None  # shortest time from sending to executing a request, plus the clock difference
        self.note_request()

    def close(self) -> None:
        """Stop making cells wait."""
        self._forget_end()
        self._started.clear()
        if self in self._transformers:
            self._transformers.remove(self)

    def follow(self, run: Run) -> None:
        """Register that this cell has started `run` in the background, so cells queued behind it wait."""
        if (request := self._request()) is None:
            return
        self._started = [one for one in self._started if one.run is not run and one.run.background.active]
        self._started.append(_Started(run, request[0]))
        if self not in self._transformers:
            self._transformers.append(self)
        # It is called before the reply is sent, so before a front end can send a cell that is not queued. The run has
        # registered its handling of interrupts before, so none strikes here.
        self._events.register("post_execute", self._note_end)

    def _note_end(self) -> None:
        for one in self._started:
            one.ended = one.ended or time.time()
        self._forget_end()

    def _forget_end(self) -> None:
        if self._note_end in self._events.callbacks["post_execute"]:
            self._events.unregister("post_execute", self._note_end)

    def note_request(self) -> None:
        """Record how long the request of the current cell took to arrive."""
        if (request := self._request()) is not None:
            lag = time.time() - request[1]
            self._lag = lag if self._lag is None else min(self._lag, lag)

    def _request(self) -> tuple[str, float] | None:
        """The current request, and when it was sent by the clock of the front end; None outside a kernel."""
        header = request_header() or {}
        try:
            return header["msg_id"], float(header["date"].timestamp())
        except (AttributeError, KeyError):
            return None

    def visit(self, cell: ast.AST) -> ast.AST:
        """Wait before a queued cell. Raises CellNotRun if the run fails or is paused meanwhile."""
        self.note_request()
        request = self._request()
        if request is None or acts_now(cell):
            return cell
        sent = request[1] + (self._lag or 0.0)
        behind = [one for one in self._started if one.request != request[0] and (one.ended is None or sent < one.ended)]
        try:
            wait_for([one.run for one in behind])
        except CommandError as error:
            raise CellNotRun(str(error)) from None
        return cell

    def before_command(self) -> None:
        """Wait for runs started earlier in the same cell. Raises CommandError as `wait_for` does."""
        request = self._request()
        wait_for([one.run for one in self._started if request is not None and one.request == request[0]])


def acts_now(cell: ast.AST) -> bool:
    """Whether a `%finetune` in the cell has the option --now."""
    for call in ast.walk(cell):
        match call:
            case ast.Call(
                func=ast.Attribute(attr="run_line_magic" | "run_cell_magic"),
                args=[ast.Constant("finetune"), ast.Constant(str() as line), *_],
            ) if NOW in line:
                try:
                    if NOW in shlex.split(line):
                        return True
                except ValueError:  # the command reports the error itself
                    return True
    return False


def wait_for(runs: list[Run]) -> None:
    """Train the runs to their ends, with a progress line.

    Raises CommandError if one of them fails, has failed, or is paused, for instance by an interrupt.
    """
    for run in runs:
        if run.state == RunState.FAILED:
            _refuse_unfinished(run, None)
    moving = [run for run in runs if run.background.active]
    if not moving:
        return
    line = _WaitingLine(moving)
    last: dict[int, Event] = {}
    with _own_interrupts():
        events = {id(run): run.background.drive_in_cell() for run in moving}
        while events:
            for run in moving:
                event = next(events[id(run)], None) if id(run) in events else None
                if event is None:
                    events.pop(id(run), None)
                else:
                    last[id(run)] = event
                    line.show(run, event)
    line.finish()
    for run in moving:
        _refuse_unfinished(run, last.get(id(run)))


def _refuse_unfinished(run: Run, last: Event | None) -> None:
    """Raise CommandError if a run that a cell waited for did not finish."""
    where = f"{run.name} {event_text.STATES[run.state]} after update {run.step_count}"
    again = "`%finetune run` continues. This cell waited for the run and was not executed; execute it again to act now."
    if run.state == RunState.FAILED:
        known = [event.error for event in (last, *reversed(run.history.events)) if isinstance(event, RunFailed)]
        raise CommandError(f"{where}: {known[0] if known else run.status()} {again}")
    if run.state in (RunState.PAUSED, RunState.BUILT):
        reason = f" ({last.reason})" if isinstance(last, RunPaused) and last.reason != "interrupted" else ""
        raise CommandError(f"{where}{reason}; nothing is lost. {again}")


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Restores the SIGINT handler of the cell afterwards: a run that ends installs the one for between cells."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _WaitingLine:
    """The output of a waiting cell: one line per run."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs
        self._activity: dict[int, str] = {}
        self._shown = Line(self._text())

    def show(self, run: Run, event: Event) -> None:
        """Process an event; the line changes at most a few times per second."""
        self._activity[id(run)] = event_text.progress_words(event) if isinstance(event, Progress) else ""
        if self._shown.is_due:
            self._shown.put(self._text())

    def finish(self) -> None:
        """Show the results of the runs."""
        self._activity.clear()
        self._shown.put(self._text())

    def _text(self) -> str:
        return "\n".join(self._line(run) for run in self._runs)

    def _line(self, run: Run) -> str:
        if run.state != RunState.RUNNING:
            return f"waited for {run.name}, which {event_text.STATES[run.state]}  ·  {progress_summary(run)}"
        hint = f"interrupt to pause it; {NOW} does not wait"
        return f"waiting for {run.name}  ·  {progress_summary(run, self._activity.get(id(run), ''))}  ·  {hint}"
