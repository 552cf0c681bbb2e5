"""Checks across settings: those without effect and those that exclude each other, each an error naming the setting.

Every check is a generator of SettingErrors. The values that it reads already have the right type and are inside their
bounds.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field, fields
from typing import Any

from mlx_nb.config.fields import SettingError, function_name
from mlx_nb.config.hints import ALL_ADAPTED, is_all_linear
from mlx_nb.config.memory_limit import problem_with_limit
from mlx_nb.config.methods import METHODS, Loss, is_built_in, lower_is_better, method_named, options_of
from mlx_nb.config.optimizers import arguments_of, check_optimizer_config, has_no_decay
from mlx_nb.config.templates import template_problem
from mlx_nb.errors import ConfigError, did_you_mean, shown

# Roles a message can have; `function_call` is the assistant's, and its text is the JSON of a tool call.
CALLING = "function_call"
MESSAGE_ROLES = ("system", "developer", "user", "assistant", "tool", CALLING, "function", "ipython")


class CheckedConfig:
    """A view of a RunConfig in which reading a setting that was already refused ends the check.

    `given` are setting names. A check that depends on a refused setting is skipped: it would report the same mistake
    again.
    """

    def __init__(self, config: Any, refused: Collection[str], given: Collection[str]) -> None:
        self._config, self.refused, self.given = config, refused, given

    def __getattr__(self, name: str) -> Any:
        if name in self.refused:
            raise _Refused
        return getattr(self._config, name)

    def declarations(self, wanted: Callable[[Field[Any]], bool]) -> Iterator[Field[Any]]:
        """The wanted settings that were not refused and are not at their default."""
        for declared in filter(wanted, fields(self._config)):
            if declared.name not in self.refused and getattr(self._config, declared.name) != declared.default:
                yield declared


class _Refused(Exception):
    """Raised when a check reads a setting that was refused."""


def problems_of(config: Any, refused: Collection[str], given: Collection[str]) -> list[SettingError]:
    """All settings of `config` that have no effect or exclude another one, as errors.

    `refused` are settings that are wrong already; `given` are those that were given, even at their default.
    """
    readable, problems = CheckedConfig(config, refused, given), []
    for check in EFFECT_CHECKS:
        try:
            for problem in check(readable):
                problems.append(problem)
        except _Refused:
            continue
    return problems


def warnings_about(config: Any, learning_rate: float | None = None) -> list[str]:
    """Warnings about settings that are probably a mistake, a sentence or two each; the run trains anyway.

    `learning_rate` replaces that of `config`.
    """
    rate, optimizer = config.learning_rate if learning_rate is None else learning_rate, config.optimizer
    if optimizer == "sgd" or rate <= _HIGHEST_RATE:
        return []
    mirrored = rate**-1.0
    meant = f" Was {mirrored:.0e} meant?".replace("e-0", "e-") if 1e-7 <= mirrored <= 1e-2 else ""
    return [
        f"`learning_rate: {rate:g}` moves every weight by about that much in each update of {optimizer}, "
        f"where 1e-5 to 1e-3 is usual.{meant} `%finetune set learning_rate=...` changes it."
    ]


def _check_method(config: CheckedConfig) -> Iterator[SettingError]:
    """The method exists and every setting that was given has an effect with it."""
    try:
        method = method_named(config.method)
    except ConfigError as error:
        yield SettingError(("method",), str(error))
        return
    if config.loss is not None and config.loss not in method.losses:
        yield SettingError(
            ("loss",),
            f"`loss` cannot be {config.loss!r} with `method: {method.name}`.{did_you_mean(config.loss, method.losses)} "
            f"It has: {', '.join(method.losses)}.",
        )
        return
    options = method.loss(config.loss).options
    for declared in config.declarations(lambda one: one.metadata["only_for"] is not None):
        name = declared.name
        if method.uses(name, declared.metadata["only_for"], options):
            continue
        yield SettingError((name,), f"`{name}` has no effect with `method: {method.name}`{_remedy(config, name)}")
    for name in config.method_options:
        if name not in options:
            known = f"Its options: {', '.join(options)}." if options else "It has no options."
            yield SettingError(
                ("method_options", name),
                f"`method_options.{name}` is not an option of {method.name}.{did_you_mean(name, options)} {known}",
            )
        elif name in _declared(config) and is_built_in(method.name):
            yield SettingError(("method_options", name), f"`{name}` is a separate setting: write `{name}: ...`.")
    yield from _check_option_kinds(config.method_options, method.loss(config.loss))


def _declared(config: CheckedConfig) -> dict[str, Field[Any]]:
    return {declared.name: declared for declared in fields(config._config)}


def _remedy(config: CheckedConfig, name: str) -> str:
    """The end of the error about a setting that the method's loss does not take: which variant or method does."""
    method = method_named(config.method)
    variant = f", `loss: {config.loss or next(iter(method.losses))}`" if len(method.losses) > 1 else ""
    takers = [f"`loss: {other}`" for other, loss in method.losses.items() if name in loss.options]
    if takers:
        return f"{variant}. It needs {' or '.join(takers)}. Set that, or remove it."
    return f"{variant}. Remove it."


