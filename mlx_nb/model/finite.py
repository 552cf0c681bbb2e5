"""Finds NaN and infinite weights when they are loaded, so that they are not mistaken for bad rows later."""

from __future__ import annotations

import typing
from collections.abc import Mapping

import mlx.core as mx

from mlx_nb.errors import counted

_NO_SCALE = 255  # NaN among the uint8 scales of microscaling formats


def not_finite(arrays: Mapping[str, mx.array]) -> str:
    """A message such as `NAME (3 of 64 values are NaN or infinite)` for the first bad array and the count of others.

    Returns "" if all are finite. One sum per array is computed; it is finite only if every value is. The values are
    checked only if the sum is not finite, because finite half-precision values may overflow the sum.
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
    """The values to check; None if the dtype has no non-finite values."""
    if array.dtype == mx.uint8 and name.endswith("scales"):
        return mx.where(array == _NO_SCALE, mx.nan, 0.0)
    return array if mx.issubdtype(array.dtype, mx.floating) else None
