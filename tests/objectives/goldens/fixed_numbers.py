"""The log-probabilities that the losses are asked about: random ones, always the same."""

from __future__ import annotations

from typing import Any

import numpy as np

RANDOM = np.random.default_rng(11)


def logprobs(lengths: list[int], low: float = -3.0, high: float = -0.05) -> list[list[float]]:
    return [RANDOM.uniform(low, high, length).round(3).tolist() for length in lengths]


def near(logprobs: list[list[float]], spread: float) -> list[list[float]]:
    return [np.minimum(row + RANDOM.normal(0, spread, len(row)), -0.01).round(3).tolist() for row in logprobs]


def pairs() -> dict[str, Any]:
    chosen, rejected = logprobs([4, 2, 6, 3, 5, 1]), logprobs([3, 5, 2, 3, 4, 6])
    return {
        "prompt": logprobs([2] * 6),
        "chosen": chosen,
        "rejected": rejected,
        "reference_chosen": near(chosen, 0.9),
        "reference_rejected": near(rejected, 0.9),
        "margin": RANDOM.uniform(0, 2, 6).round(3).tolist(),
    }


def labels() -> dict[str, Any]:
    answers, mismatched = logprobs([3, 5, 2, 4, 6, 1]), logprobs([5, 2, 4, 6, 1, 3])
    return {
        "label": [1, 0, 1, 1, 0, 0],
        "answers": answers,
        "reference": near(answers, 0.9),
        "mismatched": mismatched,
        "reference_mismatched": [[round(value - 0.15, 3) for value in row] for row in near(mismatched, 0.4)],
    }


def completions() -> dict[str, Any]:
    policy = logprobs([5, 2, 7, 3, 6, 4])
    return {
        "advantage": [-1.2, 0.7, -1.1, 0.9, 0.4, -0.8],
        "counts": [1, 1, 1, 1, 0, 1],
        "policy": policy,
        "behavior": near(policy, 0.6),
        "reference": near(policy, 0.5),
    }


def targets() -> dict[str, Any]:
    return {
        "logits": RANDOM.normal(0, 2, (6, 5)).round(3).tolist(),
        "target": RANDOM.integers(0, 5, 6).tolist(),
        "counts": [1, 1, 0, 1, 1, 1],
    }


PAIRS, LABELS, COMPLETIONS, TARGETS = pairs(), labels(), completions(), targets()
