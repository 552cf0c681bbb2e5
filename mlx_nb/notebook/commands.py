"""The subcommands of `%finetune`: each parses its words and delegates to a Run."""

from __future__ import annotations

import argparse
import json
import keyword
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.config.yaml_text import advice_as_words, read_words
from mlx_nb.errors import CommandError, did_you_mean
from mlx_nb.events import Pause, RunState, Stop
from mlx_nb.files.places import run_folder, working_folder
from mlx_nb.notebook.help_text import WIDTH, commands_help, help_of
from mlx_nb.notebook.queued_cells import NOW
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.shown_text import GrowingAnswer, Text, has_rich_display
from mlx_nb.run.inputs import SPLITS
from mlx_nb.run.resume import resumable
from mlx_nb.run.run import Run
from mlx_nb.run.saved import how_to_use
from mlx_nb.view.event_text import AT_NO_UPDATE, STATES, progress_words, remarks, visits_text
from mlx_nb.view.metric_text import headline

CELL_OPTIONS = {
    "--name": "name of the run (default: run); also its folder in adapters/",
    "-o": "bind the Run to this variable",
    "--paused": "build the run, load nothing, train nothing",
    "--wait": "stay in the cell until the run pauses or ends",
    "--background": "return at once and train in the background, whoever looks; queued cells do not wait for it",
    NOW: "do not wait for a run that a cell before started, where this one is queued behind it",
    "--resume": "go on from the newest checkpoint of this name, if there is one",
    "--allow-changed": "go on although this changed since (with --resume: a setting, data, template, model, ...; with "
    "resume_adapter_file or reference_adapter: model)",
}


_EXAMPLE = "learning_rate=5e-5"
_ROWS_EXAMPLE = "%finetune rows data=bees model=smollm2-135m"


@dataclass(frozen=True)
class Command:
    """One subcommand: what it takes, what it does, and the function `(session, arguments) -> object to display`.

    `of_now` says that its answer is about the run as it is at that moment: of one that is running the answer names the
    update.
    """

    usage: str
    help: str
    act: Callable[[Session, argparse.Namespace], Any]
    parser: argparse.ArgumentParser
    of_now: bool

    @property
    def options(self) -> list[str]:
        """The words for its options, such as `--wait`."""
        return [
            word
            for action in self.parser._actions
            for word in action.option_strings
            if word.startswith("--") and word != "--name"
        ]


