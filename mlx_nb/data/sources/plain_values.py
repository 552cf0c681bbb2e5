"""The values of tables (numpy, pandas, Arrow) as JSON would hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def plain_value(value: Any) -> Any:
    """numpy and pandas values as JSON would hold them, at any depth; a missing value is None."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain_value(item) for item in value]
    if isinstance(value, np.datetime64):
        # In nanoseconds, as pandas keeps them, its `item` would be a bare number.
        value = value.astype("datetime64[us]")
    if isinstance(value, np.generic):
        value = value.item()
    return None if is_missing(value) else value


def is_missing(value: Any) -> bool:
    """Whether a table has no value here: None, NaN, NA or NaT."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return type(value).__name__ in ("NAType", "NaTType")
