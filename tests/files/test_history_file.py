"""The history of a run is a file that only grows: saving it costs what is new, and damage to it costs no training."""

from __future__ import annotations

import gc
import json
import shutil

import pytest

from history_runs import new_run, resume
from mlx_nb.events import RolloutCompleted, StepCompleted
from mlx_nb.events.history import History
from mlx_nb.files.history_file import MOST_PARTS
from mlx_nb.run.resume_checks import history_of
from mlx_nb.train.checkpoint_store import CheckpointStore


def texts(history):
    return [event.to_json() for event in history.events]


def history_bytes(folder):
    return sum(path.stat().st_size for path in (folder / "checkpoints").glob("history-*.jsonl"))


def rollout(step):
    completions = [{"text": f"{step} " * 200, "rewards": {}, "reward": 0.0, "advantage": 0.0, "tokens": 200}]
    return RolloutCompleted(step, ({"row": 0, "prompt": "say red", "completions": completions * 8},), 1.0)


def test_a_save_writes_what_is_new_however_long_the_run_is(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step()
    state_sizes, added = [], []
    for step in range(1, 6):
        for _ in range(100 if step < 5 else 1):
            run.history.append(rollout(step))
        before = history_bytes(run.folder)
        state_sizes.append((run.checkpoint() / "state.json").stat().st_size)
        added.append(history_bytes(run.folder) - before)
    assert max(state_sizes) - min(state_sizes) < 100
    assert added[-1] < added[1] / 50
    assert texts(resume(run.folder).history) == texts(run.history)


def test_the_first_save_after_a_resume_writes_what_is_new_too(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step()
    run.history.append(rollout(1))
    run.checkpoint()
    before = history_bytes(run.folder)
    resumed = resume(run.folder)
    resumed.step()
    resumed.checkpoint()
    assert history_bytes(run.folder) - before < before / 3
    assert texts(history_of(CheckpointStore(run.folder / "checkpoints").load()[0])) == texts(resumed.history)


def test_what_a_killed_process_wrote_after_its_last_checkpoint_is_of_no_account(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(2)
    run.checkpoint()
    expected = texts(run.history)
    [file] = (run.folder / "checkpoints").glob("history-*.jsonl")
    with file.open("ab") as tail:
        tail.write(b'{"event": "StepComp')
    resumed = resume(run.folder)
    assert texts(resumed.history) == expected
    assert not any("history" in note for note in resumed.trainer.notes)
    resumed.step()
    resumed.checkpoint()
    assert texts(resume(run.folder).history) == texts(resumed.history)


def test_each_branch_of_a_run_resumed_twice_at_a_step_keeps_its_own_history(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder, keep=10)
    run.step(2)
    run.checkpoint()
    run.step(2)
    newest = run.checkpoint()
    first = texts(run.history)
    other = resume(run.folder, step=2)
    other.step(1)
    third = other.checkpoint()
    store = CheckpointStore(run.folder / "checkpoints")
    assert texts(history_of(store.load(newest.name)[0])) == first
    assert texts(history_of(store.load(third.name)[0])) == texts(other.history)
    assert len(other.history) == 3


def test_rewound_and_forked_runs_save_their_whole_history(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(4)
    run.checkpoint()
    run.rewind(to=2)
    run.step()
    run.checkpoint()
    resumed = resume(run.folder)
    assert texts(resumed.history) == texts(run.history)
    assert resumed.history["loss"] == run.history["loss"]
    assert len(resumed.history.abandoned()) == 1
    fork = run.fork(adapter_path=str(tmp_path / "fork"))
    fork.step()
    fork.checkpoint()
    assert texts(resume(fork.folder).history) == texts(fork.history)


@pytest.mark.long
def test_history_files_that_no_checkpoint_needs_are_removed(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder, iters=100, keep=1)
    for _ in range(MOST_PARTS + 3):
        run.step()
        run.checkpoint()
        run = resume(run.folder)
        assert len(run.history) == run.step_count
    run.step()
    run.checkpoint()
    [info] = run.checkpoints()
    parts = json.loads((info.path / "state.json").read_bytes())["history_parts"]
    there = {path.name for path in (run.folder / "checkpoints").glob("history-*")}
    assert there == {part["file"] for part in parts}
    assert len(there) <= MOST_PARTS


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
@pytest.mark.matrix(every=3)
def test_a_damaged_history_is_named_and_costs_no_training(tmp_path, tiny_folder, damage):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(4)
    run.checkpoint()
    [file] = (run.folder / "checkpoints").glob("history-*.jsonl")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-40] if damage == "cut" else content.replace(b'"event"', b'"evnt"')[: len(content)])
    folder, saved = run.folder, run.adapter_bytes()
    del run  # the folder has one writer at a time
    gc.collect()
    whole = new_run(tmp_path / "whole", tiny_folder)
    whole.step(5)
    resumed = resume(folder)
    assert resumed.step_count == 4
    assert resumed.adapter_bytes() == saved
    [note] = [note for note in resumed.trainer.notes if file.name in note]
    assert "What was trained is whole" in note
    assert len(resumed.history) == {"missing": 0, "cut": 3, "altered": 0}[damage]
    resumed.step()
    resumed.checkpoint()
    again = resume(folder)
    assert again.adapter_bytes() == whole.adapter_bytes()
    assert texts(again.history) == texts(resumed.history)
    assert not any("history-" in note for note in again.trainer.notes)


def test_a_history_that_is_damaged_while_the_run_lives_is_written_again(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(2)
    run.checkpoint()
    next((run.folder / "checkpoints").glob("history-*.jsonl")).unlink()
    run.step()
    run.checkpoint()
    assert texts(resume(run.folder).history) == texts(run.history)


def test_a_checkpoint_that_holds_its_history_inside_still_loads(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(2)
    run.set(learning_rate=3e-5)
    run.checkpoint()
    store = CheckpointStore(run.folder / "checkpoints")
    checkpoint, _ = store.load()
    state = {**checkpoint.state, "history": texts(run.history)}
    del state["history_parts"], state["live_changes"], state["seal"]  # as an older mlx_nb wrote it
    shutil.rmtree(store.folder)
    store.save(type(checkpoint)(checkpoint.step, checkpoint.arrays, state), kind="step")
    resumed = resume(run.folder)
    assert texts(resumed.history) == texts(run.history)
    assert resumed.config.learning_rate == 3e-5
    assert resume(run.folder, config=new_run(run.folder, tiny_folder).config).config.learning_rate == 3e-5
    resumed.step()
    resumed.checkpoint()
    assert texts(resume(run.folder).history) == texts(resumed.history)


def test_a_live_change_is_known_to_the_next_resume_without_the_history(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(2)
    run.set(learning_rate=3e-5)
    run.checkpoint()
    for file in (run.folder / "checkpoints").glob("history-*.jsonl"):
        file.unlink()
    config = new_run(run.folder, tiny_folder).config
    assert resume(run.folder, config=config).config.learning_rate == 3e-5


def test_an_append_that_fails_leaves_the_history_as_it_was(tmp_path, tiny_folder, monkeypatch):
    import mlx_nb.files.history_file as history_file
    from mlx_nb.errors import CheckpointError

    run = new_run(tmp_path / "a", tiny_folder)
    run.step()
    run.checkpoint()
    [file] = (run.folder / "checkpoints").glob("history-*.jsonl")
    before = file.read_bytes()
    run.step()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(history_file, "sync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Free some disk space"):
        run.checkpoint()
    assert file.read_bytes() == before
    monkeypatch.undo()
    run.checkpoint()
    assert texts(resume(run.folder).history) == texts(run.history)
    assert isinstance(run.history.events[-1], StepCompleted)
    assert History(run.history.events)["loss"] == run.history["loss"]


def test_a_batch_that_was_to_be_skipped_is_skipped_after_a_resume(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(2)
    run.skip()
    run.checkpoint()
    run.step()
    resumed = resume(run.folder, step=2)
    resumed.step()
    assert resumed.history.last_step.rows == run.history.last_step.rows
    assert resumed.adapter_bytes() == run.adapter_bytes()
