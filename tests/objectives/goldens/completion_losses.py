"""GRPO of TRL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fixed_numbers import COMPLETIONS
from stand_ins import chosen_of, mask_of, padded, trainer_of
from trl import GRPOTrainer

MAX_COMPLETION_LENGTH = 8


def grpo(leaf: torch.Tensor, said: dict[str, Any], all_counted: int, steps: int, loss_type: str, **options: Any):
    """One micro-batch of `steps`; `all_counted` tokens are in all of them."""
    trainer = trainer_of(
        GRPOTrainer,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=steps),
        loss_type=loss_type,
        beta=options["beta"],
        epsilon_low=options["epsilon"],
        epsilon_high=options["epsilon_high"],
        importance_sampling_level=options["importance_sampling_level"],
        max_completion_length=MAX_COMPLETION_LENGTH,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=steps,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
    )
    mask = mask_of(said["policy"], leaf.shape[1]) * torch.tensor(said["counts"])[:, None]
    none = torch.zeros(len(leaf), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": none,
        "prompt_mask": none,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.tensor(said["advantage"]),
        "old_per_token_logps": padded(said["behavior"], leaf.shape[1]),
        "ref_per_token_logps": padded(said["reference"], leaf.shape[1]),
        "num_items_in_batch": torch.tensor(all_counted),
    }
    return trainer._compute_loss(None, inputs), trainer._metrics["train"]


def completion_cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for loss_type, high in (("grpo", 0.2), ("bnpo", 0.2), ("dr_grpo", 0.2), ("dapo", 0.28)):
        for level, beta in (("token", 0.04), ("sequence", 0.04)):
            options = {"beta": beta, "epsilon": 0.2, "epsilon_high": high, "importance_sampling_level": level}
            cases[f"{loss_type}, {level} ratios, beta {beta}"] = {"loss_type": loss_type, "options": options}
    alone = {"beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token"}
    gspo = {"beta": 0.0, "epsilon": 3e-4, "epsilon_high": 4e-4, "importance_sampling_level": "sequence"}
    return {
        **cases,
        "grpo, token ratios, beta 0": {"loss_type": "grpo", "options": alone},
        "dapo, token ratios, beta 0": {"loss_type": "dapo", "options": {**alone, "epsilon_high": 0.28}},
        "gspo": {"loss_type": "grpo", "options": gspo},
    }


def completion_case(loss_type: str, options: dict[str, Any]) -> dict[str, Any]:
    """total, the same in two micro-batches, and the gradient for every token."""
    lengths, counts = [len(row) for row in COMPLETIONS["policy"]], COMPLETIONS["counts"]
    counted = sum(length * count for length, count in zip(lengths, counts))
    leaf = padded(COMPLETIONS["policy"]).requires_grad_()
    total, metrics = grpo(leaf, COMPLETIONS, counted, 1, loss_type, **options)
    total.backward()
    micro_batches = []
    for half in (slice(0, 3), slice(3, 6)):
        said = chosen_of(COMPLETIONS, half)
        micro_batches.append(grpo(padded(said["policy"]), said, counted, 2, loss_type, **options)[0].item())
    case = {
        "loss": loss_type,
        "options": options,
        "total": total.item(),
        "gradient": [row[:length].tolist() for row, length in zip(leaf.grad, lengths)],
        "total_in_two_micro_batches": sum(micro_batches),
        "clipped": metrics["clip_ratio/region_mean"][-1],
    }
    return {**case, "kl": metrics["kl"][-1]} if options["beta"] else case
