"""Trainers of a tiny model."""

from __future__ import annotations

import numpy as np

from mlx_nb.config.run_config import RunConfig
from mlx_nb.events import (
    StepCompleted,
)
from mlx_nb.model import adapters
from mlx_nb.train.state import TrainerExamples
from mlx_nb.train.trainer import Trainer
from tiny import random_examples, tiny_model

ADAPTER = {"rank": 4, "scale": 2.0}


def make_trainer(
    tmp_path,
    *,
    train=None,
    valid=None,
    test=None,
    model=None,
    name="run",
    compiled=False,
    memory_limit=None,
    **settings,
):
    config = RunConfig.from_dict(
        {"lora_parameters": ADAPTER, "learning_rate": 1e-2, "iters": 6, "batch_size": 3, **settings}
    )
    examples = TrainerExamples(train or random_examples(12), valid or (), test or ())
    folder = tmp_path / name
    model = model or tiny_model()
    return Trainer(config, model, examples, name=name, folder=folder, compiled=compiled, memory_limit=memory_limit)


def losses(events):
    return [event.loss for event in events if isinstance(event, StepCompleted)]


def weights(trainer):
    return {name: np.array(array) for name, array in adapters.adapter_weights(trainer.model).items()}
