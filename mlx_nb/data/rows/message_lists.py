"""Lists of messages that are written as columns, or as turns of a question and its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TURN = {"system": "system", "input": "user", "output": "assistant"}


def spread(value: Any) -> Any:
    """The messages in `{role: [...], content: [...]}`, as the `Sequence` of datasets gives them, and in turns
    `[{input, output}, ...]`, as Capybara and XTuner have them; anything else as it is."""
    if isinstance(value, Mapping):
        return _from_columns(value)
    if not isinstance(value, (list, tuple)) or not value or not all(_is_turn(turn) for turn in value):
        return value
    return [{"role": role, "content": turn[key]} for turn in value for key, role in _TURN.items() if turn.get(key)]


def _from_columns(value: Mapping[str, Any]) -> Any:
    columns = list(value.values())
    if {"role", "from"}.isdisjoint(value) or not all(isinstance(column, (list, tuple)) for column in columns):
        return value
    if len({len(column) for column in columns}) != 1:
        return value
    return [dict(zip(value, items)) for items in zip(*columns)]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and {"input", "output"} <= set(turn) and {"role", "from"}.isdisjoint(turn)
