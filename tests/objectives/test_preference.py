"""Every preference loss and its gradient against float64 NumPy from the paper's equation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_nb.objectives import cpo, dpo, orpo
from mlx_nb.objectives.base import with_metrics
from mlx_nb.objectives.preference import PairLogprobs, log_one_minus_exp

RANDOM = np.random.default_rng(3)
P = 7
VALUES = {
    "chosen_P": -RANDOM.uniform(2, 60, P),
    "rejected_P": -RANDOM.uniform(2, 60, P),
    "reference_chosen_P": -RANDOM.uniform(2, 60, P),
    "reference_rejected_P": -RANDOM.uniform(2, 60, P),
    "chosen_length_P": RANDOM.integers(3, 20, P).astype(float),
    "rejected_length_P": RANDOM.integers(3, 20, P).astype(float),
    "margin_P": np.zeros(P),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def margin(v):
    return (v["chosen_P"] - v["rejected_P"]) - (v["reference_chosen_P"] - v["reference_rejected_P"])


def per_token(v, name):
    return v[f"{name}_P"] / v[f"{name}_length_P"]


def margin_per_token(v):
    reference = {**v, "chosen_P": v["reference_chosen_P"], "rejected_P": v["reference_rejected_P"]}
    return (per_token(v, "chosen") - per_token(v, "rejected")) - (
        per_token(reference, "chosen") - per_token(reference, "rejected")
    )


def odds(mean_logprob):
    p = np.exp(mean_logprob)
    return p / (1 - p)


BETA = 0.1
CASES = {
    "dpo sigmoid": (lambda p: dpo.sigmoid(p, beta=BETA), lambda v: -np.log(sigmoid(BETA * margin(v)))),
    "dpo conservative": (
        lambda p: dpo.sigmoid(p, beta=BETA, label_smoothing=0.2),
        lambda v: -0.8 * np.log(sigmoid(BETA * margin(v))) - 0.2 * np.log(sigmoid(-BETA * margin(v))),
    ),
    "dpo robust": (
        lambda p: dpo.robust(p, beta=BETA, label_smoothing=0.2),
        lambda v: -(0.8 * np.log(sigmoid(BETA * margin(v))) - 0.2 * np.log(sigmoid(-BETA * margin(v)))) / 0.6,
    ),
    "dpo hinge": (lambda p: dpo.hinge(p, beta=BETA), lambda v: np.maximum(0, 1 - BETA * margin(v))),
    "dpo ipo": (lambda p: dpo.ipo(p, beta=BETA), lambda v: (margin_per_token(v) - 1 / (2 * BETA)) ** 2),
    "dpo dpop": (
        lambda p: dpo.dpop(p, beta=BETA, delta=5.0),
        lambda v: -np.log(sigmoid(BETA * (margin(v) - 5.0 * np.maximum(0, v["reference_chosen_P"] - v["chosen_P"])))),
    ),
    "dpo normalized": (
        lambda p: dpo.normalized(p, beta=2.0),
        lambda v: -np.log(sigmoid(2.0 * margin_per_token(v))),
    ),
    "cpo": (
        lambda p: cpo.sigmoid(p, beta=BETA, cpo_alpha=1.0),
        lambda v: -np.log(sigmoid(BETA * (v["chosen_P"] - v["rejected_P"]))) - per_token(v, "chosen"),
    ),
    "cpo hinge": (
        lambda p: cpo.hinge(p, beta=BETA, cpo_alpha=0.5),
        lambda v: np.maximum(0, 1 - BETA * (v["chosen_P"] - v["rejected_P"])) - 0.5 * per_token(v, "chosen"),
    ),
    "simpo": (
        lambda p: cpo.simpo(p, beta=2.0, simpo_gamma=0.5),
        lambda v: -np.log(sigmoid(2.0 * (per_token(v, "chosen") - per_token(v, "rejected")) - 0.5)),
    ),
    "orpo": (
        lambda p: orpo.orpo(p, beta=0.25),
        lambda v: (
            -per_token(v, "chosen")
            - 0.25 * np.log(sigmoid(np.log(odds(per_token(v, "chosen")) / odds(per_token(v, "rejected")))))
        ),
    ),
}


def losses(name, pairs):
    return with_metrics(CASES[name][0](pairs), pairs.chosen_P, "pair")[0]


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_paper(name):
    paper = CASES[name][1]
    pairs = PairLogprobs(**{key: mx.array(value.astype(np.float32)) for key, value in VALUES.items()})
    assert np.array(losses(name, pairs)) == pytest.approx(paper(VALUES), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_papers_equation(name):
    paper = CASES[name][1]

    def total(chosen, rejected):
        rest = {key: mx.array(value.astype(np.float32)) for key, value in VALUES.items()}
        return losses(name, PairLogprobs(**{**rest, "chosen_P": chosen, "rejected_P": rejected})).sum()

    arguments = [mx.array(VALUES[key].astype(np.float32)) for key in ("chosen_P", "rejected_P")]
    gradients = mx.grad(total, argnums=(0, 1))(*arguments)
    step = 1e-6
    for key, gradient in zip(("chosen_P", "rejected_P"), gradients):
        for pair in range(P):
            shifted = [dict(VALUES), dict(VALUES)]
            for sign, values in zip((1, -1), shifted):
                values[key] = values[key].copy()
                values[key][pair] += sign * step
            expected = (paper(shifted[0]).sum() - paper(shifted[1]).sum()) / (2 * step)
            assert gradient[pair].item() == pytest.approx(expected, rel=2e-3, abs=2e-5), (key, pair)


def test_extreme_margins_stay_finite_with_finite_gradients():
    for margin_size in (-1e4, -100.0, 0.0, 100.0, 1e4):
        zeros, ones = mx.zeros(1), mx.ones(1)
        pairs = PairLogprobs(mx.array([margin_size]), zeros, zeros, zeros, ones, ones, zeros)
        for name in CASES:
            if name == "orpo":
                continue  # log-probabilities are below 0 there
            assert mx.isfinite(losses(name, pairs)).all(), (name, margin_size)
    for mean in (-1e-6, -0.1, -5.0, -80.0):
        gradient = mx.grad(lambda x: log_one_minus_exp(x).sum())(mx.array([mean]))
        assert mx.isfinite(gradient).all(), mean


@pytest.mark.parametrize("chosen", [0.0, -1e-7, -2.0])
@pytest.mark.parametrize("rejected", [0.0, -1e-7, -3.0])
def test_orpo_is_finite_with_a_finite_gradient_for_answers_that_are_certain(chosen, rejected):
    zeros, threes = mx.zeros(1), mx.array([3.0])

    def loss(chosen_P, rejected_P):
        pairs = PairLogprobs(chosen_P, rejected_P, zeros, zeros, threes, threes, zeros)
        losses_P, metrics = orpo.orpo(pairs, beta=0.1)
        return losses_P.sum(), metrics

    arguments = mx.array([chosen]), mx.array([rejected])
    (total, metrics), gradients = mx.value_and_grad(loss, argnums=(0, 1))(*arguments)
    assert all(mx.isfinite(array).all() for array in (total, *gradients, *metrics.values()))
    assert metrics["nll"].item() == pytest.approx(-chosen / 3, rel=1e-6)  # the bound is of the odds alone
    assert gradients[0].item() <= -1 / 3 + 1e-6


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_a_margin_moves_the_reward_at_which_ipo_is_0(beta):
    zeros, ones = mx.zeros(1), mx.ones(1)
    pairs = PairLogprobs(mx.array([(0.5 + 2.0) / beta]), zeros, zeros, zeros, ones, ones, mx.array([2.0]))
    loss, metrics = dpo.ipo(pairs, beta=beta)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert metrics["margin"].item() == pytest.approx(0.5 + 2.0)


def test_a_margin_moves_the_point_where_the_loss_is_ln_2():
    zeros, ones = mx.zeros(1), mx.ones(1)
    pairs = PairLogprobs(mx.array([20.0]), zeros, zeros, zeros, ones, ones, mx.array([2.0]))
    assert dpo.sigmoid(pairs, beta=0.1).item() == pytest.approx(np.log(2))
