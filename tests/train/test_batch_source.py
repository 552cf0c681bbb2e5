"""What updates are computed on: rows, or completions. Each of the two does all that is asked of both, and no more."""

from __future__ import annotations

import inspect

import pytest

from method_runs import ROWS, run_of
from mlx_nb.train.batch_source import BatchSource, RowBatches
from mlx_nb.train.rollout import Rollouts


def members(kind):
    return {name for name in vars(kind) if not name.startswith("_")}


def test_a_batch_source_has_two_methods_and_rollouts_have_more():
    assert members(BatchSource) == {"batches", "measure"} == members(RowBatches)
    assert members(BatchSource) < members(Rollouts)
    for name in members(BatchSource):
        wanted = list(inspect.signature(getattr(BatchSource, name)).parameters)
        for kind in (RowBatches, Rollouts):
            assert list(inspect.signature(getattr(kind, name)).parameters) == wanted


@pytest.mark.parametrize("method", ROWS)
def test_only_a_method_that_samples_has_rollouts(method, tmp_path, tiny_folder):
    trainer = run_of(method, tmp_path, tiny_folder).trainer
    assert (trainer.rollouts is not None) == (method == "grpo")
    assert isinstance(trainer.source, Rollouts if method == "grpo" else RowBatches)


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.matrix(every=6)
def test_the_batches_of_an_update_have_the_rows_that_are_reported_to_come_next(method, tmp_path, tiny_folder):
    run = run_of(method, tmp_path, tiny_folder, grad_accumulation_steps=5, steps_per_eval=-1)
    for _ in range(3):
        coming = run.trainer.next_rows()
        assert run.step().rows == tuple(dict.fromkeys(coming))
