"""Computes the length of a run from `iters` or `epochs`."""

from __future__ import annotations

import math

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ConfigError
from mlx_nb.train.rollout import Rollouts
from mlx_nb.train.state import TrainerState
from mlx_nb.train.update_plan import UpdatePlan


def updates_left(config: RunConfig, state: TrainerState, plan: UpdatePlan, rollouts: Rollouts | None) -> int:
    """The number of updates left. `rollouts` is None for a method that does not sample."""
    if config.iters is not None:
        return max(0, config.iters - state.step)
    updates = plan.updates_until(config.epochs or 1.0, state.batches)
    return updates if rollouts is None else rollouts.updates_of(updates)


def refuse_shorter_than_done(config: RunConfig, name: str, state: TrainerState, batches_per_epoch: int) -> None:
    """Raise ConfigError for a length that the run `name` has passed already."""
    step, done = state.step, state.batches / batches_per_epoch
    share = (
        config.grad_accumulation_steps / batches_per_epoch
    )  # of an epoch per update, to which the length is rounded up
    back = "A rewind goes further back."
    if config.iters is not None:
        if config.iters < step:
            raise ConfigError(
                f"`iters: {config.iters}` is less than what is done: {name} is at update {step}. The smallest "
                f"value is {step}, which ends it there. {back}"
            )
    elif done - (config.epochs or 1.0) > share - 1e-9:
        given = "null" if config.epochs is None else f"{config.epochs:g}"
        raise ConfigError(
            f"`epochs: {given}` is less than what is done: {name} is at update {step}, {done:.4g} passes over "
            f"the rows. The smallest value is {math.floor(done * 1e4) / 1e4:g}, which ends it there. {back}"
        )
