"""A process that trains a run until a signal ends it, and records its updates. Quick to import."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from mlx_nb import Run, register_objective
from mlx_nb.events import StepCompleted
from mlx_nb.train.checkpoint_store import CheckpointStore
from tiny import tiny_labels, tiny_pairs, tiny_prompts, tiny_rows


class Kind(NamedTuple):
    """A training setup: method, rows, and number of interrupts."""

    settings: str
    rows: str = "tiny_rows"
    interrupts: int = 40
    iters: int = 50


ADAPTER = "lora_parameters: {rank: 4, dropout: 0.1}"
ROLLOUTS = "rewards: [e_share]\ngroup_size: 4\nmax_completion_length: 8\nupdates_per_rollout: 2\nbatch_size: 2\n"
KINDS = {
    "lora": Kind(ADAPTER, interrupts=110),
    "dora": Kind(f"fine_tune_type: dora\n{ADAPTER}", interrupts=110),
    "full": Kind("fine_tune_type: full", interrupts=110),
    "dpo": Kind(f"method: dpo\n{ADAPTER}", "tiny_pairs"),
    "cpo": Kind(f"method: cpo\n{ADAPTER}", "tiny_pairs"),
    "orpo": Kind(f"method: orpo\n{ADAPTER}", "tiny_pairs"),
    "kto": Kind(f"method: kto\n{ADAPTER}", "tiny_labels"),
    "grpo": Kind(f"method: grpo\n{ROLLOUTS}lora_parameters: {{rank: 4}}", "tiny_prompts", interrupts=60, iters=20),
}
ROWS = {one.__name__: one for one in (tiny_rows, tiny_pairs, tiny_labels, tiny_prompts)}
NAP_SECONDS = 6.0  # longer than a kernel is given to end


def e_share(completion):
    return completion.count("e") / (1 + len(completion))


def register_napping():
    """A method whose updates sleep if NAP says so, without computing."""

    @register_objective("napping")
    def napping(targets):
        time.sleep(float(os.environ.get("NAP", "0")))
        return -targets.logprob_S


def settings_of(kind, model):
    own = "method: napping\nlora_parameters: {rank: 4}" if kind == "napping" else KINDS[kind].settings
    return (
        f"model: {model}\ndata: rows\niters: 100000\nval_set_size: 0\nlearning_rate: 1e-3\nsave_every: -1\n"
        f"loss_spike: null\n{own}"
    )


def namespace_of(kind):
    return {"rows": ROWS["tiny_rows" if kind == "napping" else KINDS[kind].rows](40), "e_share": e_share}


def noted(run, log):
    """Record each update with its time in a file that survives the process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"resumed {run.step_count} {time.time()}\n".encode())

    def reported(event):
        if isinstance(event, StepCompleted):
            os.write(file, f"update {event.step} {time.time()}\n".encode())

    run.listen(reported)


def live(kind, folder, model):
    """Resume or start, and train until a signal ends the process."""
    folder, namespace = Path(folder) / kind, namespace_of(kind)
    if CheckpointStore(folder / "checkpoints").list():
        run = Run.resume(folder, data=namespace["rows"], namespace=namespace)
    else:
        run = Run.from_yaml(f"{settings_of(kind, model)}\nadapter_path: {folder}", namespace=namespace)
    _ = run.trainer
    noted(run, f"{folder}.log")
    run.run()
