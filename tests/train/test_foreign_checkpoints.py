"""A checkpoint that is whole but not of a run is passed over, in one line, and hides no good one."""

from __future__ import annotations

import dataclasses

import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import CheckpointError
from mlx_nb.train.checkpoint import Checkpoint
from mlx_nb.train.checkpoint_store import CheckpointStore
from tiny import tiny_rows

SETTINGS = {"iters": 8, "batch_size": 2, "val_set_size": 0, "save_every": -1, "keep": 9, "lora_parameters": {"rank": 2}}


@pytest.fixture
def run(tmp_path, tiny_folder):
    values = {**SETTINGS, "model": str(tiny_folder), "data": tiny_rows(), "adapter_path": str(tmp_path / "a")}
    run = Run(RunConfig.from_dict(values))
    run.step(2)
    run.checkpoint()
    return run


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_trainer(**changes):
    return lambda state: {**state, "trainer": {**state["trainer"], **changes}}


FORGED = {
    "empty": lambda state: {},
    "no trainer": without("trainer"),
    "no config": without("config"),
    "no due": without("due"),
    "unknown field": with_trainer(luck=1),
    "words for a number": with_trainer(tokens="many"),
    "another step": with_trainer(step=10**30),
    "unknown setting": lambda state: {**state, "config": {**state["config"], "luck": 1}},
    "file outside": lambda state: {**state, "history_parts": [{"file": "../x", "bytes": 1, "sha256": "", "lines": 1}]},
    "live change": lambda state: {**state, "live_changes": ['{"event": "Luck", "step": 1}']},
    "an unknown request": lambda state: {**state, "asked": ['{"request": "Luck"}']},
    "a request without its update": lambda state: {**state, "asked": ['{"request": "Rewind"}']},
    "requests that are none": lambda state: {**state, "asked": 7},
    "due of three": lambda state: {**state, "due": [["save", "last", "now"]]},
}


def test_a_checkpoint_that_is_alone_and_not_of_a_run_is_refused_in_one_line(run):
    store = CheckpointStore(run.folder / "checkpoints")
    good, _ = store.load()
    forged = store.save(dataclasses.replace(good, state=without("trainer")(good.state)), kind="step")
    run.release()
    with pytest.raises(CheckpointError) as caught:
        Run.resume(run.folder, data=tiny_rows())
    assert "\n" not in str(caught.value)
    assert f"{forged.name}: its contents cannot be resumed from (no 'trainer')" in str(caught.value)


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.matrix(every=3)
def test_a_forged_newest_hides_no_good_one(run, kind):
    store = CheckpointStore(run.folder / "checkpoints", keep=9)
    good, _ = store.load()
    state = FORGED[kind]({**good.state, "trainer": {**good.state["trainer"], "step": 3}})
    forged = store.save(dataclasses.replace(good, step=3, state=state), kind="step")
    run.release()
    resumed = Run.resume(run.folder, data=tiny_rows())
    assert resumed.step_count == 2
    assert any(forged.name in note and good.path.name in note for note in resumed.trainer.notes)


def test_links_and_files_in_the_place_of_checkpoints_hide_no_good_one(run):
    folder = run.folder / "checkpoints"
    (folder / "save-9000-step-0009000-step").symlink_to(folder / "save-9000-step-0009000-step")
    (folder / "save-9001-step-0009001-step").write_text("no folder")
    (folder / "save-9002-step-0009002-step").mkdir()
    run.release()
    resumed = Run.resume(run.folder, data=tiny_rows())
    assert resumed.step_count == 2
    resumed.step()
    resumed.checkpoint()
    resumed.release()
    assert Run.resume(run.folder, data=tiny_rows()).step_count == 3


def test_an_unknown_event_costs_the_history_from_there_on_and_no_training(run):
    store = CheckpointStore(run.folder / "checkpoints", keep=9)
    good, _ = store.load()
    lines = [event.to_json() for event in run.history.events]
    lines.insert(2, '{"event": "Luck", "step": 1}')
    # As an older mlx_nb wrote it: without a seal.
    state = {**without("seal")(without("history_parts")(good.state)), "history": lines}
    store.save(Checkpoint(2, good.arrays, state), kind="step")
    run.release()
    resumed = Run.resume(run.folder, data=tiny_rows())
    assert (resumed.step_count, len(resumed.history.events)) == (2, 2)
    assert any("event 2 of the history is unknown" in note for note in resumed.trainer.notes)
