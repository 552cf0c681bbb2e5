"""Losses and gradients against TRL's own functions: goldens/trl.json, written by goldens/make_goldens.py.

What is otherwise here than in TRL is at the end, a test for each difference.
"""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_nb.config.methods import METHODS, options_of
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.model.logprobs import target_inputs
from mlx_nb.objectives import grpo, kto, sft
from mlx_nb.objectives.grpo import completion_objective
from mlx_nb.objectives.kto import label_objective
from mlx_nb.objectives.preference import log_one_minus_exp, pair_objective
from mlx_nb.objectives.sft import token_objective

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "trl.json").read_text(encoding="utf-8"))
PAIRS, LABELS = GOLDENS["pairs"], GOLDENS["labels"]
COMPLETIONS, TARGETS = GOLDENS["completions"], GOLDENS["targets"]
PAIR_CASES, LABEL_CASES = GOLDENS["pair_cases"], GOLDENS["label_cases"]
COMPLETION_CASES, TARGET_CASES = GOLDENS["completion_cases"], GOLDENS["target_cases"]
HALVES = (slice(0, 3), slice(3, 6))


class Given:
    """Stands where a model's scorer does and gives these log-probabilities, whatever the tokens."""

    def __init__(self, logprob_S):
        self.logprob_S = logprob_S

    def logprobs(self, inputs):
        return self.logprob_S

    def at_targets(self, inputs, function, *values_S):
        """With logits of a vocabulary of two: token 0, which all targets are, and the other one."""
        logits_SV = mx.stack([self.logprob_S, log_one_minus_exp(self.logprob_S)], axis=-1)
        return function(logits_SV, inputs.target_S, *values_S)


def flat(rows):
    return np.concatenate([np.array(row, np.float32) for row in rows])


def inputs_of(answers, token_values, row_values):
    """A first token, then the answers, all of token 0; `token_values` like `answers`, `row_values` (rows,)."""
    width = 1 + max(map(len, answers))

    def laid_out(rows):
        values_BT = np.zeros((len(rows), width), np.float32)
        for values_T, row in zip(values_BT, rows):
            values_T[1 : 1 + len(row)] = row
        return values_BT

    batch = TokenBatch(
        np.zeros((len(answers), width), np.int32),
        laid_out([np.ones(len(row)) for row in answers]),
        tuple(range(len(answers))),
        tuple(1 + len(row) for row in answers),
        {name: np.array(values, np.float32) for name, values in row_values.items()},
        {name: laid_out(rows) for name, rows in token_values.items()},
    )
    return target_inputs(batch)


def measured(objective, answers, inputs):
    """(LossSum, gradient of its total for each token)"""

    def total(logprob_S):
        sums = objective(Given(logprob_S), inputs)
        return sums.total, sums

    (_, sums), gradient_S = mx.value_and_grad(total)(mx.array(flat(answers)))
    return sums, np.array(gradient_S)


def value(metric):
    total, divisor = metric
    return total.item() / divisor.item()


def mean_loss(*sums):
    return sum(one.total.item() for one in sums) / sum(one.units.item() for one in sums)