def _check_rows(config: CheckedConfig) -> Iterator[SettingError]:
    """Settings that only apply to some kinds of rows."""
    method = METHODS.get(config.method)
    if method is None:
        return
    if not method.kind.pieces and config.truncate == "split":
        yield SettingError(("truncate",), "`truncate: split` is for texts (`method: sft`). Use right, left or drop.")
    if method.kind.judged and config.beta == 0:
        yield SettingError(("beta",), f"`beta: 0` leaves nothing of `method: {method.name}` to learn. Raise it.")
    if method.kind.judged and config.loss_on == "all":
        yield SettingError(
            ("loss_on",), "`loss_on: all` trains prompts, and answers are judged without them. Remove it."
        )
    if method.kind.sampled and config.loss_on != "assistant":
        yield SettingError(("loss_on",), f"`loss_on` has no effect with `method: {method.name}`. Remove it.")


def _check_smoothing(config: CheckedConfig) -> Iterator[SettingError]:
    if config.loss == "robust" and (config.label_smoothing or 0) >= 0.5:
        yield SettingError(("label_smoothing",), "`loss: robust` needs a `label_smoothing` below 0.5.")


def _check_option_kinds(given: Mapping[str, Any], loss: Loss) -> Iterator[SettingError]:
    """Each option has the type of its default: a number, true or false, or text."""
    defaults = options_of(loss.function()) if given else {}
    for name, value in given.items():
        kind = next((kind for kind in _OPTION_KINDS if isinstance(defaults.get(name), kind)), None)
        if kind is None:
            continue
        words, fits = _OPTION_KINDS[kind]
        if not fits(value):
            yield SettingError(
                ("method_options", name), f"`method_options.{name}` cannot be {shown(value)}. It takes {words}."
            )


def _check_references(config: CheckedConfig) -> Iterator[SettingError]:
    method = METHODS.get(config.method)
    if method is None or not method.reference:
        return
    given = [name for name in ("reference_model", "reference_adapter") if getattr(config, name) is not None]
    if config.reference_free and (given or not method.kind.pairs):
        what = f"`{given[0]}`" if given else f"`method: {config.method}`"
        yield SettingError(("reference_free",), f"`reference_free` and {what} exclude each other. Remove one of them.")
    elif config.reference_free and config.loss == "dpop":
        yield SettingError(
            ("reference_free",),
            "`reference_free` and `loss: dpop` exclude each other: its penalty compares with the "
            "reference. Remove one of them.",
        )
    if method.kind.sampled and config.beta == 0:
        for name in given:
            yield SettingError((name,), f"`{name}` has no effect with `beta: 0`. Remove one of them.")


def _check_rewards(config: CheckedConfig) -> Iterator[SettingError]:
    """The rewards and their weights, for a method that learns from rewards."""
    method = METHODS.get(config.method)
    if method is None or not method.kind.sampled:
        return
    if not config.rewards:
        yield SettingError(
            ("rewards",),
            f"`method: {config.method}` needs `rewards`: a list of functions in the notebook or built-in rewards, for "
            "instance [number_match].",
        )
    elif config.reward_weights is not None and len(config.reward_weights) != len(config.rewards):
        yield SettingError(
            ("reward_weights",),
            f"`reward_weights` has {len(config.reward_weights)} numbers for {len(config.rewards)} rewards.",
        )
    if config.reward_weights is not None and not any(config.reward_weights):
        yield SettingError(("reward_weights",), "`reward_weights` are all 0, which leaves nothing to learn.")


