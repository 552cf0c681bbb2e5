"""Oddities in the content of a row, before it is tokenized: shared by the data check and the row view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mlx_nb.data.examples.kinds import ROW_KINDS
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.tagging import REASONING_FIELDS
from mlx_nb.data.rows.content import RowContent
from mlx_nb.data.rows.turns import role_sequences, turns

_CHARACTERS_PER_TOKEN = 4


def content_remarks(
    record: Mapping[str, Any], content: RowContent, settings: ExampleSettings, kind: str = "tokens"
) -> dict[str, str]:
    """The remarks about a row by kind of finding; the first of each kind.

    `record` has the row's columns, `content` is what was read from them as `kind`: tokens, pairs, labels or prompts.
    """
    remarks: dict[str, str] = {}
    for found, remark in _all_remarks(record, content, settings, kind):
        remarks.setdefault(found, remark)
    return remarks


def _all_remarks(
    record: Mapping[str, Any], content: RowContent, settings: ExampleSettings, kind: str
) -> Iterator[tuple[str, str]]:
    for roles in role_sequences(content):
        yield from _role_remarks(roles, answered=ROW_KINDS[kind].answered)
    long_turn = _CHARACTERS_PER_TOKEN * settings.max_seq_length
    for name, message in turns(content):
        text = message.get("content") or ""
        if not text.strip() and not any(message.get(field) for field in ("tool_calls", *REASONING_FIELDS)):
            yield "empty_turns", f"{name} is empty"
        elif len(text) > long_turn:
            yield "long_turns", f"{name} has {len(text):,} characters"
    yield from _unused_columns(record, content, settings)
    yield from ROW_KINDS[kind].remarks(record, content)


def _unused_columns(
    record: Mapping[str, Any], content: RowContent, settings: ExampleSettings
) -> Iterator[tuple[str, str]]:
    """Remarks about columns that are ignored because of the row's own messages."""
    system = record.get("system") if settings.columns.system is None else None
    _, first = next(turns(content), ("", {}))
    if isinstance(system, str) and system.strip() and first.get("role") == "system" and first.get("content") != system:
        yield "two_systems", "the `system` column is not used: the messages begin with another system prompt"


def _role_remarks(roles: Sequence[str], *, answered: bool) -> Iterator[tuple[str, str]]:
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] == ["assistant"]:
        yield "assistant_first", "the conversation starts with the assistant"
    again = [a for a, b in pairwise(spoken) if a == b and a in ("user", "assistant")]
    if again:
        yield "same_role_twice", f"two messages in a row from the {again[0]}"
    if "system" in roles[1:]:
        yield "late_system", f"message {roles.index('system', 1)} is from the system"
    if answered and roles[-1] != "assistant":
        yield "last_not_assistant", f"the last message is from {roles[-1]}"
