"""The common part of all losses of a kind of row: their batches, the sums around them, and their standard metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.config.methods import METHODS
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch, pad, pad_labeled, pad_mismatched, pad_pairs
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.data.examples.preference import LabeledExample, PreferenceExample
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.objectives.base import Objective
from mlx_nb.objectives.grpo import completion_objective
from mlx_nb.objectives.kto import label_objective
from mlx_nb.objectives.preference import pair_objective
from mlx_nb.objectives.sft import token_objective
from mlx_nb.objectives.trial_batches import trial_completions, trial_labels, trial_pairs, trial_tokens

MakeExample = Callable[[int], TokenizedExample]  # row number -> an example of one sequence


def _one_sequence_each(make: MakeExample, sequences: int) -> Sequence[Any]:
    return [make(row) for row in range(sequences)]


def _pairs(make: MakeExample, sequences: int) -> Sequence[Any]:
    return [PreferenceExample(make(row), make(row), 0, row) for row in range(-(-sequences // 2))]


def _labeled(make: MakeExample, sequences: int) -> Sequence[Any]:
    return [LabeledExample(make(row), row % 2 == 0, 0, row) for row in range(sequences)]


@dataclass(frozen=True)
class LossKind:
    """The common part of all losses of one kind of row.

    wrap         (loss function with its options bound, beta, settings) -> the objective, with the sums around the loss
    trial_batch  (scorer, row numbers, padding multiple) -> a batch on which its laws are tested
    collate      (examples, padding multiple) -> their batch
    planned      (function that makes one sequence, number of sequences) -> examples with that many sequences, for a
                 plan of the memory
    row_values   names of the values of each row that an update computes and its loss reads
    metrics      the metrics that the sums around the loss measure
    spread       label of an example, whose rows are spread over all batches; None = rows are alike
    mismatched   (examples, padding multiple) -> their prompts with the answers of other rows, for an estimate of the KL
                 to the reference that the loss receives as `kl_estimate`; None = it receives none
    """

    wrap: Callable[[Callable[..., Any], float, RunConfig], Objective]
    trial_batch: Callable[[TargetScorer, Sequence[int], int], TokenBatch]
    collate: Callable[[Sequence[Any], int], TokenBatch] = pad
    planned: Callable[[MakeExample, int], Sequence[Any]] = _one_sequence_each
    row_values: tuple[str, ...] = ()
    metrics: frozenset[str] = frozenset()
    spread: Callable[[Any], Any] | None = None
    mismatched: Callable[[Sequence[Any], int], TokenBatch | None] | None = None


LOSS_KINDS: dict[str, LossKind] = {
    "tokens": LossKind(lambda loss, _beta, _config: token_objective(loss), trial_tokens),
    "pairs": LossKind(
        lambda loss, beta, _config: pair_objective(loss, beta),
        trial_pairs,
        pad_pairs,
        _pairs,
        metrics=frozenset(METHODS["dpo"].metrics),
    ),
    "labels": LossKind(
        lambda loss, beta, _config: label_objective(loss, beta),
        trial_labels,
        pad_labeled,
        _labeled,
        row_values=("kl_estimate",),
        metrics=frozenset(METHODS["kto"].metrics),
        spread=lambda example: example.label,
        mismatched=pad_mismatched,
    ),
    "prompts": LossKind(
        lambda loss, _beta, config: completion_objective(
            loss, temperature=config.temperature, max_completion_length=config.max_completion_length
        ),
        trial_completions,
        row_values=("advantage", "counts"),
        metrics=frozenset(METHODS["grpo"].metrics),
    ),
}
