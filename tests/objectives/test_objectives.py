"""The battery: laws that every objective passes, and that it catches a loss that breaks one."""

from __future__ import annotations

import re
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_nb import Run, check_objective, register_objective
from mlx_nb.config.methods import METHODS, options_of
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ConfigError
from mlx_nb.model.logprobs import TargetInputs
from mlx_nb.objectives.build import objective_for, options_for
from mlx_nb.objectives.grpo import TokenLosses
from tiny import tiny_labels, tiny_prompts, tiny_rows

VARIANTS = [(method.name, loss) for method in METHODS.values() for loss in method.losses]


@pytest.fixture
def own_methods():
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize(("method", "loss"), VARIANTS)
@pytest.mark.matrix(every=17)
def test_every_objective_passes_every_check(method, loss):
    laws = check_objective(method, loss)
    untried = METHODS[method].reference + METHODS[method].losses[loss].stops_gradient
    assert len(laws) == 9 - untried
    assert all("\n" not in law for law in laws)
    assert any("finite differences" in law for law in laws) != METHODS[method].losses[loss].stops_gradient


@pytest.mark.parametrize(("method", "loss"), VARIANTS)
def test_the_options_that_are_declared_are_those_of_the_function(method, loss):
    declared = METHODS[method].losses[loss]
    assert set(declared.options) == set(options_of(declared.function()))


def test_settings_reach_the_loss_and_unset_ones_leave_its_default():
    assert options_for(RunConfig(method="dpo"))["beta"] == 0.1
    assert options_for(RunConfig(method="dpo", beta=0.3))["beta"] == 0.3
    assert options_for(RunConfig(method="cpo", loss="simpo")) == {"beta": 2.0, "cpo_alpha": 0.0, "simpo_gamma": 0.5}


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.2}, {"z_loss": 1e-3}, {"label_smoothing": 0.1, "z_loss": 0.1}]
)
@pytest.mark.matrix(every=3)
def test_options_of_sft_pass_every_check(options):
    check_objective("sft", **options)


@pytest.mark.long
def test_sequence_ratios_pass_every_check():
    check_objective("grpo", importance_sampling_level="sequence", epsilon=0.05)


COMPLETION_LOSSES = [{"method": "grpo", "loss": loss} for loss in METHODS["grpo"].losses]


@pytest.mark.parametrize(
    "settings", [*COMPLETION_LOSSES, {"method": "grpo", "importance_sampling_level": "sequence"}, {"method": "raw"}]
)
def test_padding_whose_token_is_all_but_impossible_changes_nothing(settings, own_methods):
    @register_objective("raw", rows="prompts", reference=True)
    def raw(completions):
        ratio_S = mx.exp(completions.reference_S - completions.logprob_S)
        return ratio_S - mx.exp(completions.logprob_S - completions.behavior_S) * completions.advantage_S

    counted, targets, vocabulary = 5, 8, 4
    logits_SV = np.random.default_rng(0).normal(size=(targets, vocabulary)).astype(np.float32)
    logits_SV[counted:, 0] = -1000.0  # of the padding, whose target is token 0

    def inputs(size):
        def padded(values, dtype=np.float32):
            return mx.array(np.pad(np.array(values, dtype), (0, size - counted)))

        rows = {"advantage": mx.array([1.0, -0.5]), "counts": mx.ones(2)}
        drawn = {"behavior": padded([-1.0, -2, -1, -1.5, -1]), "reference": padded([-1.5, -1, -1, -2, -1.2])}
        position_S, target_S = padded([0, 1, 2, 3, 4], np.int32), padded([1, 2, 3, 1, 2], np.int32)
        return TargetInputs(mx.zeros((2, 3), mx.int32), position_S, target_S, padded([1.0] * 5), rows, drawn)

    def measured(size):
        def total(logits_SV):
            scorer = SimpleNamespace(at_targets=lambda inputs, function: function(logits_SV, inputs.target_S))
            sums = objective_for(config)(scorer, inputs(size))
            return sums.total, sums

        (_, sums), gradient_SV = mx.value_and_grad(total)(mx.array(logits_SV[:size]))
        numbers = [sums.total, sums.units, *sums.row_total_R.tolist()]
        numbers += [part for metric in sums.metrics.values() for part in metric]
        return np.array([float(number) for number in numbers]), np.array(gradient_SV)

    config = RunConfig.from_dict({**settings, "rewards": ["length"], "temperature": 0.1})
    (plain, slope), (padded, padded_slope) = measured(counted), measured(targets)
    assert np.isfinite(padded).all()
    assert padded == pytest.approx(plain, rel=1e-6)
    assert padded_slope[:counted] == pytest.approx(slope, rel=1e-6)
    assert not padded_slope[counted:].any()


