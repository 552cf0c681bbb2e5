"""Builds the optimizer, and computes the learning rate of an update and gradient clipping."""

from __future__ import annotations

import math
import typing
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_nb.config.optimizers import OPTIMIZERS
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import OutOfMemory
from mlx_nb.model.memory import shortage
from mlx_nb.model.trees import named_arrays


class Muon(optimizers.Muon):
    """mlx's Muon with decoupled weight decay: w <- (1 - rate * weight_decay) * w - rate * orthogonalized momentum.

    mlx adds the decay to the gradient, where orthogonalization turns it into a full-size step, however small it is.
    """

    def __init__(
        self,
        learning_rate: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        super().__init__(learning_rate, momentum=momentum, weight_decay=0.0, nesterov=nesterov, ns_steps=ns_steps)
        self.decoupled_weight_decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """The new value of one parameter; updates `state`."""
        rate = self.learning_rate.astype(parameter.dtype)
        result: mx.array = super().apply_single(gradient, parameter * (1 - rate * self.decoupled_weight_decay), state)
        return result


def refuse_beyond_memory(model: nn.Module, config: RunConfig) -> None:
    """Raise OutOfMemory if the trained parameters, their gradients and the optimizer state do not fit in memory.

    The adapter of `model` is attached but not evaluated, so its arrays have sizes but use no memory yet.
    """
    parameters = model.trainable_parameters()
    optimizer = build_optimizer(config)
    optimizer.init(parameters)
    trained, state = (sum(array.nbytes for _, array in named_arrays(tree)) for tree in (parameters, optimizer.state))
    full = config.fine_tune_type == "full"
    lacking = shortage((1 if full else 2) * trained + state)
    if lacking is None:
        return
    what = "full fine-tuning" if full else f"an adapter of rank {config.lora_parameters.rank}"
    lower = "num_layers, or fine_tune_type: lora," if full else "lora_parameters.rank or num_layers, or fewer keys,"
    raise OutOfMemory(f"{what} with `optimizer: {config.optimizer}` {lacking}. A lower {lower} needs less.")


def build_optimizer(config: RunConfig) -> optimizers.Optimizer:
    """The mlx optimizer with the arguments from the settings, which are already checked."""
    facts = OPTIMIZERS[config.optimizer]
    decay = {"weight_decay": config.weight_decay} if facts.decays else {}
    arguments = {"learning_rate": config.learning_rate, **facts.standard, **config.optimizer_config, **decay}
    result: optimizers.Optimizer = facts.made(arguments)
    return result


def warmup_updates(config: RunConfig, iters: int) -> int:
    """Number of linear warm-up updates: as set, otherwise 5% of the run and at most 100."""
    warmup = config.lr_schedule.warmup
    return min(math.ceil(0.05 * iters), 100) if warmup is None else min(warmup, iters)


def learning_rate_at(config: RunConfig, iters: int, step: int) -> float:
    """Learning rate of update `step`, counted from 0. A pure function.

    Warm-up rises linearly from `warmup_init` and reaches the peak at its last update, so no update has rate 0. After
    it, mlx's schedule starts at its step 0. `learning_rate` also scales schedules with `arguments`, so that a change
    during a run affects every schedule in the same way. With `schedule_iters` the schedule covers that many updates,
    and later updates keep its last rate.
    """
    schedule = config.lr_schedule
    if config.schedule_iters is not None:
        iters, step = config.schedule_iters, min(step, config.schedule_iters - 1)
    warmup = warmup_updates(config, iters)
    if step < warmup:
        return schedule.warmup_init + (config.learning_rate - schedule.warmup_init) * (step + 1) / warmup
    after = step - warmup
    if schedule.name == "constant":
        return config.learning_rate
    arguments = schedule.arguments or _arguments_to_zero(schedule.name, config.learning_rate, max(1, iters - warmup))
    shape = getattr(optimizers.schedulers, schedule.name)(*_with_whole_steps(schedule.name, arguments))
    return float(shape(mx.array(after))) * config.learning_rate / arguments[0]


def rate_note(config: RunConfig, iters: int, step: int) -> str:
    """A note about a changed `learning_rate`: the peak of the schedule, and the rate of the next update."""
    if step >= iters:
        return ""
    rate = learning_rate_at(config, iters, step)
    if abs(rate - config.learning_rate) < 1e-9 * config.learning_rate:
        return f"Update {step + 1} runs at {rate:.3g}."
    return f"It is the peak of the schedule ({config.lr_schedule.name}): update {step + 1} runs at {rate:.3g}."


def stretch_note(config: RunConfig, before: int, after: int, step: int) -> str:
    """A note about the learning rate when a run grows from `before` to `after` updates; empty if it does not change."""
    if after <= before or all(
        learning_rate_at(config, before, at) == learning_rate_at(config, after, at) for at in (step, before - 1)
    ):
        return ""
    last, then = (learning_rate_at(config, *at) for at in ((before, max(0, step - 1)), (after, step)))
    return (
        f"The learning rate schedule is stretched over {after} updates: update {step + 1} has a rate of {then:.2e}; "
        f"the one before had {last:.2e}. `schedule_iters={before}` keeps the old schedule, and its last rate for the "
        "added updates."
    )


def _arguments_to_zero(name: str, peak: float, updates: int) -> tuple[float, ...]:
    return {"cosine_decay": (peak, updates, 0.0), "linear_schedule": (peak, 0.0, updates)}[name]


def _with_whole_steps(name: str, arguments: tuple[float, ...]) -> tuple[float, ...]:
    position = {"cosine_decay": 1, "linear_schedule": 2, "step_decay": 2}.get(name)
    return tuple(int(value) if index == position else value for index, value in enumerate(arguments))


def scalar(array: mx.array) -> float:
    """The value of a () array of real numbers."""
    return typing.cast(float, array.item())


def gradient_norm(gradients: Any) -> mx.array:
    """() float32: L2 norm over all arrays together."""
    squares = [mx.square(array.astype(mx.float32)).sum() for _, array in named_arrays(gradients)]
    return mx.sqrt(sum(squares, mx.array(0.0)))


def clip(gradients: Any, norm: mx.array, limit: float) -> Any:
    """Gradients scaled so that their norm is at most `limit`."""
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda array: array * scale.astype(array.dtype), gradients)
