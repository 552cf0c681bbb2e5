"""What stops a run before a bad update is kept, and how a person gets past it."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import LossSpike, NonFiniteLoss, OutOfMemory
from mlx_nb.events import BatchSkipped, LossSpiked, MemoryLow, RunFailed, RunFinished, Skip, StepCompleted
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from mlx_nb.train.tripwires import FEWEST_LOSSES, SpikeWatch, refusal, spike
from tiny import random_examples, tiny_rows
from trainers import make_trainer, weights


def test_a_spike_is_measured_in_robust_deviations_from_the_median():
    recent = [2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.0, 9.0]  # one hard batch among them moves nothing
    assert spike(2.9, recent, 10.0) is None
    text = spike(3.1, recent, 10.0)
    assert "3.100" in text
    assert "2.000" in text
    assert spike(3.1, recent, None) is None
    assert spike(3.1, recent, 20.0) is None
    assert spike(100.0, recent[: FEWEST_LOSSES - 1], 10.0) is None


def test_a_run_whose_losses_vary_is_given_more_room():
    wide = [1.0, 3.0] * 8
    assert spike(10.0, wide, 10.0) is None
    assert spike(20.0, wide, 10.0) is not None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_refused_whatever_came_before(loss, norm):
    assert refusal(loss, norm)[0] is NonFiniteLoss
    assert SpikeWatch([], 0, None, 3).judge(loss, norm)[0] is NonFiniteLoss


def test_a_spike_pauses_only_when_it_lasts():
    calm = [1.0] * FEWEST_LOSSES
    assert SpikeWatch(calm, 2, 10.0, 3).judge(6.0, 1.0)[0] is LossSpike
    once = SpikeWatch(calm, 0, 10.0, 3)
    assert once.judge(6.0, 1.0) is None
    assert (once.found is not None, once.in_a_row) == (True, 1)
    usual = SpikeWatch(calm, 2, 10.0, 3)
    assert usual.judge(1.1, 1.0) is None
    assert usual.in_a_row == 0
    not_compared = SpikeWatch(calm[:-1], 2, 10.0, 3)
    assert not_compared.judge(99.0, 1.0) is None
    assert not_compared.in_a_row == 2


def mixed_rows():
    """Three quarters short rows that are all alike, a quarter long ones that nothing can predict."""
    chance = random.Random(0)

    def row(question, answer):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    hard = ["".join(chance.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(40)) for _ in range(40)]
    rows = [*[row("hi", "ok")] * 300, *(row("hi there you", answer) for answer in hard)]
    chance.shuffle(rows)
    return rows


def mixed_run(tmp_path, tiny_folder, **settings):
    values = {"model": str(tiny_folder), "data": mixed_rows(), "val_set_size": 0, "save_every": -1, "iters": 240}
    values |= {"learning_rate": 2e-2, "lora_parameters": {"rank": 8, "scale": 4.0}, "autosave_minutes": None}
    return Run(RunConfig.from_dict({**values, "adapter_path": str(tmp_path / "mixed"), **settings}), name="mixed")


@pytest.mark.long
def test_ordinary_mixed_rows_stop_no_run(tmp_path, tiny_folder):
    run = mixed_run(tmp_path, tiny_folder)
    assert isinstance(run.run(), RunFinished)
    assert run.step_count == 240
    named = [event for event in run.history.events if isinstance(event, LossSpiked)]
    assert all("rows of about this length" in event.words for event in named)


@pytest.mark.long
def test_a_run_that_diverges_stops_within_a_few_updates(tmp_path, tiny_folder):
    run = mixed_run(tmp_path, tiny_folder, lr_schedule="constant", learning_rate=2e-3)
    run.step(60)
    run.set(learning_rate=20.0)
    with pytest.raises((LossSpike, NonFiniteLoss)):
        run.run(until=80)
    assert run.step_count < 75


def poisoned_trainer(folder, weight, **settings):
    """Row 7 weighs `weight` times what it should in the loss, its units too little: its loss spikes."""
    examples = random_examples(12)
    mask = np.zeros(len(examples[7].tokens), np.float32)
    mask[-2:] = (weight, 1e-3 - weight) if math.isfinite(weight) else (weight, 1.0)
    poisoned = dataclasses.replace(examples[7], loss_mask=mask)
    return make_trainer(
        folder,
        train=[*examples[:7], poisoned, *examples[8:]],
        batch_size=1,
        iters=40,
        learning_rate=1e-4,
        spike_patience=1,
        **settings,
    )


def train_until_failure(trainer):
    before = weights(trainer)
    for event in trainer.events():
        if isinstance(event, RunFailed):
            return event, before
        before = weights(trainer)
    raise AssertionError("nothing failed")


@pytest.mark.parametrize("weight", [math.nan, 1.0], ids=["nan", "spike"])
def test_the_bad_update_is_not_kept_and_rows_and_gradients_are_named(tmp_path, weight):
    trainer = poisoned_trainer(tmp_path, weight)
    if math.isfinite(weight):  # let the median be known before row 7 comes
        while 7 in trainer.next_batches()[0].rows or len(trainer.state.recent_losses) < FEWEST_LOSSES:
            if 7 in trainer.next_batches()[0].rows:
                trainer.request(Skip())
            list(trainer.events(1))
    failed, before = train_until_failure(trainer)
    assert failed.rows == (7,)
    assert failed.reason == ("loss spike" if math.isfinite(weight) else "not finite")
    assert len(failed.largest_gradients) == 3
    assert failed.largest_gradients[0][0] in failed.error
    for way_out in ("skip", "rewind", "learning_rate"):
        assert way_out in failed.error
    after = weights(trainer)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # The same again, as nothing has changed; then without the batch.
    assert isinstance(list(trainer.events(1))[-1], RunFailed)
    trainer.request(Skip())
    events = list(trainer.events(1))
    assert [event.rows for event in events if isinstance(event, BatchSkipped)] == [(7,)]
    assert isinstance(events[-1], StepCompleted)


def test_memory_that_runs_out_is_one_clear_line_and_changes_nothing(tmp_path):
    trainer, other = make_trainer(tmp_path), make_trainer(tmp_path, name="other")
    expected = [event.loss for event in other.events() if isinstance(event, StepCompleted)]
    real = trainer.stepper._gradients

    def full(*arguments):
        raise RuntimeError("[malloc_or_wait] Unable to allocate 123 bytes.")

    trainer.stepper._gradients = full
    (failed,) = (event for event in trainer.events(1) if isinstance(event, RunFailed))
    assert failed.reason == OutOfMemory.reason
    assert "batch_size" in failed.error
    trainer.stepper._gradients = real
    assert [event.loss for event in trainer.events() if isinstance(event, StepCompleted)] == expected


@pytest.mark.long
def test_memory_close_to_its_limit_is_reported_once(tmp_path):
    trainer = make_trainer(tmp_path, memory_limit=1)
    low = [event for event in trainer.events() if isinstance(event, MemoryLow)]
    assert len(low) == 1
    assert low[0].step == 1
    assert low[0].peak > low[0].limit == 1
    roomy = make_trainer(tmp_path, name="roomy", memory_limit=1 << 50)
    assert not [event for event in roomy.events() if isinstance(event, MemoryLow)]


@pytest.mark.long
def test_a_spike_in_a_notebook_raises_offers_ways_out_and_each_of_them_works(tmp_path, tiny_folder):
    rows = [
        *tiny_rows(40),
        {"messages": [{"role": "user", "content": "say ~^ 40"}, {"role": "assistant", "content": "~^" * 5}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def new(name):
        settings = {"model": str(tiny_folder), "data": str(tmp_path / "rows.jsonl"), "val_set_size": 0}
        settings |= {"batch_size": 1, "epochs": 8.0, "learning_rate": 5e-3, "lr_schedule": "constant"}
        settings |= {"fine_tune_type": "full", "grad_clip": None, "loss_spike": 5.0, "spike_patience": 1}
        return Run(RunConfig.from_dict({**settings, "adapter_path": str(tmp_path / name)}), name=name)

    run = new("a")
    with pytest.raises(LossSpike) as caught:
        run.run()
    assert 40 in caught.value.rows
    stopped_at = run.step_count
    session = Session()
    session.add(run)
    assert "40" in str(run_line(session, "skip"))
    with pytest.raises(LossSpike):  # the next epoch meets the row again
        run.run()
    assert run.step_count > stopped_at
    run.set(loss_spike=None)
    assert isinstance(run.run(), RunFinished)
    back = new("b")
    with pytest.raises(LossSpike):
        back.run()
    back.rewind(3)
    assert back.step_count == stopped_at - 3
    assert mx.isfinite(mx.array(back.history["loss"])).all()
