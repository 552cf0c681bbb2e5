"""Evaluates a split: mean loss and metrics of a fixed set of rows, with confidence intervals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError
from mlx_nb.events import EvaluationCompleted, Event
from mlx_nb.rollouts.intervals import Estimate, ratio
from mlx_nb.train.answer_metrics import Answered, measured_by
from mlx_nb.train.batch_source import BatchSource, Measured
from mlx_nb.train.state import TrainerExamples
from mlx_nb.train.step import Evaluation

# Rows -> their answers, scored by the metrics of the run or of the call.
Answering = Callable[[Sequence[int]], Generator[Event, None, Answered]]


def evaluate_split(
    config: RunConfig,
    all_examples: TrainerExamples,
    source: BatchSource,
    loss_of: Callable[[TokenBatch], Evaluation],
    *,
    step: int,
    split: str,
    all_rows: bool,
    tokenizer: Tokenizer | None = None,
    answering: Answering | None = None,
) -> Generator[Event, None, EvaluationCompleted]:
    """Measure a fixed set of rows of `split`, or all, yielding Progress before each batch.

    `answering` measures the model's answers to the same rows. Raises DataError for a split without rows.
    """
    by_split: dict[str, Sequence[Any]] = {
        "train": all_examples.train,
        "valid": all_examples.valid,
        "test": all_examples.test,
    }
    examples = by_split[split]
    if not examples:
        raise DataError(f"there are no rows in the {split} split to evaluate.")
    started = time.perf_counter()
    limit = -1 if all_rows else config.test_batches if split == "test" else config.val_batches
    measured = yield from source.measure(step, split, examples, limit, loss_of)
    nll = measured.metrics.get("nll", measured.loss)
    in_nats = config.method == "sft"
    target_bytes = _bytes_of(examples, measured, tokenizer) if in_nats and tokenizer is not None else {}
    numbers = _estimates(measured, target_bytes, in_nats and "nll" not in measured.metrics)
    answered = None
    if answering is not None:
        answered = yield from answering([row for row, _ in measured.row_losses])
        numbers |= answered.estimates
    values, intervals = measured_by(numbers)
    all_bytes = sum(target_bytes.values())
    return EvaluationCompleted(
        step,
        split,
        measured.loss,
        perplexity_of(nll) if in_nats else None,
        measured.units,
        len(measured.row_losses),
        time.perf_counter() - started,
        row_losses=measured.row_losses,
        metrics={**measured.metrics, **({name: values[name] for name in answered.estimates} if answered else {})},
        bits_per_byte=nll * measured.units / math.log(2) / all_bytes if all_bytes else None,
        intervals=intervals,
        best_by=config.best_by or "",
        problems=answered.problems if answered else (),
    )


def _estimates(measured: Measured, target_bytes: dict[int, int], in_nats: bool) -> dict[str, Estimate]:
    """The loss with its interval; if it is in nats per token of text, also perplexity and bits per byte."""
    sums: dict[int, float] = {}
    units: dict[int, float] = {}
    for (row, loss), unit in zip(measured.row_losses, measured.row_units, strict=True):
        sums[row] = sums.get(row, 0.0) + loss * unit
        units[row] = units.get(row, 0.0) + unit
    mean = ratio(list(sums.values()), list(units.values()))
    if in_nats:
        mean = _not_negative(mean)
    found = {"loss": mean}
    if in_nats:
        ends = [perplexity_of(one) for one in (mean.value, mean.low, mean.high)]
        found["perplexity"] = Estimate(ends[0], ends[1], ends[2], mean.rows)
        if sum(target_bytes.values()):
            bits = [total / math.log(2) for total in sums.values()]
            found["bits_per_byte"] = _not_negative(ratio(bits, [target_bytes[row] for row in sums]))
    return found


def _not_negative(one: Estimate) -> Estimate:
    """The estimate of a quantity that is never below 0, such as a negative log-likelihood."""
    return one if math.isnan(one.low) else one._replace(low=max(0.0, one.low))


def _bytes_of(examples: Sequence[Any], measured: Measured, tokenizer: Tokenizer) -> dict[int, int]:
    """{row: UTF-8 bytes of its target text} of the rows that were measured, without control tokens."""
    rows = {row for row, _ in measured.row_losses}
    found = dict.fromkeys(rows, 0)
    for example in examples:
        if example.row in rows:
            targets = example.tokens[example.loss_mask != 0].tolist()
            found[example.row] += len(tokenizer.decode(targets, skip_special_tokens=True).encode("utf-8", "replace"))
    return found


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite if that overflows, NaN for NaN."""
    return math.exp(loss) if not loss >= 700 else math.inf
