"""What to say to a setting that does not exist: what it is here, or the nearest name where it is a slip."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.config.fields import SettingError, typo_of
from mlx_nb.config.methods import METHODS
from mlx_nb.config.neighbor_words import (
    ABSENT,
    ALL_LINEAR,
    ALPHAS,
    INSTEAD,
    METHOD_LINES,
    NEEDLESS,
    OFF,
    OFF_HERE,
    SAME,
    SECTIONS,
    SWITCHES,
    VALUES,
)
from mlx_nb.errors import MOST_PROBLEMS, shortened


@dataclass(frozen=True)
class Foreign:
    """A setting that does not exist: the error, the setting of ours that it means ("" = none), and its value there.

    `plainly` is the error without what to write, "" where the error has no such part.
    """

    error: SettingError
    meant: str = ""
    value: Any = None
    plainly: str = ""

    def with_problems(self, problems: Sequence[SettingError]) -> SettingError:
        """One error about the setting, where what it means here would have `problems`."""
        if not problems:
            return self.error
        return SettingError(self.error.path, " ".join([self.plainly or str(self.error), *map(str, problems)]))


def foreign_settings(
    values: Mapping[Any, Any],
    known: Mapping[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    fits: Callable[..., bool],
) -> Iterator[Foreign]:
    """One for each setting in `values` that is not `known`, and for each in a mapping that another program groups by.

    `groups` has the names inside each group of ours; `fits(setting, value)` says whether a setting takes a value.
    """
    unknown = 0
    for key, value in values.items():
        section = SECTIONS.get(key)
        if key in known:
            continue
        unknown += 1
        if unknown > MOST_PROBLEMS:  # nobody will read what they might have meant
            yield Foreign(SettingError((key,), f"unknown setting `{shortened(key)}`."))
            continue
        if section is None or not isinstance(value, Mapping) or not value:
            yield _foreign((key,), key, value, values, known, groups, fits)
            continue
        for inner, item in value.items():
            word = section.get(str(inner), str(inner))
            yield _foreign((key, str(inner)), word, item, {**values, **value}, known, groups, fits)


def _foreign(
    path: tuple[str, ...],
    word: str,
    value: Any,
    around: Mapping[Any, Any],
    known: Mapping[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    fits: Callable[..., bool],
) -> Foreign:
    head = f"unknown setting `{shortened('.'.join(path))}`."
    word = word.lstrip("-").lower().replace("-", "_")
    outer, _, inner = word.partition(".")
    if (len(path) > 1 and word in known) or inner in groups.get(outer, ()):
        return _renamed(path, head, word, value, around, known, fits)
    method = METHODS.get(str(around.get("method")))
    if method is not None and any(word in loss.options for loss in method.losses.values()):
        written = f"`method_options: {{{word}: {_written(value)}}}`"
        return Foreign(SettingError(path, f"{head} It is an option of `method: {method.name}`: write {written}."))
    if word in ALPHAS:
        return _alpha(path, head, value, around)
    if word in SAME:
        return _renamed(path, head, SAME[word], value, around, known, fits)
    if word in SWITCHES:
        return _switched(path, head, word, value)
    if word == "adapter" and str(value).lower() in OFF:
        return Foreign(SettingError(path, f"{head} Here it is `fine_tune_type: full`."), "fine_tune_type")
    if word in INSTEAD:
        meant, hint = INSTEAD[word]
        return Foreign(SettingError(path, f"{head} {hint}"), meant)
    if word in NEEDLESS:
        return Foreign(SettingError(path, f"{head} {NEEDLESS[word]} Remove it."))
    if word in ABSENT:
        return Foreign(SettingError(path, f"{head} mlx_nb has no {ABSENT[word]} yet. Remove it."))
    near = typo_of(word, known)
    hint = f"Did you mean {near!r}?" if near else "`%%finetune?` lists all settings."
    return Foreign(SettingError(path, f"{head} {hint}"), near or "", value)


def inner_hint(
    error: SettingError, values: Mapping[Any, Any], known: Mapping[str, Any], fits: Callable[..., bool]
) -> SettingError:
    """The error about a name that a group of ours does not have, with what it is here where others have it there."""
    path = error.path
    group = values.get(path[0])
    if len(path) != 2 or not isinstance(group, Mapping) or not str(error).startswith("unknown setting"):
        return error
    word = path[1].lstrip("-").lower().replace("-", "_")
    if not any(word in table for table in (known, ALPHAS, SAME, SWITCHES, INSTEAD, NEEDLESS, ABSENT)):
        return error
    return _foreign(path, path[1], group.get(path[1]), {**values, **group}, known, {}, fits).error


def _switched(path: tuple[str, ...], head: str, word: str, value: Any) -> Foreign:
    """The error about a switch that is one value of a setting here."""
    name, on, off = SWITCHES[word]
    written = off if str(value).lower() in OFF else on
    if not written:
        return Foreign(SettingError(path, f"{head} {AT_DEFAULT}"))
    return Foreign(SettingError(path, f"{head} Here it is `{name}: {written}`."), name)


def _method_lines(value: str) -> dict[str, str]:
    """The settings that a method of another program is here, the method first; none where there is no such."""
    if value in METHODS:
        return {"method": value}
    if value in METHOD_LINES:
        return METHOD_LINES[value]
    owners = [method.name for method in METHODS.values() if value in method.losses]
    return {"method": owners[0], "loss": value} if len(owners) == 1 else {}


def _method_around(around: Mapping[Any, Any]) -> str:
    """The method that the settings name, in our word or another's; "" where none of them does."""
    for word, value in around.items():
        if word == "method" or SAME.get(word) == "method":
            return _method_lines(str(value)).get("method", "")
    return ""


