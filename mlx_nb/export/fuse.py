"""Fuses an adapter with its base into a model that mlx-lm loads, and says beforehand what each precision loses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError, did_you_mean
from mlx_nb.export.fuse_report import Candidate, FuseReport, recommended
from mlx_nb.export.fused_weights import BASE, HALF, MIXED, Fused, computing_model, fused_model, is_quantized
from mlx_nb.files.export_folder import refuse_beyond_disk, refuse_foreign, replacing_folder
from mlx_nb.model.lanes import lane_count
from mlx_nb.model.loading import LoadedModel, load_base_as_stored, load_model
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.model.shared_base import shared_copy
from mlx_nb.model.trees import named_arrays
from mlx_nb.objectives.build import objective_for
from mlx_nb.process.pieces import finished
from mlx_nb.train.batch_source import RowBatches
from mlx_nb.train.reference_logprobs import ReferenceLogprobs
from mlx_nb.train.step import evaluate_batch

PRECISIONS = (BASE, MIXED, HALF)
PREDICTED_BATCHES = 8  # of validation rows, at most, for a prediction
_SHARD_BYTES = 5 << 30
_KEPT_FILES = ("*.py", "generation_config.json", "LICENSE*", "NOTICE*", "tokenizer.model")


@dataclass(frozen=True, eq=False)
class FuseInputs:
    """What is fused: the model with its adapter, the settings, its base as it was loaded, and whose export it is.

    `valid` are the validation rows, None = none; `reference` is for methods that have one.
    """

    model: nn.Module
    config: RunConfig
    loaded: LoadedModel
    run_id: str
    name: str
    valid: Sequence[Any] | None = None
    reference: ReferenceLogprobs | None = None


def fuse(inputs: FuseInputs, folder: Path | None, precision: str | None) -> FuseReport:
    """Write the model with its adapter fused to `folder` in `precision` (None: the recommended one).

    Without `folder` nothing is written, and the report has only what is predicted. Raises CommandError for an unknown
    precision, FolderError if the folder has other files or cannot be written; the folder is then as before.
    """
    precisions = precisions_of(inputs)
    if precision is not None and precision not in precisions:
        known = ", ".join(precisions)
        raise CommandError(
            f"no precision {precision!r} for this base.{did_you_mean(precision, precisions)} Known: {known}."
        )
    if folder is not None:
        refuse_foreign(folder)
    report = predicted_report(inputs, precisions)
    report = replace(report, chosen=precision or report.recommended)
    if folder is None:
        return report
    fused = _fused(inputs, report.chosen)
    refuse_beyond_disk(folder, fused.bytes)
    with replacing_folder(folder, inputs.run_id, inputs.name) as work:
        write_model(fused, inputs.loaded, inputs.config, work)
    return _measured(replace(report, path=folder), inputs)


def precisions_of(inputs: FuseInputs) -> tuple[str, ...]:
    """The precisions to choose from: a float base has only its own."""
    network, _ = load_base_as_stored(inputs.loaded.folder, inputs.config.load_in_bits)
    return PRECISIONS if is_quantized(network) else (BASE,)


def predicted_report(inputs: FuseInputs, precisions: tuple[str, ...]) -> FuseReport:
    """What each precision would lose, with the loss on some validation rows of the model as it would be stored."""
    batches = min(PREDICTED_BATCHES, inputs.config.val_batches) if inputs.config.val_batches > 0 else PREDICTED_BATCHES
    live = inputs.model
    adapter_loss = _loss(inputs, live, batches)
    full = inputs.config.fine_tune_type == "full"
    base_loss = None if full or adapter_loss is None else _loss(inputs, shared_copy(inputs.loaded).model, batches)
    candidates = []
    for precision in precisions:
        fused = _fused(inputs, precision)
        predicted = None
        if adapter_loss is not None:
            shared = live if full else computing_model(shared_copy(inputs.loaded).model, fused)
            predicted = _loss(inputs, shared, batches)
        candidates.append(Candidate(precision, fused.bytes, tuple(fused.losses), predicted))
    chosen, why = recommended(candidates, adapter_loss, base_loss)
    return FuseReport(tuple(candidates), adapter_loss, base_loss, chosen, why, chosen)


def _fused(inputs: FuseInputs, precision: str) -> Fused:
    return fused_model(inputs.model, inputs.loaded.folder, inputs.config.load_in_bits, precision)


def _loss(inputs: FuseInputs, model: nn.Module, batches: int) -> float | None:
    """The mean loss on `batches` batches of validation rows (-1: all); None without rows, or if they are prompts."""
    config, examples = inputs.config, inputs.valid
    if not examples or method_named(config.method).kind.sampled:
        return None
    scorer, objective, lanes = TargetScorer(model), objective_for(config), lane_count()
    source = RowBatches(config, scorer=scorer, reference=inputs.reference, width_multiple=1)
    measuring = source.measure(
        0, "valid", examples, batches, lambda batch: evaluate_batch(objective, scorer, batch, lanes)
    )
    return finished(measuring).loss


def _measured(report: FuseReport, inputs: FuseInputs) -> FuseReport:
    """The report with the losses of the written model and of the adapter on the run's validation rows."""
    batches = inputs.config.val_batches
    adapter_loss = _loss(inputs, inputs.model, batches)
    if adapter_loss is None:
        return report
    written = load_model(str(report.path)).model
    written.freeze()
    written.eval()
    return replace(report, measured=_loss(inputs, written, batches), measured_adapter=adapter_loss)


