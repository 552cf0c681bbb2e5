"""Tokens are found by the characters that they cover: right whatever their order."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_nb.data.masks.token_edges import TokenOffsets


def offsets_of(rng: np.random.Generator, *, in_order: bool) -> np.ndarray:
    """(40, 2) offsets: some tokens without characters, some that share characters."""
    starts = np.sort(rng.integers(0, 60, 40))
    offsets = np.stack([starts, starts + rng.integers(0, 4, 40)], axis=1).astype(np.int32)
    if in_order:
        offsets[:, 1] = np.maximum.accumulate(offsets[:, 1])
        return offsets
    return rng.permutation(offsets)


@pytest.mark.parametrize("in_order", [True, False])
def test_tokens_that_cover_a_stretch_are_those_of_the_plain_definition(in_order: bool) -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        offsets = offsets_of(rng, in_order=in_order)
        found = TokenOffsets(offsets)
        for start, end in rng.integers(0, 64, (30, 2)).tolist():
            expected = [
                k for k, (a, b) in enumerate(offsets.tolist()) if a < end and (b > start or (a == b and a >= start))
            ]
            assert found.touching(start, end).tolist() == expected, (start, end)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_tokens_of_many_stretches_are_those_of_each(in_order: bool, count: int) -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        found = TokenOffsets(offsets_of(rng, in_order=in_order))
        stretches = rng.integers(0, 64, (count, 2), np.int32)
        which, tokens = found.touching_each(stretches)
        expected = [(k, token) for k, edges in enumerate(stretches.tolist()) for token in found.touching(*edges)]
        assert list(zip(which.tolist(), tokens.tolist())) == expected
