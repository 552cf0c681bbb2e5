"""LoRA, DoRA and full fine-tuning: attaches, removes, saves and loads adapters in mlx-lm's format.

The modules are mlx-lm's own (`mlx_lm.tuner`), so what is saved here loads there.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ConfigError, ModelError, and_more, did_you_mean
from mlx_nb.files.whole_files import write_whole
from mlx_nb.files.written_files import ADAPTER_FILE, CONFIG_FILE
from mlx_nb.model.adapter_files import START, AdapterFile, open_adapter
from mlx_nb.model.finite import not_finite
from mlx_nb.model.mlx_lm_import import import_mlx_lm
from mlx_nb.model.peft_files import NotHeld
from mlx_nb.model.trees import named_arrays

# Writes a file completely or not at all: (path, function that writes to the open file).
Write = Callable[[Path, Callable[[Any], Any]], None]


def attach_adapter(model: nn.Module, config: RunConfig) -> tuple[str, ...]:
    """Freeze the model and make the weights selected by `config` trainable.

    Returns the adapted module paths inside a layer.

    `full` with `num_layers: -1` trains every weight, with N those of the last N layers, as in mlx-lm. An adapter that
    is already attached is removed first.

    Adapter matrices are drawn from the current `mx.random` stream. Raises ConfigError if a key matches no module or
    `num_layers` exceeds the model, ModelError for `full` with a quantized base.
    """
    import_mlx_lm()
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = model.layers
    if config.num_layers > len(layers):
        raise ConfigError(f"`num_layers: {config.num_layers}`: this model has {len(layers)} layers. Use -1 for all.")
    detach_adapter(model)
    chosen = layers[-config.num_layers :] if config.num_layers > 0 else layers
    model.freeze()
    if config.fine_tune_type == "full":
        _unfreeze_weights([model] if config.num_layers == -1 else chosen)
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


def _unfreeze_weights(modules: list[nn.Module]) -> None:
    """Make every float weight in `modules` trainable."""
    every = [inner for module in modules for inner in module.modules()]
    if any(type(module).__name__.startswith("Quantized") for module in every):
        raise ModelError("`fine_tune_type: full` needs float weights, and this base is quantized. Use lora or dora.")
    for module in every:
        module.unfreeze(recurse=False)
        own = [name for name, array in module.items() if isinstance(array, mx.array)]
        module.freeze(recurse=False, keys=[name for name in own if not mx.issubdtype(module[name].dtype, mx.floating)])


def resolve_keys(model: nn.Module, keys: tuple[str, ...] | None) -> tuple[str, ...]:
    """Full module paths for `keys`, each a path or its suffix. Empty means every linear layer.

    mlx-lm compares whole paths, so a short name would silently train nothing.
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


def adapter_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every adapter module. Its base module is its `.linear` or `.embedding`."""
    return [(path, module) for path, module in model.named_modules() if "lora_a" in module]


def base_of(module: nn.Module) -> nn.Module:
    """The base module of an adapter module."""
    result: nn.Module = module["linear"] if "linear" in module else module["embedding"]
    return result


def detach_adapter(model: nn.Module) -> None:
    """Put the base modules back in place of the adapter.

    Frozen modules, and weights trained by `full`, stay as they are.
    """
    wrapped = adapter_modules(model)
    if wrapped:
        model.update_modules(tree_unflatten([(path, base_of(module)) for path, module in wrapped]))


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """The trainable parameters by their name in `adapters.safetensors`, which is their module path."""
    return dict(named_arrays(model.trainable_parameters()))


def adapter_description(
    config: RunConfig,
    keys: tuple[str, ...],
    *,
    base: dict[str, Any] | None = None,
    loading_info: Mapping[str, str] | None = None,
    update: int | None = None,
) -> dict[str, Any]:
    """The contents of adapter_config.json: what mlx-lm reads, and under `mlx_nb` what a run records.

    `base` is the `base_identity` of the base model. `loading_info` has the `model` name for mlx-lm and the
    `prompt_format`. `update` is the number of updates done.
    """
    parameters = config.lora_parameters
    lora: dict[str, Any] = {"rank": parameters.rank, "scale": parameters.scale, "dropout": parameters.dropout}
    if keys:
        lora["keys"] = list(keys)
    loading_info = loading_info or {}
    return {
        "model": loading_info.get("model", config.model),
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": lora,
        "mlx_nb": {
            "model": config.model,
            "prompt_format": loading_info.get("prompt_format"),
            "settings": config.changed(),
            "base": base,
            "update": update,
        },
    }


def save_adapter(
    model: nn.Module,
    description: Mapping[str, Any],
    folder: Path,
    file_name: str = ADAPTER_FILE,
    *,
    write: Write = write_whole,
    weights: dict[str, mx.array] | None = None,
) -> Path:
    """Write the adapter in mlx-lm's format, each file completely or not at all. Returns the path of the weights.

    `mlx_lm.load(model, adapter_path=folder)` reads it. `description` is an `adapter_description`; `weights` are given
    for an update other than the model's current one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=2, default=str).encode()
    write(folder / CONFIG_FILE, lambda file: file.write(text))
    weights = adapter_weights(model) if weights is None else weights
    # Written through a Python file, so that a full disk raises an OSError with the reason.
    write(folder / file_name, lambda file: mx.save_safetensors(file, weights, metadata={"format": "mlx"}))
    return folder / file_name


def load_adapter_weights(model: nn.Module, source: AdapterFile | str | Path) -> None:
    """Load the weights of an adapter, or of one in a folder or file, into the attached adapter, in its dtypes.

    Raises ModelError that names a tensor which is missing, unknown, of another shape or not finite.
    """
    adapter = source if isinstance(source, AdapterFile) else open_adapter(str(source), START)
    what, path = adapter.setting, adapter.weights
    try:
        weights = typing.cast(dict[str, mx.array], mx.load(str(path)))
        mx.eval(weights)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{what}: {path} is not a readable safetensors file ({reason}).") from None
    expected = adapter_weights(model)
    if adapter.peft is not None:
        try:
            weights = adapter.peft.weights(weights, expected, model)
        except NotHeld as error:
            raise ModelError(f"{what}: {path} does not fit this model: {error}.") from None
    trained_on = f" (it was trained on {adapter.model})" if adapter.model else ""
    hint = f"It belongs to another base{trained_on}, or its {CONFIG_FILE} belongs to another adapter."
    if adapter.config is None:
        hint = f"It has no {CONFIG_FILE}: give the fine_tune_type, num_layers and lora_parameters of its training."
    for name, array in weights.items():
        if name not in expected:
            raise ModelError(f"{what}: {path} has the tensor {name}, which does not exist here. {hint}")
        if array.shape != expected[name].shape:
            raise ModelError(
                f"{what}: {name} is {tuple(array.shape)} in {path} and {tuple(expected[name].shape)} here. {hint}"
            )
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ModelError(f"{what}: {name} in {path} is {array.dtype}, and weights are floats. {hint}")
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ModelError(f"{what}: {path} lacks {and_more(missing, 1)}. {hint}")
    if bad := not_finite(weights):
        raise ModelError(f"{what}: {path} is damaged: {bad}. Give an earlier adapter.")
    model.load_weights([(name, array.astype(expected[name].dtype)) for name, array in weights.items()], strict=False)
