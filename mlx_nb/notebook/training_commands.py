"""The `%finetune` commands that train or control a run, or use its model: step, run, pause, generate, ...

A new command of this group is a function here and its entry in the table at the end.
"""

from __future__ import annotations

import argparse
from typing import Any

from mlx_nb.config.yaml_text import advice_as_words, read_list, read_words
from mlx_nb.errors import CommandError
from mlx_nb.events import Pause, RunState, Stop
from mlx_nb.notebook.command import (
    SETTINGS_EXAMPLE,
    Command,
    argument,
    command,
    notes_since,
    refuse_finished,
    wait_of,
)
from mlx_nb.notebook.front_end import insert_cell
from mlx_nb.notebook.progress_line import shown_progress
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.text_output import GrowingAnswer, Text, has_rich_display, say
from mlx_nb.run.inputs import SPLITS
from mlx_nb.view.event_text import AT_NO_UPDATE, STATES, progress_words


def _new(session: Session, arguments: argparse.Namespace) -> Any:
    """Open the form; without widgets, or with --write, write the cell at the next prompt or below this one."""
    from mlx_nb.notebook import new_run
    from mlx_nb.notebook.new_run_cell import cell_text

    given, namespace = new_run.given_in(arguments.changes), session.namespace or {}
    form = session.form
    if arguments.write or not has_rich_display():
        if form is not None and not given:
            given = dict(form.values)
        with advice_as_words():
            new_run.checked_run(given, namespace)
        insert_cell(cell_text(given))
        return None if has_rich_display() else Text(cell_text(given))
    if form is not None:
        form.close()
    session.form = new_run.NewRun(given, namespace)
    return session.form


def _step(session: Session, arguments: argparse.Namespace) -> None:
    from mlx_nb.notebook.driver import train

    if arguments.n < 1:
        raise CommandError(f"%finetune step: cannot do {arguments.n} updates. Give a whole number, at least 1.")
    run = session.get(arguments.name)
    refuse_finished(run)
    train(session, run, arguments.n, wait=True)


def _run(session: Session, arguments: argparse.Namespace) -> None:
    from mlx_nb.notebook.driver import train

    run = session.get(arguments.name)
    if arguments.n is None:
        refuse_finished(run)
        train(session, run, wait=wait_of(arguments))
        return
    known = len(run.history.events)
    updates = run.more(arguments.n)
    for note in notes_since(run, known):
        say(note)
    train(session, run, updates, wait=wait_of(arguments))


def _pause(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    if run.state != RunState.RUNNING:
        raise CommandError(f"{run.name} {STATES[run.state]}, so there is nothing to pause.")
    run.request(Pause())
    return Text(f"{run.name} pauses after this update.")


def _stop(session: Session, arguments: argparse.Namespace) -> Text | None:
    from mlx_nb.notebook.driver import train

    run = session.get(arguments.name)
    refuse_finished(run)
    run.request(Stop())
    if run.state == RunState.RUNNING:
        return Text(f"{run.name} stops after this update and saves its adapter.")
    train(session, run, 0, wait=True)
    return None


def _panel(session: Session, arguments: argparse.Namespace) -> None:
    from mlx_nb.notebook.driver import show_panel

    show_panel(session, session.get(arguments.name))


def _eval(session: Session, arguments: argparse.Namespace) -> Text:
    from IPython.lib.pretty import pretty

    from mlx_nb.view.event_text import describe

    run = session.get(arguments.name)
    metrics = None if arguments.metrics is None else read_list(arguments.metrics)
    options = {"all_rows": arguments.all, "metrics": metrics, "max_tokens": arguments.max_tokens}
    with shown_progress(run):
        result = run.evaluate(arguments.split, **options)
    detailed = arguments.all or bool(result.answer_metrics)
    return Text(pretty(result) if detailed else describe(result))


def _lr_find(session: Session, arguments: argparse.Namespace) -> Any:
    run = session.get(arguments.name)
    with shown_progress(run):
        return run.lr_find(lowest=arguments.lowest, highest=arguments.highest, updates=arguments.updates)


def _generate(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    options = {name: getattr(arguments, name) for name in ("base", "max_tokens", "temperature", "seed")}
    prompt = " ".join(arguments.prompt)
    if not has_rich_display():
        return Text(run.generate(prompt, **options))
    who = "the base" if arguments.base else run.name
    answer = GrowingAnswer(f"{who} generates …")
    try:
        for progress in run.inputs.loading():
            answer.wait(progress_words(progress))
        return answer.ended(run.generate(prompt, on_text=answer.grow, **options))
    except BaseException:
        answer.interrupted()
        raise


def _set(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    known = len(run.history.events)
    changes = read_words(arguments.changes, "%finetune set", SETTINGS_EXAMPLE)
    with advice_as_words():
        run.set(**changes)
    words = ", ".join(word.replace("=", ": ", 1) for word in arguments.changes)
    changed = f"{run.name}: {words}, {AT_NO_UPDATE}" if run.over else f"{run.name}: from the next update on, {words}"
    notes = notes_since(run, known)
    if run.state == RunState.RUNNING and run.prepared:  # the change takes effect at the next boundary
        notes += filter(None, (run.trainer.change_note(name, run.config) for name in changes))
    return Text("\n".join([changed, *notes]))


TRAINING_COMMANDS: dict[str, Command] = {
    "new": command(
        "new",
        "open a form that writes the cell of a new run",
        _new,
        argument("changes", nargs="*", metavar="key=value", help="initial values of the form"),
        argument("--write", action="store_true", help="write its cell into the next cell"),
        steers=True,
    ),
    "step": command("step", "do exactly n updates (default 1)", _step, argument("n", nargs="?", type=int, default=1)),
    "run": command(
        "run",
        "train to the end, or for n more updates",
        _run,
        argument("n", nargs="?", type=int),
        argument("--wait", action="store_true", help="wait in the cell until the run pauses or ends"),
        argument("--background", action="store_true", help="train in the background and return at once"),
    ),
    "pause": command("pause", "pause after this update; `%finetune run` continues", _pause, steers=True),
    "stop": command("stop", "end the run after this update and save its adapter", _stop, steers=True),
    "panel": command("panel", "show the live panel with controls and curves", _panel, steers=True),
    "status": command(
        "status",
        "show the progress of the run",
        lambda session, arguments: Text(session.get(arguments.name).status()),
        steers=True,
    ),
    "eval": command(
        "eval",
        "measure loss and metrics on a split now",
        _eval,
        argument("split", nargs="?", default="valid", choices=SPLITS),
        argument("--metrics", help="functions that judge the answers, such as exact_match,my_metric"),
        argument("--all", action="store_true", help="all rows of the split, not the fixed set of a validation"),
        argument("--max-tokens", type=int, help="longest answer in tokens (default: metric_tokens)"),
        of_now=True,
    ),
    "lr_find": command(
        "lr_find",
        "try rising learning rates on the next rows, suggest one, and undo it all",
        _lr_find,
        argument("--lowest", type=float, default=1e-6),
        argument("--highest", type=float, default=1.0),
        argument("--updates", type=int, default=60, help="number of rates to try (default: 60)"),
    ),
    "generate": command(
        "generate",
        "generate text with the current model",
        _generate,
        argument("prompt", nargs="+"),
        argument("--base", action="store_true", help="switch the adapter off"),
        argument("--max-tokens", type=int, default=256),
        argument("--temperature", type=float, default=0.0),
        argument("--seed", type=int, default=0),
        of_now=True,
    ),
    "set": command(
        "set",
        "change settings during the run",
        _set,
        argument("changes", nargs="+", metavar="key=value"),
        steers=True,
    ),
}
