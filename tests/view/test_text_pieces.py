"""`truncate: split`: a long text in pieces, every token but the first trained exactly once, each with its context."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.examples import Examples, split_examples
from mlx_nb.data.examples.imitation import split_text
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.conversation import TokenizedConversation
from mlx_nb.data.rows.columns import Columns
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import ConfigError


@given(st.integers(1, 120), st.integers(2, 20), st.integers(0, 19))
def test_every_token_but_the_first_is_trained_once_after_at_least_stride_others(length, limit, stride):
    stride = min(stride, limit - 1)
    tokens = np.arange(length, dtype=np.int32)
    loss_mask = np.ones(length, np.float32)
    loss_mask[0] = 0
    text = TokenizedConversation(tokens, loss_mask, "", np.zeros((length, 2), np.int32), ())
    pieces = split_text(text, 5, ExampleSettings("assistant", limit, "split", Columns(), stride))
    assert np.concatenate([piece.tokens[piece.loss_mask > 0] for piece in pieces]).tolist() == list(range(1, length))
    for piece in pieces:
        assert len(piece.tokens) <= limit
        assert piece.row == 5
        assert piece.loss_mask[0] == 0
        assert np.array_equal(np.diff(piece.tokens), np.ones(len(piece.tokens) - 1))
    for before, after in pairwise(pieces):
        assert before.tokens[-1] - after.tokens[0] + 1 == max(1, stride)
        assert len(before.tokens) == limit


@pytest.fixture
def examples(tiny_folder):
    from transformers import AutoTokenizer

    def make(rows, **settings):
        config = RunConfig(truncate="split", max_seq_length=40, **settings)
        source = open_splits(rows, val_set_size=0).train
        return Examples(source, AutoTokenizer.from_pretrained(tiny_folder), ExampleSettings.of(config))

    return make


CHAT = {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "far " * 40}]}


def test_only_a_long_text_is_split_and_a_long_conversation_is_left_out(examples):
    text = "red green blue " * 12
    kept, left_out = split_examples(list(examples([{"text": text}, {"text": "red"}, CHAT], stride=8).tokenize_all()))
    assert {example.row for example in kept} == {0, 1}
    assert [example.row for example in kept].count(1) == 1
    assert [example.row for example in kept].count(0) > 2
    assert [row.row for row in left_out] == [2]
    assert "`truncate: split` is for plain text" in left_out[0].reason


def test_the_view_of_a_split_text_is_its_first_piece_and_says_so(examples):
    rows = examples([{"text": "red green blue " * 12}])
    view, pieces = rows.view(0), list(rows.tokenize_all())
    assert view.error is None
    assert np.array_equal(view.conversation.tokens, pieces[0].tokens)
    assert np.array_equal(view.example.loss_mask, pieces[0].loss_mask)
    assert f"the text is trained in {len(pieces)} pieces; this is the first." in view.conversation.problems


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 8}, "`stride` has no effect without `truncate: split`"),
        (
            {"stride": 64, "truncate": "split", "max_seq_length": 64},
            "`stride` (64) must be below `max_seq_length` (64)",
        ),
    ],
)
def test_a_stride_that_cannot_work_is_an_error(settings, message):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(settings)
    assert message in str(caught.value)
