"""Every shape of row is recognized, and every bad row is named in one line."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_nb.data.examples.kinds import recognize
from mlx_nb.data.rows.imitation import ChatRow, Columns, PromptCompletionRow, Row, TextRow
from mlx_nb.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Arr."}
SYSTEM = {"role": "system", "content": "Be a pirate."}
TOOL = {"type": "function", "function": {"name": "sail", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "sail", "arguments": {"to": None}}}

GOOD: dict[str, tuple[dict, Row]] = {
    "messages": ({"messages": [USER, ASSISTANT]}, ChatRow([USER, ASSISTANT])),
    "messages as JSON text": ({"messages": json.dumps([USER, ASSISTANT])}, ChatRow([USER, ASSISTANT])),
    "tools": ({"messages": [USER, ASSISTANT], "tools": [TOOL]}, ChatRow([USER, ASSISTANT], [TOOL])),
    "tools as JSON text": (
        {"messages": [USER, ASSISTANT], "tools": json.dumps([TOOL])},
        ChatRow([USER, ASSISTANT], [TOOL]),
    ),
    "no tools": ({"messages": [USER, ASSISTANT], "tools": []}, ChatRow([USER, ASSISTANT])),
    "system column": (
        {"messages": [USER, ASSISTANT], "system": "Be a pirate."},
        ChatRow([SYSTEM, USER, ASSISTANT]),
    ),
    "system column and message": (
        {"messages": [SYSTEM, USER], "system": "another one"},
        ChatRow([SYSTEM, USER]),
    ),
    "null columns are no columns": ({"messages": None, "text": "Arr."}, TextRow("Arr.")),
    "null keys of a message": ({"messages": [{**USER, "name": None}]}, ChatRow([USER])),
    "other keys are kept": (
        {"messages": [{**ASSISTANT, "train": False}]},
        ChatRow([{**ASSISTANT, "train": False}]),
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ahoy?"}]}]},
        ChatRow([USER]),
    ),
    "tool calls without content": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        ChatRow([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Ahoy?"}, {"from": "gpt", "value": "Arr."}]},
        ChatRow([USER, ASSISTANT]),
    ),
    "conversation with roles": ({"conversation": [USER, ASSISTANT]}, ChatRow([USER, ASSISTANT])),
    "Alpaca": ({"instruction": "Ahoy?", "input": "", "output": "Arr."}, ChatRow([USER, ASSISTANT])),
    "Alpaca with input": (
        {"instruction": "Say it.", "input": "Arr.", "output": "Arr."},
        ChatRow([{"role": "user", "content": "Say it.\n\nArr."}, ASSISTANT]),
    ),
    "prompt and completion": (
        {"prompt": "Ahoy?", "completion": "Arr."},
        PromptCompletionRow("Ahoy?", "Arr."),
    ),
    "prompt and completion with system": (
        {"prompt": "Ahoy?", "completion": "Arr.", "system": "Be a pirate."},
        ChatRow([SYSTEM, USER, ASSISTANT]),
    ),
    "prompt and completion as messages": (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        ChatRow([{**USER, "train": False}, {**ASSISTANT, "train": False}, {**USER, "train": False}, ASSISTANT]),
    ),
    "text": ({"text": "Arr.", "source": "sea"}, TextRow("Arr.")),
    "messages before prompt and completion": (
        {"messages": [USER, ASSISTANT], "prompt": "Ahoy?", "completion": "Arr."},
        ChatRow([USER, ASSISTANT]),
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_known_shape_is_recognized_and_left_unchanged(name):
    record, expected = GOOD[name]
    before = copy.deepcopy(record)
    assert recognize("tokens", record) == expected
    assert record == before


def test_a_named_column_chooses_the_shape():
    record = {
        "messages": [USER],
        "question": "Ahoy?",
        "answer": "Arr.",
        "who": "Be a pirate.",
        "body": "Arr.",
    }
    columns = Columns(prompt="question", completion="answer")
    assert recognize("tokens", record, columns) == PromptCompletionRow("Ahoy?", "Arr.")
    with_system = Columns(prompt="question", completion="answer", system="who")
    assert recognize("tokens", record, with_system) == ChatRow([SYSTEM, USER, ASSISTANT])
    assert recognize("tokens", record, Columns(text="body")) == TextRow("Arr.")
    assert recognize("tokens", {"talk": [USER]}, Columns(messages="talk")) == ChatRow([USER])
    tools = Columns(messages="talk", tools="can")
    assert recognize("tokens", {"talk": [USER], "can": [TOOL]}, tools) == ChatRow([USER], [TOOL])


BAD = [
    ({"messages": [{"role": "humman", "content": "x"}]}, "unknown role 'humman'. Did you mean 'human'?"),
    (
        {"messages": [{"role": "Assistent", "content": "x"}]},
        "unknown role 'Assistent'. Did you mean 'assistant'?",
    ),
    ({"messages": [{"role": 3, "content": "x"}]}, "role of `messages[0]` must be text, not the number 3"),
    ({"messages": [USER, {"content": "x"}]}, "`messages[1]` has no role (it has: 'content')"),
    ({"messages": [{"role": "user"}]}, "content of `messages[0]` is missing (it has: 'role')"),
    ({"messages": [{"role": "assistant", "content": None}]}, "content of `messages[0]` is null"),
    (
        {"messages": [{"role": "user", "content": 5}]},
        "content of `messages[0]` must be text, not the number 5",
    ),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "must be text, not an object"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part that is not text ('image')"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half a surrogate pair"),
    ({"messages": ["Ahoy?"]}, "`messages[0]` must be an object with role and content, not text"),
    ({"messages": []}, "`messages` has no messages"),
    ({"messages": "Ahoy?"}, "`messages` must be a list of messages"),
    ({"messages": "[{'role': 'user'}]"}, "`messages` is text, but not the JSON of a list"),
    ({"messages": {"role": "user"}}, "such as {role: user, content: ...}, not an object"),
    ({"messages": None}, "`messages` is empty (null)"),
    ({"messages": [{**ASSISTANT, "train": "no"}]}, "train of `messages[0]` must be true or false"),
    ({"messages": [{**ASSISTANT, "weight": -1}]}, "weight of `messages[0]` must be a number of at least 0"),
    (
        {"messages": [{**ASSISTANT, "tool_calls": "sail"}]},
        "tool_calls of `messages[0]` must be a list of objects",
    ),
    ({"messages": [USER], "tools": [1]}, "`tools` must be a list of tool descriptions"),
    ({"messages": [USER], "system": 4}, "`system` must be text, not the number 4"),
    ({"prompt": "x", "completion": 4}, "`completion` must be text, not the number 4"),
    ({"prompt": "x", "completion": None}, "`completion` is empty (null)"),
    (
        {"prompt": [USER], "completion": "x"},
        "`prompt` is a list and `completion` is text. Make both text, or both",
    ),
    ({"prompt": "x", "answer": "y"}, "columns 'prompt', 'answer'. Known: messages | "),
    ({"prompt": "x", "answer": "y"}, "Set completion_feature: answer."),
    ({"question": "x", "response": "y"}, "Set prompt_feature: question and completion_feature: response."),
    ({"prompt": "x", "chosen": "y"}, "Set completion_feature: chosen."),
    ({"prompt": "x", "chosen": "y", "rejected": "z"}, "These are pairs, for `method: dpo`, `method: cpo` or"),
    ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "These are pairs, for `method: dpo`"),
    ({"prompt": "x", "response": "y", "label": 1}, "Set completion_feature: response. With `label` it is a row for"),
    ({"dialog": [USER]}, "Set chat_feature: dialog."),
    ({"mesages": "x", "id": 1}, "Column 'mesages': Did you mean 'messages'?"),
    ({"body": "x"}, "Set text_feature: body."),
    ({"a": 1, "b": 2}, "Name your columns with chat_feature"),
    ({"product": "x", "slogan": "y"}, "for example `prompt_feature: product` and `completion_feature: slogan`."),
    ({"id": 3, "english": "x", "french": "y"}, "`prompt_feature: english` and `completion_feature: french`."),
    ({"1st word": "x", "2nd word": "y"}, "Name your columns with chat_feature"),
    ({}, "the row has no columns"),
    ({"text": ""}, "`text` is empty"),
    ({"text": ["x"]}, "`text` must be text, not a list"),
    ({"instruction": "x", "output": True}, "`output` must be text, not true or false"),
]


@pytest.mark.parametrize(("record", "expected"), BAD)
def test_a_bad_row_is_one_line_that_names_row_place_and_fault(record, expected):
    with pytest.raises(DataError) as error:
        recognize("tokens", record, row=17, location="train.jsonl line 18")
    assert str(error.value).startswith("row 17 (train.jsonl line 18): ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


BAD_COLUMNS = [
    (Columns(prompt="question"), "no column 'question'. The row has: 'prompt', 'completion'."),
    (
        Columns(completion="completoin"),
        "no column 'completoin'. The row has: 'prompt', 'completion'. Did you mean",
    ),
    (Columns(system="sys"), "no column 'sys'"),
    (Columns(tools="can"), "no column 'can'"),
    (Columns(text="prompt", system="completion"), "system_feature has no effect on rows of plain text"),
]


@pytest.mark.parametrize(("columns", "expected"), BAD_COLUMNS)
def test_a_named_column_that_is_missing_or_without_effect_is_an_error(columns, expected):
    with pytest.raises(DataError) as error:
        recognize("tokens", {"prompt": "Ahoy?", "completion": "Arr."}, columns)
    assert expected in str(error.value)


def test_two_different_system_prompts_are_refused_when_the_column_was_named():
    record = {"messages": [SYSTEM, USER], "who": "Be a parrot."}
    with pytest.raises(DataError, match="two different system prompts"):
        recognize("tokens", record, Columns(system="who"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "type"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
COLUMN_NAMES = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "output",
    "text",
    "system",
    "tools",
]


@given(st.dictionaries(st.sampled_from(COLUMN_NAMES), JSON, max_size=4))
def test_any_row_is_either_recognized_or_refused_by_name(record):
    message = ""
    try:
        recognize("tokens", record, row=3)
    except DataError as error:
        message = str(error)
    assert message == "" or message.startswith("row 3: ")


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("field", ["reasoning_content", "name", "tool_call_id", "note"])
def test_half_a_surrogate_anywhere_in_a_message_refuses_its_row(field, deep):
    from mlx_nb.data.rows.columns import read_messages

    value = {"inner": ["fine", {"x": "\ud800"}]} if deep else "\ud800"
    with pytest.raises(DataError, match=r"half a surrogate pair"):
        read_messages([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok", field: value}], "m")


def test_what_is_nested_without_end_and_weights_beyond_numbers_refuse_their_row():
    from mlx_nb.data.rows.columns import read_messages, read_tools
    from mlx_nb.data.rows.imitation import Columns

    deep = json.loads("[" * 500 + "]" * 500)
    with pytest.raises(DataError, match="nested more than 64 deep"):
        read_tools({"tools": [deep]}, Columns())
    message = {"role": "assistant", "content": "ok", "weight": 1e300}
    with pytest.raises(DataError, match="at most 1,000,000"):
        read_messages([{"role": "user", "content": "hi"}, message], "messages")
