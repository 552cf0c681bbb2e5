"""Lines of a batch one after the other in one row, each first token that several lines begin with only once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlx_nb.data.examples.batches import TokenBatch

# Of a shorter beginning that lines have in common there is nothing to gain.
_FEWEST_SHARED = 8


class PackedLines(NamedTuple):
    """Lines as one row of N tokens.

    tokens_N   (N,) int32
    positions  for each line the places in `tokens_N` of its tokens, in their order
    shared     for each line how many of its first tokens an earlier line has, and so are not there again
    """

    tokens_N: np.ndarray
    positions: tuple[np.ndarray, ...]
    shared: tuple[int, ...]


def pack_lines(lines: Sequence[np.ndarray]) -> PackedLines:
    """Lines of tokens as one row.

    For example [a b c d] and [a b x], with shared beginnings of 2 tokens allowed: the row is a b c d x, the second
    line is at 0, 1, 4, and of it 2 tokens are shared.
    """
    row: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    shared: list[int] = []
    used = 0
    for line in lines:
        common = [_common(line, other) for other in lines[: len(positions)]]
        longest = int(np.argmax(common)) if common else 0
        first = common[longest] if common and common[longest] >= _FEWEST_SHARED else 0
        beginning = positions[longest][:first] if first else np.zeros(0, np.int64)
        own = line[first:]
        positions.append(np.concatenate([beginning, np.arange(used, used + len(own))]))
        shared.append(first)
        row.append(own)
        used += len(own)
    return PackedLines(np.concatenate(row).astype(np.int32), tuple(positions), tuple(shared))


def scored_lines(batch: TokenBatch) -> list[np.ndarray]:
    """The tokens of each line up to the last that predicts a target; in a causal model the rest changes nothing."""
    ends = [int(np.flatnonzero(mask_T)[-1]) if mask_T.any() else 1 for mask_T in batch.loss_mask_BT]
    return [tokens_T[:end] for tokens_T, end in zip(batch.tokens_BT, ends)]


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens are the same."""
    shorter = min(len(one), len(other))
    (differ,) = np.nonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter
