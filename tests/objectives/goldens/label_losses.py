"""KTO of TRL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fixed_numbers import LABELS
from stand_ins import chosen_of, head_outputs, mask_of, padded, per_answer, trainer_of
from trl import KTOTrainer


def kto(leaf: torch.Tensor, labels: dict[str, Any], mismatched: dict[str, Any], **options: float):
    trainer = trainer_of(KTOTrainer, loss_type="kto", calculate_KL=True, precompute_ref_logps=True, **options)
    mask = mask_of(labels["answers"], leaf.shape[1])
    first = torch.zeros(len(leaf), 1, dtype=torch.long)
    drawn = padded(mismatched["mismatched"])
    drawn_mask = mask_of(mismatched["mismatched"], drawn.shape[1])
    drawn_first = torch.zeros(len(drawn), 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([first, torch.zeros_like(mask)], dim=1),
        "attention_mask": torch.cat([first + 1, mask], dim=1),
        "completion_mask": torch.cat([first, mask], dim=1),
        "KL_input_ids": torch.cat([drawn_first, torch.zeros_like(drawn_mask)], dim=1),
        "KL_attention_mask": torch.cat([drawn_first + 1, drawn_mask], dim=1),
        "KL_completion_mask": torch.cat([drawn_first, drawn_mask], dim=1),
        "label": torch.tensor(labels["label"]),
        "ref_logps": padded(labels["reference"]).sum(dim=1),
        "ref_KL_logps": padded(mismatched["reference_mismatched"]).sum(dim=1),
    }

    def model(**_: Any) -> SimpleNamespace:
        # The first question is about the mismatched answers, and asked without gradients.
        return head_outputs(leaf * mask if torch.is_grad_enabled() else drawn)

    loss = trainer._compute_loss(model, inputs, False)
    return loss, trainer._metrics["train"]["kl"][-1]


WEIGHTS = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
LABEL_CASES = {
    "kto": {"options": WEIGHTS},
    "kto, mismatched answers less likely than under the reference": {"options": WEIGHTS, "swapped": True},
}


def label_case(options: dict[str, float], swapped: bool = False) -> dict[str, Any]:
    """losses (B,) of each answer alone, z0 that of all; gradient (B,) of the total for each answer's tokens."""
    labels = dict(LABELS)
    if swapped:
        labels["mismatched"], labels["reference_mismatched"] = LABELS["reference_mismatched"], LABELS["mismatched"]
    lengths = [len(row) for row in labels["answers"]]
    losses = []
    for answer in range(len(lengths)):
        alone = chosen_of(labels, slice(answer, answer + 1))
        losses.append(kto(padded(alone["answers"]), alone, labels, **options)[0].item())
    leaf = padded(labels["answers"]).requires_grad_()
    total, estimate = kto(leaf, labels, labels, **options)
    total.backward()
    halves = [chosen_of(labels, half) for half in (slice(0, 3), slice(3, 6))]
    micro_batches = [kto(padded(half["answers"]), half, half, **options)[0].item() for half in halves]
    return {
        "options": options,
        "kl_estimate": estimate,
        "losses": losses,
        "total": total.item(),
        "gradient": per_answer(leaf.grad, lengths),
        "total_in_two_micro_batches": sum(micro_batches) / 2,
    }
