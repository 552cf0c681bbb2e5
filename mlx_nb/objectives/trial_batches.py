"""Random batches of each kind of row, on which the laws of objectives are tested."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_nb.data.examples.batches import TokenBatch, pad, pad_labeled, pad_pairs
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.data.examples.preference import LabeledExample, PreferenceExample
from mlx_nb.model.logprobs import TargetScorer, target_inputs

VOCABULARY = 61


def _example(row: int, seed: int, longest: int = 18) -> TokenizedExample:
    random = np.random.default_rng([seed, row])
    length = int(random.integers(6, longest))
    loss_mask = np.zeros(length, np.float32)
    loss_mask[length // 2 :] = 1
    return TokenizedExample(random.integers(1, VOCABULARY, length).astype(np.int32), loss_mask, row)


def _answer(row: int, seed: int, prompt: int) -> TokenizedExample:
    """An answer to a prompt that other rows may share."""
    of_prompt, of_answer = np.random.default_rng([0, prompt]), np.random.default_rng([seed, row])
    lengths = int(of_prompt.integers(8, 11)), int(of_answer.integers(2, 9))
    tokens = [random.integers(1, VOCABULARY, length) for random, length in zip((of_prompt, of_answer), lengths)]
    loss_mask = np.repeat(np.array([0, 1], np.float32), lengths)
    return TokenizedExample(np.concatenate(tokens).astype(np.int32), loss_mask, row)


def _noisy(scorer: TargetScorer, batch: TokenBatch, seed: int, size: float) -> np.ndarray:
    """(B, T) log-probabilities of a model close to the scorer's own; noise by row, so that batches agree."""
    values_BT = np.zeros(batch.tokens_BT.shape, np.float32)
    for index, length in enumerate(batch.lengths):
        mask = batch.loss_mask_BT[index, :length] != 0
        alone = TokenBatch(batch.tokens_BT[index : index + 1, :length], mask[None].astype(np.float32), (0,), (length,))
        own = np.array(scorer.logprobs(target_inputs(alone)))
        random = np.random.default_rng([seed, int(batch.tokens_BT[index, :length].sum())])
        values_BT[index, :length][mask] = own + size * random.standard_normal(len(own))
    return values_BT


def trial_tokens(scorer: TargetScorer, rows: Sequence[int], width: int) -> TokenBatch:
    """Conversations, with log-probabilities of a reference."""
    batch = pad([_example(row, 1) for row in rows], width)
    return batch._replace(token_values={"reference": _noisy(scorer, batch, 3, 0.5)})


def trial_pairs(scorer: TargetScorer, rows: Sequence[int], width: int) -> TokenBatch:
    """Pairs of answers to one prompt, of weight 1 and 2, with log-probabilities of a reference."""
    pairs = [PreferenceExample(_answer(row, 1, row), _answer(row, 2, row), 0, row, weight=1 + row % 2) for row in rows]
    batch = pad_pairs(pairs, width)
    return batch._replace(token_values={"reference": _noisy(scorer, batch, 3, 0.5)})


def trial_labels(scorer: TargetScorer, rows: Sequence[int], width: int) -> TokenBatch:
    """Answers labeled good and bad in turn, with log-probabilities of a reference and an estimate of the KL."""
    batch = pad_labeled([LabeledExample(_example(row, 1), row % 2 == 0, 0, row) for row in rows], width)
    values = {**batch.row_values, "kl_estimate": np.full(len(rows), 0.3, np.float32)}
    return batch._replace(row_values=values, token_values={"reference": _noisy(scorer, batch, 3, 0.5)})


def trial_completions(scorer: TargetScorer, rows: Sequence[int], width: int) -> TokenBatch:
    """Completions of prompts, three of each, with advantages and log-probabilities of the policy that sampled them and
    of a reference."""
    batch = pad([_answer(row, 1, row // 3) for row in rows], width)
    advantages = np.array([(-1.2, 0.4, 0.8)[row % 3] for row in rows], np.float32)
    values = {"advantage": advantages, "counts": np.ones(len(rows), np.float32)}
    drawn = {"behavior": _noisy(scorer, batch, 3, 0.1), "reference": _noisy(scorer, batch, 4, 0.3)}
    return batch._replace(row_values=values, token_values=drawn)