def _check_rollouts(config: CheckedConfig) -> Iterator[SettingError]:
    """Settings that exclude each other when completions are sampled."""
    method = METHODS.get(config.method)
    if method is None or not method.kind.sampled:
        return
    if config.lora_parameters.dropout:
        yield SettingError(
            ("lora_parameters", "dropout"),
            f"`lora_parameters.dropout` cannot be {config.lora_parameters.dropout:g} with `method: {config.method}`: "
            "completions are drawn without dropout, and with it their ratios would not start at 1. Set it to 0.",
        )
    for name in ("epsilon", "epsilon_high"):
        if config.updates_per_rollout == 1 and getattr(config, name) is not None:
            yield SettingError(
                (name,),
                f"`{name}` has no effect with `updates_per_rollout: 1`, where every ratio is 1. Raise that, or remove "
                f"`{name}`.",
            )
    if config.stop and "" in config.stop:
        yield SettingError(("stop",), "`stop` has an empty text, which would end every completion at once. Remove it.")


def _check_roles(config: CheckedConfig) -> Iterator[SettingError]:
    """Every custom role word maps to a known role."""
    for word, role in config.roles.items():
        if role not in MESSAGE_ROLES:
            near = did_you_mean(str(role), MESSAGE_ROLES)
            known = ", ".join(MESSAGE_ROLES)
            yield SettingError(
                ("roles", word), f"`roles.{word}` cannot be {shown(role)}.{near} Choose one of: {known}."
            )


def _check_template(config: CheckedConfig) -> Iterator[SettingError]:
    if config.chat_template is not None and (problem := template_problem(config.chat_template)) is not None:
        yield SettingError(("chat_template",), problem)


def _check_held_out(config: CheckedConfig) -> Iterator[SettingError]:
    if config.val_set_size >= 1 and not float(config.val_set_size).is_integer():
        yield SettingError(
            ("val_set_size",),
            f"`val_set_size: {config.val_set_size:g}` is neither a share below 1 nor a whole number of rows.",
        )


def _check_folder(config: CheckedConfig) -> Iterator[SettingError]:
    parts = (config.adapter_path or "").split("/")
    if any(len(part.encode(errors="surrogatepass")) > _LONGEST_FILE_NAME for part in parts):
        yield SettingError(
            ("adapter_path",),
            f"`adapter_path` has a name of more than {_LONGEST_FILE_NAME} bytes in it, which no folder can have.",
        )


def _check_length(config: CheckedConfig) -> Iterator[SettingError]:
    if config.iters is not None and config.epochs is not None:
        yield SettingError(("epochs",), "`iters` and `epochs` both set the length of the run. Give one of them.")


def _check_warmup(config: CheckedConfig) -> Iterator[SettingError]:
    warmup = config.lr_schedule.warmup
    updates = math.ceil(_WARMUP_SHARE * config.iters) if warmup is None and config.iters is not None else warmup
    if updates is not None and updates < 2 and config.lr_schedule.warmup_init:
        yield SettingError(
            ("lr_schedule", "warmup_init"),
            f"`lr_schedule.warmup_init` has no effect: the warm-up has {updates} updates, the last at the peak. Set "
            "`warmup` to 2 or more.",
        )
    if config.iters is not None and warmup is not None and warmup > config.iters:
        yield SettingError(("warmup",), f"`warmup` ({warmup}) is longer than the run (`iters: {config.iters}`).")


def _check_pieces(config: CheckedConfig) -> Iterator[SettingError]:
    if config.stride and config.truncate != "split":
        yield SettingError(("stride",), "`stride` has no effect without `truncate: split`.")
    if config.stride >= config.max_seq_length:
        yield SettingError(
            ("stride",), f"`stride` ({config.stride}) must be below `max_seq_length` ({config.max_seq_length})."
        )


def _check_adapter(config: CheckedConfig) -> Iterator[SettingError]:
    if config.num_layers == 0:
        yield SettingError(("num_layers",), "`num_layers: 0` trains nothing. Use -1 for all layers.")
    if is_all_linear(config.lora_parameters.keys):
        path = ("target_modules",) if "target_modules" in config.given else ("lora_parameters", "keys")
        yield SettingError(path, f"`{'.'.join(path)}` takes names of modules. {ALL_ADAPTED}")
    elif config.lora_parameters.keys and not all(key.strip() for key in config.lora_parameters.keys):
        path = ("target_modules",) if "target_modules" in config.given else ("lora_parameters", "keys")
        yield SettingError(path, f"`{'.'.join(path)}` has an empty name. Remove it.")


