"""Help for the settings: the text of `%%finetune?` and the reference page in docs."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import types
import typing
from typing import Any, Literal

from mlx_nb.config.fields import choice_words, kinds_of
from mlx_nb.config.methods import METHODS
from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.config.settings import LoraParameters, LrSchedule

_GROUP_TITLES = {
    "method": "Method",
    "model": "Model",
    "rows": "Rows",
    "rollouts": "Completions and rewards",
    "adapter": "What is trained",
    "optimizer": "Optimizer",
    "training": "Length and batches",
    "validation": "Validation and test",
    "samples": "Samples",
    "saving": "Saving",
    "reports": "Reports to other programs",
}
_NESTED: dict[str, type] = {"lora_parameters": LoraParameters, "lr_schedule": LrSchedule}


@dataclasses.dataclass(frozen=True)
class SettingHelp:
    """A line of the reference: name, default and type as text, help, and whether it may change during a run."""

    name: str
    group: str
    default: str
    kind: str
    help: str
    live: bool


def setting_help() -> list[SettingHelp]:
    """All settings in the order of their declaration, nested ones after their parent."""
    lines: list[SettingHelp] = []
    kinds = kinds_of(RunConfig)
    for name, declared in SETTINGS.items():
        lines.append(_describe(name, declared, kinds[name]))
        if name in _NESTED:
            hints = kinds_of(_NESTED[name])
            for inner in dataclasses.fields(_NESTED[name]):
                described = _describe(f"{name}.{inner.name}", inner, hints[inner.name])
                lines.append(dataclasses.replace(described, group=declared.metadata["group"]))
    return lines


def settings_text(width: int = 100) -> str:
    """The settings as plain text, grouped, for help in a notebook and a terminal."""
    parts: list[str] = []
    described = setting_help()
    for group, title in _GROUP_TITLES.items():
        parts.append(f"{title}:")
        for line in (line for line in described if line.group == group):
            head = f"  {line.name}: {line.default}" + ("   (may change during a run)" if line.live else "")
            parts.append(head)
            parts.append(
                textwrap.fill(f"{line.help} [{line.kind}]", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
            )
    return "\n".join(parts)


def full_help(name: str, width: int = 100) -> str:
    """The complete help for one setting; empty if there is no setting of this name."""
    for line in setting_help():
        if line.name == name:
            live = " It may change during a run." if line.live else ""
            text = f"{line.help}{live} It takes: {line.kind}."
            return f"{line.name}: {line.default}\n" + textwrap.fill(
                text, width, initial_indent="  ", subsequent_indent="  "
            )
    return ""


def settings_markdown() -> str:
    """The settings as the reference page in docs."""
    parts = [
        "# Settings\n",
        "Every key of a `%%finetune` cell, generated from their declaration in `mlx_nb/config/settings.py`.",
        "Settings marked **live** may change while a run is under way, with `%finetune set key=value`.\n",
    ]
    described = setting_help()
    for group, title in _GROUP_TITLES.items():
        parts += [f"## {title}\n", "| setting | default | takes | what it does |", "|---|---|---|---|"]
        for line in (line for line in described if line.group == group):
            live = " **live**" if line.live else ""
            cells = (f"`{line.name}`{live}", f"`{line.default}`", line.kind, line.help)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def short_help(text: str, longest: int = 68) -> str:
    """The first sentence of a help text, or as much of it as makes sense on one short line."""
    sentence = re.split(r"(?:\.|;)(?:\s|$)", text, maxsplit=1)[0]
    for divide in (": ", ", "):
        while len(sentence) > longest and sentence.rpartition(divide)[0].count(" ") >= 2:
            sentence = sentence.rpartition(divide)[0]
    sentence = _without_open_bracket(sentence)
    if len(sentence) <= longest:
        return sentence
    return _without_open_bracket(sentence[: longest - 1].rpartition(" ")[0]).rstrip(",:") + "…"


def _without_open_bracket(text: str) -> str:
    """The text up to a bracket that is never closed, without `such as` before it."""
    opened = [
        at for at in (text.rfind(bracket) for bracket in "({[") if at >= 0 and not re.search(r"[)}\]]", text[at:])
    ]
    return re.sub(r",?\s+such as$", "", text[: min(opened)].rstrip()) if opened else text


def choices_of(name: str, method: str | None = None) -> dict[str, str]:
    """The choices of a setting with their meanings (empty where unknown); empty for a setting without choices."""
    outer, _, inner = name.partition(".")
    if name == "method":
        return {one.name: one.kind.words for one in METHODS.values()}
    if name == "loss":
        return dict.fromkeys(METHODS[method or "sft"].losses if (method or "sft") in METHODS else (), "")
    if name == "lr_schedule":
        return choices_of("lr_schedule.name")
    kinds = kinds_of(_NESTED[outer] if inner and outer in _NESTED else RunConfig)
    kind = _without_none(kinds.get(inner or outer, Any))
    if kind is bool:
        return {"true": "", "false": ""}
    return dict.fromkeys(choice_words(kind), "") if typing.get_origin(kind) is Literal else {}


def inner_settings(name: str) -> dict[str, str]:
    """The settings inside a group, with their help; empty if `name` is not a group."""
    return {one.name: one.metadata["help"] for one in dataclasses.fields(_NESTED[name])} if name in _NESTED else {}


def _without_none(hint: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next(option for option in options if option is not type(None))


def _describe(name: str, declared: dataclasses.Field[Any], hint: Any) -> SettingHelp:
    return SettingHelp(
        name=name,
        group=declared.metadata["group"],
        default=_default_text(declared),
        kind=_kind_text(hint, declared.metadata["bounds"]),
        help=declared.metadata["help"],
        live=declared.metadata["live"],
    )


def _default_text(declared: dataclasses.Field[Any]) -> str:
    default = declared.default
    if default is dataclasses.MISSING:
        return "{}"
    if dataclasses.is_dataclass(default):
        shown = default.name if isinstance(default, LrSchedule) else "{...}"
        return str(shown)
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else f"{default}"


def _kind_text(hint: Any, bounds: dict[str, float]) -> str:
    kind = _without_none(hint)
    if typing.get_origin(kind) is Literal:
        text = ", ".join(choice_words(kind))
    elif typing.get_origin(kind) is tuple:
        text = "list"
    elif dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
        text = "mapping"
    else:
        text = {int: "whole number", float: "number", bool: "true or false", str: "text"}.get(kind, "anything")
    limits = ", ".join(f"{word} {limit:g}" for word, limit in bounds.items())
    return f"{text}, {limits}" if limits else text
