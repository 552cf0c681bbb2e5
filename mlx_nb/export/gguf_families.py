"""The families that can be written as GGUF: llama.cpp's name, its settings, and how their weights are laid out there.

Each entry is proved by a test that compares the logits of a small model with those of the real llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_nb.errors import ModelError
from mlx_nb.model.gguf.convert import llama3_factors

Arguments = Mapping[str, Any]


class Unwritable(ModelError):
    """A model that cannot be written as GGUF, with the reason."""


def _nothing(_arguments: Arguments) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """One `model_type` of mlx-lm in llama.cpp.

    architecture      llama.cpp's name, as in `general.architecture`
    rope_interleaved  the rows of q and k are interleaved in pairs there
    norm_offset       added to the weights of norms, because the model adds 1 to them and llama.cpp does not
    settings          further settings from the model's arguments; raises Unwritable for what llama.cpp cannot do
    """

    architecture: str
    rope_interleaved: bool = False
    norm_offset: float = 0.0
    settings: Callable[[Arguments], dict[str, Any]] = _nothing


def _llama(arguments: Arguments) -> dict[str, Any]:
    kinds = arguments.get("layer_types") or ()
    if arguments.get("sliding_window") and "sliding_attention" in kinds:
        raise Unwritable("llama.cpp has no llama with sliding windows")
    return {}


def _gemma2(arguments: Arguments) -> dict[str, Any]:
    _check_query_scale(arguments, largest=46)
    return {
        "attn_logit_softcapping": float(arguments["attn_logit_softcapping"]),
        "final_logit_softcapping": float(arguments["final_logit_softcapping"]),
        "attention.sliding_window": int(arguments.get("sliding_window") or 4096),
    }


def _gemma3(arguments: Arguments) -> dict[str, Any]:
    _check_query_scale(arguments, largest=62)
    if arguments["sliding_window_pattern"] != 6 or arguments["rope_local_base_freq"] != 10000.0:
        raise Unwritable("llama.cpp has gemma3 only with every sixth layer global and a local rope base of 10000")
    return {"attention.sliding_window": int(arguments["sliding_window"])}


def _check_query_scale(arguments: Arguments, largest: int) -> None:
    """llama.cpp scales queries by the size of a head; only in the largest model by that of its share."""
    wanted = arguments["head_dim"]
    if arguments["num_hidden_layers"] == largest:
        wanted = arguments["hidden_size"] / arguments["num_attention_heads"]
    if not math.isclose(arguments["query_pre_attn_scalar"], wanted):
        raise Unwritable(f"llama.cpp has query_pre_attn_scalar {wanted:g} for this size, not that of this model")


def _smollm3(arguments: Arguments) -> dict[str, Any]:
    usual = [int((layer + 1) % 4 != 0) for layer in range(arguments["num_hidden_layers"])]
    if list(arguments["no_rope_layers"]) != usual:
        raise Unwritable("llama.cpp has smollm3 only without rope in every fourth layer")
    return {}


def _granite(arguments: Arguments) -> dict[str, Any]:
    return {
        "attention.scale": float(arguments["attention_multiplier"]),
        "embedding_scale": float(arguments["embedding_multiplier"]),
        "residual_scale": float(arguments["residual_multiplier"]),
        "logit_scale": float(arguments["logits_scaling"]),
    }


_LLAMA = Family("llama", rope_interleaved=True, settings=_llama)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_offset=1.0),
    "gemma2": Family("gemma2", norm_offset=1.0, settings=_gemma2),
    "gemma3_text": Family("gemma3", norm_offset=1.0, settings=_gemma3),
    "phi3": Family("phi3"),
    "smollm3": Family("smollm3", rope_interleaved=True, settings=_smollm3),
    "granite": Family("granite", rope_interleaved=True, settings=_granite),
    "olmo2": Family("olmo2"),
}


def family_of(model_type: str) -> Family:
    """The family of a `model_type`. Raises Unwritable, naming the known ones."""
    if model_type not in FAMILIES:
        raise Unwritable(f"{model_type!r} is not among the families that can be written: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def settings_of(family: Family, arguments: Arguments, config: Arguments) -> dict[str, Any]:
    """llama.cpp's settings by key, without the architecture, from a model's arguments and its config.json."""
    heads = arguments["num_attention_heads"]
    head_dim = int(arguments.get("head_dim") or arguments["hidden_size"] // heads)
    if arguments.get("rope_traditional"):
        raise Unwritable("its rope is `traditional`, which llama.cpp expects only of weights laid out for it")
    scaling = arguments.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or (kind == "llama3" and family.architecture != "llama"):
        raise Unwritable(f"its rope scaling is {kind!r}, which is not supported")
    context = arguments.get("max_position_embeddings") or config.get("max_position_embeddings") or 2048
    return {
        "context_length": int(context),
        "embedding_length": int(arguments["hidden_size"]),
        "block_count": int(arguments["num_hidden_layers"]),
        "feed_forward_length": int(arguments["intermediate_size"]),
        "attention.head_count": int(heads),
        "attention.head_count_kv": int(arguments.get("num_key_value_heads") or heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(arguments["rms_norm_eps"]),
        "rope.dimension_count": int(head_dim * (arguments.get("partial_rotary_factor") or 1.0)),
        "rope.freq_base": float(arguments.get("rope_theta") or 10000.0),
        "vocab_size": int(arguments["vocab_size"]),
        **(
            {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])} if kind == "linear" else {}
        ),
        **family.settings(arguments),
    }


def rope_factors(arguments: Arguments) -> np.ndarray | None:
    """The divisors of llama3 rope scaling, (head_dim / 2,) float32; None without it."""
    scaling = arguments.get("rope_scaling") or {}
    if "llama3" not in (scaling.get("rope_type"), scaling.get("type")):
        return None
    head_dim = arguments.get("head_dim") or arguments["hidden_size"] // arguments["num_attention_heads"]
    facts = {"head_dim": head_dim, "rope_theta": arguments["rope_theta"]}
    return llama3_factors(scaling, facts).astype(np.float32)
