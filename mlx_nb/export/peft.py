"""Writes an adapter in PEFT's format, which transformers, vLLM and others read.

model/peft_files.py describes the format, and reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError, and_more
from mlx_nb.files.whole_files import write_whole
from mlx_nb.files.written_files import CONFIG_FILE, PEFT_FILE
from mlx_nb.model.adapters import Write, adapter_modules
from mlx_nb.model.peft_files import HEAD, RECORD, TABLE, has_head
from mlx_nb.model.tensor_names import place

_LAYERS = "model.layers."  # where transformers and mlx-lm have the layers of a language model


@dataclass(frozen=True)
class _Module:
    """An adapted module: its path in transformers, its tensors by the end of their PEFT name, its rank and factor."""

    path: str
    tensors: Mapping[str, mx.array]
    rank: int
    scale: float


def write_peft(
    model: nn.Module,
    config: RunConfig,
    folder: Path,
    *,
    base_name: str,
    record: Mapping[str, Any] | None = None,
    use_rslora: bool = False,
    write: Write = write_whole,
) -> Path:
    """Write the LoRA or DoRA adapter that is attached to `model`, each file completely or not at all.

    `PeftModel.from_pretrained(base, folder)` reads it. `base_name` is the base model's name for transformers. With
    `use_rslora` the factor is written as lora_alpha / sqrt(R). `record` is stored in the metadata of the weights.
    Returns the path of the weights. Raises CommandError, in one line, for what PEFT cannot hold.
    """
    modules = check_for_peft(model, config)
    description = _description(modules, model, config, base_name, use_rslora)
    weights = {
        f"base_model.model.{module.path}.{end}": array for module in modules for end, array in module.tensors.items()
    }
    metadata = {"format": "pt", RECORD: json.dumps(dict(record or {}), default=str)}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2).encode()
    write(folder / CONFIG_FILE, lambda file: file.write(text))
    write(folder / PEFT_FILE, lambda file: mx.save_safetensors(file, weights, metadata=metadata))
    return folder / PEFT_FILE


def check_for_peft(model: nn.Module, config: RunConfig) -> list[_Module]:
    """The adapted modules as PEFT holds them. Raises CommandError, in one line, for what it cannot hold."""
    if config.fine_tune_type == "full":
        raise CommandError("a full fine-tune is a model, and PEFT holds adapters. Give the model itself instead.")
    return _modules(model)


def _modules(model: nn.Module) -> list[_Module]:
    """The adapted modules of a model, without those that change nothing. Raises CommandError for an unknown module."""
    modules, refused = list[_Module](), list[str]()
    for path, module in adapter_modules(model):
        a, b, embedding = module["lora_a"], module["lora_b"], "embedding" in module
        known = path.startswith(_LAYERS) or path in (f"model.{TABLE}", HEAD)
        if not known or a.ndim != 2 or (embedding and "m" in module):
            refused.append(path)
            continue
        rank = _rank(a, b)
        if rank == 0 and "m" not in module:  # a module that changes nothing
            continue
        rank = max(rank, 1)
        a, b = mx.contiguous(a[:, :rank].T), mx.contiguous(b[:rank].T)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        tensors = dict(zip(names, (a, b)))
        if "m" in module:
            tensors["lora_magnitude_vector"] = module["m"]
        modules.append(_Module(path, tensors, rank, module.scale))
        if embedding and not has_head(model):
            # In transformers the head has a module of its own, also where it shares the embedding's weights.
            head = {"lora_A.weight": mx.contiguous(b.T), "lora_B.weight": mx.contiguous(a.T)}
            modules.append(_Module(HEAD, head, rank, module.scale))
    if refused:
        raise CommandError(
            f"{and_more(refused, 3)} cannot be written for PEFT: it needs layers named {_LAYERS}N as in transformers, "
            "and holds neither adapters of experts nor DoRA of an embedding. Save in mlx-lm's format."
        )
    if not modules:
        raise CommandError("the adapter is zero everywhere, so there is nothing to write for PEFT.")
    return modules


def _rank(a: mx.array, b: mx.array) -> int:
    """The rank without the zeros that pad it, which are zero in both matrices."""
    used = np.array(mx.any(a != 0, axis=0) | mx.any(b != 0, axis=1))
    return int(used.nonzero()[0].max(initial=-1)) + 1


def _description(
    modules: Sequence[_Module], model: nn.Module, config: RunConfig, base_name: str, use_rslora: bool
) -> dict[str, Any]:
    """PEFT's adapter_config.json. Paths that are the same in a number of layers are written once."""
    divisor = math.sqrt if use_rslora else float
    rank = max(module.rank for module in modules)
    alphas = {module.path: alpha_for(module.scale, divisor(module.rank)) for module in modules}
    alpha = next(alphas[module.path] for module in modules if module.rank == rank)
    places = [place(module.path) for module in modules]
    layers = sorted({layer for layer, _ in places if layer is not None})
    inner = list(dict.fromkeys(path for layer, path in places if layer is not None))
    regular = len(modules) == len(layers) * len(inner) and None not in {layer for layer, _ in places}
    part_of_layers = regular and len(layers) < len(model.layers)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_parameters.dropout,
        "use_dora": config.fine_tune_type == "dora",
        "use_rslora": use_rslora,
        "target_modules": inner if regular else [module.path for module in modules],
        "layers_to_transform": layers if part_of_layers else None,
        "layers_pattern": "layers" if part_of_layers else None,
        # PEFT reads the keys as patterns: a backslash keeps each dot what it is.
        "rank_pattern": {_pattern(module.path): module.rank for module in modules if module.rank != rank},
        "alpha_pattern": {_pattern(path): value for path, value in alphas.items() if value != alpha},
    }


def _pattern(path: str) -> str:
    return path.replace(".", r"\.")


def alpha_for(scale: float, divisor: float) -> float:
    """lora_alpha such that lora_alpha / divisor is `scale` to the last bit, where there is such a number."""
    first = scale * divisor
    near = (first, math.nextafter(first, 0), math.nextafter(first, math.inf))
    alpha = next((one for one in near if one / divisor == scale), first)
    return int(alpha) if alpha.is_integer() else alpha
