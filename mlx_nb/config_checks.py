"""What of a configuration would have no effect, or cannot go together: each an error that names the setting.

Every check takes a RunConfig whose single values are already of the right kind and inside their bounds.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from mlx_nb.errors import ConfigError, did_you_mean
from mlx_nb.methods import Loss, is_built_in, method_named, options_of
from mlx_nb.settings import SettingError


def _check_method(config: Any) -> None:
    """The method exists and every setting that was given has an effect with it."""
    try:
        method = method_named(config.method)
    except ConfigError as error:
        raise SettingError(("method",), str(error)) from None
    if config.loss is not None and config.loss not in method.losses:
        raise SettingError(
            ("loss",),
            f"`loss` cannot be {config.loss!r} with `method: {method.name}`.{did_you_mean(config.loss, method.losses)} "
            f"It has: {', '.join(method.losses)}.",
        )
    options = method.loss(config.loss).options
    effective = {None, method.rows, "reference"} if method.reference else {None, method.rows}
    for declared in fields(config):
        only_for, name = declared.metadata["only_for"], declared.name
        kinds = only_for if isinstance(only_for, tuple) else (only_for,)
        if not effective.isdisjoint(kinds) or name in options or getattr(config, name) == declared.default:
            continue
        variant = f", `loss: {config.loss or next(iter(method.losses))}`" if len(method.losses) > 1 else ""
        takers = [f"`loss: {other}`" for other, loss in method.losses.items() if name in loss.options]
        raise SettingError(
            (name,),
            f"`{name}` has no effect with `method: {method.name}`{variant}. "
            + (f"It needs {' or '.join(takers)}. Set that, or remove it." if takers else "Remove it."),
        )
    for name in config.method_options:
        if name not in options:
            known = f"Its options: {', '.join(options)}." if options else "It has no options."
            raise SettingError(
                ("method_options", name),
                f"`method_options.{name}` is no option of {method.name}.{did_you_mean(name, options)} {known}",
            )
        if hasattr(config, name) and is_built_in(method.name):
            raise SettingError(("method_options", name), f"`{name}` is a setting of its own: write `{name}: ...`.")
    _check_option_kinds(config.method_options, method.loss(config.loss))
    _check_references(config)
    if method.rows in ("pairs", "labels") and config.loss_on == "all":
        raise SettingError(
            ("loss_on",), "`loss_on: all` trains prompts, and answers are judged without them. Remove it."
        )
    if method.rows == "prompts" and config.loss_on != "assistant":
        raise SettingError(("loss_on",), f"`loss_on` has no effect with `method: {method.name}`. Remove it.")
    if method.rows != "tokens" and config.truncate == "split":
        raise SettingError(("truncate",), "`truncate: split` is for texts (`method: sft`). Use right, left or drop.")
    if method.rows in ("pairs", "labels") and config.beta == 0:
        raise SettingError(("beta",), f"`beta: 0` leaves nothing of `method: {method.name}` to learn. Raise it.")
    if config.loss == "robust" and (config.label_smoothing or 0) >= 0.5:
        raise SettingError(("label_smoothing",), "`loss: robust` needs a `label_smoothing` below 0.5.")
    if method.rows == "prompts":
        _check_rollouts(config)


def _check_option_kinds(given: Mapping[str, Any], loss: Loss) -> None:
    """Each option is of the kind of its default: a number, true or false, or text."""
    defaults = options_of(loss.function()) if given else {}
    for name, value in given.items():
        kind = next((kind for kind in _OPTION_KINDS if isinstance(defaults[name], kind)), None)
        if kind is None:
            continue
        words, fits = _OPTION_KINDS[kind]
        if not fits(value):
            raise SettingError(
                ("method_options", name), f"`method_options.{name}` cannot be {value!r}. It takes {words}."
            )


def _check_references(config: Any) -> None:
    given = [name for name in ("reference_model", "reference_adapter") if getattr(config, name) is not None]
    if config.reference_free and (given or method_named(config.method).rows != "pairs"):
        what = f"`{given[0]}`" if given else f"`method: {config.method}`"
        raise SettingError(("reference_free",), f"`reference_free` and {what} exclude each other. Remove one of them.")
    if config.reference_free and config.loss == "dpop":
        raise SettingError(
            ("reference_free",),
            "`reference_free` and `loss: dpop` exclude each other: its penalty compares with the "
            "reference. Remove one of them.",
        )


def _check_rollouts(config: Any) -> None:
    if not config.rewards:
        raise SettingError(
            ("rewards",),
            f"`method: {config.method}` needs `rewards`: a list of functions in the notebook or built-in rewards, for "
            "instance [number_match].",
        )
    if config.reward_weights is not None and len(config.reward_weights) != len(config.rewards):
        raise SettingError(
            ("reward_weights",),
            f"`reward_weights` has {len(config.reward_weights)} numbers for {len(config.rewards)} rewards.",
        )
    if config.lora_parameters.dropout:
        raise SettingError(
            ("lora_parameters", "dropout"),
            f"`lora_parameters.dropout` cannot be {config.lora_parameters.dropout:g} with `method: {config.method}`: "
            "completions are drawn without dropout, and with it their ratios would not start at 1. Set it to 0.",
        )
    if config.stop and "" in config.stop:
        raise SettingError(("stop",), "`stop` has an empty text, which would end every completion at once. Remove it.")


def _check_length(config: Any) -> None:
    if config.iters is not None and config.epochs is not None:
        raise SettingError(("epochs",), "`iters` and `epochs` both set the length of the run. Give one of them.")
    warmup = config.lr_schedule.warmup
    if config.iters is not None and warmup is not None and warmup > config.iters:
        raise SettingError(("warmup",), f"`warmup` ({warmup}) is longer than the run (`iters: {config.iters}`).")


def _check_pieces(config: Any) -> None:
    if config.stride and config.truncate != "split":
        raise SettingError(("stride",), "`stride` has no effect without `truncate: split`.")
    if config.stride >= config.max_seq_length:
        raise SettingError(
            ("stride",), f"`stride` ({config.stride}) must be below `max_seq_length` ({config.max_seq_length})."
        )


def _check_adapter(config: Any) -> None:
    if config.fine_tune_type == "full" and config.lora_parameters != type(config.lora_parameters)():
        raise SettingError(
            ("lora_parameters",),
            "`lora_parameters` has no effect with `fine_tune_type: full`. Remove it, or use lora or dora.",
        )
    if config.num_layers == 0:
        raise SettingError(("num_layers",), "`num_layers: 0` trains nothing. Use -1 for all layers.")


def _check_optimizer(config: Any) -> None:
    decay_default = next(declared.default for declared in fields(config) if declared.name == "weight_decay")
    if config.optimizer == "adam" and config.weight_decay not in (decay_default, 0.0):
        raise SettingError(("weight_decay",), "`weight_decay` has no effect with `optimizer: adam`. Use adamw.")
    schedule = config.lr_schedule
    if schedule.arguments is None:
        if schedule.name in ("exponential_decay", "step_decay"):
            raise SettingError(
                ("lr_schedule",),
                f"`lr_schedule: {schedule.name}` needs its arguments, for instance "
                f"{{name: {schedule.name}, arguments: {_EXAMPLE_ARGUMENTS[schedule.name]}}}.",
            )
        return
    expected = _ARGUMENT_COUNTS[schedule.name]
    if not expected[0] <= len(schedule.arguments) <= expected[1]:
        raise SettingError(
            ("lr_schedule", "arguments"),
            f"`lr_schedule.arguments` of {schedule.name} has {len(schedule.arguments)} values; mlx takes "
            f"{_EXAMPLE_ARGUMENTS[schedule.name]}.",
        )
    if schedule.arguments[0] <= 0:
        raise SettingError(("lr_schedule", "arguments"), "the first of `lr_schedule.arguments` must be above 0.")
    peak_default = next(declared.default for declared in fields(config) if declared.name == "learning_rate")
    if config.learning_rate not in (peak_default, schedule.arguments[0]):
        raise SettingError(
            ("learning_rate",),
            f"`learning_rate: {config.learning_rate:g}` has no effect: `lr_schedule.arguments` starts at "
            f"{schedule.arguments[0]:g}. Remove one of them.",
        )
    object.__setattr__(config, "learning_rate", float(schedule.arguments[0]))


def _check_validation(config: Any) -> None:
    if config.early_stopping_patience is not None and config.steps_per_eval == -1:
        raise SettingError(
            ("early_stopping_patience",),
            "`early_stopping_patience` has no effect with `steps_per_eval: -1`, which never validates.",
        )
    if config.test_batches != -1 and not config.test:
        raise SettingError(("test_batches",), "`test_batches` has no effect without `test: true`.")
    for name in ("steps_per_eval", "val_batches", "test_batches", "save_every"):
        if getattr(config, name) == 0:
            raise SettingError((name,), f"`{name}` cannot be 0. Use -1 to switch it off, or a positive number.")


# The kind of a default, what an option with it takes, and whether a value is that. A bool is a number in Python.
_OPTION_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    numbers.Real: (
        "a finite number",
        lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value),
    ),
    str: ("text", lambda value: isinstance(value, str)),
}
_ARGUMENT_COUNTS = {
    "constant": (1, 1),
    "cosine_decay": (2, 3),
    "linear_schedule": (3, 3),
    "exponential_decay": (2, 2),
    "step_decay": (3, 3),
}
_EXAMPLE_ARGUMENTS = {
    "constant": "[1e-4]",
    "cosine_decay": "[1e-4, 500, 0]",
    "linear_schedule": "[1e-4, 0, 500]",
    "exponential_decay": "[1e-4, 0.99]",
    "step_decay": "[1e-4, 0.5, 100]",
}
EFFECT_CHECKS = (_check_method, _check_length, _check_pieces, _check_adapter, _check_optimizer, _check_validation)
