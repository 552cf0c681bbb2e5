"""Checks of the sources of a mixture, as `data` lists them.

A mixture in the settings is checked when they are read, one that a variable holds when the variable is looked up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mlx_nb.config.fields import as_float32, to_plain_python
from mlx_nb.errors import did_you_mean, shortened, shown

FEATURES = {
    "chat_feature": "messages",
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "chosen_feature": "chosen",
    "rejected_feature": "rejected",
    "label_feature": "label",
    "answer_feature": "answer",
    "preference_score_feature": "preference_score",
    "text_feature": "text",
    "system_feature": "system",
}
ROW_COLUMNS = {
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "output",
    "response",
    "text",
    "chosen",
    "rejected",
}
SOURCE_KEYS = ("path", "weight", "subset", "train_split", "valid_split", "test_split", *FEATURES)


def is_mixture(found: object) -> bool:
    """Whether it is a list of names or `{path: ..., weight: ...}`, as opposed to a list of rows."""
    if not isinstance(found, (list, tuple)) or not found:
        return False
    first = found[0]
    if isinstance(first, (str, os.PathLike)):
        return True
    return isinstance(first, Mapping) and "path" in first and not ROW_COLUMNS & set(first)


def is_source(item: object) -> bool:
    """Whether it is the mapping of one source."""
    return isinstance(item, Mapping) and "path" in item and all(key in SOURCE_KEYS for key in item)


def source_problem(item: object, number: int) -> tuple[str, str] | None:
    """(key, message) of the first mistake in a source of a mixture; None if there is none.

    `number` counts from 1. The key is "" if the source as a whole is wrong.
    """
    if isinstance(item, (str, os.PathLike)):
        return None if str(item).strip() else ("", f"source {number} of data is empty. Give a name, or remove it.")
    if not isinstance(item, Mapping) or "path" not in item:
        example = "such as {path: other.jsonl, weight: 2}"
        return "", f"source {number} of data needs a path, {example}: {shown(item)}."
    for key, value in item.items():
        if key not in SOURCE_KEYS:
            return str(key), (
                f"source {number} of data has the unknown key {shortened(str(key))!r}."
                f"{did_you_mean(shortened(str(key)), SOURCE_KEYS)} Known: {', '.join(SOURCE_KEYS)}."
            )
        if key == "weight" and value is not None and not _is_weight(to_plain_python(value)):
            return key, f"weight of source {number} of data must be a number above 0, not {shown(value)}."
        if key not in ("path", "weight") and value is not None and not (isinstance(value, str) and value.strip()):
            return key, f"{key} of source {number} of data must be text, not {shown(value)}."
    path = item["path"]
    if path is None or isinstance(path, (bool, int, float)) or (isinstance(path, str) and not path.strip()):
        return "path", f"path of source {number} of data cannot be {shown(path)}. It takes a name, or rows."
    return None


def _is_weight(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < as_float32(value) < float("inf")
