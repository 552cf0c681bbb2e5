"""Builds a model from its config.json alone: the modules and shapes of the real one, without weights.

Its arrays are never evaluated, so it takes no memory and cannot compute. A `TargetScorer` for it assumes what is tested
on a real model: that the head can be split off, and that the kernels, packing and checkpointing are verified.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_nb.errors import ModelError
from mlx_nb.model import backend
from mlx_nb.model.graph_memory import evaluation_order
from mlx_nb.model.graph_record import recorded
from mlx_nb.model.layer_checkpoints import lists_of_layers
from mlx_nb.model.loading import quantize
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.model.mlx_lm_import import import_mlx_lm
from mlx_nb.model.model_source import model_folder, one_line, refuse_unknown_model
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.recomputing import NOTHING, Recomputed
from mlx_nb.model.text_model import TextModel, likely_text_model
from mlx_nb.model.trees import trained_arrays_of
from mlx_nb.model.vocabulary_chunks import with_arrays

_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def config_json_of(model: str) -> dict[str, Any]:
    """The config.json of a model. Of a hub id that is not in the local cache only this file is downloaded.

    Raises ModelError.
    """
    refuse_unknown_model(model)
    folder = Path(model).expanduser()
    if folder.is_dir() or model.count("/") != 1 or folder.exists():
        file = (folder if folder.is_dir() else model_folder(model)) / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(model, "config.json"))
        except Exception as error:
            raise ModelError(f"config.json of {model} cannot be fetched: {one_line(error)}. Check the name.") from None
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}. Give a model folder, alias or hub id.") from None
    return result


def unloaded_model(description: Mapping[str, Any], load_in_bits: int | None = None) -> nn.Module:
    """The model of a config.json, in the dtypes that it has in memory here. Raises ModelError."""
    import_mlx_lm()
    from mlx_lm.utils import _get_classes

    try:
        with random_stream(0):
            model_class, settings_class = _get_classes(dict(description))
            model: nn.Module = model_class(settings_class.from_dict(dict(description)))
    except Exception as error:  # mlx-lm's model code may raise anything
        raise ModelError(f"this config.json is not of a model that mlx-lm has: {one_line(error)}") from None
    model.eval()
    if backend.is_cpu():
        dtype = mx.float32
    else:
        text = description.get("text_config") or {}
        named = next(
            (one[key] for one in (description, text) for key in ("torch_dtype", "dtype") if one.get(key)), "bfloat16"
        )
        dtype = _DTYPES.get(str(named), mx.bfloat16)
        bits = load_in_bits or (description.get("quantization") or {}).get("bits")
        if bits:
            quantize(model, bits)
    model.update(tree_map(lambda array: _cast(array, dtype), model.parameters()))
    return model


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def layers_are_alike(model: nn.Module) -> bool:
    """Whether all layers have the same modules, shapes and settings."""
    lists = lists_of_layers(model)
    return len(lists) == 1 and len({_signature(layer) for layer in lists[0][0][lists[0][1]]}) == 1


def keep_layers(model: nn.Module, count: int) -> None:
    """Remove all but the first `count` layers."""
    for holder, name in lists_of_layers(model):
        holder[name] = holder[name][:count]


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    found: list[Any] = []
    for path, module in layer.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and "idx" not in name and "index" not in name
        }
        shapes = [(name, tuple(value.shape)) for name, value in module.items() if isinstance(value, mx.array)]
        found.append((path, type(module).__name__, tuple(sorted(plain.items())), tuple(sorted(shapes))))
    return tuple(found)


def unloaded_scorer(model: nn.Module, recomputed: Recomputed = NOTHING) -> TargetScorer:
    """A scorer whose graphs can be recorded but not evaluated."""
    has_kernels = backend.is_cpu() and platform.machine() in ("x86_64", "AMD64")
    text = likely_text_model(model)
    scorer = TargetScorer.assuming(model, text, has_kernels=has_kernels, recomputed=recomputed)
    if text is not None:
        scorer.trained_head = _arrays_of_the_head(text, scorer.sizes.hidden)
    return scorer


def _arrays_of_the_head(text: TextModel, width: int) -> list[str]:
    """The names of trained arrays that the head uses, from its graph."""
    named = trained_arrays_of(text.model)
    names, arrays = [name for name, _ in named], [array for _, array in named]

    def logits(hidden: mx.array, *arrays: mx.array) -> list[mx.array]:
        with with_arrays(text.model, names, arrays):
            return [text.logits(hidden)]

    graph = recorded(logits, [mx.zeros((1, 2, width)), *arrays])
    used = {name for one in evaluation_order(graph) for name in one.inputs}
    return [name for name, recorded_as in zip(names, graph.inputs[1:]) if recorded_as in used]
