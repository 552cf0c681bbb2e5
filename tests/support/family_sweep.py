"""Trains one family in one way and measures what must hold."""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from every_family import configuration, save_model
from mlx_nb import Run
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.errors import ModelError
from mlx_nb.model.logprobs import target_inputs
from mlx_nb.objectives.kinds import LOSS_KINDS
from tiny import tiny_pairs, tiny_rows

KINDS = ("lora", "dora", "full", "quantized")
METHODS = ("sft", "dpo")
# What is trained with one method in every other family, and with the other method in the families between.
_OF_ONE_METHOD = ("lora", "dora")
UPDATES, _AT = 4, 2
VOCABULARY = 300


def is_in_cover(family: str, kind: str, method: str, families: Sequence[str]) -> bool:
    """Whether this one of the two cases of a family and kind is in the cover.

    It has half of all cases: every family with every kind and with every method, and every kind with every method. A
    family that refuses DoRA or full weights, as many do, still trains with both methods in it.
    """
    return (families.index(family) + (kind in _OF_ONE_METHOD)) % 2 == METHODS.index(method)


def examine(family: str, kind: str, method: str, folder: Path, models: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """Measurements of a few updates on four rows, or `{"refused": line}`. Raises AssertionError for what does not hold.

    The model is in a folder of its family among `models`, which is made where it is not there.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    model = models / family
    if not model.exists():
        save_model(configuration(family, VOCABULARY), model, tokenizer_folder)
    settings = _settings(model, folder / f"{kind}-{method}", kind, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(RunConfig.from_dict(settings))
        try:
            losses = [run.step().loss for _ in range(_AT)]
        except ModelError as refused:
            if "\n" in str(refused) or Path(settings["adapter_path"]).exists():
                raise AssertionError("not refused in one line before anything was written") from refused
            return {"refused": str(refused), "seconds": time.perf_counter() - started}
        base = None if kind == "full" else run.generate("say red", max_tokens=4, base=True)
        facts = _differences(run)
        run.save()
        losses += [run.step().loss for _ in range(UPDATES - _AT)]
        straight = _bytes(run)
        said = ("never get a gradient", "cannot be split", "cannot read")
        facts["notes"] = [note for note in run.trainer.notes if any(words in note for words in said)]
        _assert_read_by_mlx_lm(run, kind)
        if base is not None:
            assert run.generate("say red", max_tokens=4, base=True) == base, "the base was changed"
        run.generate("say red", max_tokens=4)
        run.trainer.close()
        del run
        gc.collect()
        resumed = Run.resume(settings["adapter_path"], step=_AT)
        losses_again = [resumed.step().loss for _ in range(UPDATES - _AT)]
        assert losses_again == losses[_AT:], f"resumed: {losses_again}, straight {losses[_AT:]}"
        assert _bytes(resumed) == straight, "a resumed run ends with other weights"
        resumed.trainer.close()
    assert all(np.isfinite(losses)), losses
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    assert facts["gradient"] < 1e-4, f"gradient differs from the whole model's by {facts['gradient']:.1e}"
    assert facts["padding"] < 1e-4, f"padding changes the gradient by {facts['padding']:.1e}"
    return {**facts, "first": losses[0], "last": losses[-1], "seconds": time.perf_counter() - started}


def _settings(model: Path, adapter: Path, kind: str, method: str) -> dict[str, Any]:
    rows = adapter.with_suffix(".jsonl")
    made = tiny_pairs(4) if method == "dpo" else tiny_rows(4)
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    own: dict[str, Any] = {"load_in_bits": 4} if kind == "quantized" else {}
    if kind != "full":
        own["lora_parameters"] = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    return {
        "model": str(model),
        "data": str(rows),
        "method": method,
        "fine_tune_type": "lora" if kind == "quantized" else kind,
        "iters": UPDATES + 1,
        "batch_size": 4,
        "learning_rate": 1e-3 if kind == "full" else 5e-3,
        "save_every": _AT,
        "adapter_path": str(adapter),
        **own,
    }


def _bytes(run: Run) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in tree_flatten(run.model.trainable_parameters())}


def _batch(run: Run, width: int) -> TokenBatch:
    kind = LOSS_KINDS["pairs" if run.config.method == "dpo" else "tokens"]
    batch = kind.collate(run.inputs.examples.train[:3], width)
    return batch if run.inputs.reference is None else run.inputs.reference.fill(batch)


def _gradients(run: Run, batch: TokenBatch) -> dict[str, np.ndarray]:
    found = run.trainer.stepper.gradients([batch], seed=0)
    return {name: np.array(array) for name, array in tree_flatten(found.gradients)}


def _differences(run: Run) -> dict[str, Any]:
    """Between the gradient of a batch, that of the whole model, and that with padding, as part of the largest."""
    batch = _batch(run, 1)
    ours = _gradients(run, batch)
    return {
        "gradient": _largest_difference(ours, _gradients_of_whole_model(run, batch)),
        "padding": _largest_difference(_gradients_with_padding(run, batch), ours),
    }


def _gradients_of_whole_model(run: Run, batch: TokenBatch) -> dict[str, np.ndarray]:
    """Those of the model run whole, without anything that makes a step faster."""
    scorer = run.trainer.scorer
    text, scorer._text = scorer._text, None
    try:
        return _gradients(run, batch)
    finally:
        scorer._text = text


def _gradients_with_padding(run: Run, narrow: TokenBatch) -> dict[str, np.ndarray]:
    wide = _batch(run, 32)
    is_padding = np.arange(wide.tokens_BT.shape[1])[None] >= np.array(wide.lengths)[:, None]
    junk = wide._replace(tokens_BT=np.where(is_padding, 7, wide.tokens_BT).astype(np.int32))
    assert target_inputs(junk, 1, 32).tokens_BT.shape[1] > target_inputs(narrow).tokens_BT.shape[1]
    stepper, multiples = run.trainer.stepper, run.trainer.stepper._multiples
    stepper._multiples = (1, 32)
    try:
        return _gradients(run, junk)
    finally:
        stepper._multiples = multiples


def _largest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert all(np.isfinite(array).all() for array in one.values()), "a gradient is not finite"
    largest = max(float(np.abs(array).max()) for array in other.values())
    return max(float(np.abs(one[name] - other[name]).max()) for name in other) / largest


def _assert_read_by_mlx_lm(run: Run, kind: str) -> None:
    """`mlx_lm.load` with the adapter gives the logits that the run's model has; on a float base it only fits."""
    from mlx_lm.utils import load

    run.save()
    try:
        model, _ = load(run.config.model, adapter_path=run.config.adapter_path)
    except ValueError:
        if not any("mlx_lm.load cannot read" in note for note in run.trainer.notes):
            raise
        return
    if kind == "quantized":
        ours, theirs = (dict(tree_flatten(one.parameters())) for one in (run.model, model))
        assert all(mx.array_equal(theirs[name], ours[name]).item() for name in ours if ".lora_" in name)
        return
    tokens = mx.array([[5, 9, 17, 3, 60]])
    found, ours = model(tokens), run.model(tokens)
    assert mx.allclose(found, ours, rtol=1e-3, atol=1e-3 * mx.abs(ours).max().item()).item(), "mlx_lm reads another"
