"""Declaration of a setting, and conversion of a given value to its type and bounds, or to a clear error."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import numbers
import re
import struct
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import PurePath
from typing import Any, Literal

from mlx_nb.errors import ConfigError, listed_problems, on_one_line, shortened, shown


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
    """Declare one setting.

    `live` settings may change during a run; `synonyms` maps other programs' words to choices. `only_for` restricts it
    to some methods: those with one kind of rows (`pairs`, `prompts`, ...) or one of several, those with a `reference`,
    or those whose loss has it as an `option`.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"help": help, "group": group, "live": live, "synonyms": dict(synonyms or {}), "only_for": only_for}
    metadata["bounds"] = {word: value for word, value in bounds.items() if value is not None}
    return field(default=default, metadata=metadata)


@functools.cache
def kinds_of(group: type) -> Mapping[str, Any]:
    """The types of the settings of a group by name. Cached: annotations are strings until they are resolved."""
    return types.MappingProxyType(typing.get_type_hints(group))


class Settings:
    """Base class of a group of settings; remembers which were given, even at their default.

    A given value takes precedence over a derived one, also if it equals the default.
    """

    def __new__(cls, *values: Any, **named: Any) -> Any:
        """Record which settings are given, before defaults fill in the others."""
        self = super().__new__(cls)
        names = [declared.name for declared in fields(cls)]  # type: ignore[arg-type]
        object.__setattr__(self, "_given", names_given({**dict(zip(names, values)), **named}))
        return self

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that were given; those inside a group as in `lora_parameters.rank`."""
        result: frozenset[str] = self.__dict__["_given"]
        return result

    def with_given(self, given: Iterable[str]) -> Any:
        """A copy of the settings that counts those in `given` as given."""
        other = copy.copy(self)
        object.__setattr__(other, "_given", frozenset(given))
        return other


def names_given(values: Mapping[str, Any]) -> frozenset[str]:
    """The names of settings in a mapping, those inside groups as `group.name`."""
    names: set[str] = set()
    for name, value in values.items():
        inner = value.given if isinstance(value, Settings) else value if isinstance(value, Mapping) else None
        names |= {name} if inner is None else {f"{name}.{key}" for key in inner}
    return frozenset(names)


def function_name(function: Any) -> str:
    """The name of a reward or metric function: its own, that of the function in a functools.partial, or its class's."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__name__", type(inner).__name__)


class SettingError(ConfigError):
    """An error about one setting, with the path of its key."""

    def __init__(self, path: tuple[str, ...], message: str) -> None:
        super().__init__(on_one_line(message))
        self.path = path


class SettingErrors(ConfigError):
    """Errors about several settings, one line each."""

    def __init__(self, errors: Sequence[SettingError]) -> None:
        super().__init__(listed_problems([*map(str, errors)]))
        self.errors = tuple(errors)


def coerce(value: Any, declared: dataclasses.Field[Any], hint: Any, parent: tuple[str, ...] = ()) -> Any:
    """Convert `value` to the declared type, inside its bounds, made of plain Python types that JSON can hold.

    Raises SettingError with the path of the setting, or SettingErrors for several inside a group.
    """
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
            raise SettingError(path, f"`{label}` must be a mapping such as {{name: value}}, not {shown(value)}.")
        _check_key_count(value, path)
        return plain(value, path)
    synonyms = declared.metadata["synonyms"]
    value = to_plain_python(value)
    known = synonyms.get(value, value) if isinstance(value, str) else value
    result = _CONVERSIONS[typing.get_origin(kind) or kind](known, kind)
    if result is _WRONG:
        if (why := _vanishing(value, kind)) is not None:
            raise SettingError(path, f"`{label}` cannot be {why}")
        wrong = "an empty list" if isinstance(value, (list, tuple)) and not value else shown(value)
        quote = f" Put it in quotes: '{value}'." if kind is str and isinstance(value, (int, float)) else ""
        raise SettingError(path, f"`{label}` cannot be {wrong}. {_expected(options, synonyms)}{quote}")
    if kind is str and not result.strip():
        raise SettingError(path, f"`{label}` is empty. {_expected(options)}")
    for word, limit in _limits(declared, kind):
        if not all(_BOUNDS[word](one, limit) for one in _as_computed(result)):
            null = _null_means(declared) if type(None) in options and word in ("at least", "above") else ""
            off = f" {null}" if null else ""
            raise SettingError(path, f"`{label}` must be {word} {limit:.10g}, not {shown(result)}.{off}")
    return result