def _of_method(path: tuple[str, ...], head: str, outer: str, value: str, around: Mapping[Any, Any]) -> Foreign | None:
    """The error about the name of a method or of a loss, where it is other settings here; None where it is `outer`."""
    lines = _method_lines(value)
    if outer == "method" and not lines:
        hint = f"Here it is `method`, and mlx_nb has no {value} yet. It has: {', '.join(METHODS)}."
        return Foreign(SettingError(path, f"{head} {hint}"), outer)
    named = _method_around(around)
    method = METHODS.get(named or "sft")
    if outer == "loss" and (not lines or (method is not None and value in method.losses)):
        return None
    if lines == {outer: value}:
        return None
    written = " and ".join(f"`{name}: {one}`" for name, one in lines.items())
    if outer == "loss" and named not in ("", lines["method"]):
        written += f", in place of `method: {named}`"
    hint = f"Here it is `{outer}`: write {written}." if outer in lines else f"Here it is {written}."
    return Foreign(SettingError(path, f"{head} {hint}"), outer, lines["method"] if outer == "method" else None)


def _renamed(
    path: tuple[str, ...],
    head: str,
    name: str,
    value: Any,
    around: Mapping[Any, Any],
    known: Mapping[str, Any],
    fits: Callable[..., bool],
) -> Foreign:
    """The error about a setting that has another name here, with the line to write where the value fits."""
    outer, _, inner = name.partition(".")
    value = VALUES.get(outer, {}).get(value, value) if isinstance(value, str) else value
    if path[-1].replace("-", "_") == "num_train_epochs" and _is_set(around.get("max_steps")):
        return Foreign(SettingError(path, f"{head} There `max_steps` goes before it. Remove it."))
    if not inner and is_off(value) and (value is None or not fits(outer, value) or outer == "method"):
        if outer == "method" or (fits(outer, None) and known[outer].default is None):
            return Foreign(SettingError(path, f"{head} {AT_DEFAULT}"))
        value = None
    if inner and value is None:
        return Foreign(SettingError(path, f"{head} {AT_DEFAULT}"), outer)
    if not inner and is_off(value) and not fits(outer, value):
        return Foreign(SettingError(path, f"{head} Here it is `{outer}`.{_off_hint(outer)}"), outer)
    if outer in ("method", "loss") and isinstance(value, str):
        other = _of_method(path, head, outer, value, around)
        if other is not None:
            return other
    if name in ("target_modules", "lora_parameters.keys"):
        if is_all_linear(value):
            return Foreign(SettingError(path, f"{head} {ALL_ADAPTED}"))
        value = [one.strip() for one in value.split(",")] if isinstance(value, str) and "," in value else value
    plainly = f"{head} Here it is `{outer}`."
    if inner:
        written = f"{outer}: {{{inner}: {_written(value)}}}"
        hint = f"It belongs inside: `{outer}: {{{inner}: ...}}`."
        given = {inner: value}
    else:
        written, given = f"{outer}: {_written(value)}", value
        hint = f"Here it is `{outer}`."
    if (value is not None or not inner) and fits(outer, given):
        hint = f"{hint[:-1]}: write `{written}`." if not inner else f"{hint[:-1]}, here `{written}`."
    return Foreign(SettingError(path, f"{head} {hint}"), outer, None if inner else value, plainly)


