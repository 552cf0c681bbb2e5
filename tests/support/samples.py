"""Samples completions from a model, and compares their token probabilities with training."""

from __future__ import annotations

import numpy as np

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.model.logprobs import TargetScorer, accurate_target_logprobs, target_inputs
from mlx_nb.rollouts.sampling import SamplingSettings, sample_groups


def sampled(model, tokenizer, prompts, group_size=4, seed=0, rows_at_once=32, **settings):
    settings = SamplingSettings(**{"max_tokens": 24, **settings})
    completions = []

    def steps():
        completions.extend(
            (yield from sample_groups(model, tokenizer, prompts, group_size, settings, seed, rows_at_once=rows_at_once))
        )

    counts = list(steps())
    assert counts == sorted(counts)
    assert counts[-1] == sum(len(completion.tokens) for completion in completions)
    return completions


def training_logprobs(model, prompt, completion):
    """The log-probabilities that the objective computes: prompt and completion, with the mask on the completion."""
    tokens = np.concatenate([prompt, completion.tokens]).astype(np.int32)
    mask = np.zeros(len(tokens), np.float32)
    mask[len(prompt) :] = 1
    inputs = target_inputs(TokenBatch(tokens[None], mask[None], (0,), (len(tokens),)))
    return np.array(accurate_target_logprobs(TargetScorer(model).logits(inputs), inputs.target_S))


def assert_training_agrees(model, prompts, completions):
    for completion in completions:
        expected = training_logprobs(model, prompts[completion.prompt_index], completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)