def same_losses(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def same_gradients(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# Pairs


def pairs_measured(name, chosen=slice(None)):
    case = PAIR_CASES[name]
    module, function = case["loss"].split(".")
    loss = partial(getattr(importlib.import_module(f"mlx_nb.objectives.{module}"), function), **case["options"])
    answers = PAIRS["chosen"][chosen] + PAIRS["rejected"][chosen]
    reference = PAIRS["reference_chosen"][chosen] + PAIRS["reference_rejected"][chosen]
    margin = np.array(PAIRS["margin"])[chosen] * (name == "dpo with margins")
    values = {"reference": reference} if module == "dpo" else {}
    inputs = inputs_of(answers, values, {"margin": margin, "weight": np.ones_like(margin)})
    return measured(pair_objective(loss, case["options"]["beta"]), answers, inputs)


@pytest.mark.parametrize("name", PAIR_CASES)
def test_the_loss_of_every_pair_and_its_gradient_are_those_of_trl_or_else_of_the_equation(name):
    case = PAIR_CASES[name]
    sums, gradient_S = pairs_measured(name)
    same_losses(sums.row_total_R, case["losses"])
    per_answer = case["gradient_chosen"] + case["gradient_rejected"]
    lengths = [len(answer) for answer in PAIRS["chosen"] + PAIRS["rejected"]]
    same_gradients(gradient_S, np.repeat(per_answer, lengths))


WITHOUT_LIKELIHOOD = ["dpo sigmoid", "dpo robust", "dpo hinge", "dpo ipo", "dpo normalized", "simpo"]


@pytest.mark.parametrize("name", WITHOUT_LIKELIHOOD)
def test_the_loss_of_a_batch_of_pairs_is_that_of_trl(name):
    same_losses(mean_loss(pairs_measured(name)[0]), PAIR_CASES[name]["total"])


MEASURED = [
    name for name, case in PAIR_CASES.items() if "metrics" in case and name not in ("dpo ipo", "dpo normalized")
]


@pytest.mark.parametrize("name", MEASURED)
def test_implicit_rewards_and_accuracy_are_those_that_trl_shows(name):
    metrics = pairs_measured(name)[0].metrics
    for metric, expected in PAIR_CASES[name]["metrics"].items():
        same_losses(value(metrics[metric]), expected)


# Labels


def labels_measured(name):
    case = LABEL_CASES[name]
    estimate = np.full(len(LABELS["label"]), case["kl_estimate"])
    inputs = inputs_of(
        LABELS["answers"], {"reference": LABELS["reference"]}, {"label": LABELS["label"], "kl_estimate": estimate}
    )
    objective = label_objective(partial(kto.kto, **case["options"]), case["options"]["beta"])
    return measured(objective, LABELS["answers"], inputs)


@pytest.mark.parametrize("name", LABEL_CASES)
def test_the_loss_of_every_labeled_answer_and_its_gradient_are_those_of_trl(name):
    case = LABEL_CASES[name]
    sums, gradient_S = labels_measured(name)
    same_losses(sums.row_total_R, case["losses"])
    same_losses(mean_loss(sums), case["total"])
    lengths = [len(answer) for answer in LABELS["answers"]]
    same_gradients(gradient_S / sums.units.item(), np.repeat(case["gradient"], lengths))


# Completions


def completions_measured(name, chosen=slice(None)):
    case = COMPLETION_CASES[name]
    loss = partial(getattr(grpo, case["loss"]), **case["options"])
    said = {key: rows[chosen] for key, rows in COMPLETIONS.items()}
    inputs = inputs_of(
        said["policy"],
        {"behavior": said["behavior"], "reference": said["reference"]},
        {"advantage": said["advantage"], "counts": said["counts"]},
    )
    objective = completion_objective(loss, temperature=1.0, max_completion_length=8)
    return measured(objective, said["policy"], inputs)


@pytest.mark.parametrize("name", COMPLETION_CASES)
def test_the_loss_of_completions_and_its_gradient_are_those_of_trl(name):
    case = COMPLETION_CASES[name]
    sums, gradient_S = completions_measured(name)
    same_losses(mean_loss(sums), case["total"])
    same_gradients(gradient_S / sums.units.item(), flat(case["gradient"]))
    if "kl" in case:
        same_losses(value(sums.metrics["kl"]), case["kl"])


@pytest.mark.parametrize("name", [name for name in COMPLETION_CASES if "token" in name])
def test_the_share_of_clipped_tokens_is_that_of_trl(name):
    same_losses(value(completions_measured(name)[0].metrics["clipped"]), COMPLETION_CASES[name]["clipped"])


# Targets


@pytest.mark.parametrize("name", TARGET_CASES)
def test_the_loss_of_targets_and_its_gradient_are_those_of_trl_or_else_of_the_equation(name):
    case = TARGET_CASES[name]
    loss = partial(sft.dft if name == "dft" else sft.nll, **case["options"])
    targets, counts_S = mx.array(TARGETS["target"]), mx.array(TARGETS["counts"])

    def mean(logits_SV):
        at_targets = lambda _self, inputs, function, *values: function(logits_SV, inputs.target_S, *values)  # noqa: E731
        logits = type("Logits", (), {"at_targets": at_targets})()
        inputs = inputs_of([[0]] * len(TARGETS["target"]), {}, {})._replace(target_S=targets, weight_S=counts_S)
        sums = token_objective(loss)(logits, inputs)
        return sums.total / sums.units

    found, gradient_SV = mx.value_and_grad(mean)(mx.array(TARGETS["logits"]))
    same_losses(found.item(), case["total"])
    same_gradients(gradient_SV, case["gradient"])


# What is otherwise than in TRL


@pytest.mark.parametrize("name", ["cpo sigmoid", "cpo smoothed", "cpo hinge", "cpo-simpo", "orpo"])
def test_every_pair_weighs_the_same_where_trl_averages_the_likelihood_over_the_tokens_of_a_batch(name):
    case = PAIR_CASES[name]
    lengths = np.array([len(answer) for answer in PAIRS["chosen"]])
    nll_P = np.array([-np.mean(answer) for answer in PAIRS["chosen"]])
    alpha = case["options"].get("cpo_alpha", 1.0)
    preference_P = np.array(case["losses"]) - alpha * nll_P
    same_losses(preference_P.mean() + alpha * (nll_P * lengths).sum() / lengths.sum(), case["total"])
    same_losses(mean_loss(pairs_measured(name)[0]), (preference_P + alpha * nll_P).mean())


def test_orpo_trains_the_answer_only_where_trl_trains_the_prompt_too():
    case = PAIR_CASES["orpo"]
    nll_of_answers = -flat(PAIRS["chosen"]).mean()
    nll_of_both = -flat(PAIRS["prompt"] + PAIRS["chosen"]).mean()
    same_losses(case["total_with_prompt"] - case["total"], nll_of_both - nll_of_answers)
    same_losses(value(pairs_measured("orpo")[0].metrics["nll"]), np.mean([-np.mean(row) for row in PAIRS["chosen"]]))


def ratios(half, values):
    """Of each answer: log(policy / reference) of its tokens."""
    return [np.subtract(policy, known) for policy, known in zip(values[half], values[f"reference_{half}"])]


@pytest.mark.parametrize("name", ["dpo ipo", "dpo normalized"])
def test_rewards_shown_are_those_that_a_loss_compares_where_trl_shows_those_of_whole_answers(name):
    case, metrics = PAIR_CASES[name], pairs_measured(name)[0].metrics
    beta = case["options"]["beta"]
    for half in ("chosen", "rejected"):
        same_losses(case["metrics"][f"reward_{half}"], beta * np.mean([ratio.sum() for ratio in ratios(half, PAIRS)]))
        same_losses(value(metrics[f"reward_{half}"]), beta * np.mean([ratio.mean() for ratio in ratios(half, PAIRS)]))


def test_z0_of_kto_is_that_of_the_update_where_trl_takes_that_of_each_micro_batch():
    case = LABEL_CASES["kto"]
    same_losses(np.mean([ratio.sum() for ratio in ratios("mismatched", LABELS)]), case["kl_estimate"])
    same_losses(mean_loss(labels_measured("kto")[0]), case["total"])
    assert case["total_in_two_micro_batches"] != pytest.approx(case["total"], rel=1e-3)


@pytest.mark.parametrize("name", COMPLETION_CASES)
def test_micro_batches_change_no_loss_where_in_trl_they_change_bnpo(name):
    case = COMPLETION_CASES[name]
    same_losses(mean_loss(*(completions_measured(name, half)[0] for half in HALVES)), case["total"])
    unchanged_in_trl = case["total_in_two_micro_batches"] == pytest.approx(case["total"], rel=1e-5)
    assert unchanged_in_trl == (case["loss"] != "bnpo")


def test_clipped_completions_count_by_their_tokens_where_trl_counts_completions_and_masked_ones_too():
    case = COMPLETION_CASES["gspo"]
    tokens_B = np.array([len(row) for row in COMPLETIONS["policy"]]) * COMPLETIONS["counts"]
    clipped_B = np.array([not np.any(row) for row in case["gradient"]]) & (tokens_B > 0)
    same_losses(case["clipped"], clipped_B.mean())
    same_losses(
        value(completions_measured("gspo")[0].metrics["clipped"]), (clipped_B * tokens_B).sum() / tokens_B.sum()
    )


def test_these_defaults_differ_from_those_of_trl():
    differ = {}
    for method, theirs in GOLDENS["defaults"].items():
        for variant, loss in METHODS[method].losses.items():
            for name, ours in options_of(loss.function()).items():
                if name in theirs and theirs[name] != ours:
                    differ[f"{method} {variant}: {name}"] = (theirs[name], ours)
    of_all_grpo = {
        f"grpo {variant}: {name}": both
        for variant in METHODS["grpo"].losses
        for name, both in {"beta": (0.0, 0.04), "epsilon": (0.2, None)}.items()  # None: 0.2, but 3e-4 for sequences
    }
    assert differ == {
        "dpo normalized: beta": (0.1, 2.0),
        "cpo simpo: beta": (0.1, 2.0),
        "cpo simpo: cpo_alpha": (1.0, 0.0),
        **of_all_grpo,
    }
    assert (GOLDENS["defaults"]["grpo"]["max_completion_length"], RunConfig().max_completion_length) == (512, 256)
    assert (GOLDENS["defaults"]["grpo"]["loss_type"], next(iter(METHODS["grpo"].losses))) == ("dapo", "grpo")
