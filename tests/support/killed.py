"""A run that saves itself every few updates and is killed at random moments."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from mlx_nb import Run, RunConfig
from mlx_nb.train.checkpoint_store import CheckpointStore
from tiny import tiny_rows

DIGEST = (
    "import hashlib, json\n"
    "def digest(run):\n"
    "    print(hashlib.sha256(b''.join(v for _, v in sorted(run.adapter_bytes().items()))).hexdigest(),\n"
    "          hashlib.sha256(json.dumps([run.history['loss'], [e['loss'] for e in run.history.evaluations()]])"
    ".encode()).hexdigest())"
)

AUTOSAVE_SECONDS = 0.03

SETTINGS = {
    "iters": 20_000,
    "batch_size": 2,
    "grad_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lora_parameters": {"rank": 4, "dropout": 0.1},
    "steps_per_eval": 50,
    "val_batches": 2,
    "save_every": 40,
    "autosave_minutes": AUTOSAVE_SECONDS / 60,
    "loss_spike": None,
}


def new_run(folder, model):
    settings = {**SETTINGS, "model": str(model), "data": tiny_rows(40), "adapter_path": str(folder)}
    return Run(RunConfig.from_dict(settings))


def killable_run(folder, model):
    """Resume or start; record each update and each save with its time in a file that survives."""
    adapter = Path(folder) / "adapter"
    begun = CheckpointStore(adapter / "checkpoints").list()
    run = Run.resume(adapter, data=tiny_rows(40)) if begun else new_run(adapter, model)
    log = os.open(Path(folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, f"resumed {run.step_count if begun else 0} {time.monotonic()}\n".encode())
    for event in run.events():
        os.write(log, f"{type(event).__name__} {event.step} {time.monotonic()}\n".encode())


def read_line(server, timeout):
    ready, _, _ = select.select([server.stdout], [], [], timeout)
    assert ready, "the server does not answer"
    return server.stdout.readline().strip()
