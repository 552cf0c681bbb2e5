"""Tiny runs in which something is measured, which must leave no trace: all that the next update depends on."""

from __future__ import annotations

import numpy as np

from mlx_nb import Run, RunConfig
from mlx_nb.events import StepCompleted
from mlx_nb.model.trees import named_arrays
from tiny import tiny_rows


def run_of(folder, tiny_folder, **settings):
    """A run of seven updates, with dropout and validation rows."""
    values = {
        "model": str(tiny_folder),
        "data": tiny_rows(24),
        "iters": 7,
        "batch_size": 4,
        "val_set_size": 4,
        "lora_parameters": {"rank": 4, "dropout": 0.2},
        "save_every": -1,
        "adapter_path": str(folder / "a"),
    }
    return Run(RunConfig.from_dict({**values, **settings}))


def everything(run):
    """All that the next update depends on, as bytes and plain values."""
    trainer = run.trainer
    state = {"parameters": trainer.model.trainable_parameters(), "optimizer": trainer.stepper.optimizer.state}
    arrays = {name: np.array(array).tobytes() for name, array in named_arrays(state)}
    plain = (vars(trainer.state).copy(), trainer.schedule.as_lists(), run.config, len(run.history.events))
    return arrays, plain, trainer.model.training, trainer.stepper.poll


def rest_of(run):
    """(loss, rows) of each update to the end."""
    return [(event.loss, event.rows) for event in run.events() if isinstance(event, StepCompleted)]