def write_model(fused: Fused, loaded: LoadedModel, config: RunConfig, folder: Path) -> None:
    """Write a model folder for mlx-lm: weights, configuration, tokenizer with the chat template and end tokens trained.

    Raises OSError.
    """
    _write_weights(fused.network, folder)
    for pattern in _KEPT_FILES:
        for file in loaded.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    _write_tokenizer(loaded, config, folder)
    ends = _end_tokens(loaded)
    described = {**fused.config, **ends}
    described.pop("_name_or_path", None)
    if "vision_tower" not in fused.network and "vision_tower" not in getattr(fused.network, "model", {}):
        described.pop("vision_config", None)  # its weights are not loaded
    _write_json(folder / "config.json", described)
    generation = folder / "generation_config.json"
    if ends and generation.exists():
        _write_json(generation, {**json.loads(generation.read_text(encoding="utf-8")), **ends})


def _write_weights(network: nn.Module, folder: Path) -> None:
    shards = list(_shards(network))
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        with open(folder / name, "xb") as file:
            mx.save_safetensors(file, shard, metadata={"format": "mlx"})
        index |= dict.fromkeys(shard, name)
        total += sum(array.nbytes for array in shard.values())
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _shards(network: nn.Module) -> Iterator[dict[str, mx.array]]:
    """The arrays of a model in files of at most _SHARD_BYTES."""
    shard: dict[str, mx.array] = {}
    size = 0
    for name, array in named_arrays(network.parameters()):
        if shard and size + array.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name], size = array, size + array.nbytes
    yield shard


def _write_tokenizer(loaded: LoadedModel, config: RunConfig, folder: Path) -> None:
    tokenizer: Any = loaded.tokenizer
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises Exception itself if its file cannot be written
        raise error if isinstance(error, OSError) else OSError(str(error)) from None
    described = folder / "tokenizer_config.json"
    if config.chat_template is not None and described.exists():
        settings = json.loads(described.read_text(encoding="utf-8"))
        if settings.pop("chat_template_type", None):  # mlx-lm's own code for this model would replace the template
            _write_json(described, settings)


def _end_tokens(loaded: LoadedModel) -> dict[str, Any]:
    """The `eos_token_id` of config.json: every token that ends an answer."""
    ends = sorted(getattr(loaded.tokenizer, "eos_token_ids", ()))
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
