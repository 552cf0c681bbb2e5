"""Weights that are not numbers: found when they are loaded, and named, before they can be blamed on rows."""

from __future__ import annotations

import typing
from collections.abc import Mapping

import mlx.core as mx

from mlx_nb.errors import counted

_NO_SCALE = 255  # NaN among the uint8 scales of microscaling formats


def not_finite(arrays: Mapping[str, mx.array]) -> str:
    """`NAME (3 of 64 values are NaN or infinite)` of the first such array, with how many more there are, or "".

    One sum per array, all evaluated together: it is finite only if every value is. Only where it is not are values
    looked at one by one, because finite values of half precision may overflow it.
    """
    floats = {name: values for name, array in arrays.items() if (values := _floats(name, array)) is not None}
    sums = {name: values.sum() for name, values in floats.items()}
    mx.eval(sums)
    suspects = [name for name, total in sums.items() if not mx.isfinite(total).item()]
    bad = {name: count for name in suspects if (count := _count(~mx.isfinite(floats[name])))}
    if not bad:
        return ""
    name, count = next(iter(bad.items()))
    more = f"; so are values of {counted(len(bad) - 1, 'more tensor')}" if len(bad) > 1 else ""
    return f"{name} ({_share(count, arrays[name].size)} NaN or infinite{more})"


def _share(count: int, size: int) -> str:
    return f"{count} of {counted(size, 'value')} {'is' if count == 1 else 'are'}"


def _count(which: mx.array) -> int:
    return typing.cast(int, which.sum().item())


def _floats(name: str, array: mx.array) -> mx.array | None:
    """The values that may be no numbers, None where there are none."""
    if array.dtype == mx.uint8 and name.endswith("scales"):
        return mx.where(array == _NO_SCALE, mx.nan, 0.0)
    return array if mx.issubdtype(array.dtype, mx.floating) else None
