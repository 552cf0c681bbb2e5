"""One transactional update: everything is computed first and then applied, or nothing changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_map, tree_unflatten

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.errors import CheckpointError, ModelChanged, TrainingError
from mlx_nb.model.backend import one_blas_thread
from mlx_nb.model.finite import not_finite
from mlx_nb.model.lanes import in_lanes, lanes_of, one_by_one
from mlx_nb.model.logprobs import TargetInputs, TargetScorer, target_inputs
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.trained import forms_of, train_only
from mlx_nb.model.trees import named_arrays
from mlx_nb.objectives.base import LossSum, Objective, joined
from mlx_nb.train.optimizer import clip, gradient_norm, scalar
from mlx_nb.train.vectors import optimizer_form

LARGEST_SHOWN = 3
# Compiled functions are traced once per shape, so there shapes are rounded up to fewer of them.
COMPILED_WIDTHS, _COMPILED_TARGETS = 32, 64
Judge = Callable[[float, float], tuple[type[TrainingError], str] | None]


class Gradients(NamedTuple):
    """Gradients of the MEAN loss over all micro-batches, with the loss, its units, mean metrics and row losses."""

    gradients: Any
    loss: float
    units: float
    metrics: dict[str, float]
    row_losses: list[float]


class Update(NamedTuple):
    """The measurements of one update: mean loss, its units, gradient norm before clipping, mean metrics.

    `row_losses` has the mean loss of each row, in micro-batch order.
    """

    loss: float
    units: float
    gradient_norm: float
    metrics: dict[str, float]
    row_losses: list[float]


class Evaluation(NamedTuple):
    """The evaluation of one batch: loss sum, units, mean loss and units of each row, metrics as (sum, divisor)."""

    total: float
    units: float
    row_losses: list[float]
    metrics: dict[str, tuple[float, float]]
    row_units: list[float]


class Stepper:
    """Updates the trainable parameters of a model with an optimizer and an objective.

    `poll` is called before each forward pass and before an update is applied, and may raise to abort. A batch of enough
    tokens is computed in up to `lanes` parallel parts (model/lanes.py). Each update moves the B matrices of an adapter
    `b_ratio` times as far as the optimizer says: LoRA+, https://arxiv.org/abs/2402.12354, section 4.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optimizers.Optimizer,
        objective: Objective,
        scorer: TargetScorer,
        *,
        compiled: bool,
        lanes: int = 1,
        poll: Callable[[], None] = lambda: None,
        b_ratio: float = 1.0,
    ) -> None:
        self.model = model
        self.b_ratio = b_ratio
        self.poll = poll
        self.optimizer = optimizer
        self.objective = objective
        self.scorer = scorer
        self.lanes = lanes
        self._multiples = (_COMPILED_TARGETS, COMPILED_WIDTHS) if compiled else (1, 1)
        self._metric_names: tuple[str, ...] = ()
        parameters = model.trainable_parameters()
        self._trained = forms_of(parameters)
        self._form = optimizer_form(type(optimizer).__name__.lower(), parameters)
        optimizer.init(self._form.join(parameters))
        mx.eval(optimizer.state)
        self._gradients = self._sum_and_gradients
        if compiled:
            state = [mx.random.state]
            self._gradients = mx.compile(self._sum_and_gradients, inputs=state, outputs=state)

    def trainable(self) -> Any:
        """The trained parameters as a tree. If user code has frozen or unfrozen parameters, that is undone first.

        Raises ModelChanged if an array is missing or has another shape or dtype.
        """
        parameters = self.model.trainable_parameters()
        if forms_of(parameters) != self._trained:
            train_only(self.model, self._trained)
            parameters = self.model.trainable_parameters()
            there = forms_of(parameters)
            for name, (shape, dtype) in self._trained.items():
                if there.get(name) != (shape, dtype):
                    now = "missing" if name not in there else f"of shape {there[name][0]}, {there[name][1]}"
                    raise ModelChanged(
                        f"the model was changed from outside: trained array {name} had shape {shape}, {dtype} and is "
                        f"now {now}. `%finetune resume`, or `Run.resume`, continues from the last good update."
                    )
        return parameters

    def arrays(self) -> dict[str, dict[str, mx.array]]:
        """The trained `parameters` and the `optimizer` state, by name."""
        return {
            "parameters": dict(named_arrays(self.trainable())),
            "optimizer": dict(named_arrays(self.optimizer.state)),
        }

    def refuse_mismatch(self, step: int, parameters: dict[str, mx.array], optimizer: dict[str, mx.array]) -> None:
        """Raise CheckpointError if the arrays of the checkpoint of `step` do not match this model and optimizer."""
        here = self.arrays()
        pairs = {"parameter": (parameters, here["parameters"]), "optimizer state": (optimizer, here["optimizer"])}
        for what, (theirs, ours) in pairs.items():
            for name in sorted(theirs.keys() | ours.keys()):
                one, other = theirs.get(name), ours.get(name)
                if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
                    raise CheckpointError(
                        f"the checkpoint of step {step} is from another run: {what} {name} does not match. "
                        "Use its model, fine_tune_type, lora_parameters and optimizer."
                    )
            if damaged := not_finite(theirs):
                raise CheckpointError(f"the checkpoint of step {step} is damaged: {what} {damaged}.")

    def restore(self, parameters: dict[str, mx.array], optimizer: dict[str, mx.array]) -> None:
        """Restore parameters and optimizer state, which have been checked."""
        self.model.update(tree_unflatten(list(parameters.items())))
        self.optimizer.state = tree_unflatten(list(optimizer.items()))

    def _parts(self, batch: TokenBatch) -> tuple[TargetInputs, ...]:
        return tuple(target_inputs(part, *self._multiples) for part in lanes_of(batch, self.lanes))

    def _sum(self, parts: tuple[TargetInputs, ...]) -> LossSum:
        return joined(in_lanes(lambda inputs: self.objective(self.scorer, inputs), parts))

    def _sum_and_gradients(self, parameters: Any, parts: tuple[TargetInputs, ...]) -> tuple[Any, Any]:
        def sums() -> LossSum:
            found = self._sum(parts)
            self._metric_names = tuple(found.metrics)
            return found

        return sum_and_gradients(self.model, parameters, sums)

    def gradients(self, micro_batches: Sequence[TokenBatch], seed: int) -> Gradients:
        """Gradients of the mean loss over all micro-batches as a tree, with the measurements."""
        found = self._joined_gradients(micro_batches, seed)
        return found._replace(gradients=self._form.split(found.gradients))

    def _joined_gradients(self, micro_batches: Sequence[TokenBatch], seed: int) -> Gradients:
        """Like `gradients`, in the form that the optimizer takes."""
        summed = self.summed_gradients(micro_batches, seed)
        # With mask_truncated_completions an update may have no units; its gradient is then 0 and not 0 / 0.
        divisor = summed.units or 1.0
        mean = tree_map(lambda array: array / divisor, summed.gradients)
        return summed._replace(gradients=mean, loss=summed.loss / divisor)

    def summed_gradients(self, micro_batches: Sequence[TokenBatch], seed: int) -> Gradients:
        """Gradients of the SUM of the loss, which is not divided either, in the form that the optimizer takes.

        The model's parameters and mode and the user's random stream are restored, also after an error.
        """
        parameters = self.trainable()
        summed: Any = None
        total = units = 0.0
        metrics: dict[str, tuple[float, float]] = {}
        row_losses: list[float] = []
        try:
            with random_stream(seed), training_mode(self.model):
                for batch in micro_batches:
                    self.poll()
                    self.scorer.refuse_beyond_memory(batch, trained=True)
                    parts = self._parts(batch)
                    (value, packed), gradients = self._gradients(parameters, parts)
                    sums = _unpacked(value, packed, self._metric_names)
                    joined_gradients = self._form.join(one_by_one(gradients) if len(parts) > 1 else gradients)
                    summed = joined_gradients if summed is None else tree_map(mx.add, summed, joined_gradients)
                    _evaluate(parts, summed, sums)
                    total += scalar(sums.total)
                    units += scalar(sums.units)
                    row_losses += _row_losses(sums)
                    add_metrics(metrics, measured(sums))
        finally:
            self.model.update(parameters)
        return Gradients(summed, total, units, mean_metrics(metrics), row_losses)

    def update(
        self,
        micro_batches: Sequence[TokenBatch],
        *,
        learning_rate: float,
        grad_clip: float | None,
        seed: int,
        rows: Sequence[int],
        judge: Judge,
    ) -> Update:
        """Do one optimizer update, unless `judge(loss, gradient norm)` returns an error class and message.

        That error is raised with `rows` and the largest gradients. After any error nothing has changed.
        """
        gradients, loss, units, metrics, row_losses = self._joined_gradients(micro_batches, seed)
        norm_array = gradient_norm(gradients)
        norm = scalar(norm_array)
        if (refusal := judge(loss, norm)) is not None:
            raise _refused(*refusal, rows, largest_gradients(self._form.split(gradients)))
        self.apply(gradients, norm_array, learning_rate=learning_rate, grad_clip=grad_clip)
        return Update(loss, units, norm, metrics, row_losses)

    def apply(self, gradients: Any, norm: mx.array, *, learning_rate: float, grad_clip: float | None) -> None:
        """Apply gradients of this norm, in the form that the optimizer takes. After any error nothing has changed."""
        optimizer_before = _shallow(self.optimizer.state)
        try:
            if grad_clip is not None:
                gradients = clip(gradients, norm, grad_clip)
            self.optimizer.learning_rate = learning_rate
            before = self._form.join(self.model.trainable_parameters())
            parameters = self._form.split(self.optimizer.apply_gradients(gradients, before))
            if self.b_ratio != 1.0:
                parameters = _further(parameters, self.model.trainable_parameters(), self.b_ratio)
            self._form.evaluate(parameters)
            mx.eval(self.optimizer.state)
            self.poll()
        except BaseException:
            self.optimizer.state = optimizer_before
            raise
        self.model.update(parameters)

    def evaluate(self, batch: TokenBatch) -> Evaluation:
        """Evaluate one batch, without dropout and gradients."""
        return evaluate_batch(self.objective, self.scorer, batch, self.lanes, self._multiples)


