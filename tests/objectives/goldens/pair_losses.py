"""DPO, CPO and ORPO of TRL."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fixed_numbers import PAIRS
from stand_ins import chosen_of, head_outputs, mask_of, padded, per_answer, trainer_of, two_token_logits
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer


def dpo(leaf: torch.Tensor, pairs: dict[str, Any], loss_type: str, beta: float, label_smoothing: float = 0.0):
    trainer = trainer_of(
        DPOTrainer,
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        precompute_ref_logps=True,
    )
    mask = mask_of(pairs["chosen"] + pairs["rejected"], leaf.shape[1])
    first = torch.zeros(len(leaf), 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([first, torch.zeros_like(mask)], dim=1),
        "attention_mask": torch.cat([first + 1, mask], dim=1),
        "completion_mask": torch.cat([first, mask], dim=1),
        "ref_chosen_logps": padded(pairs["reference_chosen"]).sum(dim=1),
        "ref_rejected_logps": padded(pairs["reference_rejected"]).sum(dim=1),
    }
    loss = trainer._compute_loss(lambda **_: head_outputs(leaf * mask), inputs, False)
    return loss, {name: trainer._metrics["train"][name][-1] for name in REWARDS.values()}


def without_reference(kind: type, leaf: torch.Tensor, pairs: dict[str, Any], prompt: bool, **settings: Any):
    """CPO and ORPO, whole, from logits; `prompt` puts the prompt's tokens before the answers."""
    trainer = trainer_of(kind, is_encoder_decoder=False, **settings)
    count = len(pairs["chosen"])
    mask = mask_of(pairs["chosen"] + pairs["rejected"], leaf.shape[1])
    prompt_BT = padded(pairs["prompt"] * 2) if prompt else torch.zeros(2 * count, 0)
    start = torch.ones(2 * count, 1 + prompt_BT.shape[1], dtype=torch.long)
    attention = torch.cat([start, mask], dim=1)
    answer_labels = torch.cat([start * -100, torch.where(mask == 1, 0, -100)], dim=1)
    batch = {}
    for name, half in (("chosen", slice(0, count)), ("rejected", slice(count, None))):
        batch[f"{name}_input_ids"] = torch.zeros_like(attention[half])
        batch[f"{name}_attention_mask"] = attention[half]
        batch[f"{name}_labels"] = answer_labels[half]
    logits = two_token_logits(torch.cat([prompt_BT, leaf, torch.zeros(2 * count, 1)], dim=1))
    loss, metrics = trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)
    return loss, {name: metrics[name] for name in REWARDS.values()}


def cpo(leaf: torch.Tensor, pairs: dict[str, Any], loss_type: str, cpo_alpha: float = 1.0, **options: float):
    settings = {"simpo_gamma": 0.5, "label_smoothing": 0.0, "alpha": 0.0, "pad_token_id": 0, **options}
    return without_reference(CPOTrainer, leaf, pairs, False, loss_type=loss_type, cpo_alpha=cpo_alpha, **settings)


def orpo(leaf: torch.Tensor, pairs: dict[str, Any], prompt: bool = False, **options: float):
    return without_reference(ORPOTrainer, leaf, pairs, prompt, padding_value=0, **options)


def equation(leaf: torch.Tensor, pairs: dict[str, Any], name: str, beta: float, delta: float = 0.0):
    chosen, rejected = leaf.sum(dim=1).chunk(2)
    reference = [padded(pairs[f"reference_{half}"]).sum(dim=1) for half in ("chosen", "rejected")]
    difference = (chosen - reference[0]) - (rejected - reference[1])
    if name == "dpop":
        argument = beta * (difference - delta * torch.clamp(reference[0] - chosen, min=0))
    else:
        argument = beta * difference - torch.tensor(pairs["margin"])
    return torch.log1p(torch.exp(-argument)).mean(), {}


REWARDS = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "accuracy": "rewards/accuracies",
}
# name -> (mlx_nb's function, its options, who says what it is, what that one is given besides the options)
PAIR_CASES: dict[str, tuple[str, dict[str, float], Any, dict[str, Any]]] = {
    "dpo sigmoid": ("dpo.sigmoid", {"beta": 0.3}, dpo, {"loss_type": "sigmoid"}),
    # TRL's `sigmoid` takes no label smoothing; its `aot` does, and of one pair it is the same loss.
    "dpo conservative": ("dpo.sigmoid", {"beta": 0.3, "label_smoothing": 0.2}, dpo, {"loss_type": "aot"}),
    "dpo robust": ("dpo.robust", {"beta": 0.3, "label_smoothing": 0.2}, dpo, {"loss_type": "robust"}),
    "dpo hinge": ("dpo.hinge", {"beta": 1.0}, dpo, {"loss_type": "hinge"}),
    "dpo ipo": ("dpo.ipo", {"beta": 0.3}, dpo, {"loss_type": "ipo"}),
    "dpo normalized": ("dpo.normalized", {"beta": 2.0}, dpo, {"loss_type": "sigmoid_norm"}),
    "dpo dpop": ("dpo.dpop", {"beta": 0.3, "delta": 5.0}, equation, {"name": "dpop"}),
    "dpo with margins": ("dpo.sigmoid", {"beta": 0.3}, equation, {"name": "margins"}),
    "cpo sigmoid": ("cpo.sigmoid", {"beta": 0.3, "cpo_alpha": 0.7}, cpo, {"loss_type": "sigmoid"}),
    "cpo smoothed": (
        "cpo.sigmoid",
        {"beta": 0.3, "cpo_alpha": 1.0, "label_smoothing": 0.2},
        cpo,
        {"loss_type": "sigmoid"},
    ),
    "cpo hinge": ("cpo.hinge", {"beta": 0.3, "cpo_alpha": 0.5}, cpo, {"loss_type": "hinge"}),
    "simpo": ("cpo.simpo", {"beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0}, cpo, {"loss_type": "simpo"}),
    "cpo-simpo": ("cpo.simpo", {"beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.8}, cpo, {"loss_type": "simpo"}),
    "orpo": ("orpo.orpo", {"beta": 0.25}, orpo, {}),
}


def pair_case(ours: str, options: dict[str, float], reference: Any, given: dict[str, Any]) -> dict[str, Any]:
    """losses (P,) of each pair alone and their gradients for each answer's tokens; total of all pairs at once."""
    count = len(PAIRS["chosen"])
    losses, gradients = [], []
    for pair in range(count):
        alone = chosen_of(PAIRS, slice(pair, pair + 1))
        leaf = padded(alone["chosen"] + alone["rejected"]).requires_grad_()
        loss, _ = reference(leaf, alone, **options, **given)
        loss.backward()
        losses.append(loss.item())
        gradients.append(per_answer(leaf.grad, [len(alone[half][0]) for half in ("chosen", "rejected")]))
    leaf = padded(PAIRS["chosen"] + PAIRS["rejected"])
    total, metrics = reference(leaf, PAIRS, **options, **given)
    case = {
        "loss": ours,
        "options": options,
        "source": "equation"
        if reference is equation
        else f"TRL {reference.__name__} {given.get('loss_type', '')}".strip(),
        "losses": losses,
        "gradient_chosen": [gradient[0] for gradient in gradients],
        "gradient_rejected": [gradient[1] for gradient in gradients],
    }
    if reference is not equation and given.get("loss_type") != "aot":
        case["total"] = total.item()
        case["metrics"] = {name: metrics[key] for name, key in REWARDS.items()}
    if reference is orpo:
        case["total_with_prompt"] = reference(leaf, PAIRS, prompt=True, **options)[0].item()
    return case
