"""Measures the time of a few updates, and leaves the run as it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from mlx_nb.model.randomness import seed_for
from mlx_nb.train.length import updates_left
from mlx_nb.train.rate_ramp import updates_undone

if TYPE_CHECKING:
    from mlx_nb.train.trainer import Trainer

PROBED_UPDATES = 3
_SLOWER = 1  # the first updates of a process, which do work that later ones need not


class Pace(NamedTuple):
    """The measured time of updates.

    tokens_per_second  tokens of the rows, without padding
    seconds            of an update with as many tokens as the updates of an epoch have on average
    updates_left       until the end of the run
    """

    tokens_per_second: float
    seconds: float
    updates_left: int


def measured_pace(
    trainer: Trainer, stop: Callable[[], bool], done: Callable[[int], None] = lambda number: None
) -> Pace:
    """The pace of the next 3 updates, which are undone bit for bit.

    Whatever ends it, the end, an error or `stop` (asked before each forward pass; then Aborted is raised), nothing of
    the trainer is changed. `done` is called with the number of updates done. For methods without rollouts.
    """
    config, stepper, plan, state = trainer.config, trainer.stepper, trainer.plan, trainer.state
    tokens, seconds, first = 0, 0.0, state.batches
    with updates_undone(trainer, stop) as poll:
        for number in range(PROBED_UPDATES):
            poll()
            examples = plan.examples(first)
            batches = trainer.source.batches(examples)
            begun = time.perf_counter()
            stepper.update(
                batches,
                learning_rate=config.learning_rate,
                grad_clip=config.grad_clip,
                seed=seed_for(config.seed, "dropout", state.step + number),
                rows=(),
                judge=lambda loss, norm: None,
            )
            if number >= _SLOWER:
                seconds += time.perf_counter() - begun
                tokens += sum(example.length for of_batch in examples for example in of_batch)
            first = plan.after(first)
            done(number + 1)
    rate = tokens / seconds
    return Pace(rate, plan.tokens_per_update / rate, updates_left(config, state, plan, None))
