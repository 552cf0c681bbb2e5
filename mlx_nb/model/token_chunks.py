"""Long rows: MLPs and experts are computed a chunk of tokens at a time, and again for the gradient.

Everything in a layer but its token mixers treats each token by itself, so the numbers are those of the whole row. The
mixers (attention, recurrences, convolutions) see the whole row, so keys and values keep their gradients. While a graph
is built, proxies shadow those parts; no class, parameter or name is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.errors import ModelError
from mlx_nb.model.custom_functions import custom_function
from mlx_nb.model.equivalence import doubt_about
from mlx_nb.model.layer_checkpoints import lists_of_layers
from mlx_nb.model.module_proxy import ModuleProxy
from mlx_nb.model.once_per_model import once_per_model, trained_shapes
from mlx_nb.model.packing import MIXERS
from mlx_nb.model.passes import family_of
from mlx_nb.model.randomness import drawing_from, random_key
from mlx_nb.model.recomputing import Inside, in_place, listed, named_and_arrays
from mlx_nb.model.trees import named_arrays

_PROBED_TOKENS, _PROBED_CHUNK = 8, 3


@contextmanager
def token_chunks(
    layers: Sequence[nn.Module], tokens: int, inside: Inside, called: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """A context in which graphs keep the activations of about `tokens` tokens at a time in the MLPs of `layers`.

    0 changes nothing. `called` is called for each part that is computed in chunks. Call `refuse_unverified_chunks`
    first.
    """
    shadowed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for layer in layers if tokens else ():
            for name, part in layer.items():
                parts = part if isinstance(part, list) else [part]
                if name in MIXERS or not parts or not all(_has_matrices(one) for one in parts):
                    continue
                stand_ins = [_InChunks(one, tokens, inside, called) for one in parts]
                attributes = vars(layer)
                shadowed.append((attributes, name, attributes.get(name)))
                attributes[name] = stand_ins if isinstance(part, list) else stand_ins[0]
        yield
    finally:
        for attributes, name, before in reversed(shadowed):
            if before is None:
                attributes.pop(name, None)
            else:
                attributes[name] = before


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, which are in lists."""
    return [layer for holder, name in lists_of_layers(model) for layer in holder[name] if layer is not None]


def refuse_unverified_chunks(model: nn.Module) -> None:
    """Raises ModelError for a model family whose loss or gradient changes with chunks of tokens."""
    doubt = _doubt(model, trained_shapes(model))
    if doubt is not None:
        raise ModelError(
            f"efficient_long_context cannot be used with {family_of(model)}: {doubt}. Set efficient_long_context: "
            "false; grad_checkpoint: true needs less memory too."
        )


@once_per_model(good=lambda doubt: doubt is None, from_json=lambda _null: None)
def _doubt(model: nn.Module, _trained: tuple[Any, ...]) -> str | None:
    def way(count: Callable[[], None]) -> AbstractContextManager[object]:
        return token_chunks(layers_of(model), _PROBED_CHUNK, lambda _part: nullcontext(), count)

    unused = "no part of its layers besides token mixers can be computed in chunks"
    return doubt_about(model, way, _PROBED_TOKENS, unused)


def _has_matrices(part: Any) -> bool:
    return isinstance(part, nn.Module) and any(array.ndim > 1 for _, array in named_arrays(part.parameters()))


class _InChunks(ModuleProxy):
    """A proxy for a part that treats each token by itself. Calls that are not of one (B, T, D) array go to the part."""

    def __init__(self, part: nn.Module, tokens: int, inside: Inside, called: Callable[[], None]) -> None:
        super().__init__(part)
        self._tokens, self._inside, self._called = tokens, inside, called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], mx.array) or args[0].ndim != 3:
            return self._module(*args, **kwargs)
        rows, length, _ = args[0].shape
        step = max(1, self._tokens // rows)
        if length <= step:
            return self._module(*args)
        self._called()
        return _in_chunks(self._module, args[0], step, self._inside)


def _in_chunks(part: nn.Module, x_BTD: mx.array, step: int, inside: Inside) -> Any:
    """The result of a part, in chunks of `step` tokens if it is one array with a result for each token."""
    stream = mx.default_stream(mx.default_device())
    names, parameters = named_and_arrays(part.trainable_parameters())
    starts = range(0, x_BTD.shape[1], step)
    keys: list[mx.array] = []
    results: list[mx.array] = []
    for start in starts:
        keys.append(random_key())
        chunk = x_BTD[:, start : start + step]
        results.append(part(mx.depends([chunk], results[-1:])[0] if results else chunk))
        if not isinstance(results[0], mx.array) or results[0].shape[:2] != (len(x_BTD), step):
            return part(x_BTD)

    @custom_function
    def known(*_arrays: mx.array) -> mx.array:
        return mx.concatenate(results, axis=1)

    def again(key: mx.array) -> Callable[..., list[mx.array]]:
        def of(*arrays: mx.array) -> list[mx.array]:
            with drawing_from(key), in_place(part, names, arrays[:-1]), inside(part):
                return [part(arrays[-1])]

        return of

    @known.vjp
    def _gradient(primals: Any, cotangent: Any, _result: Any) -> Any:
        *own, x = listed(primals)
        [slope_of_result] = listed(cotangent)
        sums: list[mx.array] = []
        of_chunks: list[mx.array] = []
        with mx.stream(stream):
            for start, key in zip(starts, keys):
                # A chunk begins when the one before it is done, so that its activations are freed first.
                chunk = [x[:, start : start + step], slope_of_result[:, start : start + step]]
                if of_chunks:
                    chunk = mx.depends(chunk, [of_chunks[-1], *sums])
                _, slopes = mx.vjp(again(key), [*own, chunk[0]], [chunk[1]])
                sums = [total + slope for total, slope in zip(sums, slopes)] if sums else list(slopes[:-1])
                of_chunks.append(slopes[-1])
            slope = mx.concatenate(of_chunks, axis=1)
        return [*sums, slope] if sums else slope

    result: Any = known(*parameters, x_BTD)
    return result
