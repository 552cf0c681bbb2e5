"""Odd values for rows, the places where they may occur, and rows of every kind."""

from __future__ import annotations

import collections
import datetime
import decimal
import threading
import uuid
from pathlib import Path

import numpy as np
import pandas

from tiny import tiny_labels, tiny_pairs, tiny_prompts, tiny_rows


def nested(depth: int, leaf: object = "end", *, as_list: bool = False) -> object:
    value = leaf
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def circular(other: object = 1) -> list:
    value: list = [other]
    value.append({"itself": value})
    return value


class Text(str):
    """A str subclass."""

    def __str__(self) -> str:
        raise RuntimeError("mine")


class Plain:
    """An object with a content."""

    def __init__(self, content: object) -> None:
        self.content = content


class Unwritable:
    """An object that can be neither written, compared nor copied."""

    def __repr__(self) -> str:
        raise RuntimeError("mine")

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("mine")

    __hash__ = None

    def __deepcopy__(self, memo: object) -> object:
        raise RuntimeError("mine")

    def __reduce_ex__(self, protocol: object) -> object:
        raise RuntimeError("mine")


class Raising(dict):
    """A mapping whose values cannot be read."""

    def items(self):
        raise RuntimeError("mine")

    def __getitem__(self, key: object) -> object:
        raise RuntimeError("mine")


# Each makes a value from a content, so that two of them differ in it alone. The word says what becomes of a row that
# has it in a column that is not read: it is taken, or refused.
TAKEN, REFUSED = "taken", "refused"
ODD_VALUES = {
    "int key": (lambda content: {1: content, "b": 2}, TAKEN),
    "None key": (lambda content: {None: content}, TAKEN),
    "tuple key": (lambda content: {(1, 2): content}, TAKEN),
    "bytes key": (lambda content: {b"\xff": content}, TAKEN),
    "huge int": (lambda content: 10**6000 + content, REFUSED),
    "huge int inside": (lambda content: [{"n": -(10**6000) - content}], REFUSED),
    "large int": (lambda content: 10**400 + content, TAKEN),
    "huge float": (lambda content: 1e308 if content else -1e308, TAKEN),
    "infinite": (lambda content: float("inf") if content else float("-inf"), TAKEN),
    "not a number inside": (lambda content: [float("nan"), content], TAKEN),
    "deep object": (lambda content: nested(5000, content), REFUSED),
    "deep list": (lambda content: nested(5000, content, as_list=True), REFUSED),
    "circular": (lambda content: circular(content), REFUSED),
    "set": (lambda content: {"red", "green", f"{content}"}, TAKEN),
    "bytes": (lambda content: b"\xff%d" % content, TAKEN),
    "numpy scalar": (lambda content: np.float32(content), TAKEN),
    "numpy scalars inside": (lambda content: [np.int64(content)], TAKEN),
    "numpy array": (lambda content: np.arange(2000) + content, TAKEN),
    "numpy array inside": (lambda content: {"x": np.arange(2000) * (np.arange(2000) == 1000) * content}, TAKEN),
    "numpy objects": (lambda content: np.array([{"x": content}, None], dtype=object), TAKEN),
    "endless numpy objects": (lambda content: np.array([circular(content)], dtype=object), REFUSED),
    "time": (lambda content: datetime.datetime(2020, 1, 1 + content), TAKEN),
    "day inside": (lambda content: [datetime.date(2020, 1, 1 + content)], TAKEN),
    "decimal": (lambda content: decimal.Decimal(content), TAKEN),
    "uuid": (lambda content: uuid.UUID(int=content), TAKEN),
    "path": (lambda content: Path(f"/{content}"), TAKEN),
    "object": (lambda content: Plain(content), TAKEN),
    "function": (lambda content: lambda: content, TAKEN),
    "unwritable object": (lambda content: Unwritable(), TAKEN),
    "lock": (lambda content: threading.Lock(), TAKEN),
    "text of another kind": (lambda content: Text(f"x{content}"), TAKEN),
    "generator": (lambda content: (one for one in [content]), REFUSED),
    "generator inside": (lambda content: {"x": map(str, [content])}, REFUSED),
    "raising mapping": (lambda content: Raising(a=content), REFUSED),
    "ordered mapping": (lambda content: collections.OrderedDict(a=content), TAKEN),
    "missing": (lambda content: pandas.NA, TAKEN),
    "missing inside": (lambda content: [pandas.NA, pandas.NaT, content], TAKEN),
    "surrogate": (lambda content: f"\ud800{content}", TAKEN),
}
# Of these there is only one, or nothing of them can be told.
ALIKE = ("unwritable object", "lock", "missing", "generator", "generator inside", "raising mapping")

KINDS = {
    "messages": ("tokens", "sft", tiny_rows),
    "texts": ("tokens", "sft", lambda count: [{"text": row["messages"][0]["content"]} for row in tiny_rows(count)]),
    "prompt and completion": (
        "tokens",
        "sft",
        lambda count: [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny_pairs(count)],
    ),
    "pairs": ("pairs", "dpo", tiny_pairs),
    "labels": ("labels", "kto", tiny_labels),
    "prompts": ("prompts", "grpo", tiny_prompts),
}


def _messages_of(row: dict) -> list:
    """Messages in place of a text of a row."""
    return [dict(message) for message in row.get("messages", tiny_rows(1)[0]["messages"])]


def _with_call(row: dict, arguments: object) -> dict:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    said = [{"role": "user", "content": "do"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    if "messages" in row:
        return {**row, "messages": said}
    if "chosen" in row:
        return {"prompt": said[:1], "chosen": said[1:], "rejected": [{"role": "assistant", "content": "no"}]}
    if "completion" in row:
        return {**row, "prompt": said[:1], "completion": said[1:]}
    return {**row, "prompt": [*said, {"role": "user", "content": "go on"}]}


def _with_first_text(row: dict, value: object) -> dict:
    """The value in place of the first text, or of the content of the first message."""
    if "messages" in row:
        messages = _messages_of(row)
        messages[0]["content"] = value
        return {**row, "messages": messages}
    name = next(name for name in ("prompt", "text") if name in row)
    return {**row, name: value}


def _with_part(row: dict, value: object) -> dict:
    return _with_first_text(row, [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "more": value}])


def _with_field(row: dict, value: object) -> dict:
    said = [{"role": "user", "content": "a", "note": value}, {"role": "assistant", "content": "b"}]
    if "messages" in row:
        return {**row, "messages": said}
    if "text" in row:
        return {"messages": said}
    return {**row, "prompt": said[:1]}


PLACES = {
    "extra column": lambda row, value: {**row, "x": value},
    "tools": lambda row, value: {
        **row,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": value}}}],
    },
    "tools themselves": lambda row, value: {**row, "tools": value},
    "arguments": lambda row, value: _with_call(row, {"x": value}),
    "arguments themselves": _with_call,
    "content": _with_first_text,
    "part of the content": _with_part,
    "field of a message": _with_field,
    "label": lambda row, value: {**row, "label": value},
    "answer": lambda row, value: {**row, "answer": value},
    "score": lambda row, value: {**row, "preference_score": value},
    "system": lambda row, value: {**row, "system": value},
    "history": lambda row, value: {**row, "history": value},
    "the row": lambda row, value: value,
}


ODD_COLUMNS = (3, None, (1, 2), b"x", True, 1.5, "k\ud800")
