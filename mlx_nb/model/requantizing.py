"""Quantizes a changed matrix in the format that it had before, so that as much of the change as possible stays.

For each group the better of two grids is taken: the one of the original, which the unchanged values fit exactly, or a
new one. So the error of a group is at most the change itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Format(NamedTuple):
    """How a matrix is quantized, as in the `quantization` section of config.json."""

    group_size: int
    bits: int
    mode: str


class Stored(NamedTuple):
    """The arrays of a quantized matrix by name, and its values in float32."""

    arrays: dict[str, mx.array]
    values: mx.array


def format_of(module: nn.Module) -> Format | None:
    """The format of a quantized module; None for a float one."""
    if "scales" not in module:
        return None
    return Format(module.group_size, module.bits, module.mode)


def values_of(module: nn.Module) -> mx.array:
    """The weight of a module, quantized or not, in float32."""
    found = format_of(module)
    if found is None:
        weight: mx.array = module.weight
        return weight.astype(mx.float32)
    return _values(module.weight, module.scales, module.get("biases"), found)


def requantized(weight: mx.array, original: nn.Module | None, wanted: Format, dtype: mx.Dtype | None = None) -> Stored:
    """Quantize `weight` (..., rows, columns), in float32. Scales and biases are of `dtype` (None: as the original's).

    With an affine `original` of the same format, its scales and biases are kept for each group that they fit better
    than new ones.
    """
    if wanted.mode != "affine":
        found = mx.quantize(weight, *wanted[:2], mode=wanted.mode)
        arrays = dict(zip(("weight", "scales", "biases"), found))
        return Stored(arrays, _values(found[0], found[1], arrays.get("biases"), wanted))
    if dtype is None:
        dtype = mx.float32 if original is None else original.scales.dtype
    _, scales, biases = mx.quantize(weight, *wanted[:2], mode="affine")
    grid = _on_grid(weight, scales.astype(dtype), biases.astype(dtype), wanted)
    if original is not None and format_of(original) == wanted:
        old = _on_grid(weight, original.scales, original.biases, wanted)
        better = old.error < grid.error
        grid = _OnGrid(
            mx.where(better[..., None], old.codes, grid.codes),
            mx.where(better, old.scales, grid.scales),
            mx.where(better, old.biases, grid.biases),
            mx.minimum(old.error, grid.error),
        )
    packed = pack(grid.codes.reshape(weight.shape), wanted.bits)
    arrays = {"weight": packed, "scales": grid.scales, "biases": grid.biases}
    return Stored(arrays, _values(packed, grid.scales, grid.biases, wanted))


class _OnGrid(NamedTuple):
    codes: mx.array  # (..., rows, groups, group size) uint8
    scales: mx.array  # (..., rows, groups)
    biases: mx.array
    error: mx.array  # (..., rows, groups): sum of squares


def _on_grid(weight: mx.array, scales: mx.array, biases: mx.array, wanted: Format) -> _OnGrid:
    """The nearest codes for given scales and biases."""
    groups = weight.reshape(*weight.shape[:-1], -1, wanted.group_size)
    scale, bias = scales.astype(mx.float32)[..., None], biases.astype(mx.float32)[..., None]
    whole = mx.round((groups - bias) / mx.where(scale == 0, 1.0, scale))
    codes = mx.clip(whole, 0, 2**wanted.bits - 1)
    error = mx.square(codes * scale + bias - groups).sum(axis=-1)
    return _OnGrid(codes.astype(mx.uint8), scales, biases, error)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes (..., columns) uint8 as mlx does, as a stream of bits: (..., columns * bits / 32) uint32."""
    values = np.array(codes)
    flat = values.reshape(-1, values.shape[-1])
    rows = max(1, (1 << 24) // flat.shape[-1])  # at a time, because a bit needs a byte meanwhile
    packed = [_packed_rows(flat[start : start + rows], bits) for start in range(0, len(flat), rows)]
    return mx.array(np.concatenate(packed).reshape(*values.shape[:-1], -1))


def _packed_rows(rows: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return np.ascontiguousarray(rows).view(np.uint32)
    each = np.unpackbits(rows[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(rows), -1), axis=-1, bitorder="little").view(np.uint32)


def _values(weight: mx.array, scales: mx.array, biases: mx.array | None, of: Format) -> mx.array:
    # mlx rounds the result to the dtype of the scales.
    def exact(array: Any) -> Any:
        return array.astype(mx.float32) if array is not None and mx.issubdtype(array.dtype, mx.floating) else array

    found = mx.dequantize(weight, exact(scales), exact(biases), group_size=of.group_size, bits=of.bits, mode=of.mode)
    return found.astype(mx.float32)
