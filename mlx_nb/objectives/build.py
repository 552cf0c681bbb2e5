"""Builds the objective of a run from its settings: the method's loss function, its options, and the sums around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from mlx_nb.config.methods import method_named, options_of
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import LossRaised
from mlx_nb.objectives.base import Objective
from mlx_nb.objectives.kinds import LOSS_KINDS
from mlx_nb.process.user_code import describe_error, is_user_defined


def objective_for(config: RunConfig) -> Objective:
    """The objective that `config` names, with its options bound."""
    method = method_named(config.method)
    loss = method.loss(config.loss).function()
    if is_user_defined(loss):
        loss = _named_when_it_raises(loss, config.method)
    options = options_for(config)
    return LOSS_KINDS[method.row_kind].wrap(partial(loss, **options), float(options.get("beta") or 1.0), config)


def _named_when_it_raises(loss: Callable[..., Any], method: str) -> Callable[..., Any]:
    """The same function, with its errors marked as its own: an OSError in it does not mean a full disk."""

    @wraps(loss)
    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return loss(*arguments, **options)
        except Exception as error:
            raise LossRaised(f"the loss of `method: {method}` raised {describe_error(error, loss)}.") from error

    return guarded


def options_for(config: RunConfig) -> dict[str, Any]:
    """The options of the loss function: from the settings, otherwise its own defaults."""
    defaults = options_of(method_named(config.method).loss(config.loss).function())
    given = {name: value for name in defaults if (value := getattr(config, name, None)) is not None}
    return {**defaults, **given, **config.method_options}
