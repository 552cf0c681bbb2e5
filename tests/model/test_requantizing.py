"""Quantizing a changed matrix again keeps as much of the change as its format can hold."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_nb.model.requantizing import Format, format_of, pack, requantized, values_of


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 5, 128)).astype(np.uint8)
    packed = pack(mx.array(codes), bits)
    ones, zeros = mx.ones((3, 5, 2)), mx.zeros((3, 5, 2))
    assert (np.array(mx.dequantize(packed, ones, zeros, group_size=64, bits=bits)) == codes).all()


def quantized_linear(dtype=mx.float16, mode="affine", bits=4, group_size=32):
    mx.random.seed(0)
    linear = nn.Linear(128, 64)
    linear.weight = (mx.random.normal((64, 128)) * 0.05).astype(dtype)
    return nn.QuantizedLinear.from_linear(linear, group_size=group_size, bits=bits, mode=mode)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_an_unchanged_matrix_comes_back_bit_for_bit(bits, dtype):
    module = quantized_linear(dtype, bits=bits)
    again = requantized(values_of(module), module, format_of(module))
    assert mx.array_equal(again.values, values_of(module))
    assert all(mx.array_equal(again.arrays[name], module[name]) for name in ("weight", "scales", "biases"))


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_is_at_most_the_change_and_at_most_that_of_mlx(bits, size):
    module = quantized_linear(bits=bits)
    change = mx.random.normal((64, 128)) * size
    wanted = values_of(module) + change
    stored = requantized(wanted, module, format_of(module))
    plain = mx.dequantize(*mx.quantize(wanted.astype(mx.float16), 32, bits), 32, bits).astype(mx.float32)
    ours, mlx = (mx.linalg.norm(one - wanted).item() for one in (stored.values, plain))
    assert ours <= 1.001 * min(mlx, mx.linalg.norm(change).item())
    again = mx.dequantize(*(stored.arrays[name] for name in ("weight", "scales", "biases")), 32, bits)
    assert mx.allclose(again.astype(mx.float32), stored.values, atol=1e-3)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)])
def test_formats_without_biases_are_quantized_by_mlx(mode, bits, group_size):
    module = quantized_linear(mode=mode, bits=bits, group_size=group_size)
    stored = requantized(values_of(module), module, Format(group_size, bits, mode))
    assert set(stored.arrays) == {"weight", "scales"}
    assert mx.allclose(stored.values, values_of(module), atol=0.02)
