"""Supervised fine-tuning of TRL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fixed_numbers import TARGETS
from stand_ins import head_outputs, trainer_of
from transformers.trainer_pt_utils import LabelSmoother
from trl import SFTTrainer

TARGET_CASES: dict[str, dict[str, float]] = {
    "nll": {},
    "dft": {},
    "nll, label smoothing": {"label_smoothing": 0.15},
    "nll, z-loss": {"z_loss": 0.01},
}


def target_case(name: str, options: dict[str, float]) -> dict[str, Any]:
    """total over the targets that count, and its gradient for the logits."""
    leaf = torch.tensor(TARGETS["logits"]).requires_grad_()
    targets, counts = torch.tensor(TARGETS["target"]), torch.tensor(TARGETS["counts"])
    if "z_loss" in options:
        logprob = leaf.log_softmax(dim=-1)[torch.arange(len(targets)), targets]
        loss = ((-logprob + options["z_loss"] * leaf.logsumexp(dim=-1) ** 2) * counts).sum() / counts.sum()
    else:
        loss = sft(leaf, targets, counts, name.split(",")[0], options.get("label_smoothing", 0.0))
    loss.backward()
    return {"options": options, "total": loss.item(), "gradient": leaf.grad.tolist()}


def sft(leaf: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor, loss_type: str, label_smoothing: float):
    smoother = LabelSmoother(epsilon=label_smoothing) if label_smoothing else None
    trainer = trainer_of(
        SFTTrainer,
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        label_smoother=smoother,
        compute_loss_func=None,
    )
    labels = torch.cat([torch.tensor([-100]), torch.where(counts == 1, targets, -100)])[None]

    def model(labels: torch.Tensor | None = None, **_: Any) -> Any:
        if labels is None:
            return {"logits": torch.cat([leaf, torch.zeros(1, leaf.shape[1])])[None]}
        logprob = leaf.log_softmax(dim=-1)[torch.arange(len(targets)), targets] * counts
        outputs = head_outputs(logprob[None])
        outputs.label_mask = counts[None]
        return outputs

    inputs = {"input_ids": torch.zeros_like(labels), "attention_mask": torch.ones_like(labels), "labels": labels}
    return trainer.compute_loss(model, inputs, num_items_in_batch=counts.sum())
