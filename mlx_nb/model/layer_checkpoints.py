"""Gradient checkpointing: only the inputs of a layer are kept for the gradient; the rest is recomputed.

While a graph is built, proxies shadow the layers in the model's list of layers; no class, parameter or name is changed.
Layers are recomputed one at a time: each starts when the gradient of its outputs is ready, and the previous layer
starts only when the gradient of this layer's parameters is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_nb.errors import ModelError
from mlx_nb.model.custom_functions import custom_function
from mlx_nb.model.equivalence import gives_the_same
from mlx_nb.model.module_proxy import ModuleProxy
from mlx_nb.model.once_per_model import once_per_model, trained_shapes
from mlx_nb.model.passes import family_of, one_line
from mlx_nb.model.randomness import drawing_from, random_key
from mlx_nb.model.trees import named_arrays

_PROBED_TOKENS = 8
_PLAIN = (mx.array, bool, int, float, str, type(None))

# The context in which a layer is computed, and recomputed.
Inside = Callable[[nn.Module], AbstractContextManager[object]]


@contextmanager
def checkpointed_layers(model: nn.Module, inside: Inside, called: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A context in which graphs of `model` keep only the inputs of each layer and recompute the rest.

    Values and gradients are unchanged, also with dropout. `called` is called for each layer. Call
    `refuse_unverified_checkpoints` first.
    """
    lists = lists_of_layers(model)
    shadowed: list[tuple[dict[str, Any], str]] = []
    try:
        for holder, name in lists:
            stand_ins = [layer and _Checkpointed(layer, inside, called) for layer in holder[name]]
            vars(holder)[name] = stand_ins
            shadowed.append((vars(holder), name))
        yield
    finally:
        for attributes, name in shadowed:
            attributes.pop(name, None)


def refuse_unverified_checkpoints(model: nn.Module) -> None:
    """Raises ModelError for a model family whose loss or gradient changes with checkpointed layers."""
    doubt = _doubt(model, trained_shapes(model))
    if doubt is not None:
        raise ModelError(
            f"grad_checkpoint cannot be used with {family_of(model)}: {doubt}. Set grad_checkpoint: false."
        )


@once_per_model(good=lambda doubt: doubt is None, from_json=lambda _null: None)
def _doubt(model: nn.Module, _trained: tuple[Any, ...]) -> str | None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    try:
        same = gives_the_same(
            model, lambda: checkpointed_layers(model, lambda _layer: nullcontext(), count), _PROBED_TOKENS
        )
    except Exception as error:  # model code may raise anything
        return f"a gradient with it fails ({one_line(error).rstrip('.')})"
    if not calls:
        return "its layers are not called one after the other"
    return None if same else "the gradient with it is not that of the model"


def lists_of_layers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, attribute name) of each list that holds layers of the model."""
    layers = {id(layer) for layer in getattr(model, "layers", ())}
    return [
        (module, name)
        for module in model.modules()
        for name, value in module.items()
        if isinstance(value, list) and any(id(one) in layers for one in value)
    ]


class _Checkpointed(ModuleProxy):
    """A proxy for a layer, which is recomputed for its gradient.

    A layer whose arguments are mutable, such as a cache that other layers read, is called directly.
    """

    def __init__(self, layer: nn.Module, inside: Inside, called: Callable[[], None]) -> None:
        super().__init__(layer)
        self._inside, self._called = inside, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not all(isinstance(value, _PLAIN) for _, value in named_arrays((args, kwargs))):
            return self._module(*args, **kwargs)
        self._called()
        names, parameters = _split(self._module.trainable_parameters())
        given, inputs = _floats((args, kwargs))
        key = random_key()
        form: list[Any] = []

        def of(*arrays: mx.array) -> list[mx.array]:
            args, kwargs = given(arrays[len(names) :])
            with _in_place(self._module, names, arrays[: len(names)], parameters), self._inside(self._module):
                result = self._module(*args, **kwargs)
            rebuild, outputs = _floats(result)
            form[:] = [rebuild]
            return outputs

        outputs = _computed_again(of, parameters, inputs, key)
        [rebuild] = form
        return rebuild(outputs)


def _computed_again(
    of: Callable[..., list[mx.array]], parameters: list[mx.array], inputs: list[mx.array], key: Any
) -> list[mx.array]:
    """The results of `of`, which is called again for the gradient with the same arrays and random `key`."""
    stream = mx.default_stream(mx.default_device())

    @custom_function
    def once(*arrays: mx.array) -> Any:
        return of(*arrays)

    @once.vjp
    def _gradient(primals: Any, cotangents: Any, _results: Any) -> Any:
        primals, cotangents = _listed(primals), _listed(cotangents)
        with mx.stream(stream), drawing_from(key):
            _, slopes = mx.vjp(of, mx.depends(primals, cotangents), cotangents)
            own = slopes[: len(parameters)]
            # The previous layer starts after these are computed, so that their inputs are freed first.
            return [*own, *(mx.depends(slope, own) if own else slope for slope in slopes[len(own) :])]

    return _listed(once(*parameters, *inputs))


def _listed(arrays: Any) -> list[mx.array]:
    return list(arrays) if isinstance(arrays, (list, tuple)) else [arrays]


def _split(tree: Any) -> tuple[list[str], list[mx.array]]:
    named = named_arrays(tree)
    return [name for name, _ in named], [array for _, array in named]


def _floats(tree: Any) -> tuple[Callable[[Any], Any], list[mx.array]]:
    """The float arrays in a tree, and a function that rebuilds the tree with other arrays in their place."""
    found: list[mx.array] = []

    def is_float(value: Any) -> bool:
        return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)

    tree_map(lambda value: found.append(value) if is_float(value) else None, tree)

    def rebuild(arrays: Any) -> Any:
        left = iter(arrays)
        return tree_map(lambda value: next(left) if is_float(value) else value, tree)

    return rebuild, found


@contextmanager
def _in_place(layer: nn.Module, names: list[str], arrays: Any, before: list[mx.array]) -> Iterator[None]:
    """A context in which the trained arrays of the layer are replaced by `arrays`."""
    if not names:
        yield
        return
    try:
        layer.update(tree_unflatten(list(zip(names, arrays))))
        yield
    finally:
        layer.update(tree_unflatten(list(zip(names, before))))
