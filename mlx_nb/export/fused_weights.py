"""Merges an adapter into its base model in one of several precisions, and measures what each of them loses of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_nb.model.adapters import adapter_modules, base_of
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.loading import load_base_as_stored
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.requantizing import Format, format_of, requantized, values_of
from mlx_nb.model.trees import named_arrays

BASE, MIXED, HALF = "base", "mixed", "16-bit"
LOSES_MOST = 0.5  # share of the fine-tune of a module that `mixed` lets re-quantization lose
BITS_OF_MIXED = 8


@dataclass(frozen=True)
class ModuleLoss:
    """What storing one fused module changes. `lost` is that in relation to the fine-tune, both as Euclidean norms."""

    path: str
    change: float  # sum of squares of the fine-tune
    error: float  # sum of squares of fused minus stored
    stored_as: str

    @property
    def lost(self) -> float:
        """0 to 1: 0 = all of the fine-tune is kept, 1 = nothing is."""
        return share_lost([self])


def share_lost(modules: list[ModuleLoss]) -> float:
    """The share of the fine-tune of some modules together that is lost, 0 to 1."""
    change, error = sum(one.change for one in modules), sum(one.error for one in modules)
    return min(1.0, (error / change) ** 0.5) if change else 0.0


@dataclass(frozen=True, eq=False)
class Fused:
    """A base model with the adapter merged into it, as it would be stored, and the quantization of its config.json.

    `for_computing` has the float32 modules to compute with on a CPU.
    """

    network: nn.Module
    config: dict[str, Any]
    losses: list[ModuleLoss]
    for_computing: list[tuple[str, nn.Module]]

    @property
    def bytes(self) -> int:
        """The size of its weights."""
        return sum(array.nbytes for _, array in named_arrays(self.network.parameters()))


def half_type(network: nn.Module) -> mx.Dtype:
    """The float type that most values of a model are stored in, or bfloat16 if that is float32."""
    sizes: dict[mx.Dtype, int] = {}
    for _, array in named_arrays(network.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return mx.bfloat16 if most == mx.float32 else most


def is_quantized(network: nn.Module) -> bool:
    """Whether a model has quantized matrices."""
    return any(format_of(module) is not None for module in network.modules())


def fused_model(live: nn.Module, folder: Path, load_in_bits: int | None, precision: str) -> Fused:
    """The trained model `live` merged into its base in `folder`.

    `base` stores each module as the base does, `mixed` as the base or in 8 bits where that would lose more than
    LOSES_MOST, `16-bit` all of them in half precision.
    """
    network, config = load_base_as_stored(folder, load_in_bits)
    half = half_type(network)
    modules = dict(network.named_modules())
    adapters = dict(adapter_modules(live))
    losses, made, for_computing = [], [], []
    for path, wrapper in adapters.items():
        original = modules[path]
        weight = fused_values(wrapper)
        before = values_of(base_of(wrapper))
        stored, values, name = _stored(weight, before, original, precision, half)
        change, error = (float(mx.square(one).sum()) for one in (weight - before, values - weight))
        losses.append(ModuleLoss(path, change, error, name))
        made.append((path, stored))
        for_computing.append((path, _with_weight(stored, values) if is_cpu() else stored))
    if not adapters:  # full fine-tuning
        _take_trained(network, live)
    network.update_modules(tree_unflatten(made))
    if precision == HALF:
        others = [
            (path, _in_half(module, half))
            for path, module in modules.items()
            if path not in adapters and format_of(module)
        ]
        network.update_modules(tree_unflatten(others))
    return Fused(network, _with_quantization(config, network, half), losses, for_computing)


def computing_model(base: nn.Module, fused: Fused) -> nn.Module:
    """`base`, a copy of the base model, changed to compute as the fused model does."""
    base.update_modules(tree_unflatten(fused.for_computing))
    base.freeze()
    base.eval()
    return base


def fused_values(wrapper: nn.Module) -> mx.array:
    """The weight of an adapter module merged with its base, in float32."""
    key = "linear" if "linear" in wrapper else "embedding"
    base = _with_weight(wrapper[key], values_of(wrapper[key]))
    merged = copy.copy(wrapper)
    merged[key] = base
    with random_stream(0):  # mlx-lm draws weights that it overwrites
        result: mx.array = merged.fuse().weight
    return result.astype(mx.float32)


def _with_weight(module: nn.Module, weight: mx.array) -> nn.Module:
    """A float module like `module`, quantized or not, with this weight."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kind: Any = type(module)
    with random_stream(0):
        if isinstance(module, nn.QuantizedLinear):
            made: Any = nn.Linear(1, 1, bias="bias" in module)
        elif isinstance(module, nn.QuantizedEmbedding):
            made = nn.Embedding(1, 1)
        elif isinstance(module, QuantizedSwitchLinear):
            made = SwitchLinear(1, 1, 1, bias="bias" in module)
        else:
            made = copy.copy(module)
            assert isinstance(made, kind)
    made.weight = weight
    if "bias" in module:
        made.bias = module.bias
    return made  # type: ignore[no-any-return]


def _stored(
    weight: mx.array, before: mx.array, original: nn.Module, precision: str, half: mx.Dtype
) -> tuple[nn.Module, mx.array, str]:
    """The module to store, its values in float32, and the name of its format."""
    found = format_of(original)
    if found is None or precision == HALF:
        dtype = half if precision == HALF else original.weight.dtype
        values = weight.astype(dtype)
        return _with_weight(original, values), values.astype(mx.float32), str(dtype).removeprefix("mlx.core.")
    result = requantized(weight, original, found)
    change, error = (float(mx.square(one).sum()) for one in (weight - before, result.values - weight))
    if precision == MIXED and found.bits < BITS_OF_MIXED and error > LOSES_MOST**2 * change:
        found = Format(found.group_size if found.mode == "affine" else 32, BITS_OF_MIXED, "affine")
        result = requantized(weight, None, found, half)
    module = copy.copy(original)
    for name in ("weight", "scales", "biases"):
        if name in module:
            del module[name]
    for name, array in result.arrays.items():
        module[name] = array
    module.group_size, module.bits, module.mode = found
    return module, result.values, f"{found.bits} bits"


def _in_half(module: nn.Module, half: mx.Dtype) -> nn.Module:
    return _with_weight(module, values_of(module).astype(half))


def _take_trained(network: nn.Module, live: nn.Module) -> None:
    """Take the weights that full fine-tuning changed, in the types of the base."""
    trained = dict(named_arrays(live.trainable_parameters()))
    types = {name: array.dtype for name, array in named_arrays(network.parameters())}
    network.update(tree_unflatten([(name, array.astype(types[name])) for name, array in trained.items()]))


def _with_quantization(config: dict[str, Any], network: nn.Module, half: mx.Dtype) -> dict[str, Any]:
    """`config` with the quantization of the modules of `network`."""
    formats = {path: one for path, module in network.named_modules() if (one := format_of(module)) is not None}
    config = {name: value for name, value in config.items() if name not in ("quantization", "quantization_config")}
    if not formats:
        return config
    kinds = list(formats.values())
    most = max(set(kinds), key=kinds.count)
    section: dict[str, Any] = {**most._asdict()}
    for path, module in network.named_modules():
        if path in formats and formats[path] != most:
            section[path] = {**formats[path]._asdict()}
        elif path not in formats and hasattr(module, "to_quantized"):
            section[path] = False
    return {**config, "quantization": section, "quantization_config": section}
