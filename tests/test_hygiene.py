"""Forks share the base, autosaves come in time, and a run that is gone leaves nothing behind."""

from __future__ import annotations

import gc
import json
import shutil
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import forked
from mlx_nb import Run
from mlx_nb.errors import CheckpointError, CommandError, ConfigError, MlxNbError
from mlx_nb.events import Pause, RequestRefused, Rewind, Rewound, RunPaused, StepCompleted
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from mlx_nb.train.checkpoint_store import CheckpointStore
from places import SUPPORT
from runs import rows_run
from tiny import tiny_rows

# Forks


@pytest.mark.parametrize("settings", [{}, {"fine_tune_type": "dora"}, {"fine_tune_type": "full"}], ids=str)
@pytest.mark.matrix(every=3)
def test_a_fork_without_changes_gives_the_same_results_and_neither_affects_the_other(tmp_path, tiny_folder, settings):
    run = rows_run(tmp_path, tiny_folder, **settings)
    run.run(until=3)
    fork = run.fork(adapter_path=str(tmp_path / "fork"))
    before = run.adapter_bytes()
    fork.run()
    assert run.adapter_bytes() == before
    run.run()
    assert fork.history["loss"] == run.history["loss"]
    assert fork.adapter_bytes() == run.adapter_bytes()


@pytest.mark.long
def test_a_fork_takes_another_rate_from_here_on_as_a_run_that_changed_it(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=3)
    fork = run.fork(name="lower", learning_rate=1e-5, adapter_path=str(tmp_path / "lower"))
    fork.run()
    changed = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "changed"))
    changed.run(until=3)
    changed.set(learning_rate=1e-5)
    changed.run()
    assert fork.history["learning_rate"] == changed.history["learning_rate"]
    assert fork.adapter_bytes() == changed.adapter_bytes()
    with pytest.raises(ConfigError, match="keeps its `model`"):
        run.fork(model="other")
    with pytest.raises(CommandError, match="another name"):
        run.fork(name="run")
    session = Session()
    session.add(run)
    assert "3 of 6" in str(run_line(session, f"fork learning_rate=1e-3 adapter_path={tmp_path / 'c'} --as what-if"))
    assert session.get().name == "what-if"


def base_arrays(run):
    return {id(array) for _, array in run_arrays(run.model.parameters())}


def run_arrays(tree):
    from mlx_nb.model.trees import named_arrays

    return named_arrays(tree)


@pytest.mark.long
def test_runs_on_one_base_share_its_memory_and_are_independent(tmp_path, tiny_folder):
    first = rows_run(tmp_path, tiny_folder)
    first.run(until=2)
    second = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "b"))
    alone = first.adapter_bytes()
    second.run()
    assert first.adapter_bytes() == alone
    first.run()
    assert second.adapter_bytes() == first.adapter_bytes()
    frozen = {id(array) for name, array in run_arrays(first.model.parameters()) if "lora" not in name}
    assert frozen <= base_arrays(second)
    full = rows_run(tmp_path, tiny_folder, fine_tune_type="full", adapter_path=str(tmp_path / "c"))
    full.run()
    third = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "d"))
    third.run()
    assert third.adapter_bytes() == first.adapter_bytes()


# Autosave, folders in trouble


def test_a_checkpoint_is_written_when_the_last_is_old_enough(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, save_every=-1, steps_per_eval=-1, autosave_minutes=1e-9, keep=100)
    run.run(until=4)
    there = CheckpointStore(tmp_path / "a" / "checkpoints").list()
    assert [(info.step, info.kind) for info in there] == [(step, "auto") for step in (3, 4)]
    never = rows_run(tmp_path, tiny_folder, save_every=-1, steps_per_eval=-1, autosave_minutes=None)
    never.run(until=4)
    assert not CheckpointStore(tmp_path / "a" / "checkpoints").list()
    assert never.unsaved_updates == 4


def test_at_the_end_of_the_kernel_every_run_is_saved_that_did_something_since(tmp_path, tiny_folder, capsys):
    session = Session()
    run = rows_run(tmp_path, tiny_folder, save_every=-1, steps_per_eval=-1)
    session.add(run)
    session.save_all()
    assert run.checkpoints() == []
    run.run(until=3)
    session.save_all()
    session.save_all()
    assert [(info.step, info.kind) for info in run.checkpoints()] == [(3, "exit")]
    run.run(until=4)
    shutil.rmtree(tmp_path / "a")
    blocked_folder(tmp_path / "a")
    session.save_all()
    assert "could not be saved" in capsys.readouterr().err