def evaluate_batch(
    objective: Objective, scorer: TargetScorer, batch: TokenBatch, lanes: int = 1, multiples: tuple[int, int] = (1, 1)
) -> Evaluation:
    """Evaluate one batch on the scorer's model, which must be in evaluation mode."""
    scorer.refuse_beyond_memory(batch)
    parts = tuple(target_inputs(part, *multiples) for part in lanes_of(batch, lanes))
    sums = joined(in_lanes(lambda inputs: objective(scorer, inputs), parts))
    _evaluate(parts, sums)
    return Evaluation(scalar(sums.total), scalar(sums.units), _row_losses(sums), measured(sums), _row_units(sums))


def sum_and_gradients(model: nn.Module, parameters: Any, sums: Callable[[], LossSum]) -> tuple[Any, Any]:
    """((total, the other sums as one vector), gradients) of the `sums` of a model with these trained parameters."""

    def total(parameters: Any) -> tuple[mx.array, mx.array]:
        model.update(parameters)
        found = sums()
        return found.total, _packed(found)

    return mx.value_and_grad(total)(parameters)


def _further(parameters: Any, before: Any, ratio: float) -> Any:
    """`parameters` with the B matrices moved `ratio` times as far from `before`, which is a rate of `ratio` times.

    True of every optimizer whose step is proportional to the rate; decoupled weight decay is part of the step.
    """
    old = dict(named_arrays(before))
    moved = [
        (name, old[name] + ratio * (array - old[name]) if name.endswith(".lora_b") else array)
        for name, array in named_arrays(parameters)
    ]
    return tree_unflatten(moved)


