"""A run that was stopped and resumed is the run that was never stopped, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import CheckpointError, CommandError
from mlx_nb.events import AdapterSaved, CheckpointSaved, Pause, RunPaused, StepCompleted
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from mlx_nb.train.checkpoint_store import CheckpointStore
from places import NOTEBOOKS
from runs import SETTINGS, arrays_of, happened, rows_run, trainer_for
from tiny import random_examples, tiny_pairs, tiny_rows
from trainers import make_trainer


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "every"),
    [
        ({}, 13),
        pytest.param({}, 1, marks=pytest.mark.faults),
        pytest.param({"fine_tune_type": "dora"}, 7, marks=pytest.mark.faults),
        pytest.param({"fine_tune_type": "full", "lora_parameters": {}}, 7, marks=pytest.mark.faults),
        pytest.param({"optimizer": "adafactor"}, 7, marks=pytest.mark.faults),
        ({"optimizer": "muon", "weight_decay": 0.1}, 20),
    ],
    ids=["lora", "lora at every step", "dora", "full", "adafactor", "muon"],
)
def test_a_run_resumed_at_any_step_is_the_run_that_was_never_stopped(tmp_path, settings, every):
    kept = {**SETTINGS, **settings}
    store = CheckpointStore(tmp_path / "checkpoints", keep=100)

    def new(name):
        return make_trainer(tmp_path, valid=random_examples(5, seed=9), name=name, **kept)

    whole = new("whole")
    events = []
    store.save(whole.snapshot(), kind="step")
    for _ in range(40):
        events.append(list(whole.events(1)))
        store.save(whole.snapshot(), kind="step")
    events.append(list(whole.events(1)))
    expected = arrays_of(whole)
    for step in range(0, 41, every):
        checkpoint, messages = store.load(step)
        assert (checkpoint.step, messages) == (step, [])
        resumed = new(f"resumed{step}")
        resumed.restore(checkpoint)
        rest = list(resumed.events())
        assert happened(rest) == happened([event for part in events[step:] for event in part]), step
        assert arrays_of(resumed) == expected, step
        assert resumed.state.best_loss == whole.state.best_loss


def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(tmp_path):
    checkpoint = trainer_for(tmp_path, "one").snapshot()
    other = trainer_for(tmp_path, "two", lora_parameters={"rank": 8, "scale": 4.0, "dropout": 0.2})
    before = arrays_of(other)
    with pytest.raises(CheckpointError, match="does not match"):
        other.restore(checkpoint)
    with pytest.raises(CheckpointError, match="optimizer state"):
        trainer_for(tmp_path, "three", optimizer="sgd").restore(checkpoint)
    assert arrays_of(other) == before


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, tiny_folder):
    whole = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "whole"))
    whole.run()
    stopped = rows_run(tmp_path, tiny_folder)
    stopped.run(until=3)
    stopped.request(Pause("enough"))
    assert isinstance(stopped.run(), RunPaused)
    del stopped
    resumed = Run.resume(tmp_path / "a")
    assert resumed.step_count == 3
    assert len(resumed.history) == 3
    resumed.run()
    assert resumed.adapter_bytes() == whole.adapter_bytes()
    assert resumed.history["loss"] == whole.history["loss"]
    assert [one["loss"] for one in resumed.history.evaluations()] == [
        one["loss"] for one in whole.history.evaluations()
    ]
    earlier = Run.resume(tmp_path / "a", step=4)
    assert earlier.step_count == 4
    earlier.run()
    assert earlier.adapter_bytes() == whole.adapter_bytes()
    assert Run.resume(tmp_path / "a").finished


def test_what_changed_since_is_named_and_allowed_only_when_asked(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=2)
    run.checkpoint()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(30)))
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 2: data"):
        Run.resume(tmp_path / "a")
    allowed = Run.resume(tmp_path / "a", allow_changed=["data"])
    assert "changed since the checkpoint: data" in allowed.trainer.notes
    allowed.run()
    with pytest.raises(CheckpointError, match="nowhere"):
        Run.resume(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("file", "entry", "changes"),
    [
        ("config.json", {"rope_theta": 5e4}, True),
        ("config.json", {"rms_norm_eps": 1e-3}, True),
        ("generation_config.json", {"eos_token_id": 3}, True),
        ("config.json", {"_name_or_path": "elsewhere", "transformers_version": "9"}, False),
        ("generation_config.json", {"temperature": 0.5}, False),
    ],
)
def test_a_model_is_another_one_if_its_configuration_changed(file, entry, changes, tmp_path, tiny_folder):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    run = rows_run(tmp_path, model)
    run.run(until=2)
    run.release()
    path = model / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **entry}))
    if not changes:
        assert Run.resume(tmp_path / "a").run().step == 6
        return
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 2: model"):
        Run.resume(tmp_path / "a")
    assert Run.resume(tmp_path / "a", allow_changed=["model"]).run().step == 6


def test_a_reference_is_another_one_if_its_configuration_changed(tmp_path, tiny_folder):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    settings = {"method": "dpo", "reference_model": str(other), "data": tiny_pairs()}
    run = rows_run(tmp_path, tiny_folder, **settings)
    run.run(until=2)
    run.release()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5e4}))
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 2: reference"):
        Run.resume(tmp_path / "a", data=tiny_pairs())


@pytest.mark.long
def test_a_machine_with_other_lanes_is_named(tmp_path, tiny_folder, monkeypatch):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=2)
    run.checkpoint()
    monkeypatch.setattr("mlx_nb.model.lanes.lane_count", lambda: 64)
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 2: device"):
        Run.resume(tmp_path / "a")
    assert Run.resume(tmp_path / "a", allow_changed=["device"]).run().step == 6


def test_rows_that_were_an_object_are_passed_again(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, data=tiny_rows())
    run.run(until=2)
    run.checkpoint()
    with pytest.raises(CheckpointError, match="Pass them again"):
        Run.resume(tmp_path / "a")
    assert Run.resume(tmp_path / "a", data=tiny_rows()).step_count == 2


def test_a_checkpoint_that_cannot_be_written_pauses_and_loses_nothing(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=1)
    shutil.rmtree(tmp_path / "a" / "checkpoints", ignore_errors=True)
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "checkpoints").write_text("in the way")
    ended = run.run()
    assert isinstance(ended, RunPaused)
    assert "checkpoints" in ended.reason
    (tmp_path / "a" / "checkpoints").unlink()
    run.run()
    assert run.finished
    whole = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "whole"))
    whole.run()
    assert run.adapter_bytes() == whole.adapter_bytes()


def test_the_resume_command_takes_a_name_or_a_folder(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=2)
    run.checkpoint()
    session = Session()
    text = str(run_line(session, f"resume {tmp_path / 'a'}"))
    assert "2 of 6 updates" in text
    assert session.get().step_count == 2


@pytest.mark.long
def test_a_rewound_run_repeats_the_same_updates(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run()
    losses, adapter = run.history["loss"], run.adapter_bytes()
    evaluations = [one["loss"] for one in run.history.evaluations()]
    for target in (5, 3, 0, 4):
        rewound = run.rewind(to=target)
        assert (rewound.step, rewound.from_step, run.step_count) == (target, 6, target)
        assert run.history["loss"] == losses[:target]
        run.run()
        assert run.history["loss"] == losses
        assert [one["loss"] for one in run.history.evaluations()] == evaluations
        assert run.adapter_bytes() == adapter
    assert [len(branch) for branch in run.history.abandoned()] == [1, 3, 6, 2]


def test_a_rewind_and_another_rate_leave_the_old_branch_visible(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=4)
    before = run.history["loss"]
    run.rewind(2)
    run.set(learning_rate=1e-2)
    run.run()
    assert run.history["loss"][:3] == before[:3]
    assert run.history["loss"][3] != before[3]
    assert [row["loss"] for row in run.history.abandoned()[0]] == before[2:]
    assert run.plot().axes[0].get_lines()[0].get_label() == "rewound"
    again = Run.resume(tmp_path / "a")
    assert again.history["loss"] == run.history["loss"]
    assert again.history.abandoned() == run.history.abandoned()


def test_older_steps_are_fetched_from_disk_and_what_is_gone_is_reported(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, snapshot_memory=0)
    run.run()
    losses = run.history["loss"]
    with pytest.raises(CommandError, match=r"update 3 was not kept\. Available updates: .*2, 4"):
        run.rewind(to=3)
    with pytest.raises(CommandError, match="cannot go back to 6"):
        run.rewind(to=6)
    run.rewind(to=4)
    run.run()
    assert run.history["loss"] == losses


def test_what_two_steps_remember_of_the_losses_before_is_shared(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=8)
    run.step(5)
    before = run.trainer.snapshot().state["trainer"]["recent_losses"]
    run.step()
    after = run.trainer.snapshot().state["trainer"]["recent_losses"]
    assert len(after) == len(before) + 1
    assert all(one is other for one, other in zip(before, after))


def test_arrays_that_steps_share_count_once_and_those_of_the_run_itself_do_not(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=8)
    run.step()
    one = sum(array.nbytes for group in run.trainer.snapshot().arrays.values() for array in group.values())
    run.step()
    kept = run._checkpoints.snapshots
    # Three steps are in memory: the start, update 1, and update 2, which is the run as it stands.
    assert one < kept.held_bytes <= 2 * one
    distinct = {id(a): a.nbytes for s in list(kept._recent)[:-1] for g in s.arrays.values() for a in g.values()}
    newest = {id(array) for group in kept._recent[-1].arrays.values() for array in group.values()}
    assert kept.held_bytes == sum(size for name, size in distinct.items() if name not in newest)
    before = kept.held_bytes
    run._checkpoints.remember()  # the same arrays once more
    assert kept.held_bytes == before
    run.rewind(to=0)
    assert kept.held_bytes == 0


@pytest.mark.long
def test_steps_in_memory_stay_within_their_setting(tmp_path, tiny_folder):
    data = {"lora_parameters": {"rank": 64, "scale": 1.0, "dropout": 0.0}, "steps_per_eval": -1, "save_every": -1}
    run = rows_run(tmp_path, tiny_folder, iters=12, snapshot_memory=1, **data)
    kept = []
    for event in run.events():
        if isinstance(event, StepCompleted):
            kept.append(run._checkpoints.snapshots.held_bytes)
            assert run.trainer.kept_memory == kept[-1] <= 1024**2
    assert max(kept) > 2 * 1024**2 // 3
    assert run.step_count - run._checkpoints.snapshots._recent[0].step < 12
    run.set(snapshot_memory=0)  # at any time
    assert run.config.snapshot_memory == 0


def test_steps_in_memory_are_released_when_the_run_ends_and_can_still_be_reached(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=3)
    at_three = run.adapter_bytes()
    run.run()
    assert run._checkpoints.snapshots.held_bytes == 0
    run.rewind(to=3)
    assert run.adapter_bytes() == at_three
    run.run()
    assert run._checkpoints.snapshots.held_bytes == 0
    run.rewind(to=1)
    assert run.step_count == 1


def test_where_the_disk_has_no_room_for_steps_only_checkpoints_are_left(tmp_path, tiny_folder, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    run = rows_run(tmp_path, tiny_folder)
    monkeypatch.setattr("mlx_nb.train.spilled_snapshots.tempfile.TemporaryFile", full)
    run.run()
    assert run._checkpoints.snapshots.held_bytes == 0
    with pytest.raises(CommandError, match=r"update 3 was not kept\. Available updates: .*2, 4"):
        run.rewind(to=3)
    run.rewind(to=4)  # on disk
    assert run.step_count == 4


def test_peak_memory_is_that_of_training_without_the_steps_that_are_kept(tmp_path, tiny_folder, monkeypatch):
    run = rows_run(tmp_path, tiny_folder, steps_per_eval=-1)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 10**9 + run.trainer.kept_memory)
    peaks = [event.peak_memory for event in run.events() if isinstance(event, StepCompleted)]
    assert peaks == [10**9] * 6


def test_the_rewind_command(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=3)
    session = Session()
    session.add(run)
    assert "went back from update 3 to 1" in str(run_line(session, "rewind 2"))
    with pytest.raises(CommandError, match="not both"):
        run_line(session, "rewind 1 --to 0")


@pytest.mark.real_model
def test_the_real_model_resumed_at_five_steps_is_the_run_that_was_never_stopped(tmp_path):

    settings = {"model": "smollm2-135m", "data": str(NOTEBOOKS / "home_requests"), "iters": 6, "batch_size": 1}
    settings |= {"learning_rate": 5e-4, "steps_per_eval": 3, "val_batches": 1, "save_every": 1, "keep": 10}
    settings |= {"lora_parameters": {"dropout": 0.1}, "grad_accumulation_steps": 2, "warmup": 2}
    whole = Run(RunConfig.from_dict({**settings, "adapter_path": str(tmp_path / "whole")}))
    whole.run()
    for step in range(1, 6):
        shutil.copytree(tmp_path / "whole", tmp_path / f"at{step}")
        resumed = Run.resume(tmp_path / f"at{step}", step=step)
        resumed.run()
        assert resumed.history["loss"] == whole.history["loss"], step
        assert resumed.adapter_bytes() == whole.adapter_bytes(), step


def test_every_exact_checkpoint_is_reported_and_an_adapter_is_reported_as_one(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=6, save_every=3, steps_per_eval=-1)
    reported = []
    run.listen(reported.append)
    events = list(run.events())
    saved = [event for event in reported if isinstance(event, CheckpointSaved)]
    assert [(event.step, event.kind) for event in saved if event.kind != "auto"] == [(3, "step"), (6, "final")]
    assert [Path(event.path) for event in saved] == [info.path for info in run.checkpoints()]
    assert [(event.step, event.kind) for event in events if isinstance(event, AdapterSaved)] == [
        (3, "step"),
        (6, "last"),
    ]
    assert not any(isinstance(event, CheckpointSaved) for event in run.history.events)