def test_a_rewind_that_cannot_be_saved_is_reported_and_the_run_continues(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, save_every=-1, steps_per_eval=-1)
    run.run(until=4)
    blocked_folder(tmp_path / "a")
    reported = []
    run.listen(reported.append)
    run.request(Rewind(2))
    run.request(Rewind(9))
    run.run(until=5)
    refused = [event.error for event in reported if isinstance(event, RequestRefused)]
    assert "could not be saved" in refused[0]
    assert "cannot go back to 9" in refused[1]
    assert [event.step for event in run.history.events if isinstance(event, Rewound)] == [2]


def test_every_update_of_over_5_seconds_is_saved_and_one_slow_save_does_not_put_the_next_off_for_long(
    tmp_path, tiny_folder, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("mlx_nb.run.checkpoints.time", SimpleNamespace(monotonic=lambda: now[0]))
    run = rows_run(tmp_path, tiny_folder, save_every=-1, steps_per_eval=-1, iters=20)
    saved, slow = [], {6}

    def reported(event):
        if isinstance(event, StepCompleted):
            now[0] += 6.0

    run.listen(reported)
    real = CheckpointStore.save

    def save(store, checkpoint, **options):
        saved.append(checkpoint.step)
        now[0] += 5.0 if checkpoint.step in slow else 0.02
        return real(store, checkpoint, **options)

    monkeypatch.setattr(CheckpointStore, "save", save)
    run.step(5)
    assert saved == [1, 2, 3, 4, 5]
    run.step(3)
    assert saved[5:] == [6, 7, 8]


LOST = {
    "deleted": shutil.rmtree,
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "a file in its place": lambda folder: blocked_folder(folder),
    "a file in place of its checkpoints": lambda folder: blocked_folder(folder / "checkpoints"),
}


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("command", ["rewind --to 2", "rewind --to 4"])
@pytest.mark.matrix(every=3)
def test_a_rewind_of_a_run_whose_folder_is_lost_goes_back_from_memory_or_says_so_in_one_line(
    tmp_path, tiny_folder, how, command
):
    session = Session()
    run = rows_run(tmp_path, tiny_folder, save_every=2, steps_per_eval=-1)
    session.add(run)
    run.step(5)
    LOST[how](tmp_path / "a")
    if command.endswith("2"):  # it is on disk alone
        run._checkpoints.snapshots.forget()
        with pytest.raises(MlxNbError, match=r"no longer exists|cannot be read as a folder") as raised:
            run_line(session, command)
        assert run.step_count == 5
    elif "file" in how:
        with pytest.raises(MlxNbError, match="run is at update 4 again, but step 4 could not be saved") as raised:
            run_line(session, command)
        assert run.step_count == 4
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        (tmp_path / "a").unlink(missing_ok=True)
        assert run.save_unsaved()  # nothing of what was saved before is of this branch
    else:
        run_line(session, command)
        assert [(info.step, info.kind) for info in run.checkpoints()] == [(4, "rewind")]
        return
    assert "\n" not in str(raised.value)


def blocked_folder(path):
    """A file where the folder ought to be: what a lost permission looks like to root as well."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")


def test_a_folder_that_cannot_be_written_pauses_and_another_one_continues(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=1)
    blocked_folder(tmp_path / "a")
    ended = run.run()
    assert isinstance(ended, RunPaused)
    assert str(tmp_path / "a") in ended.reason
    assert run.step_count == 2
    assert isinstance(run.run(), RunPaused)
    with pytest.raises(CheckpointError, match="cannot be written"):
        run.save()
    run.save(tmp_path / "elsewhere")
    run.run()
    assert run.finished
    whole = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "whole"))
    whole.run()
    assert run.adapter_bytes() == whole.adapter_bytes()
    assert [one["loss"] for one in run.history.evaluations()] == [one["loss"] for one in whole.history.evaluations()]
    resumed = Run.resume(tmp_path / "elsewhere")
    assert resumed.adapter_bytes() == whole.adapter_bytes()


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
from mlx_nb.model.backend import prepare_backend
prepare_backend()
from pathlib import Path
from mlx_nb import Run
from runs import rows_run
run = rows_run(Path({folder!r}), Path({model!r}))
run.run(until=1)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, hard))
print(run.run())
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print(run.run())
"""


@pytest.mark.parametrize("limit", [0, 300, 20_000])
@pytest.mark.matrix(every=3)
def test_a_full_disk_pauses_with_the_reason_and_nothing_is_lost(tmp_path, tiny_folder, limit):
    code = FULL_DISK.format(tests=str(SUPPORT), folder=str(tmp_path), model=str(tiny_folder), limit=limit)
    done = forked.ended(code, tmp_path)
    assert done.returncode == 0, done.stderr
    paused, finished = done.stdout.strip().splitlines()
    assert paused.startswith("RunPaused(step=2")
    assert "File too large" in paused
    assert finished.startswith("RunFinished(step=6")
    whole = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "whole"))
    whole.run()
    resumed = Run.resume(tmp_path / "a")
    assert resumed.adapter_bytes() == whole.adapter_bytes()