def _check_full(config: CheckedConfig) -> Iterator[SettingError]:
    if config.fine_tune_type == "full" and config.lora_parameters != type(config.lora_parameters)():
        name = "lora_parameters" if "lora_parameters" in config.given else "target_modules"
        yield SettingError(
            (name,),
            f"`{name}` has no effect with `fine_tune_type: full`. Remove it, or use lora or dora.",
        )
    if config.fine_tune_type == "full" and config.loraplus_lr_ratio is not None:
        yield SettingError(
            ("loraplus_lr_ratio",),
            "`loraplus_lr_ratio` has no effect with `fine_tune_type: full`, which has no B matrices. Remove it.",
        )


def _check_optimizer(config: CheckedConfig) -> Iterator[SettingError]:
    yield from check_optimizer_config(config.optimizer, config.optimizer_config)


def _check_decay(config: CheckedConfig) -> Iterator[SettingError]:
    if "weight_decay" not in config.given:
        return
    if has_no_decay(config.optimizer) and config.weight_decay:
        message = f"`weight_decay` has no effect with `optimizer: {config.optimizer}`. Use adamw."
        yield SettingError(("weight_decay",), message)
    inner = arguments_of(config.optimizer, config.optimizer_config)
    other = inner.get("weight_decay") if isinstance(inner, Mapping) else None
    if other not in (None, config.weight_decay):
        yield SettingError(
            ("weight_decay",), "`weight_decay` and `optimizer_config.weight_decay` differ. Give one of them."
        )


def _check_schedule(config: CheckedConfig) -> Iterator[SettingError]:
    schedule = config.lr_schedule
    if config.schedule_iters is not None and schedule.name == "constant":
        yield SettingError(
            ("schedule_iters",), "`schedule_iters` has no effect with `lr_schedule: constant`. Remove it."
        )
    if schedule.arguments is None:
        if schedule.name in ("exponential_decay", "step_decay"):
            yield SettingError(
                ("lr_schedule",),
                f"`lr_schedule: {schedule.name}` needs its arguments, for instance "
                f"{{name: {schedule.name}, arguments: {_EXAMPLE_ARGUMENTS[schedule.name]}}}.",
            )
        return
    expected = _ARGUMENT_COUNTS[schedule.name]
    if not expected[0] <= len(schedule.arguments) <= expected[1]:
        yield SettingError(
            ("lr_schedule", "arguments"),
            f"`lr_schedule.arguments` of {schedule.name} has {len(schedule.arguments)} values; mlx takes "
            f"{_EXAMPLE_ARGUMENTS[schedule.name]}.",
        )
    elif schedule.arguments[0] <= 0:
        yield SettingError(("lr_schedule", "arguments"), "the first of `lr_schedule.arguments` must be above 0.")
    elif "learning_rate" in config.given and config.learning_rate != schedule.arguments[0]:
        yield SettingError(
            ("learning_rate",),
            f"`learning_rate: {config.learning_rate:g}` has no effect: `lr_schedule.arguments` starts at "
            f"{schedule.arguments[0]:g}. Remove one of them.",
        )


def _check_validation(config: CheckedConfig) -> Iterator[SettingError]:
    if config.early_stopping_patience is not None and config.steps_per_eval == -1:
        yield SettingError(
            ("early_stopping_patience",),
            "`early_stopping_patience` has no effect with `steps_per_eval: -1`, which never validates.",
        )


def _check_metrics(config: CheckedConfig) -> Iterator[SettingError]:
    names = metric_names(config.metrics)
    if config.metrics is not None and not names:
        yield SettingError(("metrics",), "`metrics` is empty. Name a function, such as exact_match, or remove it.")
    if names and config.steps_per_eval == -1 and not config.test:
        yield SettingError(
            ("metrics",),
            "`metrics` has no effect with `steps_per_eval: -1`, which never validates, and no `test: true`.",
        )
    if not names and any(config.declarations(lambda one: one.name == "metric_tokens")):
        yield SettingError(("metric_tokens",), "`metric_tokens` has no effect without `metrics`. Remove it.")
    if config.best_by is None:
        return
    method = METHODS.get(config.method)
    of_method = [
        name for name in (method.metrics if method else ()) if lower_is_better(config.method, name) is not None
    ]
    if config.best_by not in (*names, *of_method):
        known = ", ".join([*names, *of_method])
        yield SettingError(
            ("best_by",),
            f"`best_by` cannot be {shown(config.best_by)}.{did_you_mean(config.best_by, [*names, *of_method])} "
            + (f"It takes: {known}." if known else "Name the function in `metrics` too; without it the loss decides."),
        )
    elif config.steps_per_eval == -1:
        yield SettingError(
            ("best_by",), "`best_by` has no effect with `steps_per_eval: -1`, which never validates. Remove it."
        )


