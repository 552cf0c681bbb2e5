"""Merges LoRA adapters into one: the sum of their changes (cat), or one of their matrices (linear)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_nb.errors import CommandError
from mlx_nb.model.tensor_names import place

CAT, LINEAR = "cat", "linear"
HOW = (CAT, LINEAR)


@dataclass(frozen=True)
class Part:
    """An adapter to merge: `weight` times its change. `weights` are its lora_a and lora_b by name."""

    name: str
    weights: Mapping[str, mx.array]
    scale: float
    num_layers: int
    weight: float


@dataclass(frozen=True)
class Merged:
    """A merged adapter: its shape as settings, and its matrices by name."""

    settings: dict[str, Any]
    weights: dict[str, mx.array]


def merged(parts: Sequence[Part], how: str) -> Merged:
    """One adapter of `parts`, whose change of each matrix is added up.

    cat     A = [A_1 A_2 ...], B = [w_1 B_1; w_2 B_2; ...]: exactly the sum of the changes, and the ranks add up
    linear  A = sum of sqrt(w_i) A_i, B = sum of sqrt(w_i) B_i: the rank stays, and products of different adapters are
            added to the change, as in PEFT's `add_weighted_adapter`

    w_i is the weight times the scale of an adapter over that of the first; a root has the sign of its w in B. A module
    that an adapter lacks is not changed by it. Raises CommandError for `linear` with different ranks.
    """
    modules = dict.fromkeys(name.rsplit(".", 1)[0] for part in parts for name in part.weights)
    ranks = {part.name: _rank(part) for part in parts}
    if how == LINEAR and len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise CommandError(f"`linear` adds up matrices of one rank, and these have several: {listed}. Use `cat`.")
    weights: dict[str, mx.array] = {}
    for path in modules:
        pairs = [_pair(part, path, parts, ranks[part.name]) for part in parts]
        factors = [part.weight * part.scale / parts[0].scale for part in parts]
        if how == CAT:
            weights[f"{path}.lora_a"] = mx.concatenate([a for a, _ in pairs], axis=1)
            weights[f"{path}.lora_b"] = mx.concatenate([w * b for w, (_, b) in zip(factors, pairs)], axis=0)
        else:
            roots = [math.sqrt(abs(w)) for w in factors]
            weights[f"{path}.lora_a"] = _sum([root * a for root, (a, _) in zip(roots, pairs)])
            signed = [math.copysign(root, w) for root, w in zip(roots, factors)]
            weights[f"{path}.lora_b"] = _sum([root * b for root, (_, b) in zip(signed, pairs)])
    mx.eval(weights)
    counts = [part.num_layers for part in parts]
    keys = dict.fromkeys(inner if layer is not None else path for path in modules for layer, inner in [place(path)])
    rank = sum(ranks.values()) if how == CAT else next(iter(ranks.values()))
    settings = {
        "fine_tune_type": "lora",
        "num_layers": -1 if -1 in counts else max(counts),
        "lora_parameters": {"rank": rank, "scale": parts[0].scale, "keys": list(keys)},
    }
    return Merged(settings, weights)


def _rank(part: Part) -> int:
    return next(array.shape[1] for name, array in part.weights.items() if name.endswith(".lora_a"))


def _pair(part: Part, path: str, parts: Sequence[Part], rank: int) -> tuple[mx.array, mx.array]:
    """The matrices of a module; zeros if the adapter does not have it."""
    if f"{path}.lora_a" in part.weights:
        return part.weights[f"{path}.lora_a"], part.weights[f"{path}.lora_b"]
    there = next(other.weights for other in parts if f"{path}.lora_a" in other.weights)
    a, b = there[f"{path}.lora_a"], there[f"{path}.lora_b"]
    return mx.zeros((a.shape[0], rank), a.dtype), mx.zeros((rank, b.shape[1]), b.dtype)


def _sum(arrays: Sequence[mx.array]) -> mx.array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total
