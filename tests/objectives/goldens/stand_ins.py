"""What a trainer of TRL is made of here, and a model that answers with given log-probabilities."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch


def trainer_of(kind: type, **settings: Any) -> Any:
    """A trainer that holds these settings and what every loss reads of it to count and to log."""
    trainer = object.__new__(kind)

    def same(value: Any, **_: Any) -> Any:
        return value

    trainer.__dict__.update(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            parallelism_config=None,
            gather=same,
            gather_for_metrics=same,
            reduce=same,
        ),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    return trainer


def padded(rows: list[list[float]], width: int | None = None) -> torch.Tensor:
    """(rows, width), 0 after the end of a row."""
    width = width or max(map(len, rows))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])


def mask_of(rows: list[list[float]], width: int) -> torch.Tensor:
    return torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def head_outputs(logprob_BT: torch.Tensor) -> SimpleNamespace:
    """What TRL's fused head answers; only `log_probs` enters a loss."""
    zeros = torch.zeros_like(logprob_BT)
    return SimpleNamespace(log_probs=logprob_BT, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def two_token_logits(logprob_BT: torch.Tensor) -> torch.Tensor:
    """Logits over a vocabulary of two of which token 0 has this log-probability; 0, padding, becomes one half."""
    logprob_BT = torch.where(logprob_BT == 0, math.log(0.5), logprob_BT)
    return torch.stack([logprob_BT, torch.log(-torch.expm1(logprob_BT))], dim=-1)


def per_answer(gradient_BT: torch.Tensor, lengths: list[int]) -> list[float]:
    """The gradient of each answer's tokens, which must all have the same."""
    for row, length in zip(gradient_BT, lengths):
        assert torch.allclose(row[:length], row[0], rtol=1e-6, atol=1e-12), row
    return gradient_BT[:, 0].tolist()


def chosen_of(values: dict[str, Any], chosen: slice) -> dict[str, Any]:
    return {name: value[chosen] for name, value in values.items()}
