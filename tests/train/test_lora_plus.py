"""LoRA+: the B matrices learn at a rate of their own, with any optimizer, and resume stays exact."""

from __future__ import annotations

import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import ConfigError
from runs import rows_run

LORA = {"lora_parameters": {"rank": 3, "scale": 4.0}, "lr_schedule": "constant", "learning_rate": 1e-3, "iters": 4}


def arrays(run):
    return {name: np.frombuffer(content, np.float32) for name, content in run.adapter_bytes().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
def test_b_moves_as_at_a_rate_of_its_own_and_a_as_before(optimizer, tiny_folder, tmp_path):
    start, moved = None, {}
    for name, settings in {
        "plain": {},
        "ratio": {"loraplus_lr_ratio": 8.0},
        "rate": {"learning_rate": 8e-3},
    }.items():
        run = rows_run(
            tmp_path, tiny_folder, **{**LORA, **settings}, optimizer=optimizer, adapter_path=str(tmp_path / name)
        )
        _ = run.trainer
        start = arrays(run)
        run.step()
        moved[name] = {path: array - start[path] for path, array in arrays(run).items()}
    for path in start:
        expected = moved["rate" if path.endswith("lora_b") else "plain"][path]
        assert np.abs(moved["ratio"][path] - expected).max() <= 1e-6 + 1e-3 * np.abs(expected).max()
        assert (
            path.endswith("lora_a") or np.abs(moved["ratio"][path]).max() > 4 * np.abs(moved["plain"][path]).max() > 0
        )


def test_it_is_what_two_optimizers_of_mlx_do(tiny_folder, tmp_path):
    """mlx's MultiOptimizer has one optimizer for the B matrices and one for the others."""
    values = {"optimizer": "adamw", "grad_clip": None, "loraplus_lr_ratio": 5.0}
    run = rows_run(tmp_path, tiny_folder, **{**LORA, **values})
    stepper, rate = run.trainer.stepper, run.config.learning_rate
    facts = {"weight_decay": run.config.weight_decay, "bias_correction": True}
    both = optimizers.MultiOptimizer(
        [optimizers.AdamW(5 * rate, **facts), optimizers.AdamW(rate, **facts)],
        [lambda name, _: name.endswith("lora_b")],
    )
    gradients = []
    update = stepper.optimizer.apply_gradients
    stepper.optimizer.apply_gradients = lambda given, before: gradients.append(given) or update(given, before)
    expected = None
    for _ in range(3):
        before = run.model.trainable_parameters()
        run.step()
        theirs = both.apply_gradients(stepper._form.split(gradients[-1]), before if expected is None else expected)
        expected = theirs
    for path, array in nn.utils.tree_flatten(expected):
        assert np.abs(arrays(run)[path] - np.array(array).reshape(-1)).max() < 1e-5, path


def test_a_resumed_run_ends_with_the_same_bytes(tiny_folder, tmp_path):
    whole = rows_run(tmp_path, tiny_folder, **LORA, loraplus_lr_ratio=8.0, adapter_path=str(tmp_path / "whole"))
    whole.run()
    part = rows_run(tmp_path, tiny_folder, **LORA, loraplus_lr_ratio=8.0, adapter_path=str(tmp_path / "part"))
    part.step(2)
    part.checkpoint("pause")
    part.release()
    resumed = Run.resume(tmp_path / "part")
    resumed.run()
    assert resumed.adapter_bytes() == whole.adapter_bytes()


def test_it_needs_an_adapter():
    with pytest.raises(ConfigError, match="`loraplus_lr_ratio` has no effect with `fine_tune_type: full`"):
        RunConfig(fine_tune_type="full", loraplus_lr_ratio=4.0)