@pytest.mark.long
def test_a_user_defined_method_trains_under_its_name(own_methods):
    @register_objective("mine", rows="pairs", reference=True, metrics={"gap": "difference of log-ratios"})
    def mine(pairs, *, slope=1.0):
        gap = pairs.chosen_P - pairs.rejected_P
        return mx.logaddexp(mx.zeros_like(gap), -slope * gap), {"gap": gap}

    assert len(check_objective("mine", method_options={"slope": 0.3})) == 8
    with pytest.raises(ConfigError, match="Its options: slope"):
        RunConfig(method="mine", method_options={"slop": 1})
    for text in ("method: mine\nslope: 0.3", "slope: 0.3\nmethod: mine"):
        with pytest.raises(ConfigError, match=re.escape("write `method_options: {slope: 0.3}`.")):
            RunConfig.from_yaml(text)
    with pytest.raises(ConfigError, match="`beta` has no effect with `method: mine`"):
        RunConfig(method="mine", beta=0.1)


def test_dropout_is_refused_by_a_user_defined_method_that_draws_completions(own_methods):
    @register_objective("drawn", rows="prompts")
    def drawn(completions):
        return -completions.logprob_S * completions.advantage_S

    with pytest.raises(ConfigError, match=r"`lora_parameters.dropout` cannot be 0.2 with `method: drawn`"):
        RunConfig.from_dict({"method": "drawn", "rewards": ["length"], "lora_parameters": {"dropout": 0.2}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("slope: high", "line 3, column 3: `method_options.slope` cannot be 'high'. It takes a finite number."),
        ("slope: true", "cannot be True. It takes a finite number."),
        ("slope: .nan", "cannot be nan. It takes a finite number."),
        ("slope: null", "cannot be None. It takes a finite number."),
        ("count: few", "cannot be 'few'. It takes a finite number."),
        ("squared: 1", "cannot be 1. It takes true or false."),
        ("side: 3", "cannot be 3. It takes text."),
    ],
)
def test_an_option_is_of_the_kind_of_its_default(own_methods, given, words):
    @register_objective("mine")
    def mine(targets, *, slope=1.0, count=2, squared=False, side="left", other=None):
        return -targets.logprob_S

    RunConfig(
        method="mine",
        method_options={"slope": np.float32(2), "count": 1.5, "squared": True, "side": "right", "other": [1]},
    )
    with pytest.raises(ConfigError, match=re.escape(words)):
        RunConfig.from_yaml(f"method: mine\nmethod_options:\n  {given}")


def test_the_name_of_a_built_in_method_is_taken():
    with pytest.raises(ConfigError, match="'dpo' is a method of mlx_nb"):
        register_objective("dpo")


@pytest.mark.long
def test_the_checks_catch_what_breaks_a_law(own_methods):
    calls, sizes = [], set()

    @register_objective("remembers")
    def remembers(targets):
        sizes.add(targets.logprob_S.shape)
        return -targets.logprob_S * (1 + 1e-5 * len(sizes))

    @register_objective("stateful")
    def stateful(targets):
        calls.append(1)
        return -targets.logprob_S * len(calls)

    @register_objective("mean")
    def mean(targets):
        return mx.full(targets.logprob_S.shape, -targets.logprob_S.mean())

    @register_objective("flat")
    def flat(targets):
        return mx.zeros_like(targets.logprob_S)

    @register_objective("infinite")
    def infinite(targets):
        return -mx.log(targets.logprob_S - targets.logprob_S)

    @register_objective("detached")
    def detached(targets):
        return -targets.logprob_S * mx.stop_gradient(-targets.logprob_S)

    @register_objective("silent", rows="pairs")
    def silent(pairs):
        return -pairs.chosen_P, {"secret": pairs.chosen_P}

    @register_objective("unasked", rows="pairs")
    def unasked(pairs):
        return pairs.reference_chosen_P - pairs.chosen_P

    @register_objective("unasked_tokens")
    def unasked_tokens(targets):
        return mx.square(targets.logprob_S - targets.reference_S)

    for name, words in {
        "stateful": "keeps state",
        "remembers": "remembers what it saw",
        "mean": "changes the",
        "flat": "does not depend on the model",
        "infinite": "not finite",
        "detached": "finite differences give",
        "silent": "'secret' is not described",
        "unasked": "Register it with `reference=True`",
        "unasked_tokens": "Register it with `reference=True`",
    }.items():
        with pytest.raises(ConfigError, match=words):
            check_objective(name)