def _null_means(declared: dataclasses.Field[Any]) -> str:
    """The part of a setting's help about null, which other programs may write as 0 or -1; "" if there is none."""
    found = re.search(r"null = [^.]*(?:\.\d[^.]*)*\.", declared.metadata["help"])
    return found.group() if found else ""


def _as_computed(value: Any) -> tuple[Any, ...]:
    """A number, and for a float also its 32-bit value: both must be inside the bounds."""
    return (value, as_float32(value)) if isinstance(value, float) else (value,)


def _limits(declared: dataclasses.Field[Any], kind: Any) -> list[tuple[str, float]]:
    """The bounds of a number: those declared, and for a count the largest array dimension."""
    bounds = dict(declared.metadata["bounds"])
    if kind is int:
        bounds.setdefault("at most", _LARGEST_INT)
    return list(bounds.items())


def _coerce_group(value: Any, kind: type, path: tuple[str, ...]) -> Any:
    if isinstance(value, kind):
        value = {declared.name: getattr(value, declared.name) for declared in fields(kind)}
    elif isinstance(value, str) and hasattr(kind, "short_form"):
        value = {kind.short_form: value}
    if not isinstance(value, Mapping):
        names = ", ".join(declared.name for declared in fields(kind))
        raise SettingError(path, f"`{path[0]}` must be a mapping with some of: {names}; not {shown(value)}.")
    _check_key_count(value, path)
    known = {declared.name: declared for declared in fields(kind)}
    hints = kinds_of(kind)
    errors: list[SettingError] = []
    converted = {}
    for key, item in value.items():
        if key not in known:
            near = typo_of(str(key), known)
            suggestion = f" Did you mean {near!r}?" if near else ""
            message = f"unknown setting `{path[0]}.{shortened(str(key))}`.{suggestion} Known: {', '.join(known)}."
            errors.append(SettingError((*path, str(key)), message))
            continue
        try:
            converted[key] = coerce(item, known[key], hints[key], path)
        except SettingError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else SettingErrors(errors)
    return kind(**converted)


def _check_key_count(value: Mapping[Any, Any], path: tuple[str, ...]) -> None:
    """Report a mapping with far too many keys as one mistake, instead of one for each key."""
    if len(value) > MOST_KEYS:
        raise SettingError(path, f"`{'.'.join(path)}` has {len(value):,} keys. At most {MOST_KEYS} are read.")


