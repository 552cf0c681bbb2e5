"""Reads untrusted JSON as dataclasses, checking that every value has its declared type."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from mlx_nb.errors import counted, shown

_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
}


class WrongJson(ValueError):
    """A missing key, an unknown key, or a value of another type. The message says which and where."""


def json_object(content: bytes) -> Any:
    """Parse a JSON text; no key may occur twice in one object. Raises WrongJson."""
    try:
        return json.loads(content, object_pairs_hook=_unique_keys)
    except WrongJson:
        raise
    except RecursionError:
        raise WrongJson("it is nested too deeply") from None
    except ValueError as error:
        raise WrongJson(f"it is not JSON: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise WrongJson(
            f"the key {shown(next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1))} occurs twice"
        )
    return read


def read_as(kind: Any, value: Any, where: str = "", *, others: bool = False) -> Any:
    """Convert a JSON value to `kind`, recursively.

    `kind` is a type, a Literal, a union, a list, tuple or dict of kinds, a dataclass or a NamedTuple. A field with a
    default may be missing. With `others`, unknown keys of the object are ignored. Raises WrongJson, with the place of
    the mistake after `where`.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(options, value, where)
    if origin is Literal:
        if isinstance(value, bool) or value not in options:
            raise _wrong(value, where, f"one of {', '.join(map(repr, options))}")
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_object(kind, value, where, others)
    if isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        hints = typing.get_type_hints(kind)
        return kind(*_read_items(tuple(hints[name] for name in kind._fields), value, where))
    if origin is tuple and not (len(options) == 2 and options[1] is Ellipsis):
        return tuple(_read_items(options, value, where))
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _wrong(value, where, "a list")
        return origin(read_as(options[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise _wrong(value, where, "an object")
        inner = options[1] if options else Any
        return {key: read_as(inner, item, _below(where, key)) for key, item in value.items()}
    return _read_plain(kind, value, where)


def _read_plain(kind: Any, value: Any, where: str) -> Any:
    fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise _wrong(value, where, _WORDS.get(kind, kind.__name__))
    if kind is float:
        try:
            return float(value)
        except OverflowError:
            raise _wrong(value, where, "a number that can be computed with") from None
    return value


def _read_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    kinds = [option for option in options if option is not type(None)]
    errors = []
    for kind in kinds:
        try:
            return read_as(kind, value, where)
        except WrongJson as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong(
        value, where, " or ".join(_WORDS.get(typing.get_origin(option) or option, "another") for option in options)
    )


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _read_object(kind: type, value: Any, where: str, others: bool) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(value, where, "an object")
    hints = _hints(kind)
    fields = dataclasses.fields(kind)
    known = {declared.name for declared in fields}
    if not others and (foreign := [key for key in value if key not in known]):
        raise WrongJson(f"nobody knows {_below(where, foreign[0])!r}")
    read = {}
    for declared in fields:
        if declared.name in value:
            read[declared.name] = read_as(hints[declared.name], value[declared.name], _below(where, declared.name))
        elif declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING:
            raise WrongJson(f"no {_below(where, declared.name)!r}")
    return kind(**read)


def _read_items(kinds: tuple[Any, ...], value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        raise _wrong(value, where, f"a list of {counted(len(kinds), 'value')}")
    return [read_as(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value))]


def _below(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _wrong(value: Any, where: str, expected: str) -> WrongJson:
    return WrongJson(f"`{where}` is {shown(value)}, where {expected} belongs" if where else f"it is not {expected}")
