"""Which rows go into which batch, and the padded arrays of a batch.

The order is a function of (seed, epoch) alone: batch k of a run can be rebuilt without drawing the k before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from mlx_nb.data.preference_examples import LabelledExample, PreferenceExample
from mlx_nb.data.token_examples import TokenizedExample

# Batches are formed inside windows of this many batches, sorted by length: little padding, still well shuffled.
_BATCHES_PER_WINDOW = 16


class TokenBatch(NamedTuple):
    """Rows side by side, padded on the right.

    tokens_BT     (B, T) int32; padding is 0
    loss_mask_BT  (B, T) float32, weight of each token as a target; 0 on padding and in column 0
    rows          numbers of the rows in their split
    lengths       tokens of each line of tokens_BT without padding
    row_values    (R,) float32 constants by name, one for each of `rows`
    token_values  (B, T) float32 constants by name, aligned with tokens_BT
    """

    tokens_BT: np.ndarray
    loss_mask_BT: np.ndarray
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    row_values: Mapping[str, np.ndarray] = MappingProxyType({})
    token_values: Mapping[str, np.ndarray] = MappingProxyType({})


class BatchPlan:
    """Batches of `batch_size` rows for as many epochs as wanted; every row once an epoch, none dropped.

    Rows are shuffled by (seed, epoch), bucketed by length, and the batches shuffled again.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self._epoch_batches = lru_cache(maxsize=2)(self._order)

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def batch(self, index: int) -> np.ndarray:
        """Positions (into `lengths`) of the rows of batch `index`, counted from 0 across epochs."""
        epoch, position = divmod(index, self.batches_per_epoch)
        return self._epoch_batches(epoch)[position]

    def _order(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.lengths))
        window = self.batch_size * _BATCHES_PER_WINDOW
        batches: list[np.ndarray] = []
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            by_length = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += [by_length[at : at + self.batch_size] for at in range(0, len(by_length), self.batch_size)]
        return [batches[at] for at in random.permutation(len(batches))]


def evaluation_batches(lengths: Sequence[int], batch_size: int, limit: int, seed: int) -> list[np.ndarray]:
    """A FIXED set of batches: the same rows at every evaluation. `limit` batches at most, -1 = all rows."""
    count = len(lengths)
    chosen = np.arange(count)
    if limit != -1 and limit * batch_size < count:
        chosen = np.sort(np.random.default_rng([seed, count]).permutation(count)[: limit * batch_size])
    by_length = chosen[np.argsort(np.asarray(lengths)[chosen], kind="stable")]
    return [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]


def pad(examples: Sequence[TokenizedExample], pad_to_multiple: int = 1) -> TokenBatch:
    """The examples as one padded batch, its width rounded up to a multiple of `pad_to_multiple`."""
    lengths = tuple(len(example.tokens) for example in examples)
    width = -(-max(lengths) // pad_to_multiple) * pad_to_multiple
    tokens_BT = np.zeros((len(examples), width), dtype=np.int32)
    loss_mask_BT = np.zeros((len(examples), width), dtype=np.float32)
    for index, example in enumerate(examples):
        tokens_BT[index, : lengths[index]] = example.tokens
        loss_mask_BT[index, : lengths[index]] = example.loss_mask
    return TokenBatch(tokens_BT, loss_mask_BT, tuple(example.row for example in examples), lengths)


def pad_pairs(examples: Sequence[PreferenceExample], pad_to_multiple: int = 1) -> TokenBatch:
    """P pairs as one padded batch of 2P lines: all chosen answers, then all rejected ones in the same order.

    `rows` has P numbers, `lengths` 2P; row_values are `weight` and `margin`, (P,) each.
    """
    answers = [example.chosen for example in examples] + [example.rejected for example in examples]
    values = {
        "weight": np.array([example.weight for example in examples], np.float32),
        "margin": np.array([example.margin for example in examples], np.float32),
    }
    rows = tuple(example.row for example in examples)
    return pad(answers, pad_to_multiple)._replace(rows=rows, row_values=values)


def split_rows(batch: TokenBatch, parts: int) -> list[TokenBatch]:
    """The batch in at most `parts` batches of whole rows, in the same order. Both answers of a pair stay together."""
    count = len(batch.rows)
    if parts == 1 or count == 1:
        return [batch]
    lines_each = len(batch.lengths) // count
    found = []
    for rows in np.array_split(np.arange(count), min(parts, count)):
        lines = np.concatenate([rows + block * count for block in range(lines_each)])
        found.append(
            TokenBatch(
                batch.tokens_BT[lines],
                batch.loss_mask_BT[lines],
                tuple(batch.rows[row] for row in rows),
                tuple(batch.lengths[line] for line in lines),
                {name: value_R[rows] for name, value_R in batch.row_values.items()},
                {name: value_BT[lines] for name, value_BT in batch.token_values.items()},
            )
        )
    return found


def pad_labelled(examples: Sequence[LabelledExample], pad_to_multiple: int = 1) -> TokenBatch:
    """P labelled answers as one padded batch; the row value `label` is 1 for a good answer, else 0, (P,)."""
    labels = np.array([example.label for example in examples], np.float32)
    return pad([example.example for example in examples], pad_to_multiple)._replace(row_values={"label": labels})


def pad_mismatched(examples: Sequence[LabelledExample], pad_to_multiple: int = 1) -> TokenBatch | None:
    """The same prompts, each with another row's answer; None where there is no other row."""
    mismatched = [example.mismatched for example in examples if example.mismatched is not None]
    return pad(mismatched, pad_to_multiple) if len(mismatched) == len(examples) else None
