"""Pairs and labeled answers: every shape is recognized, the answers alone are trained, and bad rows are named."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_nb.data.examples.examples import Examples, split_examples
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.data.examples.kinds import ROW_KINDS, recognize
from mlx_nb.data.examples.preference import LabeledExample, with_mismatched
from mlx_nb.data.examples.settings import ExampleSettings, LeftOut, TooLong
from mlx_nb.data.rows.columns import Columns
from mlx_nb.data.rows.preference import LabeledRow, NothingToPrefer, PreferenceRow
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import DataError

USER, GOOD, BAD = (
    {"role": "user", "content": "Ahoy?"},
    {"role": "assistant", "content": "Arr."},
    {"role": "assistant", "content": "Hello."},
)
SYSTEM = {"role": "system", "content": "Be a pirate."}
AGAIN = {"role": "user", "content": "And?"}
TOOL = {"type": "function", "function": {"name": "sail", "parameters": {}}}
TEXTS = {"prompt": "Ahoy?", "chosen": "Arr.", "rejected": "Hello."}
MESSAGES = PreferenceRow([USER], [GOOD], [BAD])

PAIRS = {
    "texts": (TEXTS, PreferenceRow("Ahoy?", "Arr.", "Hello.")),
    "answers as messages, prompt as text": ({"prompt": "Ahoy?", "chosen": [GOOD], "rejected": [BAD]}, MESSAGES),
    "answers as messages, prompt too": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, MESSAGES),
    "prompt as messages, answers as texts": ({**TEXTS, "prompt": [USER]}, MESSAGES),
    "answers of several messages": (
        {"prompt": "Ahoy?", "chosen": [GOOD, AGAIN, GOOD], "rejected": [BAD]},
        PreferenceRow([USER], [GOOD, AGAIN, GOOD], [BAD]),
    ),
    "whole conversations": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, MESSAGES),
    "conversations that share turns": (
        {"chosen": [USER, BAD, AGAIN, GOOD], "rejected": [USER, BAD, AGAIN, BAD]},
        PreferenceRow([USER, BAD, AGAIN], [GOOD], [BAD]),
    ),
    "conversations as objects": (
        {"chosen": {"messages": [USER, GOOD]}, "rejected": {"messages": [USER, BAD]}},
        MESSAGES,
    ),
    "conversations as JSON text": (
        {"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps({"messages": [USER, BAD]})},
        MESSAGES,
    ),
    "conversations with their prompt": (
        {"prompt": " Ahoy?\n", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        PreferenceRow([SYSTEM, USER], [GOOD], [BAD]),
    ),
    "ShareGPT": (
        {
            "chosen": [{"from": "human", "value": "Ahoy?"}, {"from": "gpt", "value": "Arr."}],
            "rejected": [{"from": "human", "value": "Ahoy?"}, {"from": "gpt", "value": "Hello."}],
        },
        MESSAGES,
    ),
    "system column": (
        {**TEXTS, "system": "Be a pirate."},
        PreferenceRow([SYSTEM, USER], [GOOD], [BAD]),
    ),
    "tools": ({**TEXTS, "tools": [TOOL]}, PreferenceRow([USER], [GOOD], [BAD], [TOOL])),
    "weight and margin": (
        {**TEXTS, "preference_score": 2, "margin": "0.5"},
        PreferenceRow("Ahoy?", "Arr.", "Hello.", weight=2.0, margin=0.5),
    ),
    "an answer in JSON is text": (
        {"prompt": "Ahoy?", "chosen": '{"say": "Arr."}', "rejected": "[1, 2]"},
        PreferenceRow("Ahoy?", '{"say": "Arr."}', "[1, 2]"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_shape_of_a_pair_is_recognized_and_left_unchanged(name):
    record, expected = PAIRS[name]
    before = copy.deepcopy(record)
    assert recognize("pairs", record) == expected
    assert record == before


LABELS = {
    "texts": ({"prompt": "Ahoy?", "completion": "Arr.", "label": True}, LabeledRow("Ahoy?", "Arr.", True)),
    "as in a CSV file": (
        {"prompt": "Ahoy?", "completion": "Arr.", "label": "False"},
        LabeledRow("Ahoy?", "Arr.", False),
    ),
    "a number": ({"prompt": "Ahoy?", "completion": "Arr.", "label": 0.0}, LabeledRow("Ahoy?", "Arr.", False)),
    "messages": (
        {"prompt": [USER], "completion": [GOOD], "label": 1},
        LabeledRow([USER], [GOOD], True),
    ),
    "a whole conversation": (
        {"messages": [USER, BAD, AGAIN, GOOD], "label": True},
        LabeledRow([USER, BAD, AGAIN], [GOOD], True),
    ),
    "system and tools": (
        {"prompt": "Ahoy?", "completion": "Arr.", "label": True, "system": "Be a pirate.", "tools": [TOOL]},
        LabeledRow([SYSTEM, USER], [GOOD], True, [TOOL]),
    ),
}


@pytest.mark.parametrize("name", LABELS)
def test_every_shape_of_a_labeled_answer_is_recognized(name):
    record, expected = LABELS[name]
    assert recognize("labels", record) == expected


@pytest.mark.parametrize("kind", [np.bool_, np.int64, np.uint8, np.float32])
def test_a_label_may_be_a_number_of_numpy(kind):
    for said in (True, False):
        record = {"prompt": "Ahoy?", "completion": "Arr.", "label": kind(said)}
        assert recognize("labels", record) == LabeledRow("Ahoy?", "Arr.", said)


def test_columns_go_by_the_names_they_are_given():
    record = {"q": "Ahoy?", "better": "Arr.", "worse": "Hello.", "score": 3, "ok": 1, "prompt": "other"}
    columns = Columns(prompt="q", chosen="better", rejected="worse", preference_score="score")
    assert recognize("pairs", record, columns) == PreferenceRow("Ahoy?", "Arr.", "Hello.", weight=3.0)
    columns = Columns(prompt="q", completion="worse", label="ok")
    assert recognize("labels", record, columns) == LabeledRow("Ahoy?", "Hello.", True)
    named = {"talk": [USER, GOOD], "ok": 0, **TEXTS}
    assert recognize("labels", named, Columns(messages="talk", label="ok")) == LabeledRow([USER], [GOOD], False)


BAD_ROWS = [
    ("pairs", {"prompt": "x", "chosen": "y"}, "no column 'rejected'. The row has: 'prompt', 'chosen'."),
    ("pairs", {"prompt": "x", "chosen": "y", "rejected": None}, "`rejected` is empty (null)"),
    ("pairs", {"chosen": "y", "rejected": "z"}, "no column 'prompt'"),
    ("pairs", {"chosen": [GOOD], "rejected": [BAD]}, "no column 'prompt'"),
    ("pairs", {**TEXTS, "rejected": "Arr."}, "`chosen` and `rejected` are the same: there is nothing to prefer"),
    ("pairs", {**TEXTS, "rejected": [BAD]}, "`chosen` is text and `rejected` is a list. Make both of the same kind."),
    ("pairs", {**TEXTS, "chosen": 5}, "`chosen` must be text or a list of messages, not the number 5"),
    (
        "pairs",
        {"chosen": [USER, GOOD], "rejected": [AGAIN, BAD]},
        "part at message 0, which is from the user in `chosen`",
    ),
    ("pairs", {"chosen": [USER, GOOD, AGAIN, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "part at message 2"),
    ("pairs", {"chosen": [USER, GOOD, AGAIN, GOOD], "rejected": [USER, GOOD]}, "`rejected` is only the beginning"),
    ("pairs", {"prompt": "No?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "`prompt` is not in what the two"),
    ("pairs", {"prompt": "Ahoy?", "chosen": [USER, GOOD], "rejected": [BAD]}, "part at message 0"),
    ("pairs", {**TEXTS, "preference_score": 0}, "`preference_score` is the weight of the pair and must be above 0"),
    ("pairs", {**TEXTS, "preference_score": True}, "`preference_score` must be a number of at least 0, not True"),
    ("pairs", {**TEXTS, "margin": -1}, "`margin` must be a number of at least 0, not -1"),
    ("pairs", {**TEXTS, "margin": "nan"}, "`margin` must be a number of at least 0, not 'nan'"),
    ("labels", {"prompt": "x", "completion": "y"}, "no column 'label'"),
    (
        "labels",
        {"prompt": "x", "completion": "y", "label": "good"},
        "`label` must be true or false (or 1 or 0), not 'good'",
    ),
    ("labels", {"prompt": "x", "completion": "y", "label": 2}, "`label` must be true or false"),
    ("labels", {"prompt": "x", "completion": "y", "label": np.int64(2)}, "`label` must be true or false"),
    ("labels", {"prompt": "x", "completion": "y", "label": float("nan")}, "`label` must be true or false"),
    ("labels", {"prompt": "x", "completion": "y", "label": [1]}, "`label` must be true or false"),
    ("labels", {"prompt": "x", "completion": [USER, GOOD], "label": 1}, "`completion` begins with the user"),
    ("labels", {"messages": [GOOD], "label": 1}, "`messages` has no message from the user"),
    ("labels", {"messages": [USER, GOOD, AGAIN], "label": 1}, "no answer after the last user message"),
]


@pytest.mark.parametrize(("kind", "record", "message"), BAD_ROWS)
def test_a_bad_row_is_named_in_one_line(kind, record, message):
    with pytest.raises(DataError) as caught:
        recognize(kind, record, row=17, location="train.jsonl line 18")
    text = str(caught.value)
    assert text.startswith("row 17 (train.jsonl line 18): ")
    assert message in text
    assert "\n" not in text


def test_identical_answers_are_an_error_of_their_own():
    with pytest.raises(NothingToPrefer, match="row 3: "):
        recognize("pairs", {"chosen": [USER, GOOD], "rejected": [USER, dict(GOOD)]}, row=3)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=4) | st.sampled_from([USER, GOOD, BAD]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["messages", "role", "x"]), inner),
    max_leaves=6,
)
COLUMNS = ["prompt", "chosen", "rejected", "completion", "messages", "label", "margin", "system", "tools", "answer"]


@given(st.sampled_from(list(ROW_KINDS)), st.dictionaries(st.sampled_from(COLUMNS), VALUES))
def test_any_row_is_either_recognized_or_refused_by_name(kind, record):
    try:
        recognize(kind, record, row=3)
    except DataError as error:
        message = str(error)
    else:
        return
    assert message.startswith("row 3: ")
    assert "\n" not in message


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def plain(tiny_folder):
    """The same tokenizer without a chat template."""
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(tiny_folder)
    bare.chat_template = None
    return bare


def examples(rows, tokenizer, kind="pairs", *, limit=2000, truncate="right", loss_on="assistant"):
    source = open_splits(rows, val_set_size=0).train
    return Examples(source, tokenizer, ExampleSettings(loss_on, limit, truncate, Columns()), kind)


def made(*arguments, **settings):
    return split_examples(list(examples(*arguments, **settings).tokenize_all()))


def trained(tokenizer, example):
    return tokenizer.decode(example.tokens[example.loss_mask > 0])


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "tools"])
def test_of_a_pair_the_answers_are_trained_and_the_prompt_is_not(name, tokenizer):
    row = PAIRS[name][1]
    (example,), left_out = made([PAIRS[name][0]], tokenizer)
    assert left_out == []
    for said, answer in ((row.chosen, example.chosen), (row.rejected, example.rejected)):
        said = [{"content": said}] if isinstance(said, str) else said
        answers = [message["content"] for message in said if message.get("role") != "user"]
        assert trained(tokenizer, answer) == "".join(f"{text}<|end|>" for text in answers)
        assert tokenizer.decode(answer.tokens[: example.prompt_length]).endswith("<|assistant|>")
    assert (example.weight, example.margin) == (row.weight, row.margin)
    assert example.length == len(example.chosen.tokens) + len(example.rejected.tokens)


def test_texts_are_rendered_as_the_messages_they_stand_for(tokenizer):
    (texts, messages), _ = made([TEXTS, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}], tokenizer)
    for a, b in zip(texts.sequences, messages.sequences):
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.loss_mask, b.loss_mask)


def test_without_a_chat_template_the_answer_continues_the_prompt(plain):
    (pair,), _ = made([TEXTS], plain)
    assert plain.decode(pair.chosen.tokens) == "Ahoy?Arr.<|end|>"
    assert trained(plain, pair.rejected) == "Hello.<|end|>"
    assert pair.prompt_length == len(plain.encode("Ahoy?"))
    _, (refused,) = made([{"chosen": [USER, GOOD], "rejected": [USER, BAD]}], plain)
    assert refused.reason.startswith("row 0: chosen: the tokenizer has no chat template")


def test_prompts_whose_tokens_differ_are_remarked_on_and_only_what_is_shared_counts(plain):
    """`assistant` is one token: with the answer `tant` the last letters of the prompt are trained along with it."""
    row = {"prompt": "say assis", "chosen": "tant", "rejected": "!"}
    view = examples([row], plain).view(0)
    assert view.error is None
    assert any("the tokens before the two answers are not the same" in text for text in view.conversation.problems)
    (pair,), _ = made([row], plain)
    assert plain.decode(pair.chosen.tokens[: pair.prompt_length]) == "say "
    assert plain.decode(pair.rejected.tokens[: pair.prompt_length]) == "say "
    assert trained(plain, pair.chosen) == "assistant<|end|>"
    assert trained(plain, pair.rejected) == "!<|end|>"


def test_loss_on_all_is_refused_because_it_would_train_the_prompt(tokenizer):
    kept, left_out = made([TEXTS], tokenizer, loss_on="all")
    assert kept == []
    assert "loss_on='all' trains the prompt too" in left_out[0].reason


LONG = {"prompt": "Ahoy?", "chosen": "Arr.", "rejected": "no " * 40}


def test_each_answer_is_cut_to_length_alone(tokenizer):
    (whole,), _ = made([LONG], tokenizer)
    (cut,), _ = made([LONG], tokenizer, limit=60)
    assert np.array_equal(cut.chosen.tokens, whole.chosen.tokens)
    assert np.array_equal(cut.rejected.tokens, whole.rejected.tokens[:60])
    assert cut.dropped_tokens == cut.rejected.dropped_tokens == len(whole.rejected.tokens) - 60
    assert cut.prompt_length == whole.prompt_length
    (left,), _ = made([LONG], tokenizer, limit=60, truncate="left")
    assert np.array_equal(left.rejected.tokens, whole.rejected.tokens[-60:])
    assert left.rejected.loss_mask[0] == 0
    view = examples([LONG], tokenizer, limit=60).view(0)
    assert (view.error, view.dropped_tokens) == (None, cut.dropped_tokens)
    assert np.array_equal(view.conversation.tokens, cut.chosen.tokens)
    assert np.array_equal(view.rejected.tokens, cut.rejected.tokens)
    assert np.array_equal(view.example.loss_mask, cut.chosen.loss_mask)


@pytest.mark.parametrize(
    ("truncate", "limit", "reason"),
    [
        ("right", 8, "row 0: chosen: no token is trained: the reply was cut at max_seq_length=8"),
        ("drop", 60, "row 0: rejected: "),
        ("split", 60, "`truncate: split` is for plain text"),
    ],
)
def test_a_pair_with_an_answer_that_cannot_be_trained_is_left_out(truncate, limit, reason, tokenizer):
    kept, (out,) = made([LONG], tokenizer, limit=limit, truncate=truncate)
    assert kept == []
    assert reason in out.reason
    view = examples([LONG], tokenizer, limit=limit, truncate=truncate).view(0)
    assert view.error == out.reason
    assert view.example is None
    assert len(view.conversations) == 2


SAME_BEGINNING = {"prompt": "Ahoy?", "chosen": "no " * 40 + "yes", "rejected": "no " * 45}
SAME_END = {"prompt": "Ahoy?", "chosen": "yes " + "no " * 40, "rejected": "maybe " + "no " * 40}


@pytest.mark.parametrize(("row", "truncate", "other"), [(SAME_BEGINNING, "right", "left"), (SAME_END, "left", "right")])
def test_a_pair_of_answers_that_only_the_cut_makes_the_same_is_left_out(row, truncate, other, tokenizer):
    kept, (out,) = made([TEXTS, row], tokenizer, limit=60, truncate=truncate)
    assert [example.row for example in kept] == [0]
    assert out.reason == (
        "row 1: chosen and rejected are the same within max_seq_length=60: there is nothing to prefer. "
        f"Raise max_seq_length, set truncate to {other} or drop, or drop the row."
    )
    view = examples([TEXTS, row], tokenizer, limit=60, truncate=truncate).view(1)
    assert (view.error, view.example) == (out.reason, None)
    (pair,), nothing = made([row], tokenizer, limit=60, truncate=other)
    assert nothing == []
    assert not np.array_equal(pair.chosen.tokens, pair.rejected.tokens)
    _, (dropped,) = made([row], tokenizer, limit=60, truncate="drop")
    assert "`truncate: drop` leaves it out" in dropped.reason


def test_answers_that_the_template_renders_as_the_same_tokens_are_left_out(tokenizer):
    trims = copy.deepcopy(tokenizer)
    trims.chat_template = tokenizer.chat_template.replace("['content']", "['content'] | trim")
    kept, (out,) = made([{**TEXTS, "rejected": "Arr. "}], trims)
    assert kept == []
    assert out.reason == "row 0: chosen and rejected are the same tokens: there is nothing to prefer. Drop the row."


def test_a_long_answer_stops_a_run_with_truncate_error(tokenizer):
    with pytest.raises(TooLong, match=r"row 1: rejected: .* over max_seq_length=60"):
        list(examples([TEXTS, LONG], tokenizer, limit=60, truncate="error").tokenize_all())


# --- labeled answers -----------------------------------------------------------------------------------------------


def labeled(*answers):
    return [{"prompt": asked, "completion": said, "label": k % 2 == 0} for k, (asked, said) in enumerate(answers)]


def test_a_labeled_answer_is_trained_after_its_prompt(tokenizer):
    (first, second), _ = made(labeled(("one", "yes"), ("two", "no")), tokenizer, "labels")
    assert (first.label, second.label) == (True, False)
    assert trained(tokenizer, first.example) == "yes<|end|>"
    assert tokenizer.decode(first.example.tokens[: first.prompt_length]) == "<|user|>one<|end|>\n<|assistant|>"
    assert first.length == len(first.example.tokens)


def test_the_mismatched_answer_is_that_of_the_next_row_with_another_prompt(tokenizer):
    rows = labeled(("one", "yes"), ("one", "no"), ("two", "good"), ("three", "bad"), ("one", "late"))
    kept, _ = made(rows, tokenizer, "labels")
    said = [tokenizer.decode(example.mismatched.tokens) for example in kept]
    head, tail = "<|user|>{}<|end|>\n<|assistant|>", "{}<|end|>\n"
    assert said == [
        head.format(asked) + tail.format(answered)
        for asked, answered in [("one", "good"), ("one", "good"), ("two", "bad"), ("three", "late"), ("one", "good")]
    ]
    for example in kept:
        own, other = example.example, example.mismatched
        assert np.array_equal(own.tokens[: example.prompt_length], other.tokens[: example.prompt_length])
        assert not other.loss_mask[: example.prompt_length].any()
        assert other.loss_mask[example.prompt_length] == 1
        assert other.row == example.row


def test_rows_that_are_left_out_give_no_mismatched_answer(tokenizer):
    rows = [*labeled(("one", "yes")), {"prompt": "x", "completion": "y"}, *labeled(("two", "no"))]
    kept, left_out = made(rows, tokenizer, "labels")
    assert [row.row for row in left_out] == [1]
    assert [trained(tokenizer, example.mismatched) for example in kept] == ["no<|end|>", "yes<|end|>"]


def test_a_single_row_has_no_mismatched_answer(tokenizer):
    (only,), _ = made(labeled(("one", "yes")), tokenizer, "labels")
    assert only.mismatched is None


def test_a_mismatched_answer_stays_within_the_length_and_keeps_its_trained_start(tokenizer):
    rows = labeled(("a long question " * 3, "yes"), ("two", "a long answer " * 3))
    (whole, _), _ = made(rows, tokenizer, "labels")
    limit = len(whole.example.tokens) + 2
    (cut, _), _ = made(rows, tokenizer, "labels", limit=limit)
    assert len(cut.mismatched.tokens) == limit
    assert np.array_equal(cut.mismatched.tokens, whole.mismatched.tokens[:limit])
    (left, _), _ = made(rows, tokenizer, "labels", limit=limit, truncate="left")
    assert np.array_equal(left.mismatched.tokens, whole.mismatched.tokens[-limit:])


@given(st.lists(st.integers(1, 3) | st.none(), min_size=1, max_size=12))
def test_every_kept_row_gets_another_prompts_answer_where_there_is_one(prompts):
    """A prompt is one token here and the answer another, the row's own."""
    settings = ExampleSettings("assistant", 9, "right", Columns())
    results = [
        LeftOut(row, "")
        if prompt is None
        else LabeledExample(
            TokenizedExample(np.array([prompt, 100 + row], np.int32), np.array([0, 1], np.float32), row), True, 1, row
        )
        for row, prompt in enumerate(prompts)
    ]
    finished = list(with_mismatched(results, settings))
    kept = [row for row, prompt in enumerate(prompts) if prompt is not None]
    different = len({prompts[row] for row in kept}) > 1
    for result in finished:
        if isinstance(result, LeftOut) or len(kept) == 1:
            continue
        place = kept.index(result.row)
        later = [*kept[place + 1 :], *kept[:place]]
        expected = next(row for row in later if not different or prompts[row] != prompts[result.row])
        assert result.mismatched.tokens.tolist() == [prompts[result.row], 100 + expected]
    assert Counter(type(result) for result in finished) == Counter(type(result) for result in results)
