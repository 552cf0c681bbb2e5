"""The `%finetune` commands that go back, branch off or switch runs: rewind, skip, fork, resume, use.

A new command of this group is a function here and its entry in the table at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_nb.config.yaml_text import advice_as_words, read_words
from mlx_nb.errors import CommandError, did_you_mean
from mlx_nb.files.places import run_folder, working_folder
from mlx_nb.notebook.command import (
    OUTPUT,
    SETTINGS_EXAMPLE,
    Command,
    argument,
    command,
    output_name,
    refuse_finished,
)
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.text_output import Text
from mlx_nb.run.resume import resumable
from mlx_nb.run.run import Run


def _rewind(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.view.event_text import describe

    run = session.get(arguments.name)
    if arguments.to is not None and arguments.n is not None:
        raise CommandError("%finetune rewind: give a number of updates or --to, not both.")
    return Text(
        f"{run.name} {describe(run.rewind(arguments.n, to=arguments.to))}. `%finetune run` continues from there."
    )


def _skip(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    refuse_finished(run)
    rows = run.trainer.next_rows()
    places = run.inputs.places_of(rows)
    run.skip()
    return Text(
        f"{run.name} will leave out the batch with rows {', '.join(map(str, rows))}. {places}{' ' if places else ''}"
        "`%finetune run` continues after it."
    )


def _fork(session: Session, arguments: argparse.Namespace) -> Text:
    run, output = session.get(arguments.name), output_name(arguments.output)
    changes = read_words(arguments.changes, "%finetune fork", SETTINGS_EXAMPLE)
    with advice_as_words():
        fork = run.fork(name=arguments.as_name, **changes)
    notes = session.add(fork, output)
    next_steps = f"`%finetune run` trains the fork; `%finetune use {run.name}` switches back to {run.name}."
    return Text("\n".join([repr(fork), next_steps, *notes]))


def _resume(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.notebook.driver import has_live_front_end, show_panel

    output = output_name(arguments.output)
    folder = run_folder(arguments.run or arguments.name or _only_candidate(), working_folder())
    if not folder.exists():
        near = did_you_mean(folder.name, resumable(folder.parent))
        raise CommandError(
            f"%finetune resume: no checkpoint, because there is no {folder}.{near} "
            "`%finetune runs --disk` lists what there is."
        )
    run = Run.resume(
        folder,
        step=arguments.step,
        namespace=session.namespace,
        allow_changed=arguments.allow_changed or (),
    )
    notes = session.add(run, output)
    if has_live_front_end():
        show_panel(session, run)
    next_step = "`%finetune run 20` does 20 more updates" if run.over else "`%finetune run` continues from there"
    return Text("\n".join([repr(run), f"{next_step}.", *notes, *run.trainer.notes]))


def _only_candidate() -> str:
    """The only run in `adapters/` that can be resumed. Raises CommandError if there is none, or several."""
    found = resumable(Path("adapters"))
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise CommandError(
            f"%finetune resume: no run in {Path('adapters').resolve()} has a checkpoint. Give the folder of a run."
        )
    listed = ", ".join(f"{name} (update {step})" for name, step in found.items())
    raise CommandError(
        f"%finetune resume: which run? There are {listed}. Example: %finetune resume {next(iter(found))}"
    )


BRANCH_COMMANDS: dict[str, Command] = {
    "rewind": command(
        "rewind",
        "go back n updates (default 1), or --to an update",
        _rewind,
        argument("n", nargs="?", type=int),
        argument("--to", type=int, metavar="UPDATE"),
    ),
    "skip": command("skip", "leave out the next batch, such as after a loss spike", _skip, steers=True),
    "fork": command(
        "fork",
        "start a second run from here with other settings",
        _fork,
        argument("changes", nargs="*", metavar="key=value"),
        OUTPUT,
        argument("--as", dest="as_name", metavar="NAME", help="name of the fork (default: the run's name with -fork)"),
        of_now=True,
    ),
    "resume": command(
        "resume",
        "continue a run from its newest checkpoint",
        _resume,
        argument("run", nargs="?", help="name of the run, or its adapter folder (default: the only one there is)"),
        OUTPUT,
        argument("--step", type=int, help="continue from the checkpoint of this update"),
        argument("--allow-changed", nargs="+", metavar="WHAT", help="continue although this has changed"),
    ),
    "use": command(
        "use",
        "select the run that commands act on",
        lambda session, arguments: Text(repr(session.select(arguments.run))),
        argument("run"),
        steers=True,
    ),
}
