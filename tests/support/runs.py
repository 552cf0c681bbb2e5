"""Tiny runs, and comparisons between two of them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from mlx_nb import Run, RunConfig
from mlx_nb.events import EvaluationCompleted, StepCompleted
from mlx_nb.model.trees import named_arrays
from tiny import random_examples, tiny_rows
from trainers import make_trainer

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
    """The events of a run, without times and memory."""
    return [
        dataclasses.replace(event, seconds=0.0, **({"peak_memory": 0} if isinstance(event, StepCompleted) else {}))
        for event in events
        if isinstance(event, StepCompleted | EvaluationCompleted)
    ]


def arrays_of(trainer):
    state = {"parameters": trainer.model.trainable_parameters(), "optimizer": trainer.stepper.optimizer.state}
    return {name: np.array(array).tobytes() for name, array in named_arrays(state)}


def rows_run(folder, tiny_folder, **settings):
    values = {"model": str(tiny_folder), "iters": 6, "batch_size": 4, "steps_per_eval": 2, "save_every": 2}
    data = folder / "rows.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    return Run(RunConfig.from_dict({**values, "data": str(data), "adapter_path": str(folder / "a"), **settings}))
