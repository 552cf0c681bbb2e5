"""Assigns rows to batches, and makes the padded arrays of a batch.

The order is a function of (seed, epoch) and the batch size: batch k of a run can be computed without the batches before
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.data.examples.preference import LabeledExample, PreferenceExample

# Batches are formed inside windows of at most this many batches, sorted by length: little padding, still well shuffled.
_BATCHES_PER_WINDOW = 16
# Version of the order that (seed, epoch) give: increased with each change, so that a checkpoint with another order is
# noticed.
ORDER = 2
_ROUNDING = 1e-9  # tolerance for a fractional number of passes


class TokenBatch(NamedTuple):
    """A padded batch of rows, padded on the right.

    tokens_BT     (B, T) int32; padding is 0
    loss_mask_BT  (B, T) float32, weight of each token as a target; 0 on padding and in column 0
    rows          numbers of the rows in their split
    lengths       tokens of each line of tokens_BT without padding
    row_values    (R,) float32 constants by name, one for each of `rows`
    token_values  (B, T) float32 constants by name, aligned with tokens_BT
    packed        whether the lines are computed one after the other in one row
    """

    tokens_BT: np.ndarray
    loss_mask_BT: np.ndarray
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    row_values: Mapping[str, np.ndarray] = MappingProxyType({})
    token_values: Mapping[str, np.ndarray] = MappingProxyType({})
    packed: bool = False


class Place(NamedTuple):
    """The position of a run in its data, independent of its batch size: `rows` of epoch `epoch` (from 0) are done.

    `batch_size` is the one that the order of that epoch was made with.
    """

    epoch: int
    rows: int
    batch_size: int


class BatchPlan:
    """The batches of `batch_size` rows for any number of epochs; every row once per epoch, none dropped.

    Rows are shuffled by (seed, epoch), bucketed by length in windows that hold other rows in each epoch, and the
    batches shuffled again; a shorter batch comes last. Rows with different `labels` are spread over all batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, labels: Sequence[Any] | None = None) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self._labels = np.zeros(len(lengths), np.int64) if labels is None else np.asarray(labels)
        self._kinds = np.unique(self._labels)
        self._order_of = lru_cache(maxsize=2)(self._order)
        self._cut: Place | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches that cover every row once; the last may be smaller."""
        return -(-len(self.lengths) // self.batch_size)

    def batch(self, index: int) -> np.ndarray:
        """Positions (into `lengths`) of the rows of batch `index`, counted from 0 across epochs."""
        place = self.place(index)
        return self._order_of(place.epoch, place.batch_size)[place.rows : place.rows + self.batch_size]

    def update(self, first: int, count: int) -> list[np.ndarray]:
        """The batches of an update starting at batch `first`: `count`, or the rest of the epoch."""
        left = self.batches_per_epoch - first % self.batches_per_epoch
        return [self.batch(first + number) for number in range(min(count, left))]

    def place(self, index: int) -> Place:
        """Where batch `index` begins."""
        epoch, number = divmod(index, self.batches_per_epoch)
        cut = self._cut
        if cut is None or cut.epoch != epoch:
            return Place(epoch, number * self.batch_size, self.batch_size)
        # The rest of that epoch is its last batches.
        skipped = self.batches_per_epoch - -(-(len(self.lengths) - cut.rows) // self.batch_size)
        return Place(epoch, cut.rows + (number - skipped) * self.batch_size, cut.batch_size)

    def find(self, place: Place) -> int:
        """The index of the batch that begins at `place`; from there the rest of the epoch keeps its order.

        A run can thus continue with another batch size without skipping or repeating a row of the epoch.
        """
        self._cut = None
        if place.rows >= len(self.lengths):
            return (place.epoch + 1) * self.batches_per_epoch
        if place.rows == 0 or (place.batch_size == self.batch_size and place.rows % self.batch_size == 0):
            return place.epoch * self.batches_per_epoch + place.rows // self.batch_size
        self._cut = place
        return (place.epoch + 1) * self.batches_per_epoch - -(-(len(self.lengths) - place.rows) // self.batch_size)

    def epochs(self, index: int) -> float:
        """Number of passes over the rows before batch `index`."""
        place = self.place(index)
        return place.epoch + place.rows / len(self.lengths)

    def _order(self, epoch: int, batch_size: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        order = self._spread(random.permutation(len(self.lengths)))
        count = -(-len(order) // batch_size)
        # At least two windows: with one the same rows would meet in every epoch.
        windows = np.array_split(np.arange(count), min(count, max(2, -(-count // _BATCHES_PER_WINDOW))))
        batches: list[np.ndarray] = []
        for window in windows:
            rows = self._by_length(order[window[0] * batch_size : (window[-1] + 1) * batch_size])
            if short := len(rows) % batch_size:  # of the last window; moved to the end, whatever its length
                at = batch_size * int(random.integers(len(window)))
                rows = np.concatenate([rows[:at], rows[at + short :], rows[at : at + short]])
            batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        whole = len(order) // batch_size
        return np.concatenate([*(batches[at] for at in random.permutation(whole)), *batches[whole:]])

    def _by_length(self, rows: np.ndarray) -> np.ndarray:
        return self._spread(rows[np.argsort(self.lengths[rows], kind="stable")])

    def _spread(self, rows: np.ndarray) -> np.ndarray:
        """Spread the rows of each label evenly over the whole, keeping their order."""
        share = np.empty(len(rows))
        for label in self._kinds:
            (at,) = np.nonzero(self._labels[rows] == label)
            share[at] = (np.arange(len(at)) + 0.5) / max(1, len(at))
        return rows[np.argsort(share, kind="stable")]


def updates_until(epochs: float, batches_per_epoch: int, accumulated: int, first: int = 0) -> int:
    """Updates from batch `first` until `epochs` passes over the rows are done; 0 if they are.

    An update takes `accumulated` batches, fewer at the end of an epoch; a partial epoch is rounded up to an update.
    """
    whole = math.floor(epochs + _ROUNDING)
    last = math.ceil((epochs - whole) * batches_per_epoch - _ROUNDING)
    epoch, done = divmod(first, batches_per_epoch)
    if epoch >= whole:
        return -(-max(0, last - done) // accumulated) if epoch == whole else 0
    each = -(-batches_per_epoch // accumulated)
    return -(-(batches_per_epoch - done) // accumulated) + (whole - epoch - 1) * each + -(-max(0, last) // accumulated)


def evaluation_batches(lengths: Sequence[int], batch_size: int, limit: int, seed: int) -> list[np.ndarray]:
    """A FIXED set of batches: the same rows at every evaluation. At most `limit` batches, -1 = all rows."""
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
    """Divide the batch into at most `parts` batches of whole rows, in the same order. Pairs stay together."""
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
                batch.packed,
            )
        )
    return found


def pad_labeled(examples: Sequence[LabeledExample], pad_to_multiple: int = 1) -> TokenBatch:
    """P labeled answers as one padded batch; the row value `label` is 1 for a good answer, else 0, (P,)."""
    labels = np.array([example.label for example in examples], np.float32)
    return pad([example.example for example in examples], pad_to_multiple)._replace(row_values={"label": labels})


def pad_mismatched(examples: Sequence[LabeledExample], pad_to_multiple: int = 1) -> TokenBatch | None:
    """The same prompts, each with the answer of another row; None if there is no other row."""
    mismatched = [example.mismatched for example in examples if example.mismatched is not None]
    return pad(mismatched, pad_to_multiple) if len(mismatched) == len(examples) else None
