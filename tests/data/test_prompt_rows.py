"""Prompts to be answered: recognized with all their columns, tokenized as the model is asked, never cut at the end."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_nb.data.examples.examples import Examples, split_examples
from mlx_nb.data.examples.kinds import recognize
from mlx_nb.data.examples.prompt import prompt_tokens
from mlx_nb.data.examples.settings import ExampleSettings, TooLong
from mlx_nb.data.rows.columns import Columns
from mlx_nb.data.rows.prompt import PromptRow
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Arr."}
SYSTEM = {"role": "system", "content": "Be a pirate."}
TALK = [USER, ASSISTANT, USER]
TOOL = {"type": "function", "function": {"name": "sail", "parameters": {}}}

GOOD = {
    "text": ({"prompt": "Ahoy?"}, PromptRow("Ahoy?", as_given="Ahoy?")),
    "text and answer": ({"prompt": "Ahoy?", "answer": 7}, PromptRow("Ahoy?", 7, as_given="Ahoy?")),
    "all other columns": (
        {"prompt": "Ahoy?", "answer": None, "tests": ["a"], "level": 3},
        PromptRow("Ahoy?", None, {"tests": ["a"], "level": 3}, as_given="Ahoy?"),
    ),
    "messages": ({"prompt": TALK}, PromptRow(TALK, as_given=TALK)),
    "system": (
        {"prompt": "Ahoy?", "system": "Be a pirate."},
        PromptRow([SYSTEM, USER], None, {"system": "Be a pirate."}, as_given="Ahoy?"),
    ),
    "tools": ({"prompt": "Ahoy?", "tools": [TOOL]}, PromptRow([USER], None, {"tools": [TOOL]}, [TOOL], "Ahoy?")),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_shape_of_a_prompt_is_recognized(name):
    record, expected = GOOD[name]
    assert recognize("prompts", record) == expected


def test_columns_go_by_the_names_they_are_given():
    record = {"question": "Ahoy?", "solution": "Arr.", "answer": "long", "prompt": "other"}
    columns = Columns(prompt="question", answer="solution")
    others = {"answer": "long", "prompt": "other"}
    assert recognize("prompts", record, columns) == PromptRow("Ahoy?", "Arr.", others, as_given="Ahoy?")


BAD = [
    ({"question": "x"}, Columns(), "no column 'prompt'. The row has: 'question'. Set prompt_feature: question."),
    ({"text": "x"}, Columns(), "Known: prompt (+ answer and any other columns)."),
    ({"prompt": " \n"}, Columns(), "`prompt` is empty: there is nothing to answer"),
    ({"prompt": [USER, ASSISTANT]}, Columns(), "`prompt` ends with the assistant: there is nothing to answer"),
    ({"prompt": [SYSTEM]}, Columns(), "`prompt` ends with the system"),
    ({"prompt": 7}, Columns(), "`prompt` must be text or a list of messages, not the number 7"),
    ({"prompt": "x", "solution": 1}, Columns(answer="solutions"), "no column 'solutions'"),
]


@pytest.mark.parametrize(("record", "columns", "message"), BAD)
def test_a_row_that_asks_nothing_is_named_in_one_line(record, columns, message):
    with pytest.raises(DataError) as caught:
        recognize("prompts", record, columns, row=4, location="a.csv line 6")
    assert str(caught.value).startswith("row 4 (a.csv line 6): ")
    assert message in str(caught.value)


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


def examples(rows, tokenizer, *, limit=2000, truncate="right"):
    source = open_splits(rows, val_set_size=0).train
    return Examples(source, tokenizer, ExampleSettings("assistant", limit, truncate, Columns()), "prompts")


def made(*arguments, **settings):
    return split_examples(list(examples(*arguments, **settings).tokenize_all()))


@pytest.mark.parametrize("name", [name for name in GOOD if name != "tools"])
def test_a_prompt_ends_where_the_answer_begins(name, tokenizer):
    record, row = GOOD[name]
    (example,), _ = made([record], tokenizer)
    messages = [USER] if isinstance(row.prompt, str) else row.prompt
    rendered = "".join(f"<|{message['role']}|>{message['content']}<|end|>\n" for message in messages)
    assert tokenizer.decode(example.prompt_tokens) == f"{rendered}<|assistant|>"
    assert example.prompt_tokens.dtype == np.int32
    assert (example.prompt, example.answer, example.columns) == (row.as_given, row.answer, row.columns)
    assert example.length == len(example.prompt_tokens)


@pytest.mark.parametrize("name", [name for name in GOOD if name != "tools"])
def test_training_and_asking_give_the_model_the_same_tokens(name, tokenizer):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    record, row = GOOD[name]
    wrapped = TokenizerWrapper(tokenizer)
    (example,), _ = made([record], wrapped)
    assert example.prompt_tokens.tolist() == prompt_tokens(wrapped, row.prompt)


def test_without_a_chat_template_a_text_is_continued_from_its_beginning_of_sequence(tiny_folder):
    from tokenizers import processors
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_folder, bos_token="<|system|>")
    plain.chat_template = None
    bos = plain.convert_tokens_to_ids("<|system|>")
    plain._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    (example,), _ = made([{"prompt": "Ahoy?"}], plain)
    assert example.prompt_tokens[0] == bos
    assert plain.decode(example.prompt_tokens[1:]) == "Ahoy?"
    assert example.prompt_tokens.tolist() == prompt_tokens(plain, "Ahoy?")


def test_a_prompt_that_the_template_does_not_render_is_left_out_with_the_reason(tiny_folder):
    from transformers import AutoTokenizer

    picky = AutoTokenizer.from_pretrained(tiny_folder)
    picky.chat_template = "{{ raise_exception('no system, please') }}"
    kept, (out,) = made([{"prompt": "Ahoy?"}], picky)
    assert kept == []
    assert out.reason.startswith("row 0: the chat template does not render this prompt: ")
    assert "no system, please" in out.reason


def test_a_prompt_is_seen_and_nothing_of_it_is_trained(tokenizer):
    view = examples([{"prompt": "Ahoy?", "answer": "Arr."}], tokenizer).view(0)
    assert view.error is None
    assert view.example is None
    assert tokenizer.decode(view.conversation.tokens) == "<|user|>Ahoy?<|end|>\n<|assistant|>"
    assert not view.conversation.loss_mask.any()
    assert len(view.conversation.offsets) == len(view.conversation.tokens)


LONG = {"prompt": "far " * 40 + "away?"}


@pytest.mark.parametrize(
    ("truncate", "reason"),
    [
        ("right", "a question without its end cannot be answered"),
        ("drop", "`truncate: drop` leaves it out"),
        ("split", "`truncate: split` is for plain text"),
    ],
)
def test_a_long_prompt_is_left_out_rather_than_cut_at_its_end(truncate, reason, tokenizer):
    kept, (out,) = made([LONG], tokenizer, limit=30, truncate=truncate)
    assert kept == []
    assert out.reason.startswith("row 0: ")
    assert reason in out.reason
    assert examples([LONG], tokenizer, limit=30, truncate=truncate).view(0).error == out.reason


def test_a_long_prompt_keeps_its_end_with_truncate_left_and_stops_a_run_with_error(tokenizer):
    (whole,), _ = made([LONG], tokenizer)
    (cut,), _ = made([LONG], tokenizer, limit=30, truncate="left")
    assert np.array_equal(cut.prompt_tokens, whole.prompt_tokens[-30:])
    assert cut.dropped_tokens == len(whole.prompt_tokens) - 30
    view = examples([LONG], tokenizer, limit=30, truncate="left").view(0)
    assert np.array_equal(view.conversation.tokens, cut.prompt_tokens)
    assert view.dropped_tokens == cut.dropped_tokens
    with pytest.raises(TooLong, match="row 0: "):
        list(examples([LONG], tokenizer, limit=30, truncate="error").tokenize_all())
