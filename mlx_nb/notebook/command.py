"""The building blocks of `%finetune` commands: declarations, parsers, and checks of common arguments."""

from __future__ import annotations

import argparse
import keyword
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from mlx_nb.errors import CommandError
from mlx_nb.notebook.queued_cells import NOW
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.text_output import WIDTH
from mlx_nb.run.inputs import SPLITS
from mlx_nb.run.run import Run
from mlx_nb.view.event_text import remarks

CELL_OPTIONS = {
    "--name": "name of the run (default: run); also its folder in adapters/",
    "-c": "settings from a file, ours or of another program; lines of the cell replace its settings",
    "-o": "store the Run in this variable",
    "--paused": "create the run, but do not load or train",
    "--wait": "wait until the run pauses or ends",
    "--background": "train in the background; queued cells do not wait",
    NOW: "do not wait for the run of an earlier cell",
    "--from": "start from the adapter of this run or folder, on the same base",
    "--sweep": "train a run for each combination of the settings that have a list of values",
    "--halving": "with --sweep: the worse half of the runs ends early, several times",
    "--trials": "with --sweep: only so many of the combinations, at random",
    "--resume": "continue from the newest checkpoint, if any",
    "--allow-changed": "continue although this has changed (with --resume: a setting, data, template, model, ...; "
    "with resume_adapter_file or reference_adapter: model)",
}


SETTINGS_EXAMPLE = "learning_rate=5e-5"


@dataclass(frozen=True)
class Command:
    """One subcommand: what it takes, what it does, and the function `(session, arguments) -> object to display`.

    of_now  the answer describes the run at this moment, so it names the update while the run trains
    steers  it controls or shows a running run, so it does not wait in a cell queued behind that run
    """

    usage: str
    help: str
    act: Callable[[Session, argparse.Namespace], Any]
    parser: argparse.ArgumentParser
    of_now: bool
    steers: bool

    @property
    def options(self) -> list[str]:
        """The names of its options, such as `--wait`."""
        return [
            word
            for action in self.parser._actions
            for word in action.option_strings
            if word.startswith("--") and word != "--name"
        ]


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises CommandError instead of ending the process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(add_help=False, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"%finetune {self.prog}: {message}. Usage: %finetune {self.prog} {_usage(self)}".rstrip())


def _usage(parser: argparse.ArgumentParser) -> str:
    words = parser.format_usage().split()
    return " ".join(words[words.index(parser.prog) + 1 :])


def command(
    name: str,
    help: str,
    act: Callable[[Session, argparse.Namespace], Any],
    *arguments: tuple[tuple[Any, ...], dict[str, Any]],
    of_now: bool = False,
    steers: bool = False,
) -> Command:
    """Declare a command; `arguments` are made by `argument`."""
    # The usage is printed after "%finetune ".
    shape = partial(argparse.HelpFormatter, width=WIDTH - len("%finetune "), max_help_position=20)
    parser = _Parser(prog=name, description=help, formatter_class=shape)
    for flags, options in arguments:
        parser.add_argument(*flags, **options)
    usage = _usage(parser)
    if name not in ("new", "runs", "help", "use", "delete", "compare", "load", "sweep", "import"):
        parser.add_argument("--name", "-n", default=None, help="a run other than the current one")
    parser.add_argument(NOW, action="store_true", help="do not wait for the run of an earlier cell")
    return Command(usage, help, act, parser, of_now, steers)


def argument(*flags: str, **options: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Declare an argument of a command, as in argparse's `add_argument`."""
    return flags, options


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
    """The variable named by `-o`. Raises CommandError for an invalid name."""
    if word is not None and (not word.isidentifier() or keyword.iskeyword(word)):
        raise CommandError(f"-o {word!r} is not a variable name.")
    return word


def wait_of(arguments: argparse.Namespace) -> bool | None:
    """The choice between --wait and --background; None without either. Raises CommandError for both."""
    if arguments.wait and arguments.background:
        raise CommandError("--wait and --background cannot be combined.")
    return True if arguments.wait else False if arguments.background else None


def refuse_finished(run: Run) -> None:
    """Raise CommandError if all updates of the run are done."""
    if run.over:
        raise CommandError(
            f"{run.name} is finished: all {run.step_count} updates are done. `%finetune run 20` does 20 more, and "
            "`%finetune set iters=...` makes it longer."
        )


def notes_since(run: Run, known: int) -> list[str]:
    """Remarks on the setting changes that came after the first `known` events."""
    return [note for event in run.history.events[known:] for note in remarks(event)]


OUTPUT = argument("-o", "--output", metavar="VARIABLE", help=CELL_OPTIONS["-o"])
SPLIT = argument("split", nargs="?", default="train", choices=SPLITS)
