"""The training methods by name: the kind of rows each takes, its losses, and its metrics.

Contains only names and words, so that a configuration can be checked without loading mlx. A new method or variant of a
loss is an entry in METHODS.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_nb.config.row_kinds import ROW_KINDS, KindFacts
from mlx_nb.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Metric:
    """What a metric measures, and its trend in a healthy run: `up`, `down`, or words such as `near 0`."""

    help: str
    healthy: str = ""


@dataclass(frozen=True)
class Loss:
    """A loss function, or its `module:name`, and its options: the names of its keyword-only parameters.

    `stops_gradient` marks a loss that treats a part of itself as constant, so that its gradient is not that of its
    value. `scale_rewards` is the default of that setting for this loss.
    """

    where: str | Callable[..., Any]
    options: tuple[str, ...] = ()
    stops_gradient: bool = False
    scale_rewards: str = "group"

    def function(self) -> Callable[..., Any]:
        """The function itself, imported if necessary."""
        if callable(self.where):
            return self.where
        module, name = self.where.split(":")
        result: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return result


@dataclass(frozen=True)
class Method:
    """One training method.

    row_kind    kind of row it takes: `tokens`, `pairs`, `labels` or `prompts`
    losses      its variants by name, the default first
    metrics     what it measures besides the loss
    reference   whether it needs log-probabilities of a reference model
    """

    name: str
    row_kind: str
    losses: Mapping[str, Loss]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    reference: bool = False

    @property
    def kind(self) -> KindFacts:
        """The facts about the kind of rows that it takes."""
        return ROW_KINDS[self.row_kind]

    def uses(self, name: str, only_for: str | tuple[str, ...] | None, options: Collection[str] | None = None) -> bool:
        """Whether a setting declared with `only_for` has an effect with a loss that has these `options`.

        None = with any loss of the method.
        """
        kinds = only_for if isinstance(only_for, tuple) else (only_for,)
        effective = {None, self.row_kind, "reference"} if self.reference else {None, self.row_kind}
        some = {option for loss in self.losses.values() for option in loss.options} if options is None else options
        return not effective.isdisjoint(kinds) or name in some

    def loss(self, variant: str | None) -> Loss:
        """The loss of a variant; None = the default."""
        return self.losses[variant or next(iter(self.losses))]


_PAIR_METRICS = {
    "accuracy": Metric("share of pairs whose chosen answer has the higher implicit reward", "up"),
    "margin": Metric("reward of the chosen answer minus that of the rejected one", "up"),
    "reward_chosen": Metric(
        "beta * log(policy / reference) of the chosen answer; without a reference beta * log(policy)",
        "up, or slowly down",
    ),
    "reward_rejected": Metric("the same of the rejected answer", "down"),
    "logprob_chosen": Metric("log-probability per token of the chosen answer, nats", "not far down"),
    "logprob_rejected": Metric("log-probability per token of the rejected answer, nats", "down"),
}
_KL = {"kl": Metric("KL to the reference per token, k2 estimate on the rows' answers, nats", "small")}
_LABEL_METRICS = {
    "reward_desirable": Metric("beta * log(policy / reference) of answers labeled true", "up"),
    "reward_undesirable": Metric("beta * log(policy / reference) of answers labeled false", "down"),
    "kl_estimate": Metric("z0: mean log-ratio of mismatched answers, at least 0", "small"),
    "accuracy": Metric("share of answers on the side of z0 that their label says", "up"),
    **_KL,
}
_COMPLETION_METRICS = {
    "reward": Metric("mean of the weighted rewards over all completions", "up"),
    "reward_spread": Metric("standard deviation of the reward inside a group, mean over groups", "above 0"),
    "zero_variance_groups": Metric("share of groups whose completions all got the same reward: they teach nothing"),
    "completion_tokens": Metric("mean length of the completions, tokens"),
    "cut_off": Metric("share of completions cut at max_completion_length", "near 0"),
    "entropy": Metric("mean entropy of the policy at the completions' tokens, nats", "not to 0"),
    "clipped": Metric("share of tokens whose ratio was clipped", "small"),
    "kl": Metric("KL to the reference per token, k3 estimate on the completions, nats", "small"),
}


def _losses(module: str, **options: tuple[str, ...]) -> dict[str, Loss]:
    return {name: Loss(f"mlx_nb.objectives.{module}:{name}", taken) for name, taken in options.items()}


_NLL = {"nll": Metric("negative log-likelihood per token of the chosen answer, nats", "down")}
_CLIPPED = ("beta", "epsilon", "epsilon_high", "importance_sampling_level")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "sft",
            "tokens",
            {
                "nll": Loss("mlx_nb.objectives.sft:nll", ("label_smoothing", "z_loss")),
                "dft": Loss("mlx_nb.objectives.sft:dft", ("z_loss",), stops_gradient=True),
            },
            {"nll": Metric("negative log-likelihood per target token, nats, where the loss is something else", "down")},
        ),
        Method(
            "dpo",
            "pairs",
            _losses(
                "dpo",
                sigmoid=("beta", "label_smoothing"),
                hinge=("beta",),
                ipo=("beta",),
                dpop=("beta", "delta"),
                robust=("beta", "label_smoothing"),
                normalized=("beta",),
            ),
            {**_PAIR_METRICS, **_KL},
            reference=True,
        ),
        Method(
            "cpo",
            "pairs",
            _losses(
                "cpo",
                sigmoid=("beta", "cpo_alpha", "label_smoothing"),
                hinge=("beta", "cpo_alpha"),
                simpo=("beta", "cpo_alpha", "simpo_gamma"),
            ),
            {**_PAIR_METRICS, **_NLL},
        ),
        Method(
            "orpo",
            "pairs",
            _losses("orpo", orpo=("beta",)),
            {
                **_PAIR_METRICS,
                **_NLL,
                "log_odds_ratio": Metric("log odds of the chosen over the rejected answer", "up"),
            },
        ),
        Method(
            "kto",
            "labels",
            _losses("kto", kto=("beta", "desirable_weight", "undesirable_weight")),
            _LABEL_METRICS,
            reference=True,
        ),
        Method(
            "grpo",
            "prompts",
            {
                **_losses("grpo", grpo=_CLIPPED, bnpo=_CLIPPED, dapo=_CLIPPED),
                "dr_grpo": Loss("mlx_nb.objectives.grpo:dr_grpo", _CLIPPED, scale_rewards="none"),
            },
            _COMPLETION_METRICS,
            reference=True,
        ),
    )
}
_BUILT_IN = frozenset(METHODS)
# Other names for methods, and what to write for them.
_OTHER_NAMES = {
    **dict.fromkeys(("ppo", "rloo", "reinforce", "reinforce++", "rlhf", "rlvr", "gspo", "dapo"), "`grpo`"),
    **dict.fromkeys(("ipo", "slic", "rdpo"), "`dpo`"),
    "simpo": "`method: cpo` with `loss: simpo`",
    **dict.fromkeys(("sft-lora", "lora", "qlora", "full"), "`sft`, with `fine_tune_type`,"),
}


def method_named(name: str) -> Method:
    """The method with that name. Raises ConfigError, suggesting the nearest."""
    if name not in METHODS:
        similar = _OTHER_NAMES.get(name.lower()) if isinstance(name, str) else None
        hint = f" mlx_nb has none of that name; {similar} is the nearest." if similar else did_you_mean(name, METHODS)
        raise ConfigError(
            f"`method` cannot be {name!r}.{hint} Known: {', '.join(METHODS)}. "
            "For a method of your own, first run the cell with its `register_objective`."
        )
    return METHODS[name]


def lower_is_better(method: str, metric: str) -> bool | None:
    """Whether a lower value of a method's metric is better; None if neither is, or it is no metric of the method."""
    known = METHODS[method].metrics.get(metric)
    return {"up": False, "down": True}.get(known.healthy) if known is not None else None


