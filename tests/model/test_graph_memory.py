"""The operations of a graph are recorded without computing it, and its peak memory follows from them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_nb.model.custom_functions import custom_function
from mlx_nb.model.graph_memory import evaluation_order, peak_of, reshaped, row_major
from mlx_nb.model.graph_record import recorded

SIDE = 512
BYTES = 4 * SIDE * SIDE


def planned(function, *arrays, **options):
    return peak_of(recorded(function, arrays), lambda _name, _form: "all", **options).total


def measured(function, *arrays):
    mx.eval(arrays)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    results = function(*arrays)
    mx.eval(results)
    return mx.get_peak_memory() - before


def test_recording_evaluates_nothing():
    huge = mx.zeros((1 << 20, 1 << 20))
    before = mx.get_active_memory()
    graph = recorded(lambda array: [(array @ array).sum()], [huge])
    assert next(one.name for one in evaluation_order(graph)) == "Matmul"
    assert mx.get_active_memory() == before


def test_memory_of_an_input_that_nothing_else_needs_is_used_again():
    def chain(array):
        array = array @ array
        for _ in range(50):
            array = mx.exp(array)
        return [array]

    def kept(array):
        results = [array @ array]
        for _ in range(50):
            results.append(mx.exp(results[-1]))
        return results

    array = mx.ones((SIDE, SIDE))
    assert planned(chain, array) == BYTES
    assert planned(kept, array) == 51 * BYTES
    assert measured(chain, array) == pytest.approx(BYTES, rel=0.01)


def test_a_product_copies_an_input_that_is_neither_in_order_nor_transposed():
    array = mx.ones((SIDE, 2 * SIDE))
    plain, transposed, strided = (
        lambda array: [array[:, :SIDE] @ array[:, :SIDE]],
        lambda array: [array.T @ array],
        lambda array: [array[:, ::2] @ array[:, ::2]],
    )
    assert planned(transposed, array) == 4 * BYTES
    assert planned(strided, array) == 3 * BYTES == planned(plain, array)
    assert measured(strided, array) == pytest.approx(3 * BYTES, rel=0.01)


def test_memory_of_small_graphs_is_that_of_mlx():
    def layers(array):
        for _ in range(12):
            array = mx.softmax(array @ array, axis=-1) * 0.5 + array
        return [array]

    array = mx.random.normal((SIDE, SIDE))
    assert planned(layers, array) == pytest.approx(measured(layers, array), rel=0.15)


def test_a_custom_function_is_recorded_with_its_own_gradient():
    def doubled(array):
        @custom_function
        def twice(array):
            return array * 2

        @twice.vjp
        def _gradient(primal, cotangent, result):
            return mx.sinh(cotangent) * mx.cosh(primal)

        return twice(array).sum()

    graph = recorded(lambda array: [mx.grad(doubled)(mx.exp(array))], [mx.ones((3, 5))])
    names = [one.name for one in evaluation_order(graph)]
    assert names.count("Sinh") == names.count("Cosh") == names.count("Exp") == 1
    assert "Sum" not in names
    assert graph.forms[graph.outputs[0]].shape == (3, 5)


def test_arrays_that_are_used_up_count_and_are_freed():
    def scaled(one, other):
        return [(one * 2 + other).sum()]

    one, other = mx.ones((SIDE, SIDE)), mx.ones((SIDE, SIDE))
    graph = recorded(scaled, [one, other])
    kept = peak_of(graph, lambda _name, _form: "all")
    used_up = peak_of(graph, lambda _name, _form: "all", used_up=graph.inputs)
    assert kept.total == pytest.approx(BYTES, abs=64)
    assert used_up.total == pytest.approx(2 * BYTES, abs=64)


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4), (6, 4), (12, 2), (2, 12), (1, 24, 1), (8, 3)])
def test_a_reshape_is_a_view_where_numpy_has_one(axes, shape):
    array = np.arange(24).reshape(2, 3, 4).transpose(axes)
    strides = reshaped(array.shape, tuple(size // array.itemsize for size in array.strides), shape)
    view = array.reshape(shape)
    assert (strides is not None) == np.shares_memory(view, array)
    if strides is not None:
        real = [size // array.itemsize for size in view.strides]
        assert [one for one, size in zip(strides, shape) if size > 1] == [
            one for one, size in zip(real, shape) if size > 1
        ]


def test_row_major_strides():
    assert row_major((2, 3, 4)) == (12, 4, 1)