def largest_gradients(gradients: Any) -> list[tuple[str, float]]:
    """(parameter, L2 norm) of the gradient arrays with the largest norms, non-finite ones first."""
    norms = [(name, scalar(mx.linalg.norm(array.astype(mx.float32)))) for name, array in named_arrays(gradients)]
    return sorted(norms, key=lambda pair: -pair[1] if math.isfinite(pair[1]) else -math.inf)[:LARGEST_SHOWN]


def _refused(
    kind: type[TrainingError], what: str, rows: Sequence[int], largest: list[tuple[str, float]]
) -> TrainingError:
    named = ", ".join(f"{name} ({norm:.3g})" for name, norm in largest)
    return kind(f"{what} in a batch with rows {', '.join(map(str, rows))}. Largest gradients: {named}.", rows, largest)


def measured(sums: LossSum) -> dict[str, tuple[float, float]]:
    """The metrics of a batch as Python numbers: name -> (sum, divisor)."""
    return {name: (scalar(total), scalar(divisor)) for name, (total, divisor) in sums.metrics.items()}


def add_metrics(metrics: dict[str, tuple[float, float]], more: dict[str, tuple[float, float]]) -> None:
    """Add the metrics of one more batch."""
    for name, (total, divisor) in more.items():
        before = metrics.get(name, (0.0, 0.0))
        metrics[name] = (before[0] + total, before[1] + divisor)


def mean_metrics(metrics: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Sum / divisor of each metric; metrics with divisor 0 are omitted."""
    return {name: total / divisor for name, (total, divisor) in metrics.items() if divisor}


def _evaluate(parts: tuple[TargetInputs, ...], *arrays: Any) -> None:
    with one_blas_thread() if len(parts) > 1 else nullcontext():
        mx.eval(*arrays)


def _packed(sums: LossSum) -> mx.array:
    """All sums but the total as one vector, because a compiled gradient cannot have two equal outputs."""
    metrics = [array for pair in sums.metrics.values() for array in pair]
    return mx.concatenate([array.reshape(-1) for array in (sums.units, sums.row_total_R, sums.row_units_R, *metrics)])


def _unpacked(total: mx.array, packed: mx.array, names: tuple[str, ...]) -> LossSum:
    rows = (packed.size - 1 - 2 * len(names)) // 2
    ends = [1, 1 + rows, *(1 + 2 * rows + index for index in range(2 * len(names)))]
    units, row_total_R, row_units_R, *metrics = mx.split(packed, ends)
    pairs = [(metric.reshape(()), divisor.reshape(())) for metric, divisor in zip(metrics[::2], metrics[1::2])]
    return LossSum(total, units.reshape(()), dict(zip(names, pairs)), row_total_R, row_units_R)


def _row_losses(sums: LossSum) -> list[float]:
    return (sums.row_total_R / sums.row_units_R).tolist()  # type: ignore[return-value]


def _row_units(sums: LossSum) -> list[float]:
    return sums.row_units_R.tolist()  # type: ignore[return-value]


def _shallow(tree: Any) -> Any:
    """A copy of the containers of a tree, sharing its arrays. The optimizer replaces entries in place."""
    return tree_map(lambda array: array, tree)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """A context in training mode, with dropout; evaluation mode is restored afterwards."""
    try:
        model.train()
        yield
    finally:
        model.eval()