class _Parser(argparse.ArgumentParser):
    """argparse that raises CommandError where it would end the process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(add_help=False, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"%finetune {self.prog}: {message}. Usage: %finetune {self.prog} {_usage(self)}".rstrip())


def refuse_shortened(words: Sequence[str], parser: argparse.ArgumentParser, where: str) -> None:
    """Raise CommandError for a word that is the beginning of an option, or an option with too few hyphens."""
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in words:
        given = word.partition("=")[0]
        if not given.startswith("-") or len(given) < 3 or given in known:
            continue
        meant = [option for option in known if option.startswith(f"--{given.lstrip('-')}")]
        if meant:
            raise CommandError(f"{where}: there is no option {given}. Did you mean {' or '.join(meant)}?")


def output_name(word: str | None) -> str | None:
    """The variable that `-o` names. Raises CommandError where it cannot be one."""
    if word is not None and (not word.isidentifier() or keyword.iskeyword(word)):
        raise CommandError(f"-o {word!r} is not a variable name.")
    return word


def _usage(parser: argparse.ArgumentParser) -> str:
    words = parser.format_usage().split()
    return " ".join(words[words.index(parser.prog) + 1 :])


def run_line(session: Session, line: str) -> Any:
    """Carry out the line of a `%finetune` magic. Returns what is to be displayed, or None."""
    if session.queued is not None:
        session.queued.note_request()
    try:
        words = shlex.split(line)
    except ValueError as error:
        if line.split()[0] == "generate" and '"' not in line:  # an apostrophe in a text without quotation marks
            return run_line(session, line.replace("'", "\\'"))
        raise CommandError(f"%finetune {line}: {error}. Close the quotation marks.") from None
    if not words:
        return _help_text()
    name, *rest = words
    if name not in COMMANDS:
        raise CommandError(
            f"%finetune has no command {name!r}.{did_you_mean(name, COMMANDS)} `%finetune help` lists them."
        )
    command = COMMANDS[name]
    refuse_shortened(rest, command.parser, f"%finetune {name}")
    arguments = command.parser.parse_args(rest)
    if session.queued is not None and name not in _STEERING and not arguments.now:
        session.queued.before_command()
    stamp = _running_at(session, arguments.name) if command.of_now and _is_of_a_run(arguments) else None
    with _unchanged_when_interrupted(session, name, arguments):
        answer = command.act(session, arguments)
    if "name" in arguments and (arguments.name in session.runs or (arguments.name is None and session.runs)):
        session.show_again(session.get(arguments.name))
    if stamp is not None and isinstance(answer, Text):
        return answer.stamped(stamp)
    if stamp is not None:
        print(stamp)
    return answer


@contextmanager
def _unchanged_when_interrupted(session: Session, command: str, arguments: argparse.Namespace) -> Iterator[None]:
    """Raise CommandError in place of an interrupt that broke off what changes nothing, such as an answer."""
    runs = session.runs
    run = runs.get(getattr(arguments, "name", None) or "", session.get() if runs else None)
    before = run and (run.step_count, len(run.history.events))
    try:
        yield
    except KeyboardInterrupt:
        if run is None or before != (run.step_count, len(run.history.events)):
            raise
        where = f"{run.name} is as it was, {run.state} at update {run.step_count}"
        raise CommandError(f"%finetune {command} was interrupted; {where}.") from None


def _is_of_a_run(arguments: argparse.Namespace) -> bool:
    """Whether a command is about a run, and not about rows that it names itself."""
    return not any("=" in word for word in getattr(arguments, "what", ()))


def _running_at(session: Session, name: str | None) -> str | None:
    """`update 7 of 60, running` of a run that moves in the background; None of every other."""
    if not session.runs:  # the command says so itself, where it needs one
        return None
    run = session.get(name)
    if run.state != RunState.RUNNING:
        return None
    iters = run.trainer.iters if run.prepared else run.config.iters
    return f"update {run.step_count}{f' of {iters}' if iters else ''}, running"


def _help_text(name: str | None = None) -> Text:
    return Text(commands_help(COMMANDS) if name is None else help_of(name, COMMANDS))


def _step(session: Session, arguments: argparse.Namespace) -> None:
    from mlx_nb.notebook.driver import train

    if arguments.n < 1:
        raise CommandError(f"%finetune step: cannot do {arguments.n} updates. Give a whole number of 1 or more.")
    run = session.get(arguments.name)
    _refuse_finished(run)
    train(session, run, arguments.n, wait=True)


def _run(session: Session, arguments: argparse.Namespace) -> None:
    from mlx_nb.notebook.driver import train

    run = session.get(arguments.name)
    if arguments.n is None:
        _refuse_finished(run)
        train(session, run, wait=wait_of(arguments))
        return
    known = len(run.history.events)
    updates = run.more(arguments.n)
    for note in _notes_since(run, known):
        print(note)
    train(session, run, updates, wait=wait_of(arguments))


def wait_of(arguments: argparse.Namespace) -> bool | None:
    """What --wait and --background say; None when neither does."""
    if arguments.wait and arguments.background:
        raise CommandError("--wait and --background exclude each other.")
    return True if arguments.wait else False if arguments.background else None


def _pause(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    if run.state != RunState.RUNNING:
        raise CommandError(f"{run.name} {STATES[run.state]}, so there is nothing to pause.")
    run.request(Pause())
    return Text(f"{run.name} pauses after this update.")


def _stop(session: Session, arguments: argparse.Namespace) -> Text | None:
    from mlx_nb.notebook.driver import train

    run = session.get(arguments.name)
    _refuse_finished(run)
    run.request(Stop())
    if run.state == RunState.RUNNING:
        return Text(f"{run.name} stops after this update and saves its adapter.")
    train(session, run, 0, wait=True)
    return None


def _panel(session: Session, arguments: argparse.Namespace) -> None:
    from mlx_nb.notebook.driver import show_panel

    show_panel(session, session.get(arguments.name))


def _refuse_finished(run: Run) -> None:
    if run.over:
        raise CommandError(
            f"{run.name} is finished: all {run.step_count} updates are done. `%finetune run 20` does 20 more, and "
            "`%finetune set iters=...` makes it longer."
        )


def _eval(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.view.event_text import describe

    return Text(describe(session.get(arguments.name).evaluate(arguments.split)))


def _generate(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    asked = {name: getattr(arguments, name) for name in ("base", "max_tokens", "temperature", "seed")}
    prompt = " ".join(arguments.prompt)
    if not has_rich_display():
        return Text(run.generate(prompt, **asked))
    who = "the base" if arguments.base else run.name
    answer = GrowingAnswer(f"{who} answers …")
    try:
        for progress in run.inputs.loading():
            answer.wait(progress_words(progress))
        return answer.ended(run.generate(prompt, on_text=answer.grow, **asked))
    except BaseException:
        answer.broken_off()
        raise


def _set(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    known = len(run.history.events)
    changes = read_words(arguments.changes, "%finetune set", _EXAMPLE)
    with advice_as_words():
        run.set(**changes)
    words = ", ".join(word.replace("=", ": ", 1) for word in arguments.changes)
    changed = f"{run.name}: {words}, {AT_NO_UPDATE}" if run.over else f"{run.name}: from the next update on, {words}"
    notes = _notes_since(run, known)
    if run.state == RunState.RUNNING and run.prepared:  # it is recorded at the next boundary
        notes += filter(None, (run.trainer.change_words(name, run.config) for name in changes))
    return Text("\n".join([changed, *notes]))


def _notes_since(run: Run, known: int) -> list[str]:
    """What else the changes of settings do that came after the first `known` events."""
    return [note for event in run.history.events[known:] for note in remarks(event)]


def _save(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    folder = run.save(arguments.path)
    return Text("\n".join([f"saved to {folder}", *how_to_use(run.config, run.loaded, folder)]))


def _runs(session: Session, arguments: argparse.Namespace) -> Text:
    if arguments.disk:
        from mlx_nb.notebook.kept import kept_text

        return Text(kept_text(run.folder for run in session.runs.values()))
    if not session.runs:
        return Text("no runs yet. A %%finetune cell makes one.")
    table = [("", "run", "state", "update", "loss", "validation", "method", "model")]
    for run in session.runs.values():
        last, valid = run.history.last_step, run.history.evaluations("valid")
        table.append(
            (
                "→" if session.is_current(run) else "",
                run.name,
                run.state,
                f"{run.step_count} of {run.trainer.iters}" if run.prepared else "-",
                f"{last.loss:.4f}" if last else "-",
                _headline_text(valid[-1]) if valid else "-",
                f"{run.config.method}, {run.config.fine_tune_type}",
                run.config.model,
            )
        )
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return Text("\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in table))


def _config(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    return Text(run.config.to_yaml().rstrip() or "# every setting is at its default")


def _compare(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.notebook.several_runs import compared

    names = list(dict.fromkeys(arguments.runs))
    runs = [session.get(name) for name in names]
    if len(runs) == 1 and not session.is_current(runs[0]):
        runs.insert(0, session.get())
    if not runs:
        runs = list(session.runs.values())
    if len(runs) < 2:
        raise CommandError("%finetune compare: name two runs or more. `%finetune runs` lists them.")
    return Text(compared(runs))


def _load(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.run.saved import load

    output = output_name(arguments.output) or "model"
    known = session.runs.get(arguments.folder)
    place = known.folder if known is not None else Path(arguments.folder)
    model = load(place if place.exists() else run_folder(arguments.folder, working_folder()))
    if session.namespace is not None:
        session.namespace[output] = model
    return Text(f"{model!r}\n`{output}.generate('Hello')` asks it, `{output}.generate('Hello', base=True)` its base.")


def _delete(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.notebook.kept import delete_kept

    known = session.runs.get(arguments.run)
    folder = known.folder if known is not None else run_folder(arguments.run, working_folder())
    return Text(delete_kept(folder, yes=arguments.yes))


def _headline_text(evaluation: dict[str, Any]) -> str:
    name, value = headline(evaluation)
    return f"{value:.4f}" if name == "loss" else f"{name} {value:.4f}"


def _rewind(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.view.event_text import describe

    run = session.get(arguments.name)
    if arguments.to is not None and arguments.n is not None:
        raise CommandError("%finetune rewind: give a number of updates or --to, not both.")
    return Text(f"{run.name} {describe(run.rewind(arguments.n, to=arguments.to))}. `%finetune run` goes on from there.")


def _skip(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    _refuse_finished(run)
    rows = run.trainer.next_rows()
    places = run.inputs.places_of(rows)
    run.skip()
    return Text(
        f"{run.name} will leave out the batch with rows {', '.join(map(str, rows))}. {places}{' ' if places else ''}"
        "`%finetune run` goes on after it."
    )


def _fork(session: Session, arguments: argparse.Namespace) -> Text:
    run, output = session.get(arguments.name), output_name(arguments.output)
    changes = read_words(arguments.changes, "%finetune fork", _EXAMPLE)
    with advice_as_words():
        fork = run.fork(name=arguments.as_name, **changes)
    notes = session.add(fork, output)
    moves = f"`%finetune run` moves the fork; `%finetune use {run.name}` goes back to {run.name}."
    return Text("\n".join([repr(fork), moves, *notes]))


def _resume(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.notebook.driver import has_live_front_end, show_panel

    output = output_name(arguments.output)
    run = Run.resume(
        run_folder(arguments.run or arguments.name or _only_candidate(), working_folder()),
        step=arguments.step,
        namespace=session.namespace,
        allow_changed=arguments.allow_changed or (),
    )
    notes = session.add(run, output)
    if has_live_front_end():
        show_panel(session, run)
    goes_on = "`%finetune run 20` does 20 more updates" if run.over else "`%finetune run` goes on from there"
    return Text("\n".join([repr(run), f"{goes_on}.", *notes, *run.trainer.notes]))


def _only_candidate() -> str:
    """The one run here that can be resumed. Raises CommandError where there is none, or more of them."""
    found = resumable(Path("adapters"))
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise CommandError(
            f"%finetune resume: no run in {Path('adapters').resolve()} has a checkpoint. Give the folder of one."
        )
    listed = ", ".join(f"{name} (update {step})" for name, step in found.items())
    raise CommandError(
        f"%finetune resume: which run? There are {listed}. For example: %finetune resume {next(iter(found))}"
    )


def _new(session: Session, arguments: argparse.Namespace) -> Any:
    """The form; where there are no widgets, and with --write, the cell itself, at the next prompt or below this one."""
    from mlx_nb.notebook import new_run
    from mlx_nb.notebook.new_run_cell import cell_text

    given, namespace = new_run.given_in(arguments.changes), session.namespace or {}
    form = session.form
    if arguments.write or not has_rich_display():
        if form is not None and not given:
            given = dict(form.values)
        with advice_as_words():
            new_run.checked_run(given, namespace)
        new_run.write_next_cell(given)
        return None if has_rich_display() else Text(cell_text(given))
    if form is not None:
        form.close()
    session.form = new_run.NewRun(given, namespace)
    return session.form


def _rows(session: Session, arguments: argparse.Namespace) -> Any:
    settings = [word for word in arguments.what if "=" in word]
    splits = [word for word in arguments.what if "=" not in word]
    if len(splits) > 1:
        raise CommandError(f"%finetune rows: {' '.join(splits)!r} is more than one split. For example: {_ROWS_EXAMPLE}")
    arguments.split = splits[0] if splits else "train"
    if settings:
        return _rows_of(session, arguments.split, settings)
    run = session.get(arguments.name)
    rows = run.rows(arguments.split)
    if arguments.top_loss is not None:
        return _top_loss(run, arguments.split, arguments.top_loss, arguments.measure)
    lines = [f"{len(rows)} rows in {arguments.split}. `%finetune row 0` shows one, token by token."]
    if arguments.split not in run.left_out:
        lines += ["Which are left out is not known before they are tokenized. `%finetune check` says it now."]
    elif run.left_out[arguments.split]:
        lines += ["Left out:", *(f"  {row.reason}" for row in run.left_out[arguments.split])]
    return Text("\n".join(lines))


def _rows_of(session: Session, split: str, words: Sequence[str]) -> Any:
    """The rows of data that no run has yet, to leaf through; of the model the tokenizer alone is loaded."""
    settings = read_words(words, "%finetune rows", _ROWS_EXAMPLE)
    if "data" not in settings:
        raise CommandError(f"%finetune rows: say which rows, as in {_ROWS_EXAMPLE}")
    with advice_as_words():
        session.looked_at = Run(RunConfig.from_dict(settings), name="rows", namespace=session.namespace)
    session.looked_at.inputs.check_names()
    return session.looked_at.browse(split)


def _top_loss(run: Run, split: str, count: int, measure: bool) -> Text:
    if measure:
        run.evaluate(split, all_rows=True)
    losses = run.row_losses(split)
    if not losses:
        raise CommandError(
            f"%finetune rows: no row of {split} has a known loss yet. Add --measure to pass over all of them now."
        )
    visits = run.history.row_losses(split)
    lines = [f"highest loss ({_row_loss_is(run)}) of {len(losses)} rows of {split}:"]
    source = run.inputs.split(split).source
    lines += [
        f"  {source.named(row):>10}  {loss:7.3f}   {visits_text(visits[row])}"
        for row, loss in list(losses.items())[:count]
    ]
    return Text("\n".join(lines))


def _row_loss_is(run: Run) -> str:
    """What the loss of a row measures with the method of the run."""
    method = method_named(run.config.method)
    if method.kind.loss_of_row:
        return method.kind.loss_of_row
    loss = run.config.loss or next(iter(method.losses))
    return "nats a trained token" if (method.name, loss) == ("sft", "nll") else "mean of its trained tokens"


def _batch(session: Session, arguments: argparse.Namespace) -> Any:
    from mlx_nb.view.rows.batch import BatchDisplay

    run = session.get(arguments.name)
    return BatchDisplay(run.trainer.next_batches(), run.tokenizer)


def _browse(session: Session, arguments: argparse.Namespace) -> Any:
    return session.get(arguments.name).browse(arguments.split)


def _check(session: Session, arguments: argparse.Namespace) -> Any:
    from mlx_nb.view.reports.check import CheckDisplay

    run = session.get(arguments.name)
    key, equals, value = arguments.rows.partition("=")
    if key != "rows" or not equals:
        raise CommandError(f"%finetune check: {arguments.rows!r} is not rows=NUMBER. For example: rows=20000")
    check = run.check(rows=value)
    return Text(json.dumps(check.to_dict(), ensure_ascii=False)) if arguments.json else CheckDisplay(check)


def _rollouts(session: Session, arguments: argparse.Namespace) -> Any:
    return session.get(arguments.name).completions(arguments.step, ratios=arguments.ratios)


def _row(session: Session, arguments: argparse.Namespace) -> Any:
    from mlx_nb.view.rows.display import RowDisplay, measured_losses

    run = session.get(arguments.name)
    rows = run.rows(arguments.split)
    try:
        view = rows[arguments.number]
    except IndexError as error:
        raise CommandError(f"%finetune row: {error}") from None
    losses = {}
    if arguments.loss or arguments.compare:
        losses = measured_losses(view, run.token_losses, compare=bool(arguments.compare))
    return RowDisplay(view, run.tokenizer, arguments.split, per_token=arguments.tokens, page=arguments.page, **losses)


def _command(
    name: str,
    help: str,
    act: Callable[[Session, argparse.Namespace], Any],
    *arguments: tuple[tuple[Any, ...], dict[str, Any]],
    of_now: bool = False,
) -> Command:
    # Its usage begins with "%finetune" besides.
    shape = partial(argparse.HelpFormatter, width=WIDTH - len("%finetune "), max_help_position=20)
    parser = _Parser(prog=name, description=help, formatter_class=shape)
    for flags, options in arguments:
        parser.add_argument(*flags, **options)
    usage = _usage(parser)
    if name not in ("new", "runs", "help", "use", "delete", "compare", "load"):
        parser.add_argument("--name", "-n", default=None, help="another run than the current one")
    parser.add_argument(
        NOW, action="store_true", help="act at once, while a run goes on that this cell is queued behind"
    )
    return Command(usage, help, act, parser, of_now)


def _argument(*flags: str, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return flags, options


# What a person does to a run that is running, and looks that show it so: in the cell that starts one they do not wait.
_STEERING = ("pause", "stop", "set", "skip", "panel", "status", "runs", "use", "browse", "help", "new")
_OUTPUT = _argument("-o", "--output", metavar="VARIABLE", help=CELL_OPTIONS["-o"])
_SPLIT = _argument("split", nargs="?", default="train", choices=SPLITS)
COMMANDS: dict[str, Command] = {
    "new": _command(
        "new",
        "a form for a new run: settings, rows with masks, their check, and the cell",
        _new,
        _argument("changes", nargs="*", metavar="key=value", help="what the form begins with"),
        _argument("--write", action="store_true", help="write its cell into the next one"),
    ),
    "step": _command("step", "do exactly n updates (default 1)", _step, _argument("n", nargs="?", type=int, default=1)),
    "run": _command(
        "run",
        "train to the end, or n more updates, in the background where somebody looks",
        _run,
        _argument("n", nargs="?", type=int),
        _argument("--wait", action="store_true", help="stay in the cell"),
        _argument("--background", action="store_true", help="return at once"),
    ),
    "pause": _command("pause", "stop after this update; `%finetune run` goes on", _pause),
    "stop": _command("stop", "end the run after this update and save its adapter", _stop),
    "panel": _command("panel", "controls, curves, rows, samples and checkpoints, live", _panel),
    "status": _command(
        "status", "where the run is", lambda session, arguments: Text(session.get(arguments.name).status())
    ),
    "eval": _command(
        "eval",
        "loss of a split and what the method measures, now",
        _eval,
        _argument("split", nargs="?", default="valid", choices=SPLITS),
        of_now=True,
    ),
    "generate": _command(
        "generate",
        "ask the model as it is now; --base asks it without the adapter",
        _generate,
        _argument("prompt", nargs="+"),
        _argument("--base", action="store_true", help="switch the adapter off"),
        _argument("--max-tokens", type=int, default=256),
        _argument("--temperature", type=float, default=0.0),
        _argument("--seed", type=int, default=0),
        of_now=True,
    ),
    "set": _command(
        "set",
        "change a setting during the run",
        _set,
        _argument("changes", nargs="+", metavar="key=value"),
    ),
    "row": _command(
        "row",
        "one row as the model will see it, with its loss mask",
        _row,
        _argument("number", type=int),
        _argument("--split", default="train", choices=SPLITS),
        _argument("--tokens", action="store_true", help="one cell per token"),
        _argument("--loss", action="store_true", help="color the tokens by the model's loss on them, now"),
        _argument("--compare", choices=["base"], help="color by what training changed, against the base"),
        _argument("--page", type=int, default=0, help="page of a long row"),
        of_now=True,
    ),
    "rows": _command(
        "rows",
        "how many rows a split has, and which are left out; with data=bees those of no run yet",
        _rows,
        _argument("what", nargs="*", metavar="split, key=value", help="data=bees model=smollm2-135m: before a run"),
        _argument("--top-loss", type=int, metavar="N", help="the N rows of highest loss when last visited"),
        _argument("--measure", action="store_true", help="measure every row of the split now"),
        of_now=True,
    ),
    "browse": _command("browse", "leaf through the rows: previous, next, jump, filters, colors", _browse, _SPLIT),
    "batch": _command("batch", "the exact arrays that the next update will train on", _batch, of_now=True),
    "rollouts": _command(
        "rollouts",
        "the newest completions: what each reward function said, and their advantages",
        _rollouts,
        _argument("--step", type=int, metavar="UPDATE", help="the newest until this update"),
        _argument("--ratios", action="store_true", help="color tokens by log(policy now / policy that sampled)"),
        of_now=True,
    ),
    "check": _command(
        "check",
        "what is wrong or odd with the rows, by number",
        _check,
        _argument("rows", nargs="?", default="rows=5000", metavar="rows=N", help="rows to tokenize, or all"),
        _argument("--json", action="store_true", help="as one JSON document"),
    ),
    "plot": _command(
        "plot", "the curves so far", lambda session, arguments: session.get(arguments.name).plot(), of_now=True
    ),
    "save": _command(
        "save",
        "write the adapter in mlx-lm's format",
        _save,
        _argument("path", nargs="?", help="folder (default: the run's own)"),
        of_now=True,
    ),
    "runs": _command(
        "runs",
        "the runs of this notebook; --disk: those that are kept on disk, and what each takes",
        _runs,
        _argument("--disk", action="store_true", help="those in adapters/ too, with their size"),
    ),
    "config": _command("config", "the settings that are not at their defaults, as the body of a cell", _config),
    "report": _command(
        "report",
        "one HTML page with everything about the run",
        lambda session, arguments: session.get(arguments.name).report(arguments.path),
        _argument("path", nargs="?", help="file (default: report.html in its folder)"),
        of_now=True,
    ),
    "compare": _command(
        "compare",
        "runs side by side: losses, and the settings that differ",
        _compare,
        _argument("runs", nargs="*", metavar="run", help="names (default: all; with one, it and the current run)"),
    ),
    "load": _command(
        "load",
        "a model with a saved adapter, to ask it without its run",
        _load,
        _argument("folder", help="name of a run, or folder of its adapter"),
        _OUTPUT,
    ),
    "delete": _command(
        "delete",
        "remove a run from disk: the files that mlx_nb wrote for it, and nothing else",
        _delete,
        _argument("run", help="name of the run, or its adapter folder"),
        _argument("--yes", action="store_true", help="remove them; without it, only say what would be removed"),
    ),
    "rewind": _command(
        "rewind",
        "go back by n updates (default 1), or --to one",
        _rewind,
        _argument("n", nargs="?", type=int),
        _argument("--to", type=int, metavar="UPDATE"),
    ),
    "skip": _command("skip", "leave out the next batch, for instance after a loss spike", _skip),
    "fork": _command(
        "fork",
        "a second run that goes on from here with other settings, sharing the base",
        _fork,
        _argument("changes", nargs="*", metavar="key=value"),
        _OUTPUT,
        _argument("--as", dest="as_name", metavar="NAME", help="name of the fork (default: this run's, with -fork)"),
        of_now=True,
    ),
    "resume": _command(
        "resume",
        "go on with a run from its newest checkpoint, as if it had never stopped",
        _resume,
        _argument("run", nargs="?", help="name of the run, or its adapter folder (default: the only one there is)"),
        _OUTPUT,
        _argument("--step", type=int, help="the checkpoint of this update instead of the newest"),
        _argument("--allow-changed", nargs="+", metavar="WHAT", help="go on although this changed since"),
    ),
    "use": _command(
        "use",
        "make another run the current one",
        lambda session, arguments: Text(repr(session.select(arguments.run))),
        _argument("run"),
    ),
    "help": _command(
        "help",
        "this list, or all about one command or setting",
        lambda _session, arguments: _help_text(arguments.command),
        _argument("command", nargs="?"),
    ),
}
