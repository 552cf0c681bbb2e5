"""The optimizers and their arguments besides learning rate and weight decay, declared without loading mlx.

A test compares the table with mlx's signatures. A new optimizer is an entry in OPTIMIZERS and a name in OptimizerName.
"""

from __future__ import annotations

import importlib
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_nb.config.fields import SettingError, as_float32, typo_of
from mlx_nb.errors import shown


@dataclass(frozen=True)
class Argument:
    """What an argument accepts, in words, and a test for it."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1 and as_float32(value) < 1


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 <= value < float("inf")


def _is_pair(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(fits, value))


_SHARE = Argument("a number of at least 0 and below 1", _is_share)
_BETAS = Argument(
    "two numbers of at least 0 and below 1, such as [0.9, 0.999]", lambda value: _is_pair(value, _is_share)
)
_EPS = Argument("a number of at least 0", _is_positive)
_FLAG = Argument("true or false", lambda value: isinstance(value, bool))
_STEPS = Argument(
    "a whole number from 1 to 100",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 100,
)


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    where        its class, as `module:name`
    arguments    what it takes besides learning rate and weight decay
    standard     our defaults for its arguments, where they differ from mlx's
    decays       whether it takes a weight decay
    elementwise  whether each number is updated from its own gradient alone, so that arrays may be concatenated
    """

    where: str
    arguments: dict[str, Argument]
    standard: Mapping[str, Any] = field(default_factory=dict)
    decays: bool = True
    elementwise: bool = False

    def made(self, arguments: Mapping[str, Any]) -> Any:
        """An instance of the optimizer, its class imported if necessary."""
        module, name = self.where.split(":")
        return getattr(importlib.import_module(module), name)(**arguments)


OptimizerName = Literal["adam", "adamw", "sgd", "adafactor", "muon", "lion"]
_ADAM = {"betas": _BETAS, "eps": _EPS, "bias_correction": _FLAG}
# Without bias correction the first steps of mlx's Adam are about three times too long.
_CORRECTED = {"bias_correction": True}
OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer("mlx.optimizers:Adam", _ADAM, _CORRECTED, decays=False, elementwise=True),
    "adamw": Optimizer("mlx.optimizers:AdamW", _ADAM, _CORRECTED, elementwise=True),
    "sgd": Optimizer(
        "mlx.optimizers:SGD", {"momentum": _SHARE, "dampening": _SHARE, "nesterov": _FLAG}, elementwise=True
    ),
    "adafactor": Optimizer(
        "mlx.optimizers:Adafactor",
        {
            "eps": Argument(
                "two numbers of at least 0, such as [1e-30, 1e-3]", lambda value: _is_pair(value, _is_positive)
            ),
            "clip_threshold": Argument("a number above 0", lambda value: _is_positive(value) and value > 0),
            "decay_rate": Argument(
                "a number of at most 0", lambda value: _is_number(value) and float("-inf") < value <= 0
            ),
            "beta_1": Argument(
                "null, or a number of at least 0 and below 1", lambda value: value is None or _is_share(value)
            ),
            "scale_parameter": _FLAG,
            "relative_step": _FLAG,
            "warmup_init": _FLAG,
        },
        # With the scheduled rate instead of adafactor's own relative one.
        {"relative_step": False, "scale_parameter": False},
    ),
    "muon": Optimizer("mlx_nb.train.optimizer:Muon", {"momentum": _SHARE, "nesterov": _FLAG, "ns_steps": _STEPS}),
    "lion": Optimizer("mlx.optimizers:Lion", {"betas": _BETAS}, elementwise=True),
}


def has_no_decay(name: Any) -> bool:
    """Whether `name` is an optimizer that takes no weight decay."""
    return name in OPTIMIZERS and not OPTIMIZERS[name].decays


def arguments_of(optimizer: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments for one optimizer in `optimizer_config`, which mlx-lm nests by the optimizer's name."""
    return (given.get(optimizer) or {}) if is_nested(given) else given


def is_nested(given: Mapping[str, Any]) -> bool:
    """Whether it is mlx-lm's form, {adamw: {betas: ...}}."""
    return any(name in OPTIMIZERS for name in given)


def check_optimizer_config(optimizer: str, given: Mapping[str, Any]) -> Iterator[SettingError]:
    """Errors about `optimizer_config`, argument by argument."""
    path: tuple[str, ...] = ("optimizer_config",)
    if is_nested(given):
        for name, inner in given.items():
            yield from _check_nested(optimizer, name, inner)
        path = (*path, optimizer)
        given = arguments_of(optimizer, given)
        if not isinstance(given, Mapping):
            return
    for name, value in given.items():
        message = _wrong_with(optimizer, name, value)
        if message:
            yield SettingError((*path, name), message)
    if optimizer == "sgd" and not given.get("momentum"):
        for name in ("dampening", "nesterov"):
            if given.get(name):
                yield SettingError((*path, name), f"`optimizer_config.{name}` has no effect without `momentum`.")
    elif optimizer == "sgd" and given.get("nesterov") is True and given.get("dampening"):
        yield SettingError(
            (*path, "nesterov"), "`optimizer_config.nesterov` and `dampening` exclude each other. Remove one of them."
        )


def _check_nested(optimizer: str, name: str, inner: Any) -> Iterator[SettingError]:
    path = ("optimizer_config", name)
    if name not in OPTIMIZERS:
        near = typo_of(name, OPTIMIZERS)
        suggestion = f" Did you mean {near!r}?" if near else f" Put it inside `{optimizer}`."
        yield SettingError(path, f"`optimizer_config.{name}` is not an optimizer.{suggestion}")
    elif inner is not None and not isinstance(inner, Mapping):
        yield SettingError(path, f"`optimizer_config.{name}` must be a mapping, not {shown(inner)}.")
    elif inner and name != optimizer:
        yield SettingError(
            path, f"`optimizer_config.{name}` has no effect with `optimizer: {optimizer}`. Remove one of them."
        )


def _wrong_with(optimizer: str, name: str, value: Any) -> str | None:
    label = f"`optimizer_config.{name}`"
    known = OPTIMIZERS[optimizer].arguments
    if name == "weight_decay" and OPTIMIZERS[optimizer].decays:
        return None if _is_positive(value) else f"{label} cannot be {shown(value)}. It takes {_EPS.words}."
    if name in ("learning_rate", "lr"):
        return f"{label} has no effect: the rate is `learning_rate`, with `lr_schedule`. Set that."
    if name not in known:
        near = typo_of(name, known)
        suggestion = f" Did you mean {near!r}?" if near else ""
        others = [f"`{other}`" for other, facts in OPTIMIZERS.items() if name in facts.arguments]
        taken = f" It is one of {', '.join(others)}." if others and not near else ""
        if name == "weight_decay":
            taken = " Use `optimizer: adamw`."
        return f"{label} is not an argument of {optimizer}.{suggestion}{taken} It takes: {', '.join(known)}."
    if not known[name].fits(value):
        return f"{label} cannot be {shown(value)}. It takes {known[name].words}."
    if name == "relative_step" and value:
        return f"{label} would take the place of `learning_rate` and `lr_schedule`. Remove it."
    if name == "warmup_init" and value:
        return f"{label} has no effect without `relative_step`. Use `warmup`."
    return None
