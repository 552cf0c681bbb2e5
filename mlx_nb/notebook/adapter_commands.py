"""The command `%finetune adapters`: several adapters on the base of a run.

A new action is a function here and its entry in the table at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import CommandError
from mlx_nb.notebook.command import Command, argument, command
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.text_output import Text

if TYPE_CHECKING:
    from mlx_nb.run.adapters import Adapters


def _list(adapters: Adapters[Any], arguments: argparse.Namespace) -> str:
    if arguments.what:
        raise CommandError(f"%finetune adapters: `list` takes nothing more, not {' '.join(arguments.what)}.")
    return repr(adapters)


def _load(adapters: Adapters[Any], arguments: argparse.Namespace) -> str:
    if len(arguments.what) != 1:
        raise CommandError("%finetune adapters load: give the folder of one adapter, or the name of a run.")
    adapters.load(arguments.what[0], arguments.as_name)
    return repr(adapters)


def _merge(adapters: Adapters[Any], arguments: argparse.Namespace) -> str:
    if arguments.as_name is None or not arguments.what:
        raise CommandError(
            "%finetune adapters merge: give the weights and a name, such as bees=0.7 pirate=0.3 --as both."
        )
    weights = {}
    for word in arguments.what:
        name, _, weight = word.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise CommandError(f"%finetune adapters merge: {word} is not a name and a weight, as {name}=0.5.") from None
    adapters.merge(arguments.as_name, weights, how=arguments.how)
    return repr(adapters)


def _compare(adapters: Adapters[Any], arguments: argparse.Namespace) -> str:
    if not arguments.what:
        raise CommandError('%finetune adapters compare: give a prompt, such as compare "Say hello".')
    answers = adapters.compare(" ".join(arguments.what), max_tokens=arguments.max_tokens)
    return "\n\n".join(f"{name}:\n{answer}" for name, answer in answers.items())


def _save(adapters: Adapters[Any], arguments: argparse.Namespace) -> str:
    if len(arguments.what) != 2:
        raise CommandError("%finetune adapters save: give the name of an adapter and a folder.")
    name, folder = arguments.what
    return f"saved to {adapters[name].save(folder, format=arguments.format)}"


def _drop(adapters: Adapters[Any], arguments: argparse.Namespace) -> str:
    for name in arguments.what:
        adapters.drop(name)
    return repr(adapters)


_ACTIONS: dict[str, Callable[[Adapters[Any], argparse.Namespace], str]] = {
    "list": _list,
    "load": _load,
    "compare": _compare,
    "merge": _merge,
    "save": _save,
    "drop": _drop,
}


def _adapters(session: Session, arguments: argparse.Namespace) -> Text:
    return Text(_ACTIONS[arguments.action](session.get(arguments.name).adapters, arguments))


ADAPTER_COMMANDS: dict[str, Command] = {
    "adapters": command(
        "adapters",
        "load, compare and merge adapters on the run's base",
        _adapters,
        argument("action", nargs="?", default="list", choices=tuple(_ACTIONS), help="list (default), load, ..."),
        argument("what", nargs="*", help="folder; prompt; NAME=WEIGHT ...; NAME FOLDER; NAME"),
        argument("--as", dest="as_name", metavar="NAME", help="name of the loaded or merged adapter"),
        argument("--how", default="cat", help="merge: cat (exact sum, default) or linear (keeps the rank)"),
        argument("--format", default="mlx-lm", help="save: mlx-lm (default), peft, or peft-rslora"),
        argument("--max-tokens", type=int, default=256, help="compare: longest answer"),
        of_now=True,
    ),
}
