"""A run that was stopped and resumed is the run that was never stopped, to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mlx_nb.errors import CheckpointError
from mlx_nb.events import EvaluationCompleted, StepCompleted
from mlx_nb.model.trees import named_arrays
from mlx_nb.train.checkpoint import CheckpointStore
from test_trainer import make_trainer
from tiny import random_examples

SCHEDULE = {"name": "cosine_decay", "arguments": [1e-2, 40], "warmup": 5}
SETTINGS = {
    "iters": 40,
    "grad_accumulation_steps": 3,
    "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.2},
    "lr_schedule": SCHEDULE,
    "steps_per_eval": 4,
    "early_stopping_patience": 30,
    "save_every": -1,
}


def trainer_for(folder, name, **settings):
    return make_trainer(folder, valid=random_examples(5, seed=9), name=name, **{**SETTINGS, **settings})


def happened(events):
    """What a run did, without the clock and the memory."""
    return [
        dataclasses.replace(event, seconds=0.0, **({"peak_memory": 0} if isinstance(event, StepCompleted) else {}))
        for event in events
        if isinstance(event, StepCompleted | EvaluationCompleted)
    ]


def arrays_of(trainer):
    state = {"parameters": trainer.model.trainable_parameters(), "optimizer": trainer.stepper.optimizer.state}
    return {name: np.array(array).tobytes() for name, array in named_arrays(state)}


@pytest.mark.parametrize(
    "settings",
    [{}, {"fine_tune_type": "dora"}, {"fine_tune_type": "full", "lora_parameters": {}}, {"optimizer": "adafactor"}],
    ids=["lora", "dora", "full", "adafactor"],
)
def test_a_run_resumed_at_any_step_is_the_run_that_was_never_stopped(tmp_path, settings):
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
    every = 1 if not settings else 7
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
    with pytest.raises(CheckpointError, match="does not fit"):
        other.restore(checkpoint)
    with pytest.raises(CheckpointError, match="optimizer state"):
        trainer_for(tmp_path, "three", optimizer="sgd").restore(checkpoint)
    assert arrays_of(other) == before
