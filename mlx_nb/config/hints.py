"""Advice about unknown settings: the name used here for another program's setting, or the nearest spelling."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.config.fields import SettingError, typo_of
from mlx_nb.config.methods import METHODS
from mlx_nb.config.neighbor_words import (
    AFTERWARDS,
    ALL_LINEAR,
    ALPHAS,
    INSTEAD,
    METHOD_LINES,
    OFF,
    OFF_HERE,
    SAME,
    SECTIONS,
    SWITCHES,
    UNNECESSARY,
    UNSUPPORTED,
    VALUES,
)
from mlx_nb.errors import MOST_PROBLEMS, shortened


@dataclass(frozen=True)
class UnknownSetting:
    """An unknown setting: the error about it, our setting with the same meaning ("" = none), and the value for that.

    `without_advice` is the error without advice on what to write, "" if the error has no such part.
    """

    error: SettingError
    meant: str = ""
    value: Any = None
    without_advice: str = ""

    def with_problems(self, problems: Sequence[SettingError]) -> SettingError:
        """One combined error, for a setting whose translation would have `problems` of its own."""
        if not problems:
            return self.error
        return SettingError(self.error.path, " ".join([self.without_advice or str(self.error), *map(str, problems)]))


def foreign_settings(
    values: Mapping[Any, Any],
    known: Mapping[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    fits: Callable[..., bool],
) -> Iterator[UnknownSetting]:
    """One UnknownSetting for each unknown setting in `values`, and in mappings in which other programs group settings.

    `groups` has the names inside each group of ours; `fits(setting, value)` tells whether a setting takes a value.
    """
    unknown = 0
    for key, value in values.items():
        if key in known:
            continue
        unknown += 1
        if unknown > MOST_PROBLEMS:  # nobody reads so many suggestions
            yield UnknownSetting(SettingError((key,), f"unknown setting `{shortened(key)}`."))
            continue
        around = {**values, **value} if _is_section(key, value) else values
        for path, word, item in unsectioned({key: value}):
            yield _foreign(path, word, item, around, known, groups, fits)


def unsectioned(values: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(path, word, value) of each setting, also of those inside LoRA-Studio's sections."""
    for key, value in values.items():
        if not _is_section(key, value):
            yield (key,), _plain(key), value
            continue
        for inner, item in value.items():
            yield (key, str(inner)), SECTIONS[key].get(str(inner), _plain(inner)), item


def _is_section(key: Any, value: Any) -> bool:
    return key in SECTIONS and isinstance(value, Mapping) and bool(value)


def _plain(word: Any) -> str:
    return str(word).lstrip("-").lower().replace("-", "_")


