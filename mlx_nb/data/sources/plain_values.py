"""The values of tables (numpy, pandas, Arrow) as JSON would hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_nb.data.sources.row_values import DEEPEST, OddRow


def plain_value(value: Any, depth: int = 0) -> Any:
    """numpy and pandas values as JSON would hold them, at any depth; a missing value is None, a text is a `str`.

    Keys that are no text stay as they are. Raises OddRow for what is nested without end.
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
        # In nanoseconds, as pandas keeps them, its `item` would be a bare number.
        value = value.astype("datetime64[us]")
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    return None if is_missing(value) else value


def _plain_key(key: Any) -> Any:
    return str.__str__(key) if isinstance(key, str) else key


def is_missing(value: Any) -> bool:
    """Whether a table has no value here: None, NaN, NA or NaT."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return type(value).__name__ in ("NAType", "NaTType")
