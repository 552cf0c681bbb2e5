"""What becomes of one key of another program: the records that the import and the export of settings share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from mlx_nb.errors import shortened

# taken      the same name and meaning
# converted  another name, unit or form
# default    not in the file: the other program's default, where it differs from ours
# ignored    it changes nothing that is trained
# not here   it would change what is trained, and mlx_nb has no such thing
Status = Literal["taken", "converted", "default", "ignored", "not here"]
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Meaning:
    """What one key becomes: a status, settings (nested by group), and a note about any difference."""

    status: Status
    becomes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a report: a key with its value, where it stands (None = nowhere), and its meaning."""

    key: str
    value: Any
    meaning: Meaning
    number: int | None = None

    @property
    def status(self) -> Status:
        """What became of the key."""
        return self.meaning.status

    def __str__(self) -> str:
        where = "" if self.number is None else f"line {self.number}"
        said = f"{self.key}: {written(self.value)}"
        became = ", ".join(f"{name}: {written(value)}" for name, value in self.meaning.becomes.items())
        arrow = f" -> {became}" if became and became != said else ""
        note = f". {self.meaning.note}" if self.meaning.note else ""
        return f"{self.status:<9}  {where:<8}  {said}{arrow}{note}".rstrip()


def report(title: str, lines: Sequence[Line]) -> str:
    """The title and one line for each key, in the order of the file."""
    return "\n".join([title, *map(str, lines)])


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML, one a line, groups in braces."""
    lines = []
    for name, value in settings.items():
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
        lines.append(f"{name}: {text.removesuffix('...' + chr(10)).strip()}")
    return "\n".join(lines) + "\n"


def written(value: Any) -> str:
    """A value as YAML on one line, shortened."""
    if isinstance(value, str) and value and not set(value) & set(":#{}[],\"'\n"):
        return shortened(value)
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        text = "[" + ", ".join(map(written, value)) + "]"
        return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}...]"
    return json.dumps(value, ensure_ascii=False, default=str)


def merged(into: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`into` with the settings of `new`; the keys of groups are added to those that are there."""
    for name, value in new.items():
        both = isinstance(value, Mapping) and isinstance(into.get(name), Mapping)
        into[name] = {**into[name], **value} if both else value
    return into
