"""Every row once an epoch, the order a function of (seed, epoch), padding little and inert."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_nb.data.examples.batches import (
    BatchPlan,
    evaluation_batches,
    pad,
    pad_labeled,
    pad_mismatched,
    pad_pairs,
    updates_until,
)
from mlx_nb.data.examples.preference import LabeledExample, PreferenceExample
from tiny import random_examples


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=200),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_an_epoch(lengths, batch_size, seed, epoch):
    plan = BatchPlan(lengths, batch_size, seed)
    first = epoch * plan.batches_per_epoch
    seen = np.concatenate([plan.batch(first + index) for index in range(plan.batches_per_epoch)])
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.long
def test_the_order_of_an_epoch_takes_time_in_proportion_to_its_rows():
    def seconds(count):
        plan, begun = BatchPlan([7] * count, 1, seed=0), time.process_time()
        plan.batch(0)
        return time.process_time() - begun

    few, many = (min(seconds(count) for _ in range(3)) for count in (5_000, 80_000))
    assert many < 3 * 16 * few


def test_batch_k_does_not_depend_on_the_batches_drawn_before():
    lengths = list(range(1, 100))
    straight, jumping = BatchPlan(lengths, 4, seed=3), BatchPlan(lengths, 4, seed=3)
    expected = [straight.batch(index) for index in range(120)]
    for index in (119, 0, 60, 25, 26):
        assert np.array_equal(jumping.batch(index), expected[index])


def test_another_seed_and_another_epoch_give_another_order():
    lengths = [10] * 64
    plan = BatchPlan(lengths, 4, seed=0)
    epoch_0 = np.concatenate([plan.batch(index) for index in range(16)])
    epoch_1 = np.concatenate([plan.batch(index + 16) for index in range(16)])
    seed_1 = np.concatenate([BatchPlan(lengths, 4, seed=1).batch(index) for index in range(16)])
    assert not np.array_equal(epoch_0, epoch_1)
    assert not np.array_equal(epoch_0, seed_1)


def test_length_bucketing_saves_most_of_the_padding():
    lengths = np.random.default_rng(0).integers(10, 500, 2000)
    bucketed = BatchPlan(lengths, 8, seed=0)
    padded = sum(8 * lengths[bucketed.batch(index)].max() for index in range(bucketed.batches_per_epoch))
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(-1, 8).max(axis=1).sum() * 8
    assert padded / lengths.sum() < 1.08
    assert shuffled / lengths.sum() > 1.5


def test_the_evaluation_set_is_fixed():
    lengths = list(range(5, 105))
    chosen = [sorted(np.concatenate(evaluation_batches(lengths, 4, 5, seed=0))) for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 20
    assert sorted(np.concatenate(evaluation_batches(lengths, 4, -1, seed=0))) == list(range(100))


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_padding_is_zero_in_tokens_and_mask(multiple):
    examples = random_examples(5)
    batch = pad(examples, multiple)
    assert batch.tokens_BT.shape[1] % multiple == 0
    for index, example in enumerate(examples):
        length = len(example.tokens)
        assert np.array_equal(batch.tokens_BT[index, :length], example.tokens)
        assert np.array_equal(batch.loss_mask_BT[index, :length], example.loss_mask)
        assert not batch.tokens_BT[index, length:].any()
        assert not batch.loss_mask_BT[index, length:].any()


def padded(batch):
    """The lines of a batch without their padding, which must be zeros."""
    for tokens_T, mask_T, length in zip(batch.tokens_BT, batch.loss_mask_BT, batch.lengths):
        assert not tokens_T[length:].any()
        assert not mask_T[length:].any()
        yield tokens_T[:length], mask_T[:length]


def test_pairs_are_padded_chosen_first_then_rejected():
    answers = random_examples(6)
    pairs = [
        PreferenceExample(answers[k], answers[k + 3], 2, row=10 + k, margin=k / 4, weight=1.0 + k) for k in range(3)
    ]
    batch = pad_pairs(pairs, 32)
    assert batch.tokens_BT.shape == (6, 32)
    assert batch.rows == (10, 11, 12)
    assert batch.row_values["weight"].tolist() == [1.0, 2.0, 3.0]
    assert batch.row_values["margin"].tolist() == [0.0, 0.25, 0.5]
    assert all(values.dtype == np.float32 for values in batch.row_values.values())
    for (tokens, mask), answer in zip(padded(batch), answers):
        assert np.array_equal(tokens, answer.tokens)
        assert np.array_equal(mask, answer.loss_mask)


def test_labeled_answers_are_padded_with_their_labels_and_their_mismatched_answers_alike():
    answers = random_examples(6)
    labeled = [LabeledExample(answers[k], k != 1, 2, k, answers[k + 3]) for k in range(3)]
    batch, mismatched = pad_labeled(labeled), pad_mismatched(labeled)
    assert batch.row_values["label"].tolist() == [1.0, 0.0, 1.0]
    assert batch.rows == (0, 1, 2)
    for lines, expected in ((batch, answers[:3]), (mismatched, answers[3:])):
        for (tokens, mask), answer in zip(padded(lines), expected):
            assert np.array_equal(tokens, answer.tokens)
            assert np.array_equal(mask, answer.loss_mask)
    assert pad_mismatched([LabeledExample(answers[0], True, 2, 0)]) is None


def test_a_batch_of_tokens_has_no_values_that_another_could_change():
    batch = pad(random_examples(2))
    assert dict(batch.row_values) == dict(batch.token_values) == {}
    with pytest.raises(TypeError):
        batch.row_values["weight"] = 1


def batch_sets(plan, epoch):
    first = epoch * plan.batches_per_epoch
    return {frozenset(plan.batch(first + index).tolist()) for index in range(plan.batches_per_epoch)}


@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (24, 4), (64, 4), (128, 8), (500, 32), (1000, 4)])
def test_rows_meet_other_rows_in_every_epoch_however_few_they_are(rows, batch_size):
    plan = BatchPlan(np.random.default_rng(0).permutation(rows) + 20, batch_size, seed=0)
    epochs = [batch_sets(plan, epoch) for epoch in range(6)]
    again = [len(one & other) / len(one) for k, one in enumerate(epochs) for other in epochs[:k]]
    assert np.mean(again) < 0.1


@pytest.mark.parametrize(("rows", "batch_size", "most"), [(64, 4, 1.12), (200, 4, 1.08), (500, 32, 1.15)])
def test_few_rows_are_bucketed_by_length_too(rows, batch_size, most):
    lengths = np.random.default_rng(0).integers(10, 500, rows)
    plan = BatchPlan(lengths, batch_size, seed=0)
    batches = [plan.batch(index) for index in range(4 * plan.batches_per_epoch)]
    assert sum(len(rows) * lengths[rows].max() for rows in batches) / (4 * lengths.sum()) < most


@pytest.mark.parametrize("rows", [10, 60, 61, 203])
@pytest.mark.parametrize("bad_share", [2, 4])
def test_every_batch_has_rows_of_each_label_where_there_are_enough(rows, bad_share):
    labels = np.arange(rows) % bad_share != 0
    lengths = np.where(labels, 90, 30) + np.arange(rows) % 10  # good answers are longer, as they usually are
    plan = BatchPlan(lengths, 4, seed=0, labels=labels)
    for index in range(3 * plan.batches_per_epoch):
        found = labels[plan.batch(index)]
        if len(found) == 4 and bad_share == 2:
            assert found.sum() == 2
        elif len(found) == 4:
            assert 2 <= found.sum() <= 4
    assert sorted(np.concatenate([plan.batch(index) for index in range(plan.batches_per_epoch)])) == list(range(rows))


@given(
    rows=st.integers(1, 60),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=5),
    seed=st.integers(0, 3),
)
def test_another_batch_size_in_the_middle_of_an_epoch_leaves_no_row_out_and_repeats_none(rows, sizes, seed):
    lengths = np.random.default_rng(seed).integers(1, 100, rows)
    visits = []
    place = BatchPlan(lengths, 1, seed).place(0)
    for batch_size, batches in [*sizes, (2, 2 * rows + 1)]:
        plan = BatchPlan(lengths, batch_size, seed)
        index = plan.find(place)
        assert plan.place(index).rows == place.rows % rows
        for _ in range(batches):
            visits += plan.batch(index).tolist()
            index += 1
        place = plan.place(index)
        assert plan.epochs(index) == pytest.approx(len(visits) / rows)
    for epoch in range(len(visits) // rows):
        assert sorted(visits[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_an_update_ends_with_the_epoch_and_epochs_are_counted_in_such_updates():
    plan = BatchPlan([5] * 10, 4, seed=0)  # 3 batches: 4, 4 and 2 rows
    assert [len(rows) for rows in plan.update(0, 8)] == [4, 4, 2]
    assert [len(rows) for rows in plan.update(2, 8)] == [2]
    assert [len(rows) for rows in plan.update(3, 2)] == [4, 4]
    assert updates_until(1, 3, 8) == 1
    assert updates_until(3, 3, 2) == 6
    assert updates_until(2.5, 4, 1) == 10
    assert updates_until(2.5, 3, 2) == 5  # a half of 3 batches is 2, one update
    assert updates_until(0.01, 30, 4) == 1
    assert [updates_until(2, 3, 2, first) for first in range(7)] == [4, 3, 3, 2, 1, 1, 0]
