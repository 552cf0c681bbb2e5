"""Sweeps in a notebook: the cell that starts one, its live table, and the command that continues it."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import CommandError
from mlx_nb.events import Event
from mlx_nb.notebook.command import Command, argument, command, output_name
from mlx_nb.notebook.lost_interrupts import raise_lost_interrupt
from mlx_nb.notebook.progress_line import progress_shown
from mlx_nb.notebook.templating import fill
from mlx_nb.notebook.text_output import Text, has_rich_display, say

if TYPE_CHECKING:
    from mlx_nb.experiments.sweep import Sweep
    from mlx_nb.notebook.session import Session

_WHAT = ("show", "run", "cell")
_SECONDS_BETWEEN_TABLES = 1.0
_SHARE_OF_DRAWING = 0.1  # of the time


def start_sweep(session: Session, cell: str, arguments: argparse.Namespace) -> None:
    """Do what a `%%finetune --sweep` cell says: make its runs, say what they will take, train them, show the table.

    Raises CommandError for an option of a single run.
    """
    from mlx_nb.experiments.sweep import sweep

    single = {"--paused": arguments.paused, "--background": arguments.background, "--from": arguments.start}
    if given := [option for option, value in (*single.items(), ("--allow-changed", arguments.allow_changed)) if value]:
        raise CommandError(f"{given[0]} is for a single run, not for --sweep.")
    output = output_name(arguments.output)
    namespace = session.namespace if session.namespace is not None else {}
    options = {"halving": arguments.halving, "trials": arguments.trials, "resume": arguments.resume}
    found = sweep(fill(cell, namespace) + "\n", name=arguments.name, namespace=namespace, **options)
    for run in found.runs:
        for note in session.add(run):
            say(note)
    session.sweep = found
    if output is not None and session.namespace is not None:
        session.namespace[output] = found
    _train(session, found)


def _train(session: Session, found: Sweep) -> None:
    raise_lost_interrupt()
    table = _LiveTable(found)
    say(found.budget)
    try:
        with progress_shown() as show:

            def on_event(event: Event) -> None:
                show(event)
                table.refresh()

            found.run(on_event)
    finally:
        table.end()
    if not found.finished:
        say(f"{found.name} is paused, and saved. `%finetune sweep run` continues, as does its cell with --resume.")
        return
    session.select(found.best.name)
    say(f"{found.best.name} is the current run now. `%finetune sweep cell` writes its settings to the next cell.")


class _LiveTable:
    """The table and curves of a sweep in a cell, drawn again while it trains; printed at the end in a terminal."""

    def __init__(self, found: Sweep) -> None:
        self._sweep = found
        self._due = 0.0
        self._handle: Any = None

    def refresh(self) -> None:
        """Draw it again if enough time has passed."""
        if time.monotonic() >= self._due and has_rich_display():
            self._draw()

    def end(self) -> None:
        """Draw it for the last time."""
        self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        begun = time.monotonic()
        if not has_rich_display():
            print(self._sweep)
        elif self._handle is None:
            self._handle = display(self._sweep, display_id=True)
        else:
            self._handle.update(self._sweep)
        now = time.monotonic()
        self._due = now + max(_SECONDS_BETWEEN_TABLES, (now - begun) / _SHARE_OF_DRAWING)


def _sweep(session: Session, arguments: argparse.Namespace) -> Any:
    found = session.sweep
    if found is None:
        raise CommandError("there is no sweep yet. A %%finetune --sweep cell with lists of values starts one.")
    if arguments.what == "run":
        _train(session, found)
        return None
    if arguments.what == "cell":
        from IPython.core.getipython import get_ipython

        shell: Any = get_ipython()
        shell.set_next_input(found.cell())
        return Text(f"The settings of {found.best.name} are in the next cell.")
    return found


SWEEP_COMMANDS: dict[str, Command] = {
    "sweep": command(
        "sweep",
        "show the last sweep, continue it (run), or write its best settings to a cell (cell)",
        _sweep,
        argument("what", nargs="?", default="show", choices=_WHAT, help="show (default), run, or cell"),
    ),
}
