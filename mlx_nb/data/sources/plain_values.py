"""Converts values of tables (numpy, pandas, Arrow) to JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_nb.data.sources.row_values import DEEPEST, OddRow


def plain_value(value: Any, depth: int = 0) -> Any:
    """Convert numpy and pandas values to JSON values, at any depth; missing values become None, texts `str`.

    Keys that are not text stay as they are. Raises OddRow for endless nesting.
    """
    if type(value) is str:
        return value
    if depth > DEEPEST:
        raise OddRow(f"it is nested more than {DEEPEST} deep. Drop the row.")
    if isinstance(value, Mapping):
        return {_plain_key(key): plain_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain_value(item, depth + 1) for item in value]
    if isinstance(value, np.datetime64):
        # pandas stores nanoseconds, for which `item` would be a bare number.
        value = value.astype("datetime64[us]")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    return None if is_missing(value) else value


def _plain_key(key: Any) -> Any:
    return str.__str__(key) if isinstance(key, str) else key


def is_missing(value: Any) -> bool:
    """Whether it is a table's missing value: None, NaN, NA or NaT."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return type(value).__name__ in ("NAType", "NaTType")
