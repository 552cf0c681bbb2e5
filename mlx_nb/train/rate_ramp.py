"""Updates with a rising learning rate, which leave the run as it was: the measurement of the learning-rate finder."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.model.randomness import seed_for
from mlx_nb.train.shared_work import Aborted

if TYPE_CHECKING:
    from mlx_nb.train.trainer import Trainer

_FOLLOWED = 0.7  # weight of the past in the average that shows divergence


class RampUpdate(NamedTuple):
    """An update of the ramp: its rate, its loss before the update, and that of the same rows before the ramp."""

    learning_rate: float
    loss: float
    loss_at_start: float


def exponential_rates(lowest: float, highest: float, updates: int) -> list[float]:
    """`updates` learning rates from `lowest` to `highest`, each by the same factor above the one before."""
    return [lowest * (highest / lowest) ** (k / (updates - 1)) for k in range(updates)]


def rate_ramp(trainer: Trainer, rates: Sequence[float], stop: Callable[[], bool]) -> Generator[RampUpdate, None, bool]:
    """Update with the rows that come next, once with each of the `rates`, yielding every update.

    Its value says whether the loss diverged, which ends it: it is not finite, or its average is above the one at the
    start by half, or by twice of what it had fallen. Whatever ends it, the end, an error, `close` or `stop` (asked
    before each forward pass; then Aborted is raised), parameters and optimizer are those from before, bit for bit, and
    nothing else of the trainer is changed.
    """
    stepper, config = trainer.stepper, trainer.config
    with updates_undone(trainer, stop) as poll:
        with closing(_batches(trainer, len(rates), poll)) as coming:
            starts = [(batches, loss) for batches, loss in coming]
        change = lowest = 0.0
        for k, (rate, (batches, loss_at_start)) in enumerate(zip(rates, starts)):
            update = stepper.update(
                batches,
                learning_rate=rate,
                grad_clip=config.grad_clip,
                seed=seed_for(config.seed, "dropout", trainer.state.step + k),
                rows=(),
                judge=lambda loss, norm: None,
            )
            yield RampUpdate(rate, update.loss, loss_at_start)
            change = _FOLLOWED * change + (1 - _FOLLOWED) * (update.loss - loss_at_start)
            lowest = min(lowest, change)
            if not change <= max(abs(loss_at_start) / 2, -2 * lowest):
                return True
        return False


@contextmanager
def updates_undone(trainer: Trainer, stop: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """A context after which parameters and optimizer are those from before, bit for bit.

    Yields a function that raises Aborted if `stop()` says so; it is called before each forward pass.
    """
    stepper = trainer.stepper
    before, poll = stepper.arrays(), stepper.poll

    def abort_on_stop() -> None:
        if stop():
            raise Aborted

    try:
        stepper.poll = abort_on_stop
        yield abort_on_stop
    finally:
        stepper.poll = poll
        stepper.restore(before["parameters"], before["optimizer"])


def _batches(
    trainer: Trainer, updates: int, poll: Callable[[], None]
) -> Generator[tuple[list[TokenBatch], float], None, None]:
    """The batches of the next updates, each with its mean loss now."""
    first = trainer.state.batches
    for _ in range(updates):
        batches = trainer.source.batches(trainer.plan.examples(first))
        measured = []
        for batch in batches:
            poll()
            measured.append(trainer.stepper.evaluate(batch))
        units = sum(one.units for one in measured)
        yield batches, sum(one.total for one in measured) / units if units else math.nan
        first = trainer.plan.after(first)
