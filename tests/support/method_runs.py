"""A tiny run of each method."""

from __future__ import annotations

from mlx_nb import Run, RunConfig
from tiny import tiny_labels, tiny_pairs, tiny_prompts, tiny_rows


def e_share(completion):
    return completion.count("e") / (1 + len(completion))


ROWS = {
    "sft": tiny_rows,
    "dpo": tiny_pairs,
    "cpo": tiny_pairs,
    "orpo": tiny_pairs,
    "kto": tiny_labels,
    "grpo": tiny_prompts,
}

ROLLOUTS = {
    "rewards": [e_share],
    "group_size": 4,
    "max_completion_length": 6,
    "updates_per_rollout": 2,
}


def settings_for(method, folder, tiny_folder, **changes):
    return {
        "method": method,
        "model": str(tiny_folder),
        "data": ROWS[method](24),
        "iters": 8,
        "batch_size": 2,
        "grad_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.0 if method == "grpo" else 0.1},
        "steps_per_eval": 4,
        "val_batches": 1,
        "save_every": -1,
        "adapter_path": str(folder),
        **(ROLLOUTS if method == "grpo" else {}),
        **changes,
    }


def run_of(method, folder, tiny_folder, **changes):
    return Run(RunConfig.from_dict(settings_for(method, folder, tiny_folder, **changes)))
