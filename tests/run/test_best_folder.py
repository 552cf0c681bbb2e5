"""best/ holds the adapter that the run says is its best, whichever way the run came to where it is."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from mlx.core import load

from mlx_nb import Run, RunConfig
from mlx_nb.train.checkpoint_store import CheckpointStore
from tiny import tiny_rows

SETTINGS = {"iters": 12, "batch_size": 4, "val_set_size": 6, "steps_per_eval": 2, "save_every": -1, "keep": 20}
STANDSTILL = 1e-12  # a rate that moves no float32 parameter


def new_run(folder, tiny_folder, **settings):
    values = {"learning_rate": 3e-2, "lora_parameters": {"rank": 4}, "model": str(tiny_folder), "data": tiny_rows()}
    return Run(RunConfig.from_dict({**SETTINGS, **values, "adapter_path": str(folder), **settings}))


def best_weights(folder):
    weights = load(str(folder / "best" / "adapters.safetensors"))
    return {name: np.array(array).tobytes() for name, array in weights.items()}


def trained(folder, tiny_folder, **settings):
    """A run of 8 updates whose every validation is the best, and the weights of best/ after each."""
    run = new_run(folder, tiny_folder, **settings)
    seen = {}
    for _ in range(8):
        run.step()
        list(run.events(0))
        if run.step_count == run.trainer.state.best_step:
            seen[run.step_count] = best_weights(run.folder)
            assert seen[run.step_count] == run.adapter_bytes()
    assert list(seen) == [2, 4, 6, 8]
    return run, seen


FULL = {"fine_tune_type": "full", "learning_rate": 1e-3, "lora_parameters": {}}
KINDS = [({}, 4), ({}, 5), (FULL, 4), (FULL, 5), ({"snapshot_memory": 0}, 4)]


@pytest.mark.parametrize(("settings", "target"), KINDS)
@pytest.mark.matrix(every=5)
def test_after_a_rewind_best_is_what_the_run_says(tmp_path, tiny_folder, settings, target):
    run, seen = trained(tmp_path / "a", tiny_folder, **settings)
    run.rewind(to=target)
    best = run.trainer.state.best_step
    assert best in (2, 4)  # a snapshot is taken before the validation after its update, a checkpoint after it
    assert best_weights(run.folder) == seen[best]
    if settings is FULL:  # some of its parameters are small enough to be moved
        return
    run.set(learning_rate=STANDSTILL)
    finished = run.run()
    expected = seen[best] if finished.best_step == best else run.adapter_bytes()
    assert finished.best_step in (4, 6)
    assert best_weights(run.folder) == expected


@pytest.mark.long
def test_after_a_resume_at_a_step_best_is_what_the_run_says(tmp_path, tiny_folder):
    run, seen = trained(tmp_path / "a", tiny_folder)
    run.checkpoint()
    resumed = Run.resume(run.folder, step=4, data=tiny_rows())
    resumed.set(learning_rate=STANDSTILL)
    finished = resumed.run()
    assert (finished.best_step, best_weights(run.folder)) == (4, seen[4])


def test_before_the_first_better_validation_best_is_where_the_run_began(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    list(run.events(0))
    start = run.adapter_bytes()
    run.step(4)
    list(run.events(0))
    assert best_weights(run.folder) != start
    run.rewind(to=1)
    assert run.trainer.state.best_step == 0
    assert best_weights(run.folder) == start


def test_a_fork_has_the_best_that_its_summary_names(tmp_path, tiny_folder):
    run, seen = trained(tmp_path / "a", tiny_folder)
    fork = run.fork(learning_rate=STANDSTILL, adapter_path=str(tmp_path / "fork"))
    finished = fork.run()
    assert (finished.best_step, best_weights(tmp_path / "fork")) == (8, seen[8])


def test_a_loss_of_what_best_holds_is_the_best_loss(tmp_path, tiny_folder):
    run, _ = trained(tmp_path / "a", tiny_folder)
    run.rewind(to=5)
    again = new_run(tmp_path / "b", tiny_folder, resume_adapter_file=str(run.folder / "best"))
    assert math.isclose(again.evaluate("valid").loss, run.trainer.state.best_loss, rel_tol=1e-6)


@pytest.mark.long
def test_a_checkpoint_from_before_that_holds_no_best_resumes(tmp_path, tiny_folder):
    run, seen = trained(tmp_path / "a", tiny_folder)
    run.set(learning_rate=1.0)  # what comes after the best is worse
    run.step()
    run.checkpoint()
    store = CheckpointStore(run.folder / "checkpoints")
    checkpoint, _ = store.load()
    assert set(checkpoint.arrays) == {"parameters", "optimizer", "feed", "best"}
    arrays = {name: group for name, group in checkpoint.arrays.items() if name != "best"}
    store.save(type(checkpoint)(checkpoint.step, arrays, checkpoint.state), kind="step")
    resumed = Run.resume(run.folder, data=tiny_rows())
    resumed.set(learning_rate=STANDSTILL)
    assert resumed.run().best_step == 8
    assert best_weights(run.folder) == seen[8]


@pytest.mark.long
@pytest.mark.parametrize("gone", [False, True])
def test_a_copied_run_continues_where_it_was_copied(tmp_path, tiny_folder, gone):
    run, seen = trained(tmp_path / "a", tiny_folder)
    run.set(learning_rate=STANDSTILL)
    run.checkpoint()
    copied = tmp_path / "elsewhere" / "copy"
    shutil.copytree(tmp_path / "a", copied)
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    if gone:
        shutil.rmtree(tmp_path / "a")
    copy = Run.resume(copied, data=tiny_rows())
    assert copy.folder == copied
    assert copy.run().path == str(copied)
    assert copy.checkpoints()[-1].path.parent == copied / "checkpoints"
    assert best_weights(copied) == seen[8]
    after = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert after == ({} if gone else before)
    run.run()
    assert copy.adapter_bytes() == run.adapter_bytes()


@pytest.mark.long
def test_a_best_that_is_older_than_the_updates_in_memory_is_put_back_too(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder, iters=40, steps_per_eval=10, keep=1, snapshot_memory=1)
    run.step(10)
    list(run.events(0))
    assert run.trainer.state.best_step == 10
    best = best_weights(run.folder)
    run.step(25)
    assert run.trainer.state.best_step > 10
    oldest = run._checkpoints.snapshots._recent[0].step
    assert oldest > 10
    run.rewind(to=oldest)
    assert (run.trainer.state.best_step, best_weights(run.folder) == best) == (10, True)
