"""The models that a comparison measures: runs as they are now, and the base without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_nb.config.methods import METHODS, method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import evaluation_batches
from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.examples.tokenizing import tokenize_split
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import CommandError, DataError
from mlx_nb.events import Progress
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.process.pieces import finished
from mlx_nb.run.kept_answers import AnswerFiles, model_key
from mlx_nb.run.run import Run
from mlx_nb.train.answer_metrics import Answered, AnswerMetrics, Ask

BASE = "base"
GENERAL = "general"  # the name of the package's own rows
_GENERAL_ROWS = Path(__file__).with_name("general_rows.jsonl")


@dataclass(frozen=True, eq=False)
class Contestant:
    """A model with a name: that of a run, or of its base. `weights` gives what distinguishes it from others."""

    name: str
    run: Run
    model: Any
    weights: Callable[[], dict[str, bytes]]

    def row_losses(self, examples: Sequence[TokenizedExample]) -> Generator[Progress, None, list[np.ndarray]]:
        """(T,) loss in nats of each token of each row, one row at a time, so that equal weights give equal bits."""
        losses = []
        for number, example in enumerate(examples):
            yield Progress(self.run.step_count, f"loss of {self.name}", number, len(examples))
            with self.run.turns.turn():
                self.model.eval()
                losses.append(TargetScorer(self.model).token_losses(example.tokens))
        return losses

    def answers(self, metrics: AnswerMetrics, split: str, rows: Sequence[int]) -> Generator[Any, None, Answered]:
        """Its greedy answers to some rows, judged by `metrics`."""
        with self.run.turns.turn():
            kept = AnswerFiles(model_key(self.run.inputs, self.weights()))
            return (yield from metrics.measure(self.run.step_count, split, rows, self.model, kept))


def contestants(runs: Sequence[Run], base: bool) -> list[Contestant]:
    """The base, if it takes part, then the runs. Raises CommandError for runs that cannot be compared row by row."""
    first = runs[0]
    for run in runs:
        if run.trains:
            raise CommandError(
                f"{run.name} is training, and would change while it is measured. `%finetune pause` first."
            )
        if run.inputs.fingerprints["tokenizer"] != first.inputs.fingerprints["tokenizer"]:
            raise CommandError(
                f"{run.name} and {first.name} have different tokenizers, so their losses are of different tokens. "
                "`run.evaluate` gives bits per byte, which can be compared."
            )
    found = [Contestant(run.name, run, run.trainer.model, run.adapter_bytes) for run in runs]
    if base:
        if first.config.fine_tune_type == "full" and first.step_count:
            raise CommandError(f"{first.name} has trained the base itself, so there is no base left to compare with.")
        found.insert(0, Contestant(BASE, first, first.inputs.base_model, lambda: {BASE: b""}))
    return found


def compared_examples(run: Run, split: str) -> list[TokenizedExample]:
    """The fixed rows of a split that `run` is evaluated on; of a pair the chosen answer, of a text in pieces the first.

    Raises DataError without any.
    """
    if split == "test" and not run.trainer.examples.test:
        examples: Sequence[Any] = run.inputs.tokenize("test")
    else:
        examples = getattr(run.trainer.examples, split)
    if not examples:
        raise DataError(f"there are no rows in the {split} split of {run.name} to compare on.")
    config = run.config
    limit = config.test_batches if split == "test" else config.val_batches
    chosen = evaluation_batches([one.length for one in examples], config.batch_size, limit, config.seed)
    rows: dict[int, TokenizedExample] = {}
    for place in sorted(place for places in chosen for place in places):
        rows.setdefault(examples[place].row, examples[place].sequences[0])
    return [rows[row] for row in sorted(rows)]


@dataclass(frozen=True, eq=False)
class ComparedRows:
    """The rows that a comparison measures: of a split, or others.

    words     what they are
    examples  the tokenized rows
    ask       (split, row) -> what a row asks
    groups    {row: the value of its column `group`}, of rows that have one
    """

    words: str
    examples: list[TokenizedExample]
    ask: Ask
    groups: dict[int, str]


def rows_of_split(run: Run, split: str) -> ComparedRows:
    """The fixed rows of a split that `run` is evaluated on. Raises DataError without any."""
    return ComparedRows(
        split, compared_examples(run, split), lambda of, row: run.inputs.split(of).question(row), groups={}
    )


def other_rows(run: Run, rows: Any) -> ComparedRows:
    """Rows of the package (`general`), or any that the setting `data` takes, rendered as `run` renders its own.

    Raises DataError for rows that cannot be read, or of which none can be measured.
    """
    config, general = run.config, isinstance(rows, str) and rows == GENERAL
    if general:
        own = RunConfig.from_dict({"prompt_format": config.prompt_format})
        settings, kind = ExampleSettings.of(own, run.inputs.limits), METHODS["sft"].row_kind
    else:
        settings, kind = ExampleSettings.of(config, run.inputs.limits), method_named(config.method).row_kind
    source = open_splits(
        str(_GENERAL_ROWS) if general else rows,
        namespace=run.inputs.namespace,
        working_folder=config.working_folder,
        val_set_size=0,
    ).train
    examples = Examples(source, run.tokenizer, settings, kind)
    kept, left_out = finished(tokenize_split(examples))
    if not kept:
        raise DataError(f"none of these rows can be measured. The first: {left_out[0].reason}")
    there = {example.row: example.sequences[0] for example in reversed(kept)}
    groups = {row: str(source[row]["group"]) for row in there if "group" in source[row]}
    words = "the general set" if general else "the given rows"
    return ComparedRows(words, [there[row] for row in sorted(there)], lambda _, row: examples.question(row), groups)


def differing_rows(runs: Sequence[Run], split: str) -> list[str]:
    """Notes about runs whose rows of a split are others than those of the first, which may have been trained on."""
    first = runs[0].inputs.split(split).source.fingerprint()
    return [
        f"these are the {split} rows of {runs[0].name}. {run.name} has others, and may have trained on some of these."
        for run in runs[1:]
        if run.inputs.split(split).source.fingerprint() != first
    ]
