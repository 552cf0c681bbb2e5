"""How a setting is declared, and how a value becomes one: the right type, inside its bounds, or a clear error."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal

from mlx_nb.errors import ConfigError, did_you_mean


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    live: bool = False,
    synonyms: Mapping[str, str] | None = None,
    only_for: str | tuple[str, ...] | None = None,
) -> Any:
    """Declare one setting. `live` ones may change during a run; `synonyms` are other words for a choice.

    `only_for` says which methods it has an effect with: those that take a kind of row (`pairs`, `prompts`, ...) or one
    of several, that use a `reference`, or whose loss has it as an `option`.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"help": help, "group": group, "live": live, "synonyms": dict(synonyms or {}), "only_for": only_for}
    metadata["bounds"] = {word: value for word, value in bounds.items() if value is not None}
    return field(default=default, metadata=metadata)


class SettingError(ConfigError):
    def __init__(self, path: tuple[str, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


def coerce(value: Any, declared: dataclasses.Field, hint: Any, parent: tuple[str, ...] = ()) -> Any:
    """`value` as the declared type, inside its bounds. Raises SettingError with the path of the setting."""
    path = (*parent, declared.name)
    label = ".".join(path)
    if hint is Any:
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise SettingError(path, f"`{label}` has no value. {_expected(options)}")
    kind = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(kind):
        return _coerce_group(value, typing.cast(type, kind), path)
    if kind is dict or typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise SettingError(path, f"`{label}` must be a mapping such as {{eps: 1e-8}}, not {value!r}.")
        return dict(value)
    synonyms = declared.metadata["synonyms"]
    known = synonyms.get(value, value) if isinstance(value, str) else value
    result = _CONVERSIONS[typing.get_origin(kind) or kind](known, kind)
    if result is _WRONG:
        shown = "an empty list" if isinstance(value, (list, tuple)) and not value else repr(value)
        raise SettingError(path, f"`{label}` cannot be {shown}. {_expected(options, synonyms)}")
    for word, limit in declared.metadata["bounds"].items():
        if not _BOUNDS[word](result, limit):
            raise SettingError(path, f"`{label}` must be {word} {limit:g}, not {result:g}.")
    return result


def _coerce_group(value: Any, kind: type, path: tuple[str, ...]) -> Any:
    if isinstance(value, kind):
        value = {declared.name: getattr(value, declared.name) for declared in fields(kind)}
    elif isinstance(value, str) and hasattr(kind, "short_form"):
        value = {kind.short_form: value}
    if not isinstance(value, Mapping):
        names = ", ".join(declared.name for declared in fields(kind))
        raise SettingError(path, f"`{path[0]}` must be a mapping with some of: {names}; not {value!r}.")
    known = {declared.name: declared for declared in fields(kind)}
    for key in value:
        if key not in known:
            names = ", ".join(known)
            raise SettingError(
                (*path, str(key)),
                f"unknown setting `{path[0]}.{key}`.{did_you_mean(str(key), known)} Known: {names}.",
            )
    hints = typing.get_type_hints(kind)
    return kind(**{key: coerce(item, known[key], hints[key], path) for key, item in value.items()})


_WRONG = object()


def _to_int(value: Any, _kind: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else _WRONG


def _to_float(value: Any, _kind: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else _WRONG


def _to_choice(value: Any, kind: Any) -> Any:
    return value if value in typing.get_args(kind) and not isinstance(value, bool) else _WRONG


def _to_tuple(value: Any, kind: Any) -> Any:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items:
        return _WRONG
    item_kind = typing.get_args(kind)[0]
    converted = [_CONVERSIONS[item_kind](item, item_kind) for item in items]
    return _WRONG if any(item is _WRONG for item in converted) else tuple(converted)


_CONVERSIONS: dict[Any, Callable[[Any, Any], Any]] = {
    int: _to_int,
    float: _to_float,
    bool: lambda value, _kind: value if isinstance(value, bool) else _WRONG,
    str: lambda value, _kind: value if isinstance(value, str) else str(value) if isinstance(value, Path) else _WRONG,
    Literal: _to_choice,
    tuple: _to_tuple,
}
# What a kind of value is called: one of them, and several.
_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
}
_BOUNDS: dict[str, Callable[[float, float], bool]] = {
    "at least": lambda value, limit: value >= limit,
    "above": lambda value, limit: value > limit,
    "at most": lambda value, limit: value <= limit,
    "below": lambda value, limit: value < limit,
}


def _expected(options: tuple[Any, ...], synonyms: Mapping[str, str] = types.MappingProxyType({})) -> str:
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is Literal:
        text = f"Choose one of: {', '.join(str(choice) for choice in [*typing.get_args(kind), *synonyms])}."
    elif typing.get_origin(kind) is tuple:
        text = f"It takes a list of {_WORDS[typing.get_args(kind)[0]][1]}, one at least."
    else:
        text = f"It takes {_WORDS[kind][0]}."
    return text + (" null is allowed." if type(None) in options else "")
