"""Counts and describes the trained weights of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import and_more
from mlx_nb.model.trees import named_arrays

_MOST_NAMES = 6


def trainable_count(model: nn.Module) -> int:
    """The number of trained values (not arrays)."""
    return sum(array.size for _, array in named_arrays(model.trainable_parameters()))


def total_count(model: nn.Module) -> int:
    """The number of values in the model with its adapter. Quantized weights are counted unpacked."""
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(model))


def forms_of(parameters: Any) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    """{path: (shape, dtype)} of the arrays in a tree of parameters."""
    return {name: (array.shape, array.dtype) for name, array in named_arrays(parameters)}


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze all parameters except those with these paths."""
    model.freeze()
    wanted = set(names)
    for path, module in model.named_modules():
        own = [key for key, value in module.items() if isinstance(value, mx.array)]
        keys = [key for key in own if (f"{path}.{key}" if path else key) in wanted]
        if keys:
            module.unfreeze(recurse=False, keys=keys)


def trained_summary(model: nn.Module, config: RunConfig, keys: tuple[str, ...]) -> str:
    """A short text about what is trained and what is frozen. `keys` are the adapted module paths; empty = all."""
    layers = len(model.layers)
    chosen = layers if config.num_layers == -1 else config.num_layers
    which = f"all {layers} layers" if chosen == layers else f"the last{_number(chosen)} of {layers} layers"
    if config.fine_tune_type != "full":
        kind = {"lora": "LoRA", "dora": "DoRA"}[config.fine_tune_type]
        shape = config.lora_parameters
        modules = _listed([key.rsplit(".", 1)[-1] for key in keys]) if keys else "every linear module"
        return f"{kind} of rank {shape.rank}, scale {shape.scale:g}, on {modules} of {which}; the base is frozen"
    outside = _frozen_outside(model)
    first = layers - chosen
    frozen = [*outside, *([f"the first{_number(first)} layer{'s' if first > 1 else ''}"] if first else [])]
    if not frozen:
        return "all weights; none are frozen"
    return f"the weights of {which}; frozen: {_listed(frozen)}"


def orthogonalized_outside(model: nn.Module, config: RunConfig) -> tuple[str, ...]:
    """A note if muon trains matrices outside the layers, for which its author recommends another optimizer."""
    if config.optimizer != "muon" or config.fine_tune_type != "full":
        return ()
    inside = {id(module) for layer in model.layers for module in layer.modules()}
    names = [
        path.rsplit(".", 1)[-1]
        for path, module in reversed(model.named_modules())
        if id(module) not in inside
        and any("." not in name and array.ndim > 1 for name, array in named_arrays(module.trainable_parameters()))
    ]
    if not names:
        return ()
    return (
        f"muon also orthogonalizes {_listed(names)}, as in mlx-lm. Its author uses AdamW for embeddings and the "
        "output head: see `num_layers`, or use another optimizer.",
    )


def _number(count: int) -> str:
    return f" {count}" if count > 1 else ""


def _frozen_outside(model: nn.Module) -> list[str]:
    """The names of modules outside the layers that have weights, none of which is trained."""
    inside = {id(module) for layer in model.layers for module in layer.modules()}
    names = []
    for path, module in reversed(model.named_modules()):  # named_modules lists the last module first
        own = [name for name, array in named_arrays(module.parameters()) if "." not in name]
        if own and id(module) not in inside and not any(name in module.trainable_parameters() for name in own):
            names.append(path.rsplit(".", 1)[-1])
    return names


def _listed(names: list[str]) -> str:
    return and_more(list(dict.fromkeys(names)), _MOST_NAMES)
