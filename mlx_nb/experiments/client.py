"""The low-level client: the training loop is yours, in the words of tinker, in this kernel and without a server.

`from mlx_nb.experiments import client as tinker` takes the place of `import tinker`.
"""

from __future__ import annotations

import mlx.nn as nn
import numpy as np

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError
from mlx_nb.experiments import client_types as types
from mlx_nb.experiments.client_sampling import SamplingClient
from mlx_nb.experiments.client_training import TrainingClient, about_state, state_folder
from mlx_nb.experiments.client_types import (
    AdamParams,
    APIFuture,
    Datum,
    ForwardBackwardOutput,
    ModelInput,
    SamplingParams,
    TensorData,
)
from mlx_nb.files.places import working_folder
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.saved_model import load

__all__ = [
    "APIFuture",
    "AdamParams",
    "Datum",
    "ForwardBackwardOutput",
    "ModelInput",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "TensorData",
    "TrainingClient",
    "types",
]

_ALPHA = 32.0  # tinker's; the multiplier of an adapter is alpha / rank


class ServiceClient:
    """Makes clients. `base_url` and `api_key` are taken and not needed: everything is computed in this process."""

    def __init__(self, *, base_url: str | None = None, api_key: str | None = None) -> None:
        pass

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
    ) -> TrainingClient:
        """A client that trains a new LoRA adapter of `rank` with the multiplier 32 / rank.

        Clients of one base share its arrays. Without a `seed` one is drawn. Raises ModelError, ConfigError, and
        CommandError if nothing is to be trained.
        """
        seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        config = RunConfig.from_dict(
            {
                "model": base_model,
                "seed": seed,
                "num_layers": -1,
                "optimizer": "adamw",
                "lora_parameters": {"rank": rank, "scale": _ALPHA / rank, "dropout": 0.0},
            }
        ).at(working_folder())
        inputs = RunInputs(config)
        keys = _chosen(inputs.loaded.model, train_mlp, train_attn, train_unembed)
        parameters = {"rank": rank, "scale": _ALPHA / rank, "dropout": 0.0, "keys": keys}
        return TrainingClient(inputs, config.replace(lora_parameters=parameters))

    def create_training_client_from_state(self, path: str) -> TrainingClient:
        """A client with the weights of a saved state, and a new optimizer. Raises CheckpointError."""
        client = self._of_state(path)
        client.load_state(path)
        return client

    def create_training_client_from_state_with_optimizer(self, path: str) -> TrainingClient:
        """A client with the weights and the optimizer of a saved state. Raises CheckpointError."""
        client = self._of_state(path)
        client.load_state_with_optimizer(path)
        return client

    def _of_state(self, path: str) -> TrainingClient:
        config = RunConfig.from_dict(about_state(state_folder(path))["settings"]).at(working_folder())
        return TrainingClient(RunInputs(config), config)

    def create_sampling_client(self, model_path: str | None = None, base_model: str | None = None) -> SamplingClient:
        """A client that samples from saved weights, or from a base model without an adapter."""
        if (model_path is None) == (base_model is None):
            raise CommandError("create_sampling_client takes model_path or base_model.")
        if model_path is not None:
            saved = load(state_folder(model_path))
            return SamplingClient(saved.model, saved.tokenizer)
        loaded = RunInputs(RunConfig.from_dict({"model": base_model}).at(working_folder())).loaded
        return SamplingClient(loaded.model, loaded.tokenizer)


def _chosen(model: nn.Module, mlp: bool, attention: bool, unembedding: bool) -> list[str]:
    """The paths of the modules to adapt: in layers by their name, and the head, which may be the embedding."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    found: list[str] = []
    for layer in model.layers:
        for path, module in layer.named_modules():
            adaptable = isinstance(module, kinds) or hasattr(module, "to_lora") or "Switch" in type(module).__name__
            is_attention = any(word in path.partition(".")[0].lower() for word in ("attn", "attention"))
            if adaptable and not list(module.children()) and (attention if is_attention else mlp):
                found.append(path)
    if unembedding:
        names = [path for path, _ in model.named_modules()]
        heads = [path for path in names if path.endswith("lm_head")]
        found += heads or [path for path in names if path.endswith("embed_tokens")][:1]
    if not found:
        raise CommandError("nothing would be trained. Leave train_mlp, train_attn or train_unembed at True.")
    return list(dict.fromkeys(found))
