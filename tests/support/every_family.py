"""A tiny model of every family that mlx-lm has, from the configurations in tests/families/configurations.json.

`shared` there is what the families' arguments have in common (a family takes those it knows), and `families` what one
needs besides.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from families import randomized
from mlx_nb.model.mlx_lm_import import import_mlx_lm

_DATA = json.loads((Path(__file__).parent.parent / "families" / "configurations.json").read_text())
EVERY_FAMILY: tuple[str, ...] = tuple(_DATA["families"])
# Families that cannot be trained with this mlx-lm on a CPU, and what is said of each before anything is trained.
REFUSED = {
    "bitnet": "No Metal back-end",
    "deepseek_v41": "Cannot calculate VJP with respect to indices",
    "gemma3n": "its logits without a cache",
    "kimi_k3": "'LoRALinear' object has no attribute 'weight'",
    "muse_spark": "No Metal back-end",
    "phi3small": "its logits without a cache",
    "recurrent_gemma": "object has no attribute '_no_grad'",
}
ENDS_THE_PROCESS = ("phi3small",)  # mlx does, when the activation that it compiled for them is freed
TRAINED: tuple[str, ...] = tuple(family for family in EVERY_FAMILY if family not in REFUSED)
WRAPPERS = tuple(family for family in TRAINED if "text_config" in _DATA["families"][family])


def configuration(family: str, vocabulary: int) -> dict[str, Any]:
    """The family's config.json for this vocabulary size."""
    own = dict(_DATA["families"][family])
    sizes = {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary, "num_vocab": vocabulary}
    name = own.pop("module", family)
    known = inspect.signature(_module(name).ModelArgs).parameters
    values = {**_DATA["shared"], **own, **sizes}
    config = {"model_type": name, **{key: value for key, value in values.items() if key in known or key in own}}
    config["vocab_size"] = vocabulary
    if "text_config" in own:
        config["text_config"] = {**_DATA["shared"], **own["text_config"], **sizes}
    return copy.deepcopy(config)


def _module(name: str) -> Any:
    import_mlx_lm()
    return importlib.import_module(f"mlx_lm.models.{name}")


def model_of(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """A model of random float32 weights; zero-initialized arrays are random too, so that differences show."""
    module = _module(config["model_type"])
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(config)))
    return randomized(model, seed)


def small_model(family: str, vocabulary: int = 61) -> nn.Module:
    return model_of(configuration(family, vocabulary))


def save_model(config: dict[str, Any], folder: Path, tokenizer_folder: Path) -> Path:
    """A folder that `mlx_lm.load` can open, with the tokenizer of another one."""
    folder.mkdir(parents=True)
    for file in tokenizer_folder.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, folder)
    weights = dict(tree_flatten(model_of(config).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    return folder