def is_built_in(name: str) -> bool:
    """Whether the method comes with the package."""
    return name in _BUILT_IN


def register_objective(
    name: str,
    *,
    rows: str = "tokens",
    reference: bool = False,
    metrics: Mapping[str, str] | None = None,
    stops_gradient: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a loss function of your own a training method: `method: name` in a `%%finetune` cell.

        @mlx_nb.register_objective("my_dpo", rows="pairs", reference=True)
        def my_dpo(pairs, *, beta=0.1):
            return -mx.log(mx.sigmoid(beta * (pairs.chosen_P - pairs.rejected_P)))

    What the function takes and returns depends on `rows`; `mlx_nb.objectives.base` describes it for each kind. Its
    keyword-only parameters are its options: settings of the same name, or entries of `method_options`. It must be
    pure; `mlx_nb.check_objective(name)` tests that and more. `metrics` ({name: meaning}) documents what it adds.
    Registering a name again replaces it. Raises ConfigError for the name of a built-in method, an unknown kind, or a
    function that takes something else.
    """
    if name in _BUILT_IN:
        raise ConfigError(f"{name!r} is a method of mlx_nb. Give yours another name.")
    if rows not in ROW_KINDS:
        raise ConfigError(
            f"rows={rows!r}: a method takes one of {', '.join(ROW_KINDS)}.{did_you_mean(rows, ROW_KINDS)}"
        )

    def register(loss: Callable[..., Any]) -> Callable[..., Any]:
        positional = _positional(loss)
        if len(positional) > 1:
            options = ", ".join(f"{option}=..." for option in positional[1:])
            raise ConfigError(
                f"{name}: its function is called with `{positional[0]}` alone. Make what follows keyword-only, with "
                f"defaults: `({positional[0]}, *, {options})`."
            )
        for option, default in options_of(loss).items():
            if default is inspect.Parameter.empty:
                raise ConfigError(f"{name}: its option `{option}` has no default. Give it one.")
        described = {key: Metric(text) for key, text in (metrics or {}).items()}
        METHODS[name] = Method(
            name, rows, {name: Loss(loss, tuple(options_of(loss)), stops_gradient)}, described, reference
        )
        return loss

    return register


def _positional(loss: Callable[..., Any]) -> list[str]:
    """The parameters of a loss function that are not options."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [one.name for one in inspect.signature(loss).parameters.values() if one.kind in kinds]


def options_of(loss: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of a loss function with their defaults (`inspect.Parameter.empty` = none)."""
    parameters = inspect.signature(loss).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