AT_DEFAULT = "That is the default here. Remove it."
ALL_ADAPTED = "Every linear layer is adapted unless `target_modules` names others. Remove it."


def is_all_linear(value: Any) -> bool:
    """Whether it is another program's word for every linear layer, alone or in a list."""
    word = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    return isinstance(word, str) and word.lower() in ALL_LINEAR


def _alpha(path: tuple[str, ...], head: str, value: Any, around: Mapping[Any, Any]) -> Foreign:
    """The error about PEFT's alpha: the scale here is alpha / rank."""
    group = around.get("lora_parameters")
    around = {**group, **around} if isinstance(group, Mapping) else around
    rank = next((around[word] for word in ("rank", "r", "lora_r", "lora_rank") if word in around), None)
    numbers = [one for one in (value, rank) if isinstance(one, (int, float)) and not isinstance(one, bool) and one > 0]
    scale = f"{numbers[0] / numbers[1]:g}" if len(numbers) == 2 else "..."
    hint = f"Here it is `lora_parameters: {{scale: {scale}}}` (alpha / rank)."
    return Foreign(SettingError(path, f"{head} {hint}"), "lora_parameters")


def is_off(value: Any) -> bool:
    """Whether other programs say with this value that something is off, or left to them."""
    if isinstance(value, str):
        return value.lower() in (*OFF, "0.0", "-1")
    return value is None or (isinstance(value, (int, float)) and value in (0, -1))


def _is_set(value: Any) -> bool:
    """Whether it is a number of updates, and not another program's word for none."""
    return value is not None and not is_off(value)


def _off_hint(name: str) -> str:
    """What to write here for a setting that is off elsewhere, with a space in front; "" where nothing is to be said."""
    return f" {OFF_HERE[name]}" if name in OFF_HERE else ""


def value_hint(name: str, value: Any) -> str:
    """What to add to the error about a value that a setting does not take, with a space in front."""
    if is_off(value):
        return _off_hint(name)
    if isinstance(value, str):
        if name == "fine_tune_type" and value in METHODS:
            return f" {value} is a method: write `method: {value}`."
        if value in VALUES.get(name, {}):
            return f" Here it is `{name}: {VALUES[name][value]}`."
    return ""


def _written(value: Any) -> str:
    """The value as it is written in YAML, "..." for one that is long or an object."""
    if (
        isinstance(value, str)
        and value
        and value.replace("_", "").replace("-", "").replace("/", "").replace(".", "").isalnum()
    ):
        return value if not value[0].isdigit() and value not in ("true", "false", "null") else json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return "..."
    return text if len(text) <= 80 else "..."
