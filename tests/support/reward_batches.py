"""Completions in the form that reward functions receive."""

from __future__ import annotations

from mlx_nb.rollouts.rewards.resolve import CompletionBatch, resolve_rewards
from mlx_nb.rollouts.rewards.score import score_completions

TEXTS = ["one", "two words", "three more words", "four"]


def batch_of(texts=TEXTS, rows=(17, 17, 20, 20), **columns):
    return CompletionBatch(
        prompts=[f"prompt {k}" for k in range(len(texts))],
        completions=list(texts),
        answers=[str(k) for k in range(len(texts))],
        completion_tokens=[[k] * len(text.split()) for k, text in enumerate(texts)],
        columns={"difficulty": list(range(len(texts))), **columns},
        rows=list(rows)[: len(texts)],
    )


def scores_of(*functions, batch=None, weights=None, timeout=5.0, seen=None):
    """Scores of functions, driven to the end; progress goes into `seen`."""
    going = score_completions(resolve_rewards(functions, {}), weights, batch or batch_of(), timeout=timeout)
    while True:
        try:
            progress = next(going)
        except StopIteration as stop:
            return stop.value
        if seen is not None:
            seen.append(progress)


def column_of(function, **more):
    scores = scores_of(function, **more)
    return scores.rewards_NF[:, 0].tolist(), [problem.error for problem in scores.problems]


def my_reward(completion):
    return float(len(completion))