WRONG_RESULTS = {
    "pairs": [
        (lambda pairs: -mx.stack([pairs.chosen_P] * 2), "one loss for each pair: an array of shape (P,), not one of"),
        (lambda pairs: -pairs.chosen_P.mean(), "not one of shape ()"),
        (lambda pairs: None, "one loss for each pair: an array of shape (P,), not None."),
        (lambda pairs: (-pairs.chosen_P, None), "may return {name: values}, not None"),
        (lambda pairs: (-pairs.chosen_P, {"loss": pairs.chosen_P}), "the metric 'loss' has the name of a column"),
        (lambda pairs: (-pairs.chosen_P, {"seconds": pairs.chosen_P}), "the metric 'seconds' has the name of a column"),
        (lambda pairs: (-pairs.chosen_P, {"x": pairs.chosen_P.sum()}), "the metric 'x' must have one value for each"),
        (lambda pairs: (-pairs.chosen_P, {}, {}), "not a value of type tuple"),
    ],
    "tokens": [(lambda targets: targets.logits_SV, "one loss for each target"), (lambda targets: 0.0, "type float")],
    "labels": [(lambda answers: answers.logprob_B[:, None], "one loss for each answer")],
    "prompts": [
        (lambda completions: None, "one loss for each token"),
        (
            lambda completions: TokenLosses(
                -completions.logprob_S, mx.array(1.0), mx.array(2.0), mx.zeros_like(completions.logprob_S)
            ),
            "TokenLosses.share_S must have a number for each token",
        ),
    ],
}


@pytest.mark.parametrize(
    ("rows", "loss", "words"), [(rows, *case) for rows in WRONG_RESULTS for case in WRONG_RESULTS[rows]]
)
@pytest.mark.matrix(every=3)
def test_a_result_that_is_not_one_number_each_is_refused_in_one_line(own_methods, rows, loss, words):
    register_objective("wrong", rows=rows)(loss)
    with pytest.raises(ConfigError, match=f"^wrong: .*{re.escape(words.replace('(P,)', '(6,)'))}") as caught:
        check_objective("wrong")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda targets: None, "must return one loss for each target"),
        (lambda targets: -mx.stack([targets.logprob_S] * 2), "must return one loss for each target"),
        (
            lambda targets: (-targets.logprob_S, {"loss": targets.logprob_S}),
            "the metric 'loss' has the name of a column",
        ),
    ],
)
def test_training_stops_at_such_a_result_too(own_methods, tmp_path, tiny_folder, result, words):
    register_objective("wrong")(result)
    run = Run(
        RunConfig(method="wrong", model=str(tiny_folder), data=tiny_rows(12), adapter_path=str(tmp_path), iters=2)
    )
    with pytest.raises(ConfigError, match=words):
        run.step()


def test_options_must_be_keyword_only(own_methods):
    with pytest.raises(ConfigError, match=re.escape("wrong: its function is called with `pairs` alone")) as caught:
        register_objective("wrong", rows="pairs")(lambda pairs, beta, tau=1.0: pairs)
    assert "`(pairs, *, beta=..., tau=...)`" in str(caught.value)
    assert "wrong" not in METHODS


@pytest.mark.long
def test_what_a_user_defined_method_may_leave_out_or_add(own_methods, tmp_path, tiny_folder):
    @register_objective("labels_alone", rows="labels")
    def labels_alone(answers):
        return -answers.logprob_B * (2 * answers.label_B - 1) / 100

    @register_objective("held", rows="tokens", reference=True)
    def held(targets, *, weight=1.0):
        return -targets.logprob_S + weight * mx.square(targets.logprob_S - targets.reference_S)

    @register_objective("surely", rows="prompts", metrics={"sure": "log-probability"})
    def surely(completions):
        return -completions.logprob_S * completions.advantage_S, {"sure": completions.logprob_S}

    with pytest.raises(ConfigError, match="its option `weight` has no default"):
        register_objective("needy")(lambda targets, *, weight: targets)
    rows = {"labels_alone": tiny_labels, "held": tiny_rows, "surely": tiny_prompts}
    for name, make in rows.items():
        check_objective(name)
        rewards = {"rewards": [len_of], "max_completion_length": 4} if name == "surely" else {}
        settings = {"method": name, "model": str(tiny_folder), "data": make(12), "adapter_path": str(tmp_path / name)}
        step = Run(RunConfig.from_dict({**settings, **rewards, "iters": 2})).step(2)
        assert step.step == 2
    assert "sure" in step.metrics


def len_of(completion):
    return len(completion)
