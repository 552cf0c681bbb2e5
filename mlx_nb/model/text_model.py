"""Splits a model into backbone and head, so that logits are computed only at chosen positions.

The split is found by trial, for wrappers and any model family. Nothing is assumed about the head: it is everything that
the model's own call does after the backbone, such as scales, soft caps, biases and tied embeddings. The call runs on
shallow copies of the modules around the backbone, so the model itself is never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_nb.model.module_proxy import ModuleProxy
from mlx_nb.model.once_per_model import once_per_model
from mlx_nb.model.passes import family_of, is_half, random_tokens
from mlx_nb.model.trees import named_arrays

_ROWS, _TOKENS = 2, 5
_PROBED = (0, 3, 6, 9, 8)  # of the ten positions of the probe
# Tolerance relative to the largest logit, in single and half precision; products over fewer rows round differently.
_TOLERANCE = (2e-5, 0.02)

# Transforms the backbone's result, or the head's input.
_Step = Callable[[Any], Any]


class Place(NamedTuple):
    """The path of a module, and whether positions are chosen from its result (`after`) or from its input."""

    path: tuple[str, ...]
    after: bool


class TextModel:
    """Computes the head of a model at chosen positions, with the model's current parameters at each call."""

    def __init__(self, model: nn.Module, place: Place) -> None:
        self.model = model
        self.place = place

    def hidden(self, tokens_BT: mx.array, position_S: mx.array) -> Any:
        """(1, S, D) input of the head at positions of the flattened rows; a tuple if the backbone returns one."""
        taken: list[Any] = []

        def choose(hidden: Any) -> Any:
            taken.append(_chosen(hidden, tokens_BT.shape, position_S))
            return taken[-1]

        self._called(tokens_BT, choose)  # the head's result is never evaluated
        [hidden] = taken
        return hidden

    def logits(self, hidden: Any) -> mx.array:
        """(S, V) logits of the head for the result of `hidden`."""
        positions = named_arrays(hidden)[0][1].shape[1]
        return self._called(mx.zeros((1, positions), mx.int32), lambda _whole: hidden, computes=False)[0]

    def logits_at(self, tokens_BT: mx.array, position_S: mx.array) -> mx.array:
        """(S, V) logits at positions of the flattened rows."""
        return self._called(tokens_BT, lambda hidden: _chosen(hidden, tokens_BT.shape, position_S))[0]

    def _called(self, tokens_BT: mx.array, step: _Step, *, computes: bool = True) -> mx.array:
        path, kind = self.place.path, _Backbone if self.place.after else _Head
        result: mx.array = _with_stand_in(self.model, path, lambda module: kind(module, step, computes))(tokens_BT)
        return result


class _Chooser(ModuleProxy):
    """A proxy for a module in a copy of its parent. It chooses positions with `step`."""

    def __init__(self, module: nn.Module, step: _Step, computes: bool) -> None:
        super().__init__(module)
        self._step, self._computes = step, computes


class _Backbone(_Chooser):
    """Chooses positions from the module's result. With `computes` false the module is not called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(self._module(*args, **kwargs) if self._computes else None)


class _Head(_Chooser):
    """Chooses positions from the module's input. A tied embedding is a head through `as_linear`."""

    def __call__(self, x: mx.array) -> Any:
        tied = hasattr(self._module, "as_linear")
        return self._module(x) if tied else self._module(self._step(x))

    def as_linear(self, x: mx.array) -> Any:
        return self._module.as_linear(self._step(x))


def _with_stand_in(module: nn.Module, path: tuple[str, ...], stand_in: Callable[[nn.Module], Any]) -> nn.Module:
    """A copy of `module` with a proxy at `path`; all other parts are shared."""
    copied, part = copy.copy(module), module[path[0]]
    copied[path[0]] = stand_in(part) if len(path) == 1 else _with_stand_in(part, path[1:], stand_in)
    return copied


def _chosen(hidden: Any, shape: tuple[int, ...], position_S: mx.array) -> Any:
    def at_positions(value: Any) -> Any:
        if not isinstance(value, mx.array) or value.ndim < 3 or value.shape[:2] != shape:
            return value
        return value.reshape(-1, *value.shape[2:])[position_S][None]

    return tree_map(at_positions, hidden)


