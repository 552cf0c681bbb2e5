"""How long a run is: it can get longer at any time, and never shorter than what is done."""

from __future__ import annotations

import pytest

from mlx_nb import Run
from mlx_nb.errors import CheckpointError, ConfigError
from mlx_nb.events import ChangeSetting, RequestRefused, SettingChanged, Stop
from mlx_nb.train.optimizer import learning_rate_at
from runs import rows_run


def lossy(run):
    return run.history["loss"], run.history["learning_rate"], run.adapter_bytes()


def resumed(tmp_path, config, **options):
    return Run.resume(tmp_path / "a", config=config, **options)


TOO_SHORT = {
    "set iters": lambda run, _: run.set(iters=2),
    "set epochs": lambda run, _: run.set(epochs=0.2),
    "fork iters": lambda run, folder: run.fork(iters=2, adapter_path=str(folder / "fork")),
    "fork epochs": lambda run, folder: run.fork(epochs=0.2, adapter_path=str(folder / "fork")),
    "resume iters": lambda run, folder: resumed(folder, run.config.replace(iters=2), allow_changed=["iters"]),
    "resume epochs": lambda run, folder: resumed(
        folder, run.config.replace(iters=None, epochs=0.2), allow_changed=["iters", "epochs"]
    ),
}


@pytest.mark.parametrize("how", TOO_SHORT)
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.matrix(every=6)
def test_a_length_below_what_is_done_is_refused_in_one_line_with_the_smallest_there_is(
    tmp_path, tiny_folder, how, ended
):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=None if ended else 4)
    before = (run.config.to_dict(), run.trainer.iters, len(run.history.events))
    with pytest.raises(ConfigError) as refused:
        TOO_SHORT[how](run, tmp_path)
    said = str(refused.value)
    assert "\n" not in said
    assert f"is at update {run.step_count}" in said
    smallest = said.split("The smallest value is ")[1].split(",")[0]
    if "iters" in how:
        assert smallest == str(run.step_count)
    else:
        assert float(smallest) == pytest.approx(run.step_count / 6, abs=1e-3)  # of six batches
    assert (run.config.to_dict(), run.trainer.iters, len(run.history.events)) == before
    if not how.startswith("resume"):
        run.set(**{how.split()[1]: float(smallest) if "epochs" in how else int(smallest)})
        assert run.run().step == (6 if ended else 4)


def test_a_length_that_was_requested_in_time_and_is_passed_by_now_is_refused_and_training_continues(
    tmp_path, tiny_folder
):
    run = rows_run(tmp_path, tiny_folder)
    run.step(3)
    run.request(ChangeSetting("iters", 2))
    events = list(run.events())
    assert [event for event in events if isinstance(event, RequestRefused)]
    assert (run.step_count, run.trainer.iters) == (6, 6)
    assert not any(isinstance(event, SettingChanged) for event in events)


@pytest.mark.long
def test_another_length_in_the_settings_of_a_resume_is_a_change_that_stays_once_it_was_allowed(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=3)
    run.checkpoint()
    for iters in (4, 9):
        with pytest.raises(CheckpointError, match="changed since the checkpoint of step 3: iters"):
            resumed(tmp_path, run.config.replace(iters=iters))
    again = resumed(tmp_path, run.config.replace(iters=9), allow_changed=["iters"])
    assert (again.trainer.iters, again.history.iters) == (9, 9)
    assert again.run().step == 9
    assert resumed(tmp_path, run.config).trainer.iters == 9  # what it was made since counts, not what it began with


REOPENED = {
    "set": lambda run, folder: run.set(iters=12),
    "run until": lambda run, folder: run.run(12),
    "more": lambda run, folder: run.more(12 - run.step_count),
    "resume": lambda run, folder: Run.resume(folder / "a"),
    "resume with longer settings": lambda run, folder: resumed(
        folder, run.config.replace(iters=12), allow_changed=["iters"]
    ),
    "fork": lambda run, folder: run.fork(iters=12, adapter_path=str(folder / "fork")),
}


@pytest.mark.parametrize("how", REOPENED)
@pytest.mark.parametrize("end", ["the end", "stop", "early stopping"])
@pytest.mark.matrix(every=18)
def test_a_run_that_ended_continues_however_it_is_made_longer(tmp_path, tiny_folder, how, end):
    early = {"iters": 11, "steps_per_eval": 1, "early_stopping_patience": 1, "learning_rate": 1.0, "loss_spike": None}
    run = rows_run(tmp_path, tiny_folder, **(early if end == "early stopping" else {"iters": 6}))
    if end == "stop":
        run.step(2)
        run.request(Stop())
    ended = run.run()
    assert ended.reason == {"the end": "iters reached", "stop": "stopped"}.get(end, end)
    made = REOPENED[how](run, tmp_path)
    longer = made if isinstance(made, Run) else run
    if how == "resume":
        longer.set(iters=12)
    assert longer.run().reason in ("iters reached", "early stopping")
    assert longer.step_count > ended.step
    assert longer.trainer.iters == 12


@pytest.mark.long
def test_a_run_that_is_made_longer_and_resumed_is_the_one_that_was_made_longer_without_a_break(tmp_path, tiny_folder):
    runs = []
    for name in ("straight", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        run = rows_run(folder, tiny_folder, adapter_path=str(folder / "a"), lora_parameters={"rank": 4, "dropout": 0.1})
        run.run()
        if name == "straight":
            run.set(iters=14)
        else:
            run = Run.resume(folder / "a", config=run.config.replace(iters=14), allow_changed=["iters"])
            run.step(3)
            run.checkpoint()
            run = Run.resume(folder / "a", config=run.config)
        assert run.run().step == 14
        runs.append(run)
    assert lossy(runs[0]) == lossy(runs[1])


@pytest.mark.long
def test_a_longer_run_has_its_schedule_stretched_or_keeps_the_last_rate_and_says_which(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, learning_rate=1e-2)
    run.run()
    stretched = run.fork(iters=10, adapter_path=str(tmp_path / "stretched"))
    stretched.run()
    tail = run.fork(iters=10, schedule_iters=6, adapter_path=str(tmp_path / "tail"))
    tail.run()
    rates = run.history["learning_rate"]
    assert stretched.history["learning_rate"] == [
        *rates,
        *(learning_rate_at(run.config.replace(iters=10), 10, step) for step in range(6, 10)),
    ]
    assert tail.history["learning_rate"] == [*rates, *[rates[-1]] * 4]
    run.set(iters=10)
    note = run.history.events[-1].note
    assert note.startswith("The learning rate schedule is stretched over 10 updates: update 7 has a rate of ")
    assert "`schedule_iters=6`" in note
    for settings in ({"lr_schedule": "constant"}, {"schedule_iters": 6}):
        folder = tmp_path / "-".join(settings)
        folder.mkdir()
        other = rows_run(folder, tiny_folder, adapter_path=str(folder / "a"), **settings)
        other.run()
        other.set(iters=10)
        assert other.history.events[-1].note == ""


def test_a_schedule_without_end_has_no_length(tmp_path, tiny_folder):
    with pytest.raises(ConfigError, match="`schedule_iters` has no effect with `lr_schedule: constant`"):
        rows_run(tmp_path, tiny_folder, lr_schedule="constant", schedule_iters=3)
