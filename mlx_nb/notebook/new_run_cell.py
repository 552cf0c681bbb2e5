"""The fields of the new-run form, and the `%%finetune` cell that results from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from mlx_nb.config.help import choices_of, setting_help, short_help
from mlx_nb.config.methods import METHODS
from mlx_nb.config.run_config import SETTINGS
from mlx_nb.config.yaml_text import load_mapping
from mlx_nb.errors import MlxNbError
from mlx_nb.notebook.choices import values
from mlx_nb.notebook.help_text import TEN

NAME = "name"
# Settings that a method needs, or that are often changed with it, besides the ten of every method.
_OF_METHODS = ("loss", "beta", "rewards", "group_size", "max_completion_length")
_ONE_A_LINE = "sample_prompts"
LONGEST_HELP = 200


class Field(NamedTuple):
    """One setting in the form: its name, default and help, its choices, and whether other values are allowed."""

    name: str
    default: str
    help: str
    choices: list[list[str]]  # [text, help]
    only_these: bool


def fields_of(given: Mapping[str, str], namespace: Mapping[str, Any]) -> list[Field]:
    """The settings in the form for the method in `given`, and others in `given`, with the choices in this notebook."""
    method = METHODS.get(given.get("method") or "sft", METHODS["sft"])
    own = _OF_METHODS if method.name != "sft" else ()
    described = {line.name: line for line in setting_help()}
    fields = []
    more = [name for name in given if name not in (*TEN, *own, NAME) and name in described and given[name].strip()]
    for name in (*TEN, *own, *more):
        outer = name.partition(".")[0]
        if not method.uses(outer, SETTINGS[outer].metadata["only_for"]):
            continue
        line = described[name]
        choices = [list(one) for one in values(tuple(name.split(".")), "", namespace, {"method": method.name})]
        only_these = bool(choices_of(name, method.name))
        default = "" if line.default == "null" else line.default
        fields.append(Field(name, default, short_help(line.help, LONGEST_HELP), choices, only_these))
    return fields


def cell_text(given: Mapping[str, str]) -> str:
    """The cell: `name` in its first line, then one line for each setting that is not empty."""
    name = given.get(NAME, "").strip()
    lines = [f"%%finetune --name {name}" if name else "%%finetune"]
    groups: dict[str, list[str]] = {}
    for key, text in given.items():
        if key == NAME or not text.strip():
            continue
        outer, _, inner = key.partition(".")
        written = _list_of_lines(text) if key == _ONE_A_LINE else _one_line(key, text.strip())
        groups.setdefault(outer, []).append(f"{inner}: {written}" if inner else written)
    order = [one.partition(".")[0] for one in (*TEN[:3], *_OF_METHODS, *TEN[3:])]
    for outer in sorted(groups, key=lambda one: order.index(one) if one in order else len(order)):
        parts = groups[outer]
        is_group = any(f"{outer}." in key for key in given)
        lines.append(f"{outer}: {{{', '.join(parts)}}}" if is_group else f"{outer}: {parts[-1]}")
    return "\n".join(lines)


def _one_line(key: str, text: str) -> str:
    """A value as YAML: as typed, or in quotation marks if YAML would cut it or read it as something else."""
    if text[0] in "[{\"'":
        return text
    try:
        read = load_mapping(f"{key.replace('.', '_')}: {text}").values
    except MlxNbError:
        return json.dumps(text, ensure_ascii=False)
    (value,) = read.values()
    return json.dumps(text, ensure_ascii=False) if isinstance(value, str) and value != text else text


def _list_of_lines(text: str) -> str:
    """Prompts, one per line, as a list; a typed list stays as it is. Braces in them are not variables."""
    if text.strip()[0] == "[":
        return text.strip()
    prompts = [line.strip().replace("{", "{{").replace("}", "}}") for line in text.splitlines() if line.strip()]
    return json.dumps(prompts, ensure_ascii=False)
