"""A batch for each kind of row, and the methods that take it."""

from __future__ import annotations

from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.objectives.kinds import LOSS_KINDS

# A method of each kind of row, of each way to use a reference, and the settings it needs.
METHODS = [
    ("sft", {}),
    ("dpo", {}),
    ("orpo", {}),
    ("kto", {}),
    ("grpo", {"rewards": ["length"], "updates_per_rollout": 2}),
]


def batch_for(method, model):
    rows = {"sft": "tokens", "kto": "labels", "grpo": "prompts"}.get(method, "pairs")
    return LOSS_KINDS[rows].trial_batch(TargetScorer(model), range(6), 1)
