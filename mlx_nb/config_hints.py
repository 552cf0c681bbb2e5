"""What to say to a setting that does not exist: what it is here, or the nearest name where it is a slip."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_nb.methods import METHODS
from mlx_nb.neighbor_words import ABSENT, ALPHAS, INSTEAD, NEEDLESS, SAME, SECTIONS, VALUES
from mlx_nb.settings import SettingError, typo_of


@dataclass(frozen=True)
class Foreign:
    """A setting that does not exist: the error, the setting of ours that it means ("" = none), and its value there."""

    error: SettingError
    meant: str = ""
    value: Any = None


def foreign_settings(
    values: Mapping[Any, Any],
    known: Mapping[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    fits: Callable[..., bool],
) -> Iterator[Foreign]:
    """One for each setting in `values` that is not `known`, and for each in a mapping that another program groups by.

    `groups` has the names inside each group of ours; `fits(setting, value)` says whether a setting takes a value.
    """
    for key, value in values.items():
        section = SECTIONS.get(key)
        if key in known:
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
    head = f"unknown setting `{'.'.join(path)}`."
    word = word.lstrip("-").lower().replace("-", "_")
    outer, _, inner = word.partition(".")
    if len(path) > 1 and word in known:
        return _renamed(path, head, word, value, fits)
    if inner in groups.get(outer, ()):
        return _renamed(path, head, word, value, fits)
    method = METHODS.get(str(around.get("method")))
    if method is not None and any(word in loss.options for loss in method.losses.values()):
        written = f"`method_options: {{{word}: {_written(value)}}}`"
        return Foreign(SettingError(path, f"{head} It is an option of `method: {method.name}`: write {written}."))
    if word in ALPHAS:
        return _alpha(path, head, value, around)
    if word in SAME:
        return _renamed(path, head, SAME[word], value, fits)
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


def _renamed(path: tuple[str, ...], head: str, name: str, value: Any, fits: Callable[..., bool]) -> Foreign:
    """The error about a setting that has another name here, with the line to write where the value fits."""
    outer, _, inner = name.partition(".")
    value = VALUES.get(outer, {}).get(value, value) if isinstance(value, str) else value
    if outer == "method" and isinstance(value, str) and value not in METHODS:
        hint = f"Here it is `method`, and mlx_nb has no {value} yet. It has: {', '.join(METHODS)}."
        return Foreign(SettingError(path, f"{head} {hint}"), outer)
    if inner:
        written = f"{outer}: {{{inner}: {_written(value)}}}"
        hint = f"It belongs inside: `{outer}: {{{inner}: ...}}`."
        given = {inner: value}
    else:
        written, given = f"{outer}: {_written(value)}", value
        hint = f"Here it is `{outer}`."
    if value is not None and fits(outer, given):
        hint = f"{hint[:-1]}: write `{written}`." if not inner else f"{hint[:-1]}, here `{written}`."
    return Foreign(SettingError(path, f"{head} {hint}"), outer, None if inner else value)


def _alpha(path: tuple[str, ...], head: str, value: Any, around: Mapping[Any, Any]) -> Foreign:
    """The error about PEFT's alpha: the scale here is alpha / rank."""
    rank = next((around[word] for word in ("rank", "r", "lora_r", "lora_rank") if word in around), None)
    numbers = [one for one in (value, rank) if isinstance(one, (int, float)) and not isinstance(one, bool) and one > 0]
    scale = f"{numbers[0] / numbers[1]:g}" if len(numbers) == 2 else "..."
    hint = f"Here it is `lora_parameters: {{scale: {scale}}}` (alpha / rank)."
    return Foreign(SettingError(path, f"{head} {hint}"), "lora_parameters")


def value_hint(name: str, value: Any) -> str:
    """What to add to the error about a value that a setting does not take, with a space in front."""
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
