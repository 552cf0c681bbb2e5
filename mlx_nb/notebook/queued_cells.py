"""Cells that were sent before the cell that started a run had ended, as by Run All: they wait for the run.

So a notebook gives what it gives under nbconvert and papermill, where a run trains in its own cell.
"""

from __future__ import annotations

import ast
import asyncio
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.error import InputRejected

from mlx_nb.errors import CommandError
from mlx_nb.events import Event, Progress, RunFailed, RunPaused, RunState
from mlx_nb.notebook.front_end import request_header
from mlx_nb.notebook.progress_line import how_far
from mlx_nb.notebook.shown_text import Line
from mlx_nb.view import event_text

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from mlx_nb.run.run import Run

NOW = "--now"


class CellNotRun(InputRejected):
    """The cell waited for a run that did not come to its end. In the notebook it is one line."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


@dataclass
class _Started:
    """A run that the cell of `request` started in the background, and when that cell had ended.

    None while it is executed, and until the loop has its next turn: what comes until then was there already.
    """

    run: Run
    request: str
    ended: float | None = None

    def note_end(self) -> None:
        self.ended = time.time()


class QueuedCells:
    """Has the cells of one shell wait for the runs that cells before them started. `close` ends it.

    A cell was queued when its request was sent before the cell that started the run had ended. Both times are made
    comparable by the least time that any request took to arrive, so that the clocks of kernel and browser may differ.
    While there is such a run, IPython hands each cell to `visit` before it is executed.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._transformers: list[Any] = shell.ast_transformers  # which need a `visit` and no more
        self._started: list[_Started] = []
        self._lag: float | None = (
            None  # of a request from being sent to being executed, at the least, and of the clocks
        )
        self.note_request()

    def close(self) -> None:
        """Let every cell be executed at once again."""
        self._started.clear()
        if self in self._transformers:
            self._transformers.remove(self)

    def follow(self, run: Run) -> None:
        """This cell has started `run` in the background: what is queued behind it waits."""
        if (request := self._request()) is None:
            return
        started = _Started(run, request[0])
        self._started = [one for one in self._started if one.run is not run and one.run.background.active]
        self._started.append(started)
        if self not in self._transformers:
            self._transformers.append(self)
        asyncio.get_running_loop().call_soon(started.note_end)

    def note_request(self) -> None:
        """A cell is executed: take note of how long its request took to arrive."""
        if (request := self._request()) is not None:
            lag = time.time() - request[1]
            self._lag = lag if self._lag is None else min(self._lag, lag)

    def _request(self) -> tuple[str, float] | None:
        """The request that is executed, and when it was sent by the clock of the front end; None outside a kernel."""
        header = request_header() or {}
        try:
            return header["msg_id"], float(header["date"].timestamp())
        except (AttributeError, KeyError):
            return None

    def visit(self, cell: ast.AST) -> ast.AST:
        """Wait before a cell that was queued. Raises CellNotRun where the run fails or is paused meanwhile."""
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
        """Wait for the runs that this very cell has started. Raises CommandError as `wait_for`."""
        request = self._request()
        wait_for([one.run for one in self._started if request is not None and one.request == request[0]])


def acts_now(cell: ast.AST) -> bool:
    """Whether a `%finetune` in the cell says that it acts at once."""
    for call in ast.walk(cell):
        match call:
            case ast.Call(
                func=ast.Attribute(attr="run_line_magic" | "run_cell_magic"),
                args=[ast.Constant("finetune"), ast.Constant(str() as line), *_],
            ) if NOW in line:
                try:
                    if NOW in shlex.split(line):
                        return True
                except ValueError:  # the command says what is wrong with it
                    return True
    return False


def wait_for(runs: list[Run]) -> None:
    """Move the runs to their ends, with a line that says how far they are.

    Raises CommandError where one of them fails, or has failed, or is paused, as an interrupt does.
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
    """Raise CommandError for a run that a cell waited for and that did not come to its end."""
    where = f"{run.name} {event_text.STATES[run.state]} after update {run.step_count}"
    again = "`%finetune run` goes on. This cell waited for it and was not executed: execute it again to act on that."
    if run.state == RunState.FAILED:
        known = [event.error for event in (last, *reversed(run.history.events)) if isinstance(event, RunFailed)]
        raise CommandError(f"{where}: {known[0] if known else run.status()} {again}")
    if run.state in (RunState.PAUSED, RunState.BUILT):
        reason = f" ({last.reason})" if isinstance(last, RunPaused) and last.reason != "interrupted" else ""
        raise CommandError(f"{where}{reason}; nothing is lost. {again}")


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """What answers SIGINT in a cell answers it again afterwards: a run that ends gives back what was between cells."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _WaitingLine:
    """What the cell that waits says about the runs, a line each."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs
        self._activity: dict[int, str] = {}
        self._shown = Line(self._text())

    def show(self, run: Run, event: Event) -> None:
        """Take note of an event; the line changes a few times a second."""
        self._activity[id(run)] = event_text.progress_words(event) if isinstance(event, Progress) else ""
        if self._shown.is_due:
            self._shown.put(self._text())

    def finish(self) -> None:
        """Say what the runs came to."""
        self._activity.clear()
        self._shown.put(self._text())

    def _text(self) -> str:
        return "\n".join(self._line(run) for run in self._runs)

    def _line(self, run: Run) -> str:
        if run.state != RunState.RUNNING:
            return f"waited for {run.name}, which {event_text.STATES[run.state]}  ·  {how_far(run)}"
        hint = f"an interrupt pauses it, {NOW} would not wait"
        return f"waiting for {run.name}  ·  {how_far(run, self._activity.get(id(run), ''))}  ·  {hint}"
