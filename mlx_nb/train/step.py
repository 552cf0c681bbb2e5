"""One transactional update: computed and evaluated first, then put in place; or nothing changes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map

from mlx_nb.errors import NonFiniteLoss
from mlx_nb.model.logprobs import TargetInputs, TargetScorer
from mlx_nb.model.randomness import random_stream
from mlx_nb.objectives.base import Objective
from mlx_nb.train.optimizer import clip, gradient_norm, scalar


class Update(NamedTuple):
    """What one update measured: mean loss, units it is over, gradient norm before clipping, mean metrics."""

    loss: float
    units: float
    gradient_norm: float
    metrics: dict[str, float]


class Stepper:
    """Updates one model's trainable parameters with one optimizer and one objective."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        objective: Objective,
        scorer: TargetScorer,
        *,
        compiled: bool,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.objective = objective
        self.scorer = scorer
        optimizer.init(model.trainable_parameters())
        self._gradients = self._sum_and_gradients
        if compiled:
            state = [mx.random.state]
            self._gradients = mx.compile(self._sum_and_gradients, inputs=state, outputs=state)

    def _sum_and_gradients(self, parameters: Any, inputs: TargetInputs) -> tuple[Any, Any]:
        def total(parameters: Any) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            self.model.update(parameters)
            sums = self.objective(self.scorer, inputs)
            return sums.total, sums.units, sums.metrics

        return mx.value_and_grad(total)(parameters)

    def gradients(self, micro_batches: Sequence[TargetInputs], seed: int) -> tuple[Any, float, float, dict[str, float]]:
        """(gradients of the MEAN loss over all micro-batches, mean loss, units, mean metrics).

        The model's parameters, its mode and the user's random stream are as before, whatever happens.
        """
        parameters = self.model.trainable_parameters()
        summed: Any = None
        total = units = 0.0
        metrics: dict[str, float] = {}
        try:
            with random_stream(seed), training_mode(self.model):
                for inputs in micro_batches:
                    (batch_total, batch_units, batch_metrics), gradients = self._gradients(parameters, inputs)
                    summed = gradients if summed is None else tree_map(mx.add, summed, gradients)
                    mx.eval(summed, batch_total, batch_units, batch_metrics)
                    total += batch_total.item()
                    units += batch_units.item()
                    for name, value in batch_metrics.items():
                        metrics[name] = metrics.get(name, 0.0) + value.item()
        finally:
            self.model.update(parameters)
        mean = tree_map(lambda array: array / units, summed)
        return mean, total / units, units, {name: value / units for name, value in metrics.items()}

    def update(
        self,
        micro_batches: Sequence[TargetInputs],
        *,
        learning_rate: float,
        grad_clip: float | None,
        seed: int,
        rows: Sequence[int],
    ) -> Update:
        """One optimizer update. Raises NonFiniteLoss naming `rows`; on any error nothing has changed."""
        optimizer_before = _shallow(self.optimizer.state)
        try:
            gradients, loss, units, metrics = self.gradients(micro_batches, seed)
            norm_array = gradient_norm(gradients)
            norm = scalar(norm_array)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
                raise NonFiniteLoss(
                    f"{what} in a batch with rows {', '.join(map(str, rows))}. The update was not applied. "
                    "Look at these rows, lower learning_rate, or set grad_clip.",
                    rows,
                )
            if grad_clip is not None:
                gradients = clip(gradients, norm_array, grad_clip)
            self.optimizer.learning_rate = learning_rate
            parameters = self.optimizer.apply_gradients(gradients, self.model.trainable_parameters())
            mx.eval(parameters, self.optimizer.state)
        except BaseException:
            self.optimizer.state = optimizer_before
            raise
        self.model.update(parameters)
        return Update(loss, units, norm, metrics)

    def evaluate(self, inputs: TargetInputs) -> tuple[float, float]:
        """(sum of the loss, units) of one batch without dropout and without gradients."""
        sums = self.objective(self.scorer, inputs)
        mx.eval(sums.total, sums.units)
        return scalar(sums.total), scalar(sums.units)


def _shallow(tree: Any) -> Any:
    """The same arrays in new containers: the optimizer replaces entries in place."""
    return tree_map(lambda array: array, tree)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Dropout is on while inside and off again afterwards, so that talking to the model is not noisy."""
    model.train()
    try:
        yield
    finally:
        model.eval()
