"""The files that are written for mlx-lm train there as here, and its own files train here as there."""

from __future__ import annotations

import types

import mlx.core as mx
import numpy as np
import pytest
import yaml
from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import load_dataset
from mlx_lm.utils import load

import mlx_nb
from mlx_nb.config.dialects.exported import export_settings
from mlx_nb.config.run_config import RunConfig

LENGTH = 24  # tokens of every row, so that mlx-lm adds no target of padding


class Losses(TrainingCallback):
    """Records the training losses that mlx-lm reports."""

    def __init__(self):
        self.losses = []

    def on_train_loss_report(self, train_info):
        self.losses.append(train_info["train_loss"])


def mlx_lm_losses(file):
    """The loss of each iteration of `mlx_lm.lora --config FILE`, whose `main` this does without its printing."""
    with open(file) as opened:
        values = yaml.load(opened, lora.yaml_loader)
    args = types.SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **values, "steps_per_report": 1})
    np.random.seed(args.seed)
    model, tokenizer = load(args.model)
    train, valid, _ = load_dataset(args, tokenizer)
    seen = Losses()
    mx.disable_compile()  # on a CPU it calls a C++ compiler
    try:
        lora.train_model(args, model, train, valid, seen)
    finally:
        mx.enable_compile()
    return seen.losses


@pytest.fixture
def one_batch(tmp_path):
    """A folder with four rows, one batch, each longer than `LENGTH` tokens."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [f'{{"text": "{" ".join([word] * 40)}"}}' for word in ("red", "green", "blue", "amber")]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


def start_adapter(tmp_path, tiny_folder, data):
    """The folder of an adapter that both programs start from."""
    config = RunConfig.from_dict(
        {
            "model": str(tiny_folder),
            "data": str(data),
            "iters": 2,
            "learning_rate": 1e-2,
            "val_set_size": 0,
            "lora_parameters": {"rank": 4, "scale": 2.0},
            "adapter_path": str(tmp_path / "start"),
            "max_seq_length": LENGTH,
        }
    )
    run = mlx_nb.Run(config)
    run.run()
    run.release()
    return tmp_path / "start"


SCHEDULES = {
    "cosine with warmup": {"lr_schedule": "cosine", "warmup": 4},
    "constant": {"lr_schedule": "constant", "warmup": 0},
    "constant with warmup": {"lr_schedule": "constant", "warmup": 3},
    "linear": {"lr_schedule": "linear", "warmup": 0, "optimizer": "adamw", "weight_decay": 0.1},
}


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.matrix(every=4)
def test_a_file_written_for_mlx_lm_gives_our_losses_there(case, tmp_path, tiny_folder, one_batch):
    start = start_adapter(tmp_path, tiny_folder, one_batch)
    config = RunConfig.from_dict(
        {
            "model": str(tiny_folder),
            "data": str(one_batch),
            "iters": 10,
            "learning_rate": 5e-3,
            "loss_on": "all",
            "grad_clip": None,
            "val_set_size": 0,
            "lora_parameters": {"rank": 4, "scale": 2.0},
            "resume_adapter_file": str(start),
            "max_seq_length": LENGTH,
            "adapter_path": str(tmp_path / "ours"),
            **SCHEDULES[case],
        }
    )
    run = mlx_nb.Run(config)
    run.run()
    file = export_settings(config.replace(adapter_path=str(tmp_path / "theirs")), "mlx-lm").save(tmp_path / "lora.yaml")
    theirs = mlx_lm_losses(file)
    assert len(theirs) == 10
    assert theirs[0] - theirs[-1] > 0.1
    np.testing.assert_allclose(theirs, run.history["loss"], atol=1e-3)


@pytest.mark.long
def test_a_file_of_mlx_lm_gives_its_losses_here(tmp_path, tiny_folder, one_batch):
    start = start_adapter(tmp_path, tiny_folder, one_batch)
    file = tmp_path / "lora.yaml"
    file.write_text(
        f"""model: {tiny_folder}
train: true
data: {one_batch}
iters: 20
grad_accumulation_steps: 2
learning_rate: 5e-3
num_layers: 2
max_seq_length: {LENGTH}
resume_adapter_file: {start}/adapters.safetensors
adapter_path: {tmp_path}/theirs
lora_parameters: {{rank: 4, scale: 2.0, dropout: 0.0}}
lr_schedule: {{name: cosine_decay, arguments: [5e-3, 10]}}
"""
    )
    run = mlx_nb.Run.from_yaml(file, adapter_path=str(tmp_path / "ours"))
    run.run()
    assert run.config.iters == 10
    np.testing.assert_allclose(mlx_lm_losses(file)[::2], run.history["loss"], atol=1e-3)
