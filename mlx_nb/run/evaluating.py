"""Evaluates a run on request, reporting progress. An interrupt at any moment changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import CommandError
from mlx_nb.events import EvaluationCompleted, Event, Pause
from mlx_nb.run.kept_answers import AnswerFiles, model_key
from mlx_nb.train.interrupts import Interrupts

if TYPE_CHECKING:
    from mlx_nb.run.inputs import RunInputs
    from mlx_nb.train.trainer import Trainer


def evaluated(
    trainer: Trainer,
    inputs: RunInputs,
    weights: Callable[[], dict[str, bytes]],
    notify: Callable[[Event], None],
    *,
    split: str,
    all_rows: bool,
    metrics: Any,
    max_tokens: int | None,
) -> EvaluationCompleted:
    """What `Run.evaluate` measures. `weights` gives the trained parameters, `notify` takes the progress.

    SIGINT is raised as KeyboardInterrupt between two pieces of work, and a second one inside a metric function at once.
    """
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
        raise CommandError(f"max_tokens must be a whole number of 1 or more, not {max_tokens!r}.")
    names = inputs.config.metrics if metrics is None else metrics
    if names is None and max_tokens is not None:
        raise CommandError("max_tokens limits the answers that metrics judge, and there are no metrics. Name some.")
    judged = None if names is None else inputs.answer_metrics(names, max_tokens or inputs.config.metric_tokens)
    kept = None if judged is None else AnswerFiles(model_key(inputs, weights()))

    def interrupt(pause: Pause) -> None:
        if pause.at_once and judged is not None:
            judged.user_code.strike(KeyboardInterrupt())

    with Interrupts(interrupt) as interrupts:

        def on_progress(event: Event) -> None:
            notify(event)
            if interrupts.count:
                raise KeyboardInterrupt

        return trainer.evaluate(split, all_rows=all_rows, metrics=judged, kept=kept, on_progress=on_progress)