def test_a_folder_deleted_in_the_middle_is_made_again(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=3)
    shutil.rmtree(tmp_path / "a")
    run.run()
    assert run.finished
    assert Run.resume(tmp_path / "a").adapter_bytes() == run.adapter_bytes()


@pytest.mark.parametrize("damage", ["flip", "cut", "version"])
@pytest.mark.matrix(every=3)
def test_a_damaged_newest_checkpoint_is_passed_over_by_the_run(tmp_path, tiny_folder, damage):
    run = rows_run(tmp_path, tiny_folder, keep=10)
    run.run()
    losses = run.history["loss"]
    newest = CheckpointStore(tmp_path / "a" / "checkpoints").list()[-1].path.name
    files = sorted(path.name for path in (tmp_path / "a" / "checkpoints" / newest).iterdir())
    for file in files if damage != "version" else ["manifest.json"]:
        folder = tmp_path / f"damaged-{file}"
        shutil.copytree(tmp_path / "a", folder)
        path = folder / "checkpoints" / newest / file
        content = path.read_bytes()
        altered = {
            "flip": bytes([content[0] ^ 1]) + content[1:],
            "cut": content[: len(content) // 2],
            "version": content.replace(b'"format": 1', b'"format": 2'),
        }[damage]
        path.write_bytes(altered)
        resumed = Run.resume(folder)
        assert not resumed.finished, file
        assert any(newest in note for note in resumed.trainer.notes), file
        resumed.run()
        assert resumed.history["loss"] == losses
        assert resumed.adapter_bytes() == run.adapter_bytes()


# What a run leaves behind


@pytest.mark.long
def test_a_deleted_run_frees_its_memory(tmp_path, tiny_folder):
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    run = rows_run(tmp_path, tiny_folder)
    run.run()
    assert mx.get_active_memory() > before
    del run
    gc.collect()
    assert mx.get_active_memory() <= before


def run_cell(shell, source):
    result = shell.run_cell(source)
    result.raise_error()


@pytest.mark.long
def test_a_cell_run_again_and_an_extension_reloaded_leak_nothing(shell, tiny_folder):
    shell.user_ns["my_rows"] = tiny_rows()
    source = f"%%finetune --name again -o run\nmodel: {tiny_folder}\ndata: my_rows\niters: 3\nbatch_size: 2"
    used = []
    for _ in range(4):
        run_cell(shell, source)
        run_cell(shell, "%reload_ext mlx_nb")
        gc.collect()
        used.append(mx.get_active_memory())
    assert max(used) < 1.1 * used[0]  # a buffer taken from mlx's cache may be a little larger than asked for
    shell.user_ns.pop("run")
    gc.collect()
    assert mx.get_active_memory() < used[0]


def test_a_run_leaves_random_streams_as_they_were(tmp_path, tiny_folder):
    mx.random.seed(5)
    np.random.seed(5)
    numbers = (mx.random.uniform(shape=(3,)).tolist(), np.random.rand(3).tolist())
    mx.random.seed(5)
    np.random.seed(5)
    run = rows_run(tmp_path, tiny_folder, lora_parameters={"dropout": 0.5})
    run.run(until=3)
    run.request(Pause())
    run.run()
    run.rewind(1)
    run.run()
    assert (mx.random.uniform(shape=(3,)).tolist(), np.random.rand(3).tolist()) == numbers


# %%finetune --resume


@pytest.mark.long
def test_a_cell_resumes_its_run_and_names_what_changed(shell, tiny_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    body = f"\nmodel: {tiny_folder}\ndata: rows.jsonl\niters: 6\nsave_every: 2\nlearning_rate: 1e-2\nbatch_size: 2"
    run_cell(shell, f"%%finetune --name a -o whole{body}")
    run_cell(shell, f"%%finetune --name b --paused --resume{body}")
    run_cell(shell, "%finetune step 3")
    run_cell(shell, "%finetune set learning_rate=2e-2")
    run_cell(shell, "%finetune step 1")
    run_cell(shell, f"%%finetune --name b --resume -o b{body}")
    assert shell.user_ns["b"].step_count == 6
    assert shell.user_ns["b"].history["learning_rate"][3:] != shell.user_ns["whole"].history["learning_rate"][3:]
    run_cell(shell, f"%%finetune --name a --resume -o again{body}")
    assert shell.user_ns["again"].adapter_bytes() == shell.user_ns["whole"].adapter_bytes()
    longer = body.replace("iters: 6", "iters: 8")
    error = shell.run_cell(f"%%finetune --name a --resume{longer}").error_in_exec
    assert isinstance(error, CheckpointError)
    assert "iters" in str(error)
    assert "--allow-changed iters" in str(error)
    run_cell(shell, f"%%finetune --name a --resume --allow-changed iters -o longer{longer}")
    assert shell.user_ns["longer"].step_count == 8
