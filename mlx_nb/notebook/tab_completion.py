"""Tab completion for `%%finetune`, its options and settings, and for `%finetune` commands and their arguments.

In these places, completions of Python names are suppressed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_nb.config.help import short_help
from mlx_nb.config.run_config import LIVE_SETTINGS, SETTINGS
from mlx_nb.notebook.choices import Choice, adapters, inner_keys, keys, paths, values
from mlx_nb.notebook.commands import COMMANDS
from mlx_nb.notebook.yaml_cursor import place_of, settings_in
from mlx_nb.run.fingerprints import MADE_FROM

if TYPE_CHECKING:
    from mlx_nb.notebook.session import Session

_FIRST = 1000.0  # priority over the matchers of IPython
_COMMAND = re.compile(r"\s*(?:[\w., ]+=\s*)?%finetune\s+(.*)|\s*finetune\s+(?![=.(\[])(.*)")


class Offer(NamedTuple):
    """Completions of `fragment`, the partial word before the cursor."""

    fragment: str
    choices: list[Choice]


class _Answered(list[Any]):
    """Completions that are final even if there are none: for an empty list IPython would use other matchers."""

    def __len__(self) -> int:
        return max(1, super().__len__())


def matcher(session: Session, cell_parser: argparse.ArgumentParser) -> Callable[[Any], Any]:
    """A matcher for `Completer.custom_matchers`; `cell_parser` has the options of `%%finetune`."""
    from IPython.core.completer import CompletionContext, SimpleCompletion, context_matcher

    def match(context: CompletionContext) -> dict[str, Any]:
        offer = complete(session, cell_parser, context.full_text, context.cursor_line, context.cursor_position)
        if offer is None:
            return {"completions": [], "suppress": False}
        found = [SimpleCompletion(choice.text, type=_beside(choice.help)) for choice in offer.choices]
        return {
            "completions": _Answered(found),
            "matched_fragment": offer.fragment,
            "suppress": True,
            "ordered": True,
        }

    decorated: Callable[[Any], Any] = context_matcher(priority=_FIRST, identifier="mlx_nb.finetune")(match)
    return decorated


def _beside(help: str) -> str:
    """The text next to a completion, passed as its type; JupyterLab would break it at ordinary spaces."""
    return short_help(help).replace(" ", "\u00a0") or "value"


def complete(session: Session, cell_parser: argparse.ArgumentParser, text: str, line: int, column: int) -> Offer | None:
    """The completions at a place in a cell; None outside of `%%finetune` and `%finetune`."""
    lines = text.split("\n")
    before = lines[line][:column]
    first = next((at for at, one in enumerate(lines) if one.strip()), 0)
    if re.match(r"%%finetune(\s|$)", lines[first]) and line >= first:
        if line > first:
            return _setting(session, lines[first + 1 : line], before, lines[line + 1 :])
        return _words(session, cell_parser, before.removeprefix("%%finetune"))
    command = _COMMAND.fullmatch(before)
    if command is None:
        return None
    rest = command[1] if command[1] is not None else command[2]
    name, space, after = rest.partition(" ")
    if not space:
        return _offer(name, [Choice(one, command.help) for one, command in COMMANDS.items()])
    return _words(session, COMMANDS[name].parser, f" {after}") if name in COMMANDS else Offer("", [])


def _setting(session: Session, above: Sequence[str], before: str, below: Sequence[str]) -> Offer:
    """Completions in the YAML body."""
    place = place_of(above, before)
    if place is None:
        return Offer("", [])
    body = settings_in([*above, *below])
    path, fragment = place.path, place.fragment
    namespace = session.namespace or {}
    if not place.is_key:
        return _offer(fragment, values(path, fragment, namespace, body, lists=place.in_list))
    if path:
        return _offer(fragment, inner_keys(path[0], body.get("optimizer", "adamw")))
    return _offer(fragment, keys(body.get("method"), body))


def _words(session: Session, parser: argparse.ArgumentParser, line: str) -> Offer:
    """Completions of the last word in a line of options and arguments."""
    *before, fragment = line.split(" ")
    pending, position, given = None, 0, set()
    positional = [action for action in parser._actions if not action.option_strings]
    for word in filter(None, before):
        option = parser._option_string_actions.get(word)
        if option is not None:
            given.add(option.dest)
            pending = None if option.nargs == 0 else option
        elif pending is not None:
            pending = pending if pending.nargs == "+" else None
        else:
            position += 1
    if pending is not None and not fragment.startswith("-"):
        return _argument(session, parser, pending, fragment)
    options = [
        Choice(max(action.option_strings, key=len), action.help or "")
        for action in parser._actions
        if action.option_strings and action.dest not in given
    ]
    if fragment.startswith("-"):
        return _offer(fragment, options)
    place = min(position, len(positional) - 1)
    if place < 0 or (position > place and positional[place].nargs not in ("+", "*")):
        return _offer(fragment, options)
    offer = _argument(session, parser, positional[place], fragment)
    return offer if fragment else Offer("", [*offer.choices, *options])


def _argument(session: Session, parser: argparse.ArgumentParser, action: argparse.Action, fragment: str) -> Offer:
    """Completions of one argument of a command."""
    name, equals, value = fragment.partition("=")
    if equals and name in SETTINGS:
        return _offer(value, values((name,), value, session.namespace or {}, {}))
    if action.choices is not None:
        return _offer(fragment, [Choice(str(one)) for one in action.choices])
    return _offer(fragment, _of_kind(session, parser.prog, action.dest, fragment))


def _of_kind(session: Session, command: str, kind: str, fragment: str) -> list[Choice]:
    names = [Choice(run.name, f"{run.state}, {run.config.model}") for run in session.runs.values()]
    match kind:
        case "name":
            return names
        case "run":
            known = {one.text for one in names}
            saved = [Choice(Path(one.text).name, one.help) for one in adapters()] if command != "use" else []
            return [*names, *(one for one in saved if one.text not in known)]
        case "changes":
            settings = LIVE_SETTINGS if command == "set" else tuple(SETTINGS)
            helps = {one.text.removesuffix(": "): one.help for one in keys(None)}
            return [Choice(f"{name}=", helps[name]) for name in settings]
        case "command":
            return [Choice(name, one.help) for name, one in COMMANDS.items()]
        case "allow_changed":
            return [Choice(one) for one in MADE_FROM if " " not in one]
        case "path":
            return paths(fragment, lambda path: False)
        case "rows":
            return [Choice("rows=all"), Choice("rows=5000", "default")]
    return []


def _offer(fragment: str, choices: Iterable[Choice]) -> Offer:
    """The choices that begin with the typed text."""
    return Offer(fragment, [one for one in choices if one.text.lower().startswith(fragment.lower())])
