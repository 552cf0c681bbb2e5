"""Loads the reference model, with which the policy is compared. By default it is the model before training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import ConfigError, ModelError
from mlx_nb.files.written_files import CONFIG_FILE
from mlx_nb.model import adapters
from mlx_nb.model.adapter_files import REFERENCE, START, AdapterFile, adapter_weights_file, open_adapter, shape_of
from mlx_nb.model.fingerprint import configuration_digest, weights_fingerprint
from mlx_nb.model.limits import limits_of
from mlx_nb.model.loading import LoadedModel
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.model.model_source import model_folder, model_named
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.shared_base import load_base, shared_copy
from mlx_nb.model.trees import held_arrays

BARE = "none"


def reference_scorer(config: RunConfig, loaded: LoadedModel, start: nn.Module | None = None) -> TargetScorer:
    """The scorer of the reference model in `config`.

    It shares the arrays of `loaded`, so it needs no memory unless `reference_model` names another model. `start` is a
    shared copy made before a full fine-tune. Raises ModelError.
    """
    if config.reference_model is not None:
        model = _other_model(config, loaded)
    else:
        model = start if start is not None else shared_copy(loaded).model
    if config.reference_adapter not in (None, BARE):
        adapter = open_adapter(str(config.located(REFERENCE)), REFERENCE)
        _attach(model, shape_of(adapter, model), adapter)
    elif config.reference_adapter is None and config.reference_model is None and config.resume_adapter_file:
        _attach(model, config, open_adapter(str(config.located(START)), START))
    model.freeze()
    model.eval()
    mx.eval(held_arrays(model))
    return TargetScorer(model)


def reference_fingerprint(config: RunConfig, loaded: LoadedModel) -> str:
    """A digest of the reference: its weights, configuration, adapter, quantization and the version of mlx."""
    weights, configuration = loaded.weights, loaded.configuration
    if config.reference_model is not None:
        folder = model_folder(model_named(config, "reference_model"))
        weights = weights_fingerprint(folder)
        configuration = configuration_digest(json.loads((folder / "config.json").read_bytes()))
    chosen = BARE if config.reference_adapter == BARE else config.located("reference_adapter")
    if chosen is None and config.reference_model is None:
        chosen = config.located("resume_adapter_file")
    facts: list[Any] = [weights, configuration, config.load_in_bits, version("mlx"), _adapter_digest(chosen)]
    if chosen is not None and config.reference_adapter is None:  # it is attached with this run's adapter shape
        facts += [config.fine_tune_type, config.num_layers, dataclasses.asdict(config.lora_parameters)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _adapter_digest(adapter: str | None) -> list[str] | None:
    """Digests of the weights and of the configuration beside them, which has the scale."""
    if adapter in (None, BARE):
        return None
    weights = adapter_weights_file(Path(str(adapter)).expanduser())
    files = [weights, weights.parent / CONFIG_FILE]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def _other_model(config: RunConfig, loaded: LoadedModel) -> nn.Module:
    other = load_base(config.replace(model=config.reference_model, chat_template=None))
    ours, theirs = (_vocabulary(model.tokenizer) for model in (loaded, other))
    if ours != theirs:
        raise ModelError(
            f"reference_model: {config.reference_model} has a different vocabulary than {config.model} ({len(theirs)} "
            f"and {len(ours)} tokens), so log-probabilities cannot be compared. Choose one with the same tokenizer."
        )
    if method_named(config.method).kind.sampled:
        # Rows are checked individually, but sampled completions may have any token that has a logit.
        known, written = limits_of(other.model).ids, limits_of(loaded.model).targets
        if known is not None and written is not None and known < written:
            raise ModelError(
                f"reference_model: {config.reference_model} has embeddings for {known} tokens, but {config.model} can "
                f"sample {written}. Choose a model with the same vocabulary size."
            )
    return other.model


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    result: dict[str, int] = getattr(tokenizer, "_tokenizer", tokenizer).get_vocab()
    return result


def _attach(model: nn.Module, shape: RunConfig, adapter: AdapterFile) -> None:
    with random_stream(0):  # the initial matrices are overwritten
        try:
            adapters.attach_adapter(model, shape)
        except ConfigError as error:
            raise ModelError(f"{adapter.setting}: {adapter.weights} does not fit this model: {error}") from None
    adapters.load_adapter_weights(model, adapter)
