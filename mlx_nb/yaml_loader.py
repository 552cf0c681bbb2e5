"""YAML as people mean it: 1e-5 is a number, `on` is a word, a repeated key is an error, every value has a place.

PyYAML follows YAML 1.1, which reads `1e-5` as a string, `on` as True and `012` as 10.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from mlx_nb.errors import ConfigError


@dataclass(frozen=True)
class Document:
    """The mapping of one YAML text. `places` gives `line N, column M` (counted from 1) for each key path."""

    values: dict[str, Any]
    places: dict[tuple[str, ...], str] = field(default_factory=dict)

    def place(self, *path: str) -> str:
        return self.places.get(path, "")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of the YAML 1.2 core schema."""


_Loader.yaml_implicit_resolvers = {}
_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))


def load_mapping(text: str, name: str = "the YAML") -> Document:
    """Read a YAML mapping. Raises ConfigError with line and column when it is not one."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Document({})
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{name} is not a list of `key: value` lines. Write for example `model: smollm2-135m`.")
        places: dict[tuple[str, ...], str] = {}
        _record_places(root, (), places)
        return Document(loader.construct_document(root), places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = error.problem or "cannot be read"
        raise ConfigError(f"{name} cannot be read{where}: {reason}.{_hint(text, mark)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} cannot be read: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _record_places(node: yaml.Node, path: tuple[str, ...], places: dict[tuple[str, ...], str]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in seen:
            raise ConfigError(f"line {line}: `{key}` is given twice, first on line {seen[key]}. Keep one of them.")
        seen[key] = line
        places[(*path, key)] = f"line {line}, column {value_node.start_mark.column + 1}"
        _record_places(value_node, (*path, key), places)


def _hint(text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return ""
    line = lines[mark.line]
    if "\t" in line:
        return " YAML does not allow tabs: indent with spaces."
    if re.match(r"\s*[\w-]+\s*=", line):
        return " Write `key: value`, not `key=value`."
    return f" The line reads: {line.strip()[:80]}"
