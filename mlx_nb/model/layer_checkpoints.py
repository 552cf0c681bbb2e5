"""Gradient checkpointing: only the inputs of every few layers are kept for the gradient; the rest is recomputed.

While a graph is built, proxies shadow the layers in the model's list of layers; no class, parameter or name is changed.
Layers that are called one after the other form segments. A segment is recomputed when the gradient of its results is
ready, and the one before it only when the gradient of this segment's parameters is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.errors import ModelError
from mlx_nb.model.equivalence import doubt_about
from mlx_nb.model.module_proxy import ModuleProxy
from mlx_nb.model.once_per_model import once_per_model, trained_shapes
from mlx_nb.model.passes import family_of
from mlx_nb.model.randomness import drawing_from, random_key
from mlx_nb.model.recomputing import (
    Inside,
    Recomputed,
    computed_again,
    in_place,
    named_and_arrays,
    with_floats,
    without_floats,
)
from mlx_nb.model.trees import named_arrays

_PROBED_TOKENS = 8
_PLAIN = (mx.array, bool, int, float, str, type(None))
_ONE_LAYER = Recomputed(segment=1)


@contextmanager
def checkpointed_layers(
    model: nn.Module,
    inside: Inside,
    recomputed: Recomputed = _ONE_LAYER,
    called: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """A context in which graphs of `model` keep only the inputs of each segment of layers and recompute the rest.

    Values and gradients are unchanged, also with dropout. `called` is called for each layer. Call
    `refuse_unverified_checkpoints` first.
    """
    segments = _Segments(inside, recomputed)
    shadowed: list[tuple[dict[str, Any], str]] = []
    try:
        for holder, name in lists_of_layers(model):
            stand_ins = [layer and _Checkpointed(layer, segments, called) for layer in holder[name]]
            vars(holder)[name] = stand_ins
            shadowed.append((vars(holder), name))
        yield
    finally:
        segments.end()
        for attributes, name in shadowed:
            attributes.pop(name, None)


def refuse_unverified_checkpoints(model: nn.Module, recomputed: Recomputed = _ONE_LAYER) -> None:
    """Raises ModelError for a model family whose loss or gradient changes with checkpointed layers."""
    doubt = _doubt(model, trained_shapes(model), recomputed.segment, recomputed.each_layer)
    if doubt is not None:
        name, off = ("grad_checkpoint", "false") if recomputed == _ONE_LAYER else ("segment_size", "0")
        raise ModelError(f"{name} cannot be used with {family_of(model)}: {doubt}. Set {name}: {off}.")


@once_per_model(good=lambda doubt: doubt is None, from_json=lambda _null: None)
def _doubt(model: nn.Module, _trained: tuple[Any, ...], segment: int, each_layer: bool) -> str | None:
    def way(count: Callable[[], None]) -> AbstractContextManager[object]:
        return checkpointed_layers(model, lambda _layer: nullcontext(), Recomputed(segment, each_layer), count)

    return doubt_about(model, way, _PROBED_TOKENS, "its layers are not called one after the other")


def lists_of_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, attribute name) of each list that holds layers of the model."""
    layers = {id(layer) for layer in getattr(model, "layers", ())}
    return [
        (module, name)
        for module in model.modules()
        for name, value in module.items()
        if isinstance(value, list) and any(id(one) in layers for one in value)
    ]


class _Call(NamedTuple):
    """A call of a layer in a segment.

    given       its (args, kwargs) without float arrays
    inputs      where each float array is from: a place among the arrays that come into the segment, or the number of an
                earlier call and of its result
    parameters  places of the layer's trained parameters, which have these `names`
    """

    layer: nn.Module
    given: Any
    inputs: tuple[int | tuple[int, int], ...]
    names: list[str]
    parameters: tuple[int, ...]
    key: mx.array


class _Segments:
    """Sorts the calls of layers into segments: a call that takes a result of the segment continues it."""

    def __init__(self, inside: Inside, recomputed: Recomputed) -> None:
        self._inside, self._recomputed = inside, recomputed
        self.end()

    def end(self) -> None:
        """The next call begins a new segment."""
        self._calls: list[_Call] = []
        self._arrays: list[mx.array] = []
        self._owned: set[int] = set()
        self._results: dict[int, tuple[mx.array, tuple[int, int]]] = {}

    def called(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """The result of a layer, whose segment up to this call is computed again for its gradient."""
        given, inputs = without_floats((args, kwargs))
        continues = any(id(array) in self._results for array in inputs)
        if not continues or len(self._calls) == self._recomputed.segment:
            self.end()
        names, parameters = named_and_arrays(layer.trainable_parameters())
        places = tuple(self._place(array) for array in parameters)
        self._owned.update(places)
        origins = tuple(
            self._results[id(array)][1] if id(array) in self._results else self._place(array) for array in inputs
        )
        self._calls.append(_Call(layer, given, origins, names, places, random_key()))
        form, now = without_floats(layer(*args, **kwargs))
        of = _again(tuple(self._calls), self._inside, each_layer=self._recomputed.each_layer)
        results = computed_again(now, of, list(self._arrays), frozenset(self._owned))
        for number, array in enumerate(results):
            self._results[id(array)] = (array, (len(self._calls) - 1, number))
        return with_floats(form, results)

    def _place(self, array: mx.array) -> int:
        for place, known in enumerate(self._arrays):
            if known is array:
                return place
        self._arrays.append(array)
        return len(self._arrays) - 1


def _again(calls: Sequence[_Call], inside: Inside, *, each_layer: bool) -> Callable[..., list[mx.array]]:
    """A function that computes a segment from its arrays and gives the results of the last call."""

    def of(*arrays: mx.array) -> list[mx.array]:
        results: list[list[mx.array]] = []
        for call in calls:
            parameters = [arrays[place] for place in call.parameters]
            inputs = [arrays[at] if isinstance(at, int) else results[at[0]][at[1]] for at in call.inputs]
            found = _layer_again(call, inside)(*parameters, *inputs)
            if each_layer:
                own = [*parameters, *inputs]
                found = computed_again(found, _layer_again(call, inside), own, range(len(parameters)))
            results.append(found)
        return results[-1]

    return of


def _layer_again(call: _Call, inside: Inside) -> Callable[..., list[mx.array]]:
    """A function that computes one layer from its trained parameters and inputs, with the draws of its first call."""
    count = len(call.names)

    def of(*arrays: mx.array) -> list[mx.array]:
        args, kwargs = with_floats(call.given, arrays[count:])
        layer = call.layer
        with drawing_from(call.key), in_place(layer, call.names, arrays[:count]), inside(layer):
            return without_floats(layer(*args, **kwargs))[1]

    return of


class _Checkpointed(ModuleProxy):
    """A proxy for a layer, which is recomputed for its gradient.

    A layer whose arguments are mutable, such as a cache that other layers read, is called directly.
    """

    def __init__(self, layer: nn.Module, segments: _Segments, called: Callable[[], None]) -> None:
        super().__init__(layer)
        self._segments, self._called = segments, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not all(isinstance(value, _PLAIN) for _, value in named_arrays((args, kwargs))):
            self._segments.end()
            return self._module(*args, **kwargs)
        self._called()
        return self._segments.called(self._module, args, kwargs)