def part_of(hidden: Any, chosen: slice) -> Any:
    """A slice of positions from the result of `TextModel.hidden`."""
    return tree_map(lambda array: array[:, chosen], hidden)


def text_model(model: nn.Module) -> TextModel | None:
    """The split model if it gives the model's own logits on a few random tokens; otherwise None."""
    place = _proved_place(model)
    return None if place is None else TextModel(model, place)


def likely_text_model(model: nn.Module) -> TextModel | None:
    """The first split of a model without weights that gives logits of the right shape; None if there is none."""
    tokens_BT, position_S = mx.zeros((_ROWS, _TOKENS), mx.int32), mx.array(_PROBED)
    try:
        vocabulary = model(tokens_BT).shape[-1]
    except Exception:  # model code may raise anything
        return None
    for place in _places(model):
        text = TextModel(model, place)
        try:
            hidden = named_arrays(text.hidden(tokens_BT, position_S))
            shapes = {array.shape for _, array in hidden} | {text.logits_at(tokens_BT, position_S).shape}
        except Exception:
            continue
        if (1, len(_PROBED), vocabulary) not in shapes and (len(_PROBED), vocabulary) in shapes:
            return text
    return None


def full_logits_note(model: nn.Module) -> str | None:
    """A note for a model that cannot be split; None for others."""
    if _proved_place(model) is not None:
        return None
    return (
        f"{family_of(model)}: this model cannot be split into backbone and head, so logits are computed at all "
        "positions and not only at trained ones. The numbers are the same, but it needs more memory and time."
    )


@once_per_model(good=lambda place: place is not None, from_json=lambda place: Place(tuple(place[0]), place[1]))
def _proved_place(model: nn.Module) -> Place | None:
    tokens_BT = mx.array([random_tokens(model, _TOKENS, draw) for draw in range(_ROWS)])
    try:
        whole_BTV = model(tokens_BT)
        expected_SV = _numbers(whole_BTV.reshape(-1, whole_BTV.shape[-1])[mx.array(_PROBED)])
    except Exception:  # model code may raise anything
        return None
    return next(
        (place for place in _places(model) if _is_proved(TextModel(model, place), tokens_BT, expected_SV)), None
    )


def _is_proved(text: TextModel, tokens_BT: mx.array, expected_SV: np.ndarray) -> bool:
    """Whether one call, and two calls with a part of the positions, give the expected logits."""
    position_S = mx.array(_PROBED)
    try:
        hidden = text.hidden(tokens_BT, position_S)
        if any(_numbers(array)[0].shape == expected_SV.shape for _, array in named_arrays(hidden)):
            return False  # the place is after the head
        part = part_of(hidden, slice(1, 4))
        found = [(text.logits_at(tokens_BT, position_S), expected_SV), (text.logits(part), expected_SV[1:4])]
        most = _TOLERANCE[is_half(text.model)] * np.abs(expected_SV).max()
        return all(
            logits.shape == expected.shape and bool(np.abs(_numbers(logits) - expected).max() <= most)
            for logits, expected in found
        )
    except Exception:
        return False


def _places(model: nn.Module) -> Iterator[Place]:
    """Candidate places: after modules that hold layers, innermost first, then before heads."""
    around = [((), model), *_holders(model)]
    for path, _ in reversed(around[1:]):
        yield Place(path, after=True)
    for path, module in around:
        for name, part in module.items():
            if isinstance(part, nn.Module) and not _holds_layers(part):
                yield Place((*path, name), after=False)


def _holders(module: nn.Module, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], nn.Module]]:
    found = []
    for name, part in module.items():
        if isinstance(part, nn.Module) and _holds_layers(part):
            found += [((*path, name), part), *_holders(part, (*path, name))]
    return found


def _holds_layers(module: nn.Module) -> bool:
    return any(
        isinstance(value, list) and any(isinstance(one, nn.Module) for one in value)
        for inner in module.modules()
        for value in inner.values()
    )


def _numbers(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32))
