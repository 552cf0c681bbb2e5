"""Replaces `{name}` in a `%%finetune` body by the notebook variable `name`, without evaluating anything.

A value always stays one YAML value: a text stays a text, even with `#`, `: `, quotes or line breaks, and a number
stays a number. The body is scanned with a placeholder for each name; then scalars with placeholders are rewritten, on
the same number of lines.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import yaml

from mlx_nb.config.fields import to_plain_python
from mlx_nb.config.yaml_text import load_mapping
from mlx_nb.errors import CommandError, ConfigError, did_you_mean

# `{{ text }}` with spaces is Jinja, and left alone.
_PLACE = re.compile(r"\{\{(?P<literal>(?! )[^{}\n]*(?<! ))\}\}|\{(?P<name>[A-Za-z_]\w*)\}")
_MOST_VALUES = 10_000  # in a list or mapping that is written into the YAML


@dataclass(frozen=True)
class _Place:
    """A `{name}` or `{{literal}}` of the body, its line, and the placeholder that replaces it during the scan."""

    text: str
    line: int
    placeholder: str
    name: str | None
    literal: str | None


def fill(body: str, namespace: Mapping[str, Any]) -> str:
    """The body with every `{name}` outside comments replaced; `{{text}}` becomes `{text}`.

    A chat template, and any other text with a `{%` tag, is Jinja and stays unchanged, as does a YAML mapping such as
    `{rank: 8}` or `{length: {max: 80}}`. Raises CommandError for undefined names, one line each, and for a value that
    cannot be written in YAML.
    """
    begin, end = _unused(body)
    places: dict[str, _Place] = {}

    def placeholder(match: re.Match[str]) -> str:
        text = f"{begin}{len(places)}{end}"
        line = body.count("\n", 0, match.start()) + 1
        places[text] = _Place(match.group(), line, text, match.group("name"), match.group("literal"))
        return text

    scanned = _PLACE.sub(placeholder, body)
    pattern = re.compile(f"{begin}[0-9]+{end}")
    scalars = list(_scalars(scanned, pattern))
    jinja = {text for one in scalars if one.is_jinja for text in pattern.findall(scanned[one.start : one.stop])}
    edits = [one for one in scalars if not one.is_jinja]
    named = [places[text] for one in edits for text in pattern.findall(scanned[one.start : one.stop])]
    _refuse_undefined([place for place in named if place.name is not None], namespace)
    parts, position = [], 0
    for one in edits:
        source = scanned[one.start : one.stop]
        parts += [scanned[position : one.start], _written(source, one.token, one.is_key, pattern, places, namespace)]
        position = one.stop
    filled = "".join([*parts, scanned[position:]])
    return pattern.sub(lambda match: _untouched(places[match.group()], match.group() in jinja), filled)


def _unused(body: str) -> tuple[str, str]:
    """Two characters of the private use area that do not occur in the body."""
    free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in body)
    return next(free), next(free)


def _untouched(place: _Place, is_jinja: bool) -> str:
    """The text for a placeholder that was not rewritten: in a comment, in Jinja, or raw YAML in double braces."""
    return place.text if place.literal is None or is_jinja else f"{{{place.literal}}}"


class _Scalar(NamedTuple):
    """A scalar of the body that contains a placeholder, from `start` to `stop`."""

    start: int
    stop: int
    token: yaml.ScalarToken
    is_key: bool
    is_jinja: bool


def _scalars(scanned: str, pattern: re.Pattern[str]) -> Iterator[_Scalar]:
    """Each scalar with a placeholder.

    The scan ends at invalid YAML; the error is reported when the body is read.
    """
    before: Any = None
    key = ""
    try:
        for token in yaml.scan(scanned, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.ScalarToken):
                is_key = isinstance(before, yaml.KeyToken)
                is_jinja = not is_key and (key == "chat_template" or "{%" in token.value)
                if pattern.search(token.value):
                    yield _Scalar(token.start_mark.index, token.end_mark.index, token, is_key, is_jinja)
                key = token.value if is_key else key
            before = token
    except (yaml.YAMLError, ValueError, OverflowError):
        return


def _refuse_undefined(places: list[_Place], namespace: Mapping[str, Any]) -> None:
    known = [name for name in namespace if not name.startswith("_")]
    missing = [place for place in places if place.name not in namespace]
    if missing:
        raise CommandError(
            "\n".join(
                f"line {place.line}: {{{place.name}}} is not defined in the notebook."
                f"{did_you_mean(str(place.name), known) or ' Run the cell that defines it first.'}"
                for place in missing
            )
        )


def _written(
    source: str,
    token: yaml.ScalarToken,
    is_key: bool,
    pattern: re.Pattern[str],
    places: Mapping[str, _Place],
    namespace: Mapping[str, Any],
) -> str:
    """A scalar with its names replaced by their values, as YAML. `source` is its text in the body."""
    alone = places.get(source) if token.plain else None
    if alone is not None and alone.name is not None:
        value = to_plain_python(namespace[alone.name])
        if is_key and isinstance(value, (list, tuple, Mapping)):
            raise CommandError(f"line {alone.line}: {alone.text} is a {type(value).__name__} and cannot be a key.")
        return _as_yaml(value, alone)
    if all(places[text].name is None for text in pattern.findall(source)):
        return source
    inserted = {text: _inside(places[text], namespace) for text in pattern.findall(token.value)}
    text = pattern.sub(lambda match: inserted[match.group()], token.value)
    if token.plain and "\n" not in source and _stays_plain(text, source, pattern, places, namespace):
        return text
    # On one line, followed by the original number of line breaks, so that later lines keep their numbers.
    return _quoted(text) + "\n" * source.count("\n")


def _stays_plain(
    text: str,
    source: str,
    pattern: re.Pattern[str],
    places: Mapping[str, _Place],
    namespace: Mapping[str, Any],
) -> bool:
    """Whether an unquoted text is read as itself or, if made only of numbers, as a number."""
    try:
        read = load_mapping(f"k: [{text}]").values["k"]
    except ConfigError:
        return False
    names = [places[one].name for one in pattern.findall(source)]
    numbers = all(name is not None and not isinstance(namespace[name], (str, PurePath)) for name in names)
    return read == [text] or (numbers and len(read) == 1 and isinstance(read[0], (int, float)))


def _inside(place: _Place, namespace: Mapping[str, Any]) -> str:
    """A value as part of a text."""
    if place.name is None:
        return f"{{{place.literal}}}"
    value = to_plain_python(namespace[place.name])
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple, Mapping)):
        kind = type(value).__name__
        raise CommandError(f"line {place.line}: {place.text} is a {kind} and cannot be part of a text.")
    return _as_yaml(value, place)


def _as_yaml(value: Any, place: _Place) -> str:
    """A value of the notebook as one YAML value on one line. Raises CommandError if that is impossible."""
    if isinstance(value, (str, PurePath)):
        return _word(str(value) if isinstance(value, PurePath) else str.__str__(value))
    try:
        count, text = _flow(value)
    except (TypeError, ValueError, RecursionError):
        count, text = 0, None
    if text is None or count > _MOST_VALUES:
        kind = type(value).__name__
        size = f" with {count} values" if count else ""
        raise CommandError(
            f"line {place.line}: {place.text} is a {kind}{size} and cannot be written into the YAML. "
            f"To train on rows in a variable, write `data: {place.name}` without braces."
        )
    return text


def _flow(value: Any) -> tuple[int, str]:
    """The number of values in it, and the value in YAML's flow style. Raises TypeError or ValueError."""
    value = to_plain_python(value)
    if value is None or isinstance(value, bool):
        return 1, json.dumps(value)
    if isinstance(value, int):
        return 1, int.__repr__(value)
    if isinstance(value, float) and math.isfinite(value):
        return 1, float.__repr__(value)
    if isinstance(value, PurePath):
        return 1, _quoted(str(value))
    if isinstance(value, str):
        return 1, _quoted(str.__str__(value))
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys are text")
        inner = [(key, *_flow(item)) for key, item in value.items()]
        return sum(one[1] for one in inner), "{" + ", ".join(f"{_quoted(key)}: {text}" for key, _, text in inner) + "}"
    if isinstance(value, (list, tuple)):
        items = [_flow(item) for item in value]
        return sum(count for count, _ in items), "[" + ", ".join(text for _, text in items) + "]"
    raise TypeError(type(value).__name__)


def _word(text: str) -> str:
    """A text, in quotes unless YAML reads it as itself without them."""
    try:
        return (
            text
            if re.fullmatch(r"[./~]*\w[\w./~-]*", text) and load_mapping(f"k: [{text}]").values["k"] == [text]
            else _quoted(text)
        )
    except ConfigError:
        return _quoted(text)


def _quoted(text: str) -> str:
    """A text in double quotes, on one line, with characters escaped that are not printable in YAML."""
    return _UNPRINTED.sub(lambda match: f"\\u{ord(match.group()):04x}", json.dumps(text, ensure_ascii=False))


_UNPRINTED = re.compile("[\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
