"""Converts lists of messages that are written as columns, or as question-answer turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TURN = {"system": "system", "input": "user", "output": "assistant"}


def to_messages(value: Any) -> Any:
    """The messages in columns `{role: [...], content: [...]}` or turns `[{input, output}, ...]`.

    Columns come from the `Sequence` of datasets, turns from Capybara and XTuner. Any other value is returned unchanged.
    """
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
