"""LoRA, DoRA and full fine-tuning: attach, count, switch off for a while, save and load in mlx-lm's format.

The modules are mlx-lm's own (`mlx_lm.tuner`), so what is saved here loads there.
"""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_nb.config import RunConfig
from mlx_nb.errors import ConfigError, ModelError, did_you_mean
from mlx_nb.model.trees import named_arrays

ADAPTER_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"


def attach_adapter(model: nn.Module, config: RunConfig) -> tuple[str, ...]:
    """Freeze the model and make what `config` names trainable. Returns the adapted module paths inside a layer.

    Adapter matrices are drawn from the current `mx.random` stream. Raises ConfigError when a key matches no module
    or `num_layers` exceeds the model, ModelError when `full` meets a quantised base.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = model.layers
    if config.num_layers > len(layers):
        raise ConfigError(f"`num_layers: {config.num_layers}`: this model has {len(layers)} layers. Use -1 for all.")
    chosen = layers[-config.num_layers :] if config.num_layers > 0 else layers
    model.freeze()
    if config.fine_tune_type == "full":
        if any(isinstance(module, nn.QuantizedLinear) for module in model.modules()):
            raise ModelError(
                "`fine_tune_type: full` needs float weights, and this base is quantised. Use lora or dora."
            )
        for layer in chosen:
            layer.unfreeze()
        return ()
    parameters = config.lora_parameters
    keys = resolve_keys(model, parameters.keys)
    settings: dict[str, Any] = {
        "rank": parameters.rank,
        "scale": parameters.scale,
        "dropout": parameters.dropout,
    }
    if keys:
        settings["keys"] = set(keys)
    linear_to_lora_layers(model, config.num_layers, settings, use_dora=config.fine_tune_type == "dora")
    return keys


def resolve_keys(model: nn.Module, keys: tuple[str, ...] | None) -> tuple[str, ...]:
    """Full module paths for `keys`, each a path or the end of one. Empty means every linear layer.

    mlx-lm compares whole paths, so there a short name trains nothing without a word.
    """
    if keys is None:
        return ()
    known = {path for layer in model.layers for path, module in layer.named_modules() if _adaptable(module)}
    outside = {path for path, module in model.named_modules() if _adaptable(module) and ".layers." not in path}
    resolved: list[str] = []
    for key in keys:
        matches = sorted(path for path in known | outside if path == key or path.endswith(f".{key}"))
        if not matches:
            names = sorted({path.rsplit(".", 1)[-1] for path in known})
            raise ConfigError(
                f"`lora_parameters.keys`: no module of this model is called {key!r}."
                f"{did_you_mean(key, [*names, *known])} It has: {', '.join(names)}."
            )
        resolved += [path for path in matches if path not in resolved]
    return tuple(resolved)


def _adaptable(module: nn.Module) -> bool:
    linear = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    return isinstance(module, linear) or hasattr(module, "to_lora") or type(module).__name__.endswith("SwitchLinear")


def trainable_count(model: nn.Module) -> int:
    """Numbers (not arrays) that training changes."""
    return sum(array.size for _, array in named_arrays(model.trainable_parameters()))


def total_count(model: nn.Module) -> int:
    """Numbers in the model, quantised weights counted unpacked, adapters included."""
    from mlx_lm.utils import get_total_parameters

    return int(get_total_parameters(model))


def _wrapped_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every adapter module, which holds its base under `.linear` or `.embedding`."""
    return [(path, module) for path, module in model.named_modules() if "lora_a" in module]


def _base_of(module: nn.Module) -> nn.Module:
    return module["linear"] if "linear" in module else module["embedding"]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base model while inside: adapter modules are taken out, and put back whatever happens.

    Does nothing for full fine-tuning, where the base is not kept apart.
    """
    wrapped = _wrapped_modules(model)
    try:
        if wrapped:
            model.update_modules(tree_unflatten([(path, _base_of(module)) for path, module in wrapped]))
        yield
    finally:
        if wrapped:
            model.update_modules(tree_unflatten(wrapped))


def detach_adapter(model: nn.Module) -> None:
    """Take the adapter out for good: the model is again what was loaded."""
    wrapped = _wrapped_modules(model)
    if wrapped:
        model.update_modules(tree_unflatten([(path, _base_of(module)) for path, module in wrapped]))


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters by their name in `adapters.safetensors`, which is their module path."""
    return dict(named_arrays(model.trainable_parameters()))


def save_adapter(
    model: nn.Module, config: RunConfig, keys: tuple[str, ...], folder: Path, file_name: str = ADAPTER_FILE
) -> Path:
    """Write the adapter in mlx-lm's format, each file whole or not at all. Returns the weights' path.

    `mlx_lm.load(model, adapter_path=folder)` reads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = config.lora_parameters
    lora: dict[str, Any] = {"rank": parameters.rank, "scale": parameters.scale, "dropout": parameters.dropout}
    if keys:
        lora["keys"] = list(keys)
    description = {
        "model": config.model,
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": lora,
        "mlx_nb": {"settings": config.changed()},
    }
    text = json.dumps(description, indent=2, default=str).encode()
    write_whole(folder / CONFIG_FILE, lambda file: file.write(text))
    weights = adapter_weights(model)
    # Through Python's file, so that a full disk is an OSError with its reason.
    write_whole(folder / file_name, lambda file: mx.save_safetensors(file, weights, metadata={"format": "mlx"}))
    return folder / file_name


def write_whole(path: Path, write: Any) -> None:
    """Write beside `path`, flush to disk, then rename: a reader sees the old file or the new one, never half."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_adapter_weights(model: nn.Module, source: str) -> None:
    """Load an `adapters.safetensors`, or the folder that holds it, into the attached adapter.

    Raises ModelError when the file is missing, or a tensor is missing, unknown or of another shape.
    """
    path = Path(source).expanduser()
    path = path / ADAPTER_FILE if path.is_dir() else path
    if not path.is_file():
        raise ModelError(f"resume_adapter_file: no such file: {path}. Give an adapters.safetensors or its folder.")
    try:
        weights = typing.cast(dict[str, mx.array], mx.load(str(path)))
    except Exception as error:
        raise ModelError(f"resume_adapter_file: {path} is not a readable safetensors file ({error}).") from None
    expected = adapter_weights(model)
    for name, array in weights.items():
        if name not in expected:
            raise ModelError(
                f"resume_adapter_file: {path} holds {name}, which this run does not train. Give the same "
                "fine_tune_type, num_layers and lora_parameters.keys as the adapter was made with."
            )
        if array.shape != expected[name].shape:
            raise ModelError(
                f"resume_adapter_file: {name} is {tuple(array.shape)} in {path} and {tuple(expected[name].shape)} "
                "here. Give the same lora_parameters.rank and model."
            )
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ModelError(f"resume_adapter_file: {path} lacks {missing[0]} and {len(missing) - 1} more.")
    model.load_weights(list(weights.items()), strict=False)