def _foreign(
    path: tuple[str, ...],
    word: str,
    value: Any,
    siblings: Mapping[Any, Any],
    known: Mapping[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    fits: Callable[..., bool],
) -> UnknownSetting:
    head = f"unknown setting `{shortened('.'.join(path))}`."
    outer, _, inner = word.partition(".")
    if (len(path) > 1 and word in known) or inner in groups.get(outer, ()):
        return _renamed(path, head, word, value, siblings, known, fits)
    method = METHODS.get(str(siblings.get("method")))
    if method is not None and any(word in loss.options for loss in method.losses.values()):
        written = f"`method_options: {{{word}: {_written(value)}}}`"
        return UnknownSetting(
            SettingError(path, f"{head} It is an option of `method: {method.name}`: write {written}.")
        )
    if word in ALPHAS:
        return _alpha(path, head, value, siblings)
    if word in SAME:
        return _renamed(path, head, SAME[word], value, siblings, known, fits)
    if word in SWITCHES:
        return _switched(path, head, word, value)
    if word == "adapter" and str(value).lower() in OFF:
        return UnknownSetting(SettingError(path, f"{head} Here it is `fine_tune_type: full`."), "fine_tune_type")
    if word in INSTEAD:
        meant, hint = INSTEAD[word]
        return UnknownSetting(SettingError(path, f"{head} {hint}"), meant)
    if word in UNNECESSARY:
        return UnknownSetting(SettingError(path, f"{head} {UNNECESSARY[word]} Remove it."))
    if word in AFTERWARDS:
        return UnknownSetting(SettingError(path, f"{head} {AFTERWARDS[word]} Remove it."))
    if word in UNSUPPORTED:
        return UnknownSetting(SettingError(path, f"{head} mlx_nb has no {UNSUPPORTED[word]} yet. Remove it."))
    near = typo_of(word, known)
    hint = f"Did you mean {near!r}?" if near else "`%%finetune?` lists all settings."
    return UnknownSetting(SettingError(path, f"{head} {hint}"), near or "", value)


def inner_hint(
    error: SettingError, values: Mapping[Any, Any], known: Mapping[str, Any], fits: Callable[..., bool]
) -> SettingError:
    """The error about an unknown name in a group, with its name here if another program has it in that group."""
    path = error.path
    group = values.get(path[0])
    if len(path) != 2 or not isinstance(group, Mapping) or not str(error).startswith("unknown setting"):
        return error
    word = _plain(path[1])
    if not any(
        word in table for table in (known, ALPHAS, SAME, SWITCHES, INSTEAD, UNNECESSARY, AFTERWARDS, UNSUPPORTED)
    ):
        return error
    return _foreign(path, word, group.get(path[1]), {**values, **group}, known, {}, fits).error


def _switched(path: tuple[str, ...], head: str, word: str, value: Any) -> UnknownSetting:
    """The error about a switch that is one value of a setting here."""
    name, on, off = SWITCHES[word]
    written = off if str(value).lower() in OFF else on
    if not written:
        return UnknownSetting(SettingError(path, f"{head} {AT_DEFAULT}"))
    return UnknownSetting(SettingError(path, f"{head} Here it is `{name}: {written}`."), name)


def method_lines(value: str) -> dict[str, str]:
    """The settings that select another program's method here, the method first; empty if there is none."""
    if value in METHODS:
        return {"method": value}
    if value in METHOD_LINES:
        return METHOD_LINES[value]
    owners = [method.name for method in METHODS.values() if value in method.losses]
    return {"method": owners[0], "loss": value} if len(owners) == 1 else {}


def _method_around(siblings: Mapping[Any, Any]) -> str:
    """The method that the settings name, in our word or another program's; "" if none of them does."""
    for word, value in siblings.items():
        if word == "method" or SAME.get(word) == "method":
            return method_lines(str(value)).get("method", "")
    return ""


def _of_method(
    path: tuple[str, ...], head: str, outer: str, value: str, siblings: Mapping[Any, Any]
) -> UnknownSetting | None:
    """The error about the name of a method or loss that means other settings here; None if it means `outer`."""
    lines = method_lines(value)
    if outer == "method" and not lines:
        hint = f"Here it is `method`, and mlx_nb has no {value} yet. It has: {', '.join(METHODS)}."
        return UnknownSetting(SettingError(path, f"{head} {hint}"), outer)
    named = _method_around(siblings)
    method = METHODS.get(named or "sft")
    if outer == "loss" and (not lines or (method is not None and value in method.losses)):
        return None
    if lines == {outer: value}:
        return None
    written = " and ".join(f"`{name}: {one}`" for name, one in lines.items())
    if outer == "loss" and named not in ("", lines["method"]):
        written += f", in place of `method: {named}`"
    hint = f"Here it is `{outer}`: write {written}." if outer in lines else f"Here it is {written}."
    return UnknownSetting(SettingError(path, f"{head} {hint}"), outer, lines["method"] if outer == "method" else None)


def _renamed(
    path: tuple[str, ...],
    head: str,
    name: str,
    value: Any,
    siblings: Mapping[Any, Any],
    known: Mapping[str, Any],
    fits: Callable[..., bool],
) -> UnknownSetting:
    """The error about a setting with another name here, with the line to write if the value fits."""
    outer, _, inner = name.partition(".")
    value = VALUES.get(outer, {}).get(value, value) if isinstance(value, str) else value
    if path[-1].replace("-", "_") == "num_train_epochs" and _is_set(siblings.get("max_steps")):
        return UnknownSetting(SettingError(path, f"{head} There `max_steps` goes before it. Remove it."))
    if not inner and is_off(value) and (value is None or not fits(outer, value) or outer == "method"):
        if outer == "method" or (fits(outer, None) and known[outer].default is None):
            return UnknownSetting(SettingError(path, f"{head} {AT_DEFAULT}"))
        value = None
    if inner and value is None:
        return UnknownSetting(SettingError(path, f"{head} {AT_DEFAULT}"), outer)
    if not inner and is_off(value) and not fits(outer, value):
        return UnknownSetting(SettingError(path, f"{head} Here it is `{outer}`.{_off_hint(outer)}"), outer)
    if outer in ("method", "loss") and isinstance(value, str):
        other = _of_method(path, head, outer, value, siblings)
        if other is not None:
            return other
    if name in ("target_modules", "lora_parameters.keys"):
        if is_all_linear(value):
            return UnknownSetting(SettingError(path, f"{head} {ALL_ADAPTED}"))
        value = [one.strip() for one in value.split(",")] if isinstance(value, str) and "," in value else value
    without_advice = f"{head} Here it is `{outer}`."
    if inner:
        written = f"{outer}: {{{inner}: {_written(value)}}}"
        hint = f"It belongs inside: `{outer}: {{{inner}: ...}}`."
        given = {inner: value}
    else:
        written, given = f"{outer}: {_written(value)}", value
        hint = f"Here it is `{outer}`."
    if (value is not None or not inner) and fits(outer, given):
        hint = f"{hint[:-1]}: write `{written}`." if not inner else f"{hint[:-1]}, here `{written}`."
    return UnknownSetting(SettingError(path, f"{head} {hint}"), outer, None if inner else value, without_advice)


AT_DEFAULT = "That is the default here. Remove it."
ALL_ADAPTED = "Every linear layer is adapted unless `target_modules` names others. Remove it."


def is_all_linear(value: Any) -> bool:
    """Whether it is another program's word for every linear layer, alone or in a list."""
    word = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    return isinstance(word, str) and word.lower() in ALL_LINEAR


def _alpha(path: tuple[str, ...], head: str, value: Any, siblings: Mapping[Any, Any]) -> UnknownSetting:
    """The error about PEFT's alpha: the scale here is alpha / rank."""
    group = siblings.get("lora_parameters")
    siblings = {**group, **siblings} if isinstance(group, Mapping) else siblings
    rank = next((siblings[word] for word in ("rank", "r", "lora_r", "lora_rank") if word in siblings), None)
    numbers = [one for one in (value, rank) if isinstance(one, (int, float)) and not isinstance(one, bool) and one > 0]
    scale = f"{numbers[0] / numbers[1]:g}" if len(numbers) == 2 else "..."
    hint = f"Here it is `lora_parameters: {{scale: {scale}}}` (alpha / rank)."
    return UnknownSetting(SettingError(path, f"{head} {hint}"), "lora_parameters")


def is_off(value: Any) -> bool:
    """Whether other programs use this value for "off" or "automatic"."""
    if isinstance(value, str):
        return value.lower() in (*OFF, "0.0", "-1")
    return value is None or (isinstance(value, (int, float)) and value in (0, -1))


def _is_set(value: Any) -> bool:
    """Whether it is a number of updates, and not another program's word for none."""
    return value is not None and not is_off(value)


def _off_hint(name: str) -> str:
    """How to write "off" where other programs write it differently, after a space; "" if there is no advice."""
    return f" {OFF_HERE[name]}" if name in OFF_HERE else ""


def value_hint(name: str, value: Any) -> str:
    """An addition to the error about a value that a setting does not take, after a space."""
    if is_off(value):
        return _off_hint(name)
    if isinstance(value, str):
        if name == "fine_tune_type" and value in METHODS:
            return f" {value} is a method: write `method: {value}`."
        if value in VALUES.get(name, {}):
            return f" Here it is `{name}: {VALUES[name][value]}`."
    return ""


def _written(value: Any) -> str:
    """The value as written in YAML; "..." for a long one or an object."""
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