def plain(value: Any, path: tuple[str, ...], depth: int = 0) -> Any:
    """Convert `value` to what JSON can hold: paths become text, numpy values Python's, tuples lists.

    Raises SettingError for other objects, keys that are not text, NaN, and nesting that is too deep.
    """
    label, value = ".".join(path), to_plain_python(value)
    if depth > _DEEPEST:
        raise SettingError(path[:1], f"`{path[0]}` is nested more than {_DEEPEST} levels deep.")
    if isinstance(value, Mapping):
        wrong = [key for key in value if _to_text(key, str) is _WRONG]
        if wrong:
            raise SettingError(path, f"`{label}` has the key {shown(wrong[0])}. Keys are text.")
        return {str(key): plain(item, (*path, str(key)), depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, (*path, str(index)), depth + 1) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    converted = (_to_text if isinstance(value, (str, PurePath)) else _to_number)(value, None)
    if converted is _WRONG:
        if (why := _vanishing(value, float)) is not None:
            raise SettingError(path, f"`{label}` cannot be {why}")
        takes = "a finite number" if isinstance(value, float) else "numbers, texts, lists and mappings"
        raise SettingError(path, f"`{label}` cannot be {shown(value)}. It takes {takes}.")
    return converted


def typo_of(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` misspells, with one typo in at most two of its parts; None without one.

    In a short word a replaced letter makes another word: `min` and `max`, `text` and `test`.
    """
    parts = word.lower().replace("-", "_").split("_")
    for name in known:
        others = name.split("_")
        if len(parts) == len(others):
            slips = [(one, other) for one, other in zip(parts, others) if one != other]
            if len(slips) <= 2 and all(_one_slip(one, other, len(other) > 5) for one, other in slips):
                return name
        elif _one_slip("".join(parts), "".join(others), False):
            return name
    return None


def _one_slip(one: str, other: str, other_letter: bool) -> bool:
    """Equal but for one letter added, omitted, swapped with the next or, with `other_letter`, replaced."""
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    if len(long) - len(short) == 1:
        return any(long[:place] + long[place + 1 :] == short for place in range(len(long)))
    if len(long) != len(short):
        return False
    places = [place for place, (a, b) in enumerate(zip(one, other)) if a != b]
    if len(places) == 1:
        return other_letter
    first, last = places[0], places[-1]
    return len(places) == 2 and last == first + 1 and one[first] == other[last] and one[last] == other[first]


_WRONG = object()
_DEEPEST = 32
_LARGEST_INT = 2**31 - 1  # array dimensions are of this type
_LARGEST_FLOAT = 3.4e38  # array elements are of this type
_SMALLEST_FLOAT = 2.0**-126  # below it a 32-bit float loses digits, and some devices flush it to 0
MOST_KEYS = 100


def as_float32(number: float) -> float:
    """The number rounded to a 32-bit float."""
    try:
        result: float = struct.unpack("f", struct.pack("f", number))[0]
        return result
    except (OverflowError, struct.error):  # a float or an int that is too large
        return math.inf if number > 0 else -math.inf


def _vanishing(value: Any, kind: Any) -> str | None:
    """The end of the error for a number, or one in a list, that becomes 0 as a 32-bit float; None if there is none."""
    if kind is not float and typing.get_args(kind)[:1] != (float,):
        return None
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(one, float) and 0 < abs(one) < _SMALLEST_FLOAT:
            return f"{shown(one)}: that is 0 in 32-bit floats, the smallest of which is {_SMALLEST_FLOAT:.2g}."
    return None


def to_plain_python(value: Any) -> Any:
    """A numpy (or similar) scalar as Python's, an array as a list; anything else unchanged."""
    if not hasattr(value, "shape") or isinstance(value, type):
        return value
    convert = getattr(value, "item" if value.shape == () else "tolist", None)
    return convert() if callable(convert) else value


def _to_number(value: Any, _kind: Any) -> Any:
    """A finite number of printable size."""
    if isinstance(value, int):
        return value if abs(value) < 2**64 else _WRONG
    return _to_float(value, None)


def _to_int(value: Any, _kind: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else _WRONG


def _to_float(value: Any, _kind: Any) -> Any:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return _WRONG
    try:
        number = float(value)
    except OverflowError:
        return _WRONG
    held = number == 0 or _SMALLEST_FLOAT <= abs(number) <= _LARGEST_FLOAT
    return number if held else _WRONG


def _to_text(value: Any, _kind: Any) -> Any:
    """Text that can be written to a file: without NUL and lone surrogates."""
    text = str(value) if isinstance(value, (str, PurePath)) else "\0"
    return text if "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text) else _WRONG


def _to_choice(value: Any, kind: Any) -> Any:
    choices = typing.get_args(kind)
    among = any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices)
    return value if among else _WRONG


def choice_words(kind: Any) -> list[str]:
    """The choices of a Literal as they are written in YAML."""
    return [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in typing.get_args(kind)]


def _to_tuple(value: Any, kind: Any) -> Any:
    items = [value] if isinstance(value, (str, PurePath)) else value
    if not isinstance(items, (list, tuple)) or not items:
        return _WRONG
    item_kind = typing.get_args(kind)[0]
    converted = [_CONVERSIONS[item_kind](to_plain_python(item), item_kind) for item in items]
    return _WRONG if any(item is _WRONG for item in converted) else tuple(converted)


_CONVERSIONS: dict[Any, Callable[[Any, Any], Any]] = {
    int: _to_int,
    float: _to_float,
    bool: lambda value, _kind: value if isinstance(value, bool) else _WRONG,
    str: _to_text,
    Literal: _to_choice,
    tuple: _to_tuple,
}
# Names of the types in messages: singular and plural.
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
    if dataclasses.is_dataclass(kind):
        names = ", ".join(declared.name for declared in fields(kind))
        text = f"It takes a mapping with some of: {names}. Leave it out for the defaults."
    elif kind is dict or typing.get_origin(kind) is dict:
        text = "It takes a mapping such as {name: value}. Leave it out for none."
    elif typing.get_origin(kind) is Literal:
        text = f"Choose one of: {', '.join([*choice_words(kind), *synonyms])}."
    elif typing.get_origin(kind) is tuple:
        text = f"It takes a list of {_WORDS[typing.get_args(kind)[0]][1]}, one at least."
    else:
        text = f"It takes {_WORDS[kind][0]}."
    return text + (" null is allowed." if type(None) in options else "")
