"""The learning-rate finder of a run: checks its arguments, follows the ramp, and answers interrupts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import CommandError
from mlx_nb.events import Event, Progress
from mlx_nb.train.interrupts import Interrupts
from mlx_nb.view.curves.rate_range import RateRange

if TYPE_CHECKING:
    from mlx_nb.train.trainer import Trainer

FEWEST_UPDATES = 10


def check_rates(lowest: Any, highest: Any, updates: Any) -> None:
    """Raise CommandError for rates or a number of updates that make no ramp."""
    for name, value in (("lowest", lowest), ("highest", highest)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise CommandError(f"{name} must be a learning rate above 0, not {value!r}.")
    if lowest >= highest:
        raise CommandError(f"lowest ({lowest:g}) must be below highest ({highest:g}).")
    if isinstance(updates, bool) or not isinstance(updates, int) or updates < FEWEST_UPDATES:
        raise CommandError(f"updates must be a whole number of {FEWEST_UPDATES} or more, not {updates!r}.")


def find_rate(
    trainer: Trainer, notify: Callable[[Event], None], *, lowest: float, highest: float, updates: int
) -> RateRange:
    """What `Run.lr_find` does. `notify` takes the progress. SIGINT is raised once everything is restored."""
    from mlx_nb.train.rate_ramp import exponential_rates, rate_ramp
    from mlx_nb.train.shared_work import Aborted

    if trainer.rollouts is not None:
        raise CommandError(
            "the learning-rate finder compares losses of rows, and `method: grpo` has rewards of completions that it "
            "samples. Try rates in short runs."
        )
    rates, changes, diverged = exponential_rates(lowest, highest, updates), [], False
    with Interrupts(lambda pause: None) as interrupts:
        ramp = rate_ramp(trainer, rates, lambda: interrupts.count > 0)
        try:
            notify(Progress(trainer.state.step, "learning rates", 0, updates))
            while True:
                update = next(ramp)
                changes.append(update.loss - update.loss_at_start)
                notify(Progress(trainer.state.step, "learning rates", len(changes), updates))
        except StopIteration as ended:
            diverged = bool(ended.value)
        except Aborted:
            pass
        finally:
            ramp.close()
    if interrupts.count:
        raise KeyboardInterrupt
    return RateRange(rates[: len(changes)], changes, diverged)
