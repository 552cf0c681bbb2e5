"""Rows as other tools write them are read as what they say, or refused by what they look like."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from mlx_nb.data.examples.kinds import recognize
from mlx_nb.data.rows.columns import AUTOMATIC, Columns
from mlx_nb.data.rows.imitation import ChatRow, PromptCompletionRow, TextRow
from mlx_nb.data.rows.preference import LabeledRow, PreferenceRow
from mlx_nb.data.rows.prompt import PromptRow
from mlx_nb.errors import DataError

SYSTEM = {"role": "system", "content": "Be a pirate."}
USER, GOOD, BAD = (
    {"role": "user", "content": "Ahoy?"},
    {"role": "assistant", "content": "Arr."},
    {"role": "assistant", "content": "Hello."},
)
AGAIN = {"role": "user", "content": "And?"}
UNSEEN = {**USER, "train": False}
TOOL = {"type": "function", "function": {"name": "sail", "parameters": {}}}
PAIR = PreferenceRow([USER], [GOOD], [BAD])
TEXTS = PreferenceRow("Ahoy?", "Arr.", "Hello.")
LONG = PreferenceRow([USER, BAD, AGAIN], [GOOD], [BAD])
HH = "\n\nHuman: Ahoy?\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"
GPT = {"good": {"from": "gpt", "value": "Arr."}, "bad": {"from": "gpt", "value": "Hello."}}

# What a row means, by the kind of rows that its method takes.
FORMS: dict[str, tuple[str, dict[str, Any], Any]] = {
    # to imitate
    "Alpaca with history": (
        "tokens",
        {
            "instruction": "And?",
            "input": "",
            "output": "Arr.",
            "history": [["Ahoy?", "Hello."]],
            "system": SYSTEM["content"],
        },
        ChatRow([SYSTEM, USER, BAD, AGAIN, GOOD]),
    ),
    "Alpaca with empty history": (
        "tokens",
        {"instruction": "Ahoy?", "output": "Arr.", "history": []},
        ChatRow([USER, GOOD]),
    ),
    "Dolly": (
        "tokens",
        {"instruction": "Ahoy?", "context": "At sea.", "response": "Arr.", "category": "open_qa"},
        ChatRow([{"role": "user", "content": "Ahoy?\n\nAt sea."}, GOOD]),
    ),
    "ms-swift": (
        "tokens",
        {"query": "And?", "response": "Arr.", "history": [["Ahoy?", "Hello."]]},
        ChatRow([USER, BAD, AGAIN, GOOD]),
    ),
    "HH text": ("tokens", {"text": f"{HH} Arr."}, ChatRow([USER, BAD, AGAIN, GOOD])),
    "HH text, as text": ("tokens named text", {"text": f"{HH} Arr."}, TextRow(f"{HH} Arr.")),
    "text about a human": ("tokens", {"text": "Human: an ape."}, TextRow("Human: an ape.")),
    "HH prompt and completion": (
        "tokens",
        {"prompt": "\n\nHuman: Ahoy?\n\nAssistant:", "completion": " Arr."},
        ChatRow([UNSEEN, GOOD]),
    ),
    "prompt and completion as JSON text": (
        "tokens",
        {"prompt": json.dumps([USER]), "completion": json.dumps([GOOD])},
        ChatRow([UNSEEN, GOOD]),
    ),
    "prompt and completion as one message each": (
        "tokens",
        {"prompt": USER, "completion": GOOD},
        ChatRow([UNSEEN, GOOD]),
    ),
    "messages as columns": (
        "tokens",
        {"messages": {"role": ["user", "assistant"], "content": ["Ahoy?", "Arr."]}},
        ChatRow([USER, GOOD]),
    ),
    "turns of a question and an answer": (
        "tokens",
        {"conversation": [{"input": "Ahoy?", "output": "Hello."}, {"input": "And?", "output": "Arr."}]},
        ChatRow([USER, BAD, AGAIN, GOOD]),
    ),
    "turns with a system prompt": (
        "tokens",
        {"conversation": [{"system": "Be a pirate.", "input": "Ahoy?", "output": "Arr."}]},
        ChatRow([SYSTEM, USER, GOOD]),
    ),
    "a completion in JSON": (
        "tokens",
        {"prompt": "Ahoy?", "completion": '{"role": 1}'},
        PromptCompletionRow("Ahoy?", '{"role": 1}'),
    ),
    "tools as a list of JSON texts": (
        "tokens",
        {"messages": [USER, GOOD], "tools": [json.dumps(TOOL)]},
        ChatRow([USER, GOOD], [TOOL]),
    ),
    "content as texts": (
        "tokens",
        {"messages": [{"role": "user", "content": ["Ah", "oy?"]}, GOOD]},
        ChatRow([USER, GOOD]),
    ),
    "content as parts of the APIs": (
        "tokens",
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "Ahoy?"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Ar"}, {"type": "text", "text": "r."}],
                },
            ]
        },
        ChatRow([USER, GOOD]),
    ),
    # pairs
    "HH pair": ("pairs", {"chosen": f"{HH} Arr.", "rejected": f"{HH} Hello."}, LONG),
    "HH prompt and answers": ("pairs", {"prompt": HH, "chosen": " Arr.", "rejected": " Hello."}, LONG),
    "HH pair that parts early": (
        "pairs",
        {"chosen": "\n\nHuman: Ahoy?\n\nAssistant: Arr.", "rejected": f"{HH} Arr."},
        PreferenceRow([USER], [GOOD], [BAD, AGAIN, GOOD]),
    ),
    "OpenAI": (
        "pairs",
        {
            "input": {"messages": [SYSTEM, USER], "tools": [TOOL], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        PreferenceRow([SYSTEM, USER], [GOOD], [BAD], [TOOL]),
    ),
    "OpenAI as JSON text": (
        "pairs",
        {
            "input": json.dumps({"messages": [USER]}),
            "preferred_output": json.dumps([GOOD]),
            "non_preferred_output": json.dumps([BAD]),
        },
        PAIR,
    ),
    "one message each": ("pairs", {"prompt": "Ahoy?", "chosen": GOOD, "rejected": BAD}, PAIR),
    "one message each, as JSON text": (
        "pairs",
        {"prompt": "Ahoy?", "chosen": json.dumps(GOOD), "rejected": json.dumps(BAD)},
        PAIR,
    ),
    "ShareGPT with one message each": (
        "pairs",
        {"conversations": [{"from": "human", "value": "Ahoy?"}], "chosen": GPT["good"], "rejected": GPT["bad"]},
        PAIR,
    ),
    "Alpaca": (
        "pairs",
        {"instruction": "Say", "input": "it.", "chosen": "Arr.", "rejected": "Hello."},
        PreferenceRow("Say\n\nit.", "Arr.", "Hello."),
    ),
    "Alpaca pair with history": (
        "pairs",
        {"instruction": "And?", "history": [["Ahoy?", "Hello."]], "chosen": "Arr.", "rejected": "Hello."},
        LONG,
    ),
    "a question": (
        "pairs",
        {"system": "Be a pirate.", "question": "Ahoy?", "chosen": "Arr.", "rejected": "Hello."},
        PreferenceRow([SYSTEM, USER], [GOOD], [BAD]),
    ),
    "input": ("pairs", {"input": "Ahoy?", "chosen": "Arr.", "rejected": "Hello."}, TEXTS),
    "conversation objects beside a prompt": (
        "pairs",
        {
            "prompt": "User prompt",
            "chosen": {"messages": [SYSTEM, USER, GOOD]},
            "rejected": {"messages": [SYSTEM, USER, BAD]},
        },
        PreferenceRow([SYSTEM, USER], [GOOD], [BAD]),
    ),
    "conversations in objects": (
        "pairs",
        {"chosen": {"conversations": [USER, GOOD]}, "rejected": {"conversation": [USER, BAD]}},
        PAIR,
    ),
    "a conversation and a rejected response": (
        "pairs",
        {"messages": [SYSTEM, USER, BAD, AGAIN, GOOD], "rejected_response": "Hello."},
        PreferenceRow([SYSTEM, USER, BAD, AGAIN], [GOOD], [BAD]),
    ),
    "a conversation and a rejected one": ("pairs", {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, PAIR),
    "query, response and a rejected response": (
        "pairs",
        {"query": "And?", "response": "Arr.", "rejected_response": "Hello.", "history": [["Ahoy?", "Hello."]]},
        LONG,
    ),
    **{
        f"{better} and {worse}": ("pairs", {"prompt": "Ahoy?", better: "Arr.", worse: "Hello."}, TEXTS)
        for better, worse in (
            ("chosen_response", "rejected_response"),
            ("response_chosen", "response_rejected"),
            ("chosen", "rejected_response"),
            ("chosen_answer", "rejected_answer"),
            ("chosen_completion", "rejected_completion"),
            ("preferred", "dispreferred"),
            ("preferred_response", "non_preferred_response"),
            ("accepted", "rejected"),
            ("better_answer", "worse_answer"),
            ("completion", "rejected"),
        )
    },
    # labels
    "kto_tag": (
        "labels",
        {"instruction": "Say", "input": "it.", "output": "Arr.", "kto_tag": True},
        LabeledRow("Say\n\nit.", "Arr.", True),
    ),
    "ShareGPT with kto_tag": (
        "labels",
        {"conversations": [{"from": "human", "value": "Ahoy?"}, GPT["bad"]], "kto_tag": False},
        LabeledRow([USER], [BAD], False),
    ),
    "a response": ("labels", {"prompt": "Ahoy?", "response": "Arr.", "label": 1}, LabeledRow("Ahoy?", "Arr.", True)),
    "a question and a completion": (
        "labels",
        {"question": "Ahoy?", "completion": "Arr.", "label": 1},
        LabeledRow("Ahoy?", "Arr.", True),
    ),
    "HH prompt, labeled": (
        "labels",
        {"prompt": HH, "completion": " Arr.", "label": 1},
        LabeledRow(LONG.prompt, [GOOD], True),
    ),
    "one message, labeled": (
        "labels",
        {"prompt": [USER], "completion": GOOD, "label": 1},
        LabeledRow([USER], [GOOD], True),
    ),
    # prompts
    "HH prompt alone": ("prompts", {"prompt": HH, "answer": 1}, PromptRow(LONG.prompt, 1, as_given=LONG.prompt)),
    "one message to answer": ("prompts", {"prompt": USER}, PromptRow([USER], as_given=[USER])),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_another_tool_is_read_as_what_it_says_and_left_unchanged(name):
    kind, record, expected = FORMS[name]
    before = copy.deepcopy(record)
    kind, _, named = kind.partition(" named ")
    assert recognize(kind, record, Columns(**{named: named} if named else {})) == expected
    assert record == before


def test_a_named_column_wins_over_every_word_that_is_known():
    record = {"prompt": "Ahoy?", "chosen": "x", "better": "Arr.", "rejected": "y", "worse": "Hello."}
    assert recognize("pairs", record, Columns(chosen="better", rejected="worse")) == TEXTS
    record = {"question": "x", "asked": "Ahoy?", "output": "y", "answer": "Arr.", "ok": 1, "label": 0}
    columns = Columns(prompt="asked", completion="answer", label="ok")
    assert recognize("labels", record, columns) == LabeledRow("Ahoy?", "Arr.", True)


UNREADABLE: list[tuple[str, dict[str, Any], str]] = [
    ("tokens", {"chosen_response": "x", "rejected_response": "y"}, "These are pairs, for `method: dpo`"),
    (
        "tokens",
        {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        "These are pairs",
    ),
    ("tokens", {"segments": [{"label": True, "text": "x"}]}, "`segments` are pieces of text with a label each"),
    ("tokens", USER, "This is one message, and a row is a conversation"),
    ("tokens", {"text": "x", "role": "prompter", "parent_id": None}, "This is one message of a tree"),
    (
        "tokens",
        {"instruction": "x", "output": "y", "history": ["z"]},
        "`history[0]` must be a pair [question, answer], not text.",
    ),
    (
        "pairs",
        {"prompt": "x", "response_0": "y", "response_1": "z", "better_response_id": 0},
        "These are two answers, and which",
    ),
    (
        "pairs",
        {"conversation_a": [USER], "conversation_b": [USER], "winner": "model_a"},
        "These are two answers, and which",
    ),
    (
        "pairs",
        {"prompt": "x", "responses": ["a", "b"], "scores": [1, 2]},
        "`responses` holds several answers: take a better",
    ),
    ("pairs", {"prompt": "x", "completion": "y", "label": True}, "These are labeled answers, for `method: kto`."),
    ("pairs", {"messages": [USER, GOOD]}, "These are answers to imitate, for `method: sft`."),
    ("pairs", {"prompt": "x"}, "These are prompts without an answer, for `method: grpo`."),
    (
        "pairs",
        {"prompt": "x", "preferred": "a", "accepted": "b", "rejected": "c"},
        "`preferred` and `accepted` could each be the chosen",
    ),
    ("pairs", {"question": "x", "problem": "y", "chosen": "a", "rejected": "b"}, "Set prompt_feature to one of them."),
    (
        "pairs",
        {"messages": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]},
        "`messages` ends with the assistant: there is nothing to answer",
    ),
    ("pairs", {"messages": [USER], "rejected_response": "x"}, "no answer after the last user message"),
    ("pairs", {"messages": [USER, GOOD], "rejected_response": "Arr."}, "are the same: there is nothing to prefer"),
    ("labels", {"prompt": "x", "completions": ["a"], "labels": [True]}, "This judges each step of an answer"),
    ("labels", {"prompt": "x", "chosen": "a", "rejected": "b"}, "These are pairs, for `method: dpo`"),
    ("prompts", {"messages": [USER]}, "Set prompt_feature: messages."),
    ("prompts", {"messages": [USER, GOOD]}, "These are answers to imitate, for `method: sft`."),
    ("prompts", {"instruction": "x"}, "Set prompt_feature: instruction."),
]


@pytest.mark.parametrize(("kind", "record", "expected"), UNREADABLE)
def test_a_row_for_something_else_is_refused_by_what_it_looks_like(kind, record, expected):
    with pytest.raises(DataError) as caught:
        recognize(kind, record, row=3, location="a.jsonl line 4")
    message = str(caught.value)
    assert message.startswith("row 3 (a.jsonl line 4): ")
    assert expected in message
    assert "\n" not in message


MESSAGE = {"role": "assistant", "content": "ay"}
AS_TEXT = {
    "one message": json.dumps(MESSAGE),
    "a list": json.dumps([MESSAGE]),
    "sharegpt": '{"from": "gpt", "value": "ay"}',
}


@pytest.mark.parametrize("case", AS_TEXT)
@pytest.mark.parametrize(
    ("asking", "answering"), [("prompt", "completion"), ("instruction", "output"), ("query", "response")]
)
def test_an_answer_that_is_the_json_text_of_messages_is_read_as_messages(asking, answering, case):
    for value in (AS_TEXT[case], json.loads(AS_TEXT[case])):
        row = recognize("tokens", {asking: "sail?", answering: value}, AUTOMATIC)
        assert [(message["role"], message["content"]) for message in row.messages] == [
            ("user", "sail?"),
            ("assistant", "ay"),
        ]
    judged = recognize("labels", {"prompt": "sail?", "completion": AS_TEXT[case], "label": True}, AUTOMATIC)
    assert [(m["role"], m["content"]) for m in judged.completion] == [("assistant", "ay")]


def test_a_text_that_is_the_json_of_a_conversation_is_read_as_one():
    talk = [{"role": "user", "content": "sail?"}, MESSAGE]
    assert recognize("tokens", {"text": json.dumps(talk)}, AUTOMATIC).messages == talk
    assert recognize("tokens", {"text": json.dumps(talk)}, Columns(text="text")) == TextRow(json.dumps(talk))


@pytest.mark.parametrize(
    "answer", ['{"a": 1}', "[1, 2]", '{"role": "admin", "content": "x"}', '{"role": "assistant"}', "{"]
)
def test_an_answer_in_json_stays_a_text(answer):
    assert recognize("tokens", {"prompt": "q", "completion": answer}, AUTOMATIC) == PromptCompletionRow("q", answer)
    row = recognize("tokens", {"instruction": "q", "output": answer}, AUTOMATIC)
    assert row.messages[-1] == {"role": "assistant", "content": answer}
    assert recognize("tokens", {"text": answer}, AUTOMATIC) == TextRow(answer)
