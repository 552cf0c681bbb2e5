"""Dispatches a `%finetune` line: finds the command, parses its arguments and calls it.

The commands are in training_commands, row_commands, result_commands, branch_commands, export_commands and
sweep_cell.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_nb.errors import CommandError, did_you_mean
from mlx_nb.events import RunState
from mlx_nb.notebook.adapter_commands import ADAPTER_COMMANDS
from mlx_nb.notebook.branch_commands import BRANCH_COMMANDS
from mlx_nb.notebook.command import Command, argument, command, refuse_shortened
from mlx_nb.notebook.export_commands import EXPORT_COMMANDS
from mlx_nb.notebook.help_text import commands_help, help_of
from mlx_nb.notebook.result_commands import RESULT_COMMANDS
from mlx_nb.notebook.row_commands import ROW_COMMANDS
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.sweep_cell import SWEEP_COMMANDS
from mlx_nb.notebook.text_output import Text, say
from mlx_nb.notebook.training_commands import TRAINING_COMMANDS


def run_line(session: Session, line: str) -> Any:
    """Run the line of a `%finetune` magic. Returns the object to display, or None."""
    if session.queued is not None:
        session.queued.note_request()
    try:
        words = shlex.split(line)
    except ValueError as error:
        if line.split()[0] == "generate" and '"' not in line:  # an apostrophe in a prompt without quotation marks
            return run_line(session, line.replace("'", "\\'"))
        raise CommandError(f"%finetune {line}: {error}. Close the quotation marks.") from None
    if not words:
        return _help_text()
    name, *rest = words
    if name not in COMMANDS:
        raise CommandError(
            f"%finetune has no command {name!r}.{did_you_mean(name, COMMANDS)} `%finetune help` lists them."
        )
    chosen = COMMANDS[name]
    refuse_shortened(rest, chosen.parser, f"%finetune {name}")
    arguments = chosen.parser.parse_intermixed_args(rest)
    if session.queued is not None and not chosen.steers and not arguments.now:
        session.queued.before_command()
    stamp = _running_at(session, arguments.name) if chosen.of_now and _is_of_a_run(arguments) else None
    with _unchanged_when_interrupted(session, name, arguments):
        answer = chosen.act(session, arguments)
    if "name" in arguments and (arguments.name in session.runs or (arguments.name is None and session.runs)):
        session.show_again(session.get(arguments.name))
    if stamp is not None and isinstance(answer, Text):
        return answer.stamped(stamp)
    if stamp is not None:
        say(stamp)
    return answer


@contextmanager
def _unchanged_when_interrupted(session: Session, command: str, arguments: argparse.Namespace) -> Iterator[None]:
    """A context that turns an interrupt of a command without side effects, such as an answer, into CommandError."""
    runs = session.runs
    run = runs.get(getattr(arguments, "name", None) or "", session.get() if runs else None)
    before = run and (run.step_count, len(run.history.events))
    try:
        yield
    except KeyboardInterrupt:
        if run is None or before != (run.step_count, len(run.history.events)):
            raise
        where = f"{run.name} is unchanged, {run.state} at update {run.step_count}"
        raise CommandError(f"%finetune {command} was interrupted; {where}.") from None


def _is_of_a_run(arguments: argparse.Namespace) -> bool:
    """Whether a command is about a run, and not about rows given with `data=`."""
    return not any("=" in word for word in getattr(arguments, "what", ()))


def _running_at(session: Session, name: str | None) -> str | None:
    """`update 7 of 60, running` for a run that trains in the background; None for any other."""
    if not session.runs:  # a command that needs one reports that itself
        return None
    run = session.get(name)
    if run.state != RunState.RUNNING:
        return None
    iters = run.trainer.iters if run.prepared else run.config.iters
    return f"update {run.step_count}{f' of {iters}' if iters else ''}, running"


def _help_text(name: str | None = None) -> Text:
    return Text(commands_help(COMMANDS) if name is None else help_of(name, COMMANDS))


COMMANDS: dict[str, Command] = {
    **TRAINING_COMMANDS,
    **ROW_COMMANDS,
    **RESULT_COMMANDS,
    **BRANCH_COMMANDS,
    **ADAPTER_COMMANDS,
    **EXPORT_COMMANDS,
    **SWEEP_COMMANDS,
    "help": command(
        "help",
        "show this list, or help for a command or setting",
        lambda _session, arguments: _help_text(arguments.command),
        argument("command", nargs="?"),
        steers=True,
    ),
}