def metric_names(metrics: Any) -> list[str]:
    """The names of the functions in `metrics`: names, functions, and mappings of one name to its value."""
    entries = metrics if isinstance(metrics, list | tuple) else () if metrics is None else (metrics,)
    return [
        next(iter(one)) if isinstance(one, Mapping) else one if isinstance(one, str) else function_name(one)
        for one in entries
    ]


def _check_test(config: CheckedConfig) -> Iterator[SettingError]:
    if config.test_batches not in (-1, 0) and not config.test:
        yield SettingError(("test_batches",), "`test_batches` has no effect without `test: true`.")


def _check_samples(config: CheckedConfig) -> Iterator[SettingError]:
    if config.sample_prompts is None:
        for declared in config.declarations(lambda one: one.name in ("sample_every", "sample_tokens")):
            name = declared.name
            yield SettingError((name,), f"`{name}` has no effect without `sample_prompts`. Set them, or remove it.")


def _check_down_weight(config: CheckedConfig) -> Iterator[SettingError]:
    if config.down_weight is None:
        if any(config.declarations(lambda one: one.name == "down_weight_factor")):
            message = "`down_weight_factor` has no effect without `down_weight`. Set that, or remove it."
            yield SettingError(("down_weight_factor",), message)
        return
    both = sorted(set(config.down_weight) & set(config.leave_out or ()))
    if both:
        message = f"`down_weight` has row {both[0]}, which `leave_out` leaves out. Remove it from one of them."
        yield SettingError(("down_weight",), message)


def _check_spikes(config: CheckedConfig) -> Iterator[SettingError]:
    if config.loss_spike is None and any(config.declarations(lambda one: one.name == "spike_patience")):
        yield SettingError(("spike_patience",), "`spike_patience` has no effect with `loss_spike: null`. Remove it.")


def _check_long_context(config: CheckedConfig) -> Iterator[SettingError]:
    if not config.efficient_long_context and any(config.declarations(lambda one: one.name == "seq_step_size")):
        message = "`seq_step_size` has no effect without `efficient_long_context: true`. Set that, or remove it."
        yield SettingError(("seq_step_size",), message)


def _check_memory_limit(config: CheckedConfig) -> Iterator[SettingError]:
    if (problem := problem_with_limit(config.memory_limit)) is not None:
        yield SettingError(("memory_limit",), problem)


def _check_zeros(config: CheckedConfig) -> Iterator[SettingError]:
    for declared in config.declarations(lambda one: one.name in _NEVER_0):
        if getattr(config, declared.name) == 0:
            name = declared.name
            yield SettingError((name,), f"`{name}` cannot be 0. Use -1 to switch it off, or a positive number.")


_NEVER_0 = ("steps_per_eval", "val_batches", "test_batches", "save_every")
_LONGEST_FILE_NAME = 255
_HIGHEST_RATE = 0.1  # the highest one without a warning
_WARMUP_SHARE = 0.05  # of the run, unless `warmup` is set
# By the type of an option's default: what it accepts in words, and a test for it. A bool is an int in Python.
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
TRACKERS = ("wandb", "trackio", "tensorboard", "mlflow", "swanlab")


def tracker_names(report_to: tuple[str, ...] | None) -> list[str]:
    """The names in `report_to`, which may also be one text with commas, as in mlx-lm."""
    return [name for text in report_to or () for part in text.split(",") if (name := part.strip().lower())]


def _check_reports(config: CheckedConfig) -> Iterator[SettingError]:
    for name in tracker_names(config.report_to):
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS)
            yield SettingError(("report_to",), f"`report_to` cannot be {name!r}.{hint} Known: {', '.join(TRACKERS)}.")
    if config.project_name is not None and not tracker_names(config.report_to):
        yield SettingError(
            ("project_name",), "`project_name` has no effect without `report_to`. Set that, or remove it."
        )


EFFECT_CHECKS: tuple[Callable[[CheckedConfig], Iterator[SettingError]], ...] = (
    _check_method,
    _check_rows,
    _check_roles,
    _check_template,
    _check_folder,
    _check_held_out,
    _check_smoothing,
    _check_references,
    _check_rewards,
    _check_rollouts,
    _check_length,
    _check_warmup,
    _check_pieces,
    _check_adapter,
    _check_full,
    _check_optimizer,
    _check_decay,
    _check_schedule,
    _check_validation,
    _check_metrics,
    _check_test,
    _check_samples,
    _check_down_weight,
    _check_spikes,
    _check_long_context,
    _check_memory_limit,
    _check_zeros,
    _check_reports,
)
