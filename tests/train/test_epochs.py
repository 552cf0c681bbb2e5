"""How long a run is and which rows it has seen: an epoch visits every row once, whatever changes on the way."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from method_runs import ROWS, settings_for
from mlx_nb import Run, RunConfig
from mlx_nb.data.examples.batches import pad
from mlx_nb.errors import ConfigError
from mlx_nb.events import EvaluationCompleted, RunFinished, StepCompleted
from tiny import random_examples
from trainers import losses, make_trainer

ALL_METHODS = ["sft", "dpo", "kto", "grpo"]


def run_of(method, folder, tiny_folder, rows=10, **changes):
    defaults = {"data": ROWS[method](rows), "val_set_size": 0, "steps_per_eval": None, "val_batches": 25}
    settings = settings_for(method, folder, tiny_folder, **{**defaults, "updates_per_rollout": 1, **changes})
    if method != "grpo":
        del settings["updates_per_rollout"]
    return Run(RunConfig.from_dict(settings))


def visits(events):
    return Counter(row for event in events if isinstance(event, StepCompleted) for row in event.rows)


def update_rows(run):
    return [event.rows for event in run.history.events if isinstance(event, StepCompleted)]


@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize(("rows", "accumulated", "epochs", "updates"), [(4, 8, 3, 3), (10, 2, 1, 2), (14, 3, 2, 4)])
@pytest.mark.matrix(every=6)
def test_an_epoch_visits_every_row_exactly_once(method, rows, accumulated, epochs, updates, tmp_path, tiny_folder):
    length = {"iters": None, "epochs": epochs, "batch_size": 4, "grad_accumulation_steps": accumulated}
    run = run_of(method, tmp_path, tiny_folder, rows, **length)
    run.run()
    assert visits(run.history.events) == dict.fromkeys(range(rows), epochs)
    assert run.step_count == run.trainer.iters == updates
    assert [event.epoch for event in run.history.events if isinstance(event, StepCompleted)][-1] == epochs


@pytest.mark.long
def test_a_rollout_serves_all_its_updates_at_the_end_of_an_epoch_too(tmp_path, tiny_folder):
    length = {"iters": None, "epochs": 2, "batch_size": 2, "grad_accumulation_steps": 2, "updates_per_rollout": 3}
    run = run_of("grpo", tmp_path, tiny_folder, 6, **length)
    run.run()
    assert run.step_count == 12
    assert visits(run.history.events) == dict.fromkeys(range(6), 6)


def test_a_short_update_is_weighted_as_one_batch_of_its_rows(tmp_path):
    examples = random_examples(10)
    trainer = make_trainer(tmp_path, train=examples, batch_size=4, grad_accumulation_steps=2, iters=3)
    one, short = (event for event in trainer.events(2) if isinstance(event, StepCompleted))
    assert (len(one.rows), len(short.rows)) == (8, 2)
    again = make_trainer(tmp_path, train=examples, batch_size=4, grad_accumulation_steps=2, iters=3, name="again")
    list(again.events(1))
    whole = again.stepper.evaluate(pad([examples[row] for row in short.rows]))
    assert short.loss == pytest.approx(whole.total / whole.units, rel=1e-5)


def test_half_epochs_are_rounded_up_to_an_update(tmp_path):
    trainer = make_trainer(tmp_path, train=random_examples(16), iters=None, epochs=2.5, batch_size=4)
    events = [event for event in trainer.events() if isinstance(event, StepCompleted)]
    assert len(events) == trainer.iters == 10
    assert events[-1].epoch == 2.5


@pytest.mark.long
@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize(
    "changes",
    [{"batch_size": 2}, {"batch_size": 8}, {"batch_size": 3, "grad_accumulation_steps": 2}, {"batch_size": 1}],
)
@pytest.mark.matrix(every=16)
def test_a_fork_with_other_batches_visits_the_rest_of_the_epoch_and_no_more(method, changes, tmp_path, tiny_folder):
    length = {"iters": None, "epochs": 2, "batch_size": 4, "grad_accumulation_steps": 1}
    short = {"max_completion_length": 2} if method == "grpo" else {}
    run = run_of(method, tmp_path / "run", tiny_folder, 10, **length, **short)
    for updates in (1, 2, 3):
        run.step()
        fork = run.fork(adapter_path=str(tmp_path / f"fork{updates}"), name=f"fork{updates}", **changes)
        assert fork.trainer.plan.batches.epochs(fork.trainer.state.batches) == min(4 * updates, 10) / 10
        fork.run()
        assert visits(fork.history.events) == dict.fromkeys(range(10), 2)
        again = run.fork(adapter_path=str(tmp_path / f"again{updates}"), name=f"again{updates}", **changes)
        again.run()
        assert update_rows(again) == update_rows(fork)


@pytest.mark.long
def test_a_fork_of_a_fork_resumed_in_the_middle_of_the_epoch_gives_the_same_results(tmp_path, tiny_folder):
    length = {"iters": None, "epochs": 2, "batch_size": 4, "grad_accumulation_steps": 1}
    run = run_of("sft", tmp_path / "run", tiny_folder, 15, **length)
    run.step(1)
    fork = run.fork(adapter_path=str(tmp_path / "a"), name="a", batch_size=3)
    fork.step(2)
    second = fork.fork(adapter_path=str(tmp_path / "b"), name="b", batch_size=2)
    second.step(1)
    second.checkpoint()
    rows = ROWS["sft"](15)
    resumed = Run.resume(tmp_path / "b", data=rows)
    second.run()
    resumed.run()
    assert update_rows(resumed) == update_rows(second)
    assert resumed.adapter_bytes() == second.adapter_bytes()
    assert visits(second.history.events) == dict.fromkeys(range(15), 2)


@pytest.mark.long
def test_a_resume_with_another_batch_size_continues_at_the_same_row(tmp_path, tiny_folder):
    length = {"iters": None, "epochs": 1, "batch_size": 4, "grad_accumulation_steps": 1}
    run = run_of("sft", tmp_path / "run", tiny_folder, 10, **length)
    run.step(1)
    run.checkpoint()
    config = run.config.replace(batch_size=2)
    resumed = Run.resume(tmp_path / "run", config=config, data=ROWS["sft"](10), allow_changed=["batch_size"])
    resumed.run()
    assert visits(resumed.history.events) == dict.fromkeys(range(10), 1)


def test_a_batch_that_is_left_out_is_not_made_up_for_by_a_second_visit(tmp_path, tiny_folder):
    run = run_of("sft", tmp_path, tiny_folder, 10, iters=None, epochs=1, grad_accumulation_steps=1, batch_size=2)
    run.step(1)
    left_out = run.trainer.next_rows()
    run.skip()
    run.run()
    assert visits(run.history.events) == {row: 1 for row in range(10) if row not in left_out}
    assert run.step_count == run.trainer.iters == 4


# How long a run is


def ends_at(run):
    ended = run.run()
    assert isinstance(ended, RunFinished)
    return ended.step


@pytest.mark.parametrize("lowered", [5, 4, 1])
@pytest.mark.parametrize("how", ["set", "fork", "resume", "epochs", "before"])
@pytest.mark.matrix(every=8)
def test_a_run_made_as_short_as_what_is_done_ends_there_and_never_shorter(lowered, how, tmp_path, tiny_folder):
    run = run_of("sft", tmp_path / "run", tiny_folder, 20, iters=20, batch_size=4, grad_accumulation_steps=1)
    run.step(5)
    rates = run.history["learning_rate"]
    if lowered < 5:
        with pytest.raises(ConfigError, match="is less than what is done"):
            made_as_short_as(lowered, how, run, tmp_path)
        assert (run.trainer.iters, run.state) == (20, "paused")
        return
    run = made_as_short_as(lowered, how, run, tmp_path)
    assert ends_at(run) == run.trainer.iters == 5
    assert run.history["learning_rate"] == rates
    assert run.state == "finished"
    assert (run.folder / "adapters.safetensors").exists()


def made_as_short_as(lowered, how, run, tmp_path):
    if how == "set":
        run.set(iters=lowered)
    elif how == "fork":
        run = run.fork(iters=lowered, adapter_path=str(tmp_path / "fork"))
    elif how == "resume":
        run.checkpoint()
        config = run.config.replace(iters=lowered)
        run = Run.resume(tmp_path / "run", config=config, data=ROWS["sft"](20), allow_changed=["iters"])
    elif how == "epochs":
        run.set(epochs=lowered / 5)
    else:  # it had been longer, and shorter, and longer in between
        for iters in (lowered, 30, lowered, 40, lowered):
            run.set(iters=iters)
    return run


def test_a_run_that_ends_early_is_validated_once_after_its_last_update(tmp_path, tiny_folder):
    length = {"iters": 20, "batch_size": 4, "grad_accumulation_steps": 1, "val_set_size": 4}
    for updates, every in ((3, 10), (4, 4)):
        run = run_of("sft", tmp_path / str(updates), tiny_folder, 20, steps_per_eval=every, **length)
        run.step(updates)
        run.set(iters=updates)
        run.run()
        steps = [event.step for event in run.history.events if isinstance(event, EvaluationCompleted)]
        assert steps == [0, updates]


@pytest.mark.parametrize("change", [{"iters": 8}, {"epochs": 2}])
def test_a_run_made_longer_after_its_last_update_continues(change, tmp_path, tiny_folder):
    run = run_of("sft", tmp_path, tiny_folder, 16, iters=4, batch_size=4, grad_accumulation_steps=1)
    for event in run.events():
        if isinstance(event, StepCompleted) and event.step == 4:
            break  # the end is due, and has not come
    run.set(**change)
    assert ends_at(run) == 8
    finished = [event for event in run.history.events if isinstance(event, RunFinished)]
    assert [event.step for event in finished] == [8]


@pytest.mark.long
def test_a_length_changed_live_and_the_other_word_for_it_go_together_after_a_resume(tmp_path, tiny_folder):
    run = run_of("sft", tmp_path, tiny_folder, 16, iters=4, batch_size=4, grad_accumulation_steps=1)
    began_with = run.config
    run.step(2)
    run.set(epochs=3)
    run.checkpoint()
    resumed = Run.resume(tmp_path, config=began_with, data=ROWS["sft"](16))
    assert resumed.trainer.iters == run.trainer.iters == 12
    assert ends_at(resumed) == 12


def test_rates_reach_the_end_of_the_schedule_with_the_last_short_update(tmp_path):
    settings = {"batch_size": 4, "grad_accumulation_steps": 2, "iters": None, "epochs": 3}
    trainer = make_trainer(tmp_path, train=random_examples(10), **settings)
    events = [event for event in trainer.events() if isinstance(event, StepCompleted)]
    rates = [event.learning_rate for event in events]
    assert len(rates) == 6
    assert rates[-1] > 0
    straight = make_trainer(tmp_path, train=random_examples(10), name="s", **{**settings, "epochs": None, "iters": 6})
    assert losses(straight.events()) == losses(events)
    assert np.argmax(rates) == 0
