"""Advantages are those of their formula; what has no reward, or tells nothing, gets 0."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_nb.errors import ConfigError
from mlx_nb.rollouts.advantages import group_advantages


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_follow_their_formula(scale):
    totals = np.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    groups = totals.reshape(2, 3)
    centered = groups - groups.mean(axis=1, keepdims=True)
    scales = {"group": groups.std(axis=1, ddof=1, keepdims=True) + 1e-4, "batch": totals.std(ddof=1) + 1e-4, "none": 1}
    found = group_advantages(totals, 3, scale=scale)
    np.testing.assert_allclose(found.advantage_N, (centered / scales[scale]).reshape(-1), rtol=1e-6)
    assert found.advantage_N.dtype == np.float32
    assert found.valid_N.all()
    assert found.zero_variance_share == 0.0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_missing_reward_leaves_the_others_as_if_it_were_not_there(scale):
    nan = math.nan
    found = group_advantages(np.array([1.0, nan, 3.0, 5.0, nan, nan]), 3, scale=scale)
    whole = group_advantages(np.array([1.0, 3.0, 5.0, 5.0]), 2, scale=scale)
    assert found.valid_N.tolist() == [True, False, True, True, False, False]
    assert found.advantage_N[[1, 3, 4, 5]].tolist() == [0.0] * 4
    assert found.zero_variance_share == 0.5
    if scale != "batch":  # there the lone reward counts once, not twice
        assert found.advantage_N[[0, 2]].tolist() == whole.advantage_N[:2].tolist()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_and_lone_ones_give_exactly_nothing(scale):
    nan = math.nan
    totals = np.array([0.1 + 0.2, 0.3, 0.3 + 1e-8, nan, 7.0, nan, nan, nan, nan, 0.0, 1.0, 2.0])
    found = group_advantages(totals, 3, scale=scale)
    assert found.advantage_N[:9].tolist() == [0.0] * 9
    assert found.advantage_N[9] < 0 < found.advantage_N[11]
    assert found.zero_variance_share == 0.75
    assert group_advantages(np.zeros(0), 3, scale=scale).zero_variance_share == 0.0


def test_the_scale_and_the_groups_are_checked():
    with pytest.raises(ConfigError, match="Did you mean 'group'"):
        group_advantages(np.zeros(4), 2, scale="groups")
    with pytest.raises(ValueError, match="groups of 3"):
        group_advantages(np.zeros(4), 3, scale="group")
