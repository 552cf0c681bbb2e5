"""Tests the laws of objectives on a model of a few thousand parameters, for built-in and user-defined ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_nb.config.methods import Loss, Method, method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.errors import ConfigError
from mlx_nb.model.logprobs import TargetInputs, TargetScorer, target_inputs
from mlx_nb.model.mlx_lm_import import import_mlx_lm
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.trees import named_arrays
from mlx_nb.objectives.base import LossSum, Objective
from mlx_nb.objectives.build import objective_for
from mlx_nb.objectives.kinds import LOSS_KINDS
from mlx_nb.objectives.trial_batches import VOCABULARY

ROWS = 6

# (scorer, rows, width multiple) -> batch
_Maker = Callable[[TargetScorer, Sequence[int], int], TokenBatch]


class Trial(NamedTuple):
    """An objective and the batches to test it on: some of `ROWS` rows, padded to a multiple of a width."""

    config: RunConfig
    objective: Objective
    scorer: TargetScorer
    make: _Maker
    method: Method
    loss: Loss

    def inputs(self) -> TargetInputs:
        """All rows as one batch."""
        return target_inputs(self.make(self.scorer, range(ROWS), 1))


def check_objective(name: str, loss: str | None = None, **settings: Any) -> tuple[str, ...]:
    """Test the laws on a method, built in or your own; `settings` are those of a run, such as `beta=0.2`.

    Returns the laws that were tested. Raises ConfigError at the first violation: what differs, and by how much.
    """
    # With one update per rollout every ratio is 1, and options that bound it would be refused.
    of_prompts = {"rewards": ["length"], "updates_per_rollout": 2} if method_named(name).kind.sampled else {}
    config = RunConfig.from_dict({"method": name, "loss": loss, **of_prompts, **settings})
    method = method_named(name)
    with random_stream(0):
        scorer = TargetScorer(_model())
    trial = Trial(
        config, objective_for(config), scorer, LOSS_KINDS[method.row_kind].trial_batch, method, method.loss(loss)
    )
    tried = []
    for law in _LAWS:
        try:
            trouble = law(trial)
        except ConfigError as error:
            trouble = str(error)
        if trouble:
            raise ConfigError(f"{name}: {trouble}")
        if trouble is not None:
            tried.append((law.__doc__ or "").splitlines()[0])
    return tuple(tried)


# A law returns the violation, an empty string if it holds, or None if it does not apply.


def _finite(trial: Trial) -> str:
    """Loss, units and gradient are finite, and units are above 0."""
    sums, gradient = _gradient(trial, trial.inputs())
    numbers = [sums.total, sums.units, *(array for _, array in named_arrays(gradient))]
    if not all(mx.isfinite(array).all().item() for array in numbers):
        return "loss or gradient is not finite. Look for a log of 0, a division by 0 or an overflow."
    return "" if _number(sums.units) > 0 else "units are 0, so the loss has no mean."


def _pure(trial: Trial) -> str:
    """The same batch gives the same numbers again."""
    inputs = trial.inputs()
    first, second = (_number(trial.objective(trial.scorer, inputs).total) for _ in range(2))
    return (
        ""
        if first == second
        else f"the same batch gave {first} and then {second}: the loss keeps state or draws random numbers."
    )


def _reference_is_registered(trial: Trial) -> str | None:
    """A loss that reads log-probabilities of a reference must be registered with `reference=True`."""
    if trial.method.reference:
        return None
    batch = trial.make(trial.scorer, range(ROWS), 1)
    others = {name: values for name, values in batch.token_values.items() if name != "reference"}
    totals = [
        _number(trial.objective(trial.scorer, target_inputs(one)).total)
        for one in (batch, batch._replace(token_values=others))
    ]
    if totals[0] == totals[1]:
        return ""
    return "the loss reads log-probabilities of a reference and is given none. Register it with `reference=True`."


def _padding_is_inert(trial: Trial) -> str:
    """Neither the width of the padding nor its content changes loss, units or gradient."""
    wide = trial.make(trial.scorer, range(ROWS), 32)
    junk_BT = np.where(_is_padding(wide), 7, wide.tokens_BT).astype(np.int32)
    plain = _gradient(trial, trial.inputs())
    padded = _gradient(trial, target_inputs(wide._replace(tokens_BT=junk_BT), 64))
    return _differ("padding", plain, padded)


def _packing_is_inert(trial: Trial) -> str:
    """Lines in one row, one after the other, give loss, units and gradient of the same lines side by side."""
    batch = trial.make(trial.scorer, range(ROWS), 1)
    packed = _gradient(trial, target_inputs(batch._replace(packed=True)))
    return _differ("packing", _gradient(trial, trial.inputs()), packed)


def _micro_batches_are_one_batch(trial: Trial) -> str:
    """Sums over micro-batches of different sizes equal those over one batch."""
    whole = _gradient(trial, trial.inputs())
    parts = [_gradient(trial, target_inputs(trial.make(trial.scorer, rows, 1))) for rows in ((0,), (1, 2), (3, 4, 5))]
    total = mx.stack([part[0].total for part in parts]).sum()
    units = mx.stack([part[0].units for part in parts]).sum()
    gradient = {key: sum(dict(named_arrays(part[1]))[key] for part in parts) for key, _ in named_arrays(whole[1])}
    return _differ(
        "cutting the batch into micro-batches", whole, (whole[0]._replace(total=total, units=units), gradient)
    )


def _resuming_is_exact(trial: Trial) -> str:
    """Repeated updates from the first one on, by a newly built objective, give the same bits."""
    parts = [target_inputs(trial.make(trial.scorer, rows, 1)) for rows in ((0, 1), (2, 3), (4, 5))]
    start = trial.scorer.model.trainable_parameters()

    def descend(trial: Trial, parameters: Any, inputs: TargetInputs) -> Any:
        trial.scorer.model.update(parameters)
        _, gradient = _gradient(trial, inputs)
        return tree_map(lambda array, slope: array - 0.01 * slope, parameters, gradient)

    try:
        first = descend(trial, start, parts[0])
        resumed = trial._replace(objective=objective_for(trial.config))
        ends = [descend(one, descend(one, first, parts[1]), parts[2]) for one in (trial, resumed)]
    finally:
        trial.scorer.model.update(start)
    for (key, one_array), (_, other_array) in zip(*map(named_arrays, ends)):
        if not mx.array_equal(one_array, other_array).item():
            return f"after a resume {key} differs: the loss remembers what it saw. It may use only what it is given."
    return ""


def _gradient_is_that_of_the_loss(trial: Trial) -> str | None:
    """The gradient equals finite differences along its own direction.

    Not tested for a loss that declares that it uses `mx.stop_gradient`.
    """
    if trial.loss.stops_gradient:
        return None
    inputs = trial.inputs()
    scorer, parameters = trial.scorer, trial.scorer.model.trainable_parameters()
    _, gradient = _gradient(trial, inputs)
    flat = dict(named_arrays(gradient))
    norm = sum(_number(mx.square(array).sum()) for array in flat.values()) ** 0.5
    if norm == 0:
        return "the gradient is 0 everywhere: the loss does not depend on the model."
    step = 1e-3 / norm  # short, so that no hinge or clip is crossed
    values = []
    try:
        for sign in (1, -1):
            moved = [(key, array + sign * step * flat[key]) for key, array in named_arrays(parameters)]
            scorer.model.load_weights(moved, strict=False)
            values.append(_number(trial.objective(scorer, inputs).total))
    finally:
        scorer.model.update(parameters)
    expected, found = (values[0] - values[1]) / (2 * step), norm**2
    if abs(expected - found) > 0.02 * abs(found):
        return f"the gradient's slope is {found:.6g} and finite differences give {expected:.6g}."
    return ""


def _metrics_are_documented(trial: Trial) -> str:
    """Every metric is described in the method, finite, and over units above 0 or left out."""
    method, sums = trial.method, trial.objective(trial.scorer, trial.inputs())
    for metric, (total, divisor) in sums.metrics.items():
        if metric not in method.metrics and metric not in LOSS_KINDS[method.row_kind].metrics:
            return f"the metric {metric!r} is not described. Name it in `metrics` of register_objective."
        if not (mx.isfinite(total).item() and mx.isfinite(divisor).item()):
            return f"the metric {metric!r} is not finite."
    return ""


_LAWS = (
    _finite,
    _pure,
    _reference_is_registered,
    _padding_is_inert,
    _packing_is_inert,
    _micro_batches_are_one_batch,
    _resuming_is_exact,
    _gradient_is_that_of_the_loss,
    _metrics_are_documented,
)


def _gradient(trial: Trial, inputs: TargetInputs) -> tuple[LossSum, Any]:
    scorer = trial.scorer

    def total(parameters: Any) -> LossSum:
        scorer.model.update(parameters)
        return trial.objective(scorer, inputs)

    parameters = scorer.model.trainable_parameters()
    try:
        sums, gradient = mx.value_and_grad(total)(parameters)
        mx.eval(sums, gradient)
    finally:
        scorer.model.update(parameters)
    return LossSum(*sums), gradient


def _differ(what: str, one: tuple[LossSum, Any], other: tuple[LossSum, Any]) -> str:
    for name in ("total", "units"):
        first, second = (_number(getattr(sums, name)) for sums, _ in (one, other))
        if not np.isclose(first, second, rtol=2e-4, atol=2e-5):
            return f"{what} changes the {name} of the loss from {first:.6g} to {second:.6g}."
    for (key, one_array), (_, other_array) in zip(named_arrays(one[1]), named_arrays(other[1])):
        largest = _number(mx.abs(one_array - other_array).max())
        if largest > 1e-3 * max(1.0, _number(mx.abs(one_array).max())):
            return f"{what} changes the gradient of {key} by {largest:.3g}."
    return ""


def _number(array: mx.array) -> float:
    return float(np.array(array))


def _is_padding(batch: TokenBatch) -> np.ndarray:
    return np.arange(batch.tokens_BT.shape[1])[None] >= np.array(batch.lengths)[:, None]


def _model() -> nn.Module:
    """A llama with two layers."""
    import_mlx_lm()
    from mlx_lm.models import llama

    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
        )
    )
    model.eval()
    mx.eval(model.parameters())
    return model
