"""Functions with their own gradient, which can also be recorded.

`mx.export_function` lists the operations of a graph, but not those of `mx.custom_function`. While a graph is recorded,
a custom function is replaced by marked operations with the same inputs and outputs, and its forward and backward
operations are recorded beside them; `graph_record` puts them in place of the marked ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

Gradient = Callable[..., Any]

_mine = threading.local()


class Mark(NamedTuple):
    """One call of a custom function in a recorded graph; each list has one array per input or per output.

    inputs, outputs        what the function got and gave
    slopes                 the gradients of the inputs, computed from `cotangents`, which stand for the real ones
    input_tags             factors of the inputs, which mark where the gradient arrives
    stand_ins, output_tags what the rest of the graph got instead of `outputs`, and factors in them
    """

    inputs: list[mx.array]
    outputs: list[mx.array]
    slopes: list[mx.array]
    cotangents: list[mx.array]
    input_tags: list[mx.array]
    output_tags: list[mx.array]
    stand_ins: list[mx.array]


class _Recording:
    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self._tags = 0

    def tag(self, like: mx.array) -> mx.array:
        """A unique constant in the shape of an array; nothing is computed."""
        self._tags += 1
        return mx.broadcast_to(mx.array(float(self._tags)).astype(like.dtype), like.shape)


@contextmanager
def recording_custom_functions() -> Iterator[list[Mark]]:
    """A context in which this thread's calls of custom functions are marked. Yields the growing list of marks."""
    before = getattr(_mine, "recording", None)
    _mine.recording = recording = _Recording()
    try:
        yield recording.marks
    finally:
        _mine.recording = before


class CustomFunction(Protocol):
    """A function with its own gradient, which is set with `vjp`."""

    def vjp(self, gradient: Gradient, /) -> Gradient:
        """Set the gradient: (inputs, gradients of the outputs, outputs) -> gradients of the inputs."""

    def __call__(self, *inputs: mx.array) -> Any:
        """Apply the function."""


def custom_function(function: Callable[..., Any]) -> CustomFunction:
    """`mx.custom_function`; marked while this thread records a graph."""
    recording = getattr(_mine, "recording", None)
    if recording is not None:
        return _Marked(function, recording)
    made: CustomFunction = mx.custom_function(function)
    return made


class _Marked:
    """A custom function in a recorded graph. Its numbers are wrong; its shapes and operations are right."""

    def __init__(self, function: Callable[..., Any], recording: _Recording) -> None:
        self._function = function
        self._recording = recording

    def vjp(self, gradient: Gradient, /) -> Gradient:
        """Set the gradient."""
        self._gradient = gradient
        return gradient

    def __call__(self, *inputs: mx.array) -> Any:
        tag = self._recording.tag
        given = [mx.stop_gradient(array) for array in inputs]
        result = self._function(*given)
        outputs = _listed(result)
        cotangents = [tag(array) for array in outputs]
        slopes = _listed(
            self._gradient(
                given[0] if len(given) == 1 else tuple(given),
                cotangents[0] if isinstance(result, mx.array) else cotangents,
                result,
            )
        )
        input_tags, output_tags = ([tag(array) for array in arrays] for arrays in (inputs, outputs))
        total = mx.array(0.0)
        for array, factor in zip(inputs, input_tags):
            total = total + (array * factor).sum().astype(mx.float32)
        stand_ins = [
            mx.broadcast_to(total.astype(array.dtype), array.shape) * factor
            for array, factor in zip(outputs, output_tags)
        ]
        self._recording.marks.append(
            Mark(list(inputs), outputs, slopes, cotangents, input_tags, output_tags, stand_ins)
        )
        return stand_ins[0] if isinstance(result, mx.array) else stand_ins


def _listed(arrays: Any) -> list[mx.array]:
    return list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]
