"""Evaluates a split: mean loss and metrics of a fixed set of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.errors import DataError
from mlx_nb.events import EvaluationCompleted, Event
from mlx_nb.train.batch_source import BatchSource
from mlx_nb.train.state import TrainerExamples
from mlx_nb.train.step import Evaluation


def evaluate_split(
    config: RunConfig,
    all_examples: TrainerExamples,
    source: BatchSource,
    loss_of: Callable[[TokenBatch], Evaluation],
    *,
    step: int,
    split: str,
    all_rows: bool,
) -> Generator[Event, None, EvaluationCompleted]:
    """Measure a fixed set of rows of `split`, or all, yielding Progress before each batch.

    Raises DataError for a split without rows.
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
    return EvaluationCompleted(
        step,
        split,
        measured.loss,
        perplexity_of(nll) if config.method == "sft" else None,
        measured.units,
        len(measured.row_losses),
        time.perf_counter() - started,
        row_losses=measured.row_losses,
        metrics=measured.metrics,
    )


def perplexity_of(loss: float) -> float:
    """exp(loss); infinite if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
