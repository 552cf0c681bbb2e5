"""The intervals hold what they promise: in simulations, 95% of them contain the true value, give or take 2%."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_nb.rollouts.intervals import estimate, mean, paired, ratio, share, t_quantile

TRIALS = 4000


def coverage(draw, interval, truth):
    """The share of intervals that contain the truth, over TRIALS samples."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(TRIALS):
        found = interval(*draw(random))
        held += found.low <= truth <= found.high
    return held / TRIALS


@pytest.mark.parametrize("rows", [20, 100])
@pytest.mark.parametrize("chance", [0.1, 0.35, 0.5, 0.9])
def test_the_interval_of_a_share_holds_it(rows, chance):
    # Exact, over every possible count: a share of few rows takes few values, and its coverage is not smooth.
    held = 0.0
    for hits in range(rows + 1):
        found = share([1.0] * hits + [0.0] * (rows - hits))
        probability = math.comb(rows, hits) * chance**hits * (1 - chance) ** (rows - hits)
        held += probability * (found.low <= chance <= found.high)
    assert held == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("rows", [10, 50])
def test_the_interval_of_a_mean_holds_it(rows):
    held = coverage(lambda random: (random.normal(0.3, 0.2, rows).tolist(),), mean, 0.3)
    assert held == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("rows", [25, 100])
def test_the_interval_of_a_loss_per_token_holds_it_though_tokens_of_a_row_are_alike(rows):
    """Rows of 5 to 40 tokens, whose tokens share the row's difficulty: by token the interval would be far too small."""

    def draw(random):
        tokens = random.integers(5, 41, rows)
        loss = random.normal(2.0, 0.5, rows)
        return tokens * loss, tokens

    assert coverage(draw, ratio, 2.0) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.5), (0.3, 0.6), (0.8, 0.9)])
@pytest.mark.parametrize("rows", [40, 150])
def test_the_interval_of_a_paired_difference_of_shares_holds_it(rows, before, after):
    """Two models answer the same rows: half of the time one random number decides both, so they agree often."""

    def draw(random):
        common, own = random.random(rows), random.random(rows)
        mixed = np.where(random.random(rows) < 0.5, common, own)
        return (common < before).astype(float).tolist(), (mixed < after).astype(float).tolist()

    assert coverage(draw, paired, after - before) == pytest.approx(0.95, abs=0.02)


def test_the_interval_of_a_paired_difference_of_losses_holds_it():
    def draw(random):
        hardness = random.gamma(2.0, 1.0, 40)
        return hardness.tolist(), (hardness - 0.2 + random.normal(0, 0.3, 40)).tolist()

    assert coverage(draw, paired, -0.2) == pytest.approx(0.95, abs=0.02)


def test_the_same_values_differ_by_nothing():
    assert paired([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]) == (0.0, 0.0, 0.0, 3)
    assert paired([1.7, 2.5], [1.7, 2.5]) == (0.0, 0.0, 0.0, 2)


def test_a_share_of_none_or_all_still_has_a_width():
    assert share([0.0] * 10) == (0.0, 0.0, pytest.approx(0.2775, abs=1e-4), 10)
    assert share([1.0] * 10) == (1.0, pytest.approx(0.7225, abs=1e-4), 1.0, 10)


def test_an_estimate_leaves_out_rows_without_a_number():
    assert estimate([1.0, math.nan, 0.0, 1.0]).rows == 3
    assert estimate([0.5, math.nan, 0.7]).value == pytest.approx(0.6)
    assert math.isnan(estimate([math.nan]).value)
    assert math.isnan(mean([0.5]).low)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (5, 2.5706), (7, 2.3646), (10, 2.2281), (30, 2.0423), (200, 1.9719)],
)
def test_the_quantile_of_student_is_that_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-3 if freedom == 5 else 2e-4)
