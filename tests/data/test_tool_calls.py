"""Tool calls become the same tokens whatever they were written as, and are trained as they will be asked for."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mlx_nb
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.check.template_report import probe_template
from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.kinds import recognize
from mlx_nb.data.examples.prompt import prompt_tokens
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.conversation import TokenizedConversation, tokenize_conversation
from mlx_nb.data.rows.imitation import Columns
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import ConfigError, DataError, MaskRefused
from tiny import tiny_rows

MARKERS = ["<|im_start|>", "<|im_end|>"]


def chatml(calls: str) -> str:
    """A template that writes the calls of a message by `calls`, in which `f` is a call's function."""
    return (
        "{% for t in tools or [] %}{{ '<tool>' + (t | tojson) + '\n' }}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{% set f = c.function %}" + calls + "{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


TEMPLATES = {
    "tojson": chatml("{{ '<call>' + f.name + (f.arguments | tojson) }}"),
    "whole call": chatml("{{ '<call>' + (c | tojson) }}"),
    "text or tojson": chatml(
        "{{ '<call>' + f.name }}{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}"
        "{% endif %}"
    ),
    "items": chatml(
        "{{ '<call>' + f.name }}{% for k, v in f.arguments | items %}{{ k }}={{ v | tojson }};{% endfor %}"
    ),
    "text": chatml("{{ '<call>' + f.name + f.arguments }}"),
    "text within": chatml("{{ '<call>' ~ f.name ~ '```' ~ f.arguments ~ '```' }}"),
    "only with an answer": chatml(
        "{% if messages[-1].tool_calls %}{{ raise_exception('open') }}{% endif %}"
        "{{ '<call>' + f.name + (f.arguments | tojson) }}"
    ),
    "none at all": chatml(""),
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=MARKERS, show_progress=False
    )
    inner.train_from_iterator(['{"name": "sail", "arguments": {"to": "Rome"}} user assistant tool'], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def call(arguments: object, name: str = "sail", **others: object) -> dict:
    return {"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}, **others}


def talk(*arguments: object) -> list[dict]:
    return [
        {"role": "user", "content": "Where to?"},
        {"role": "assistant", "content": None, "tool_calls": [call(each) for each in arguments]},
        {"role": "tool", "content": "done", "tool_call_id": "c1"},
        {"role": "assistant", "content": "There."},
    ]


def said(template: str, *arguments: object, tools: list | None = None) -> TokenizedConversation:
    return tokenize_conversation(talk(*arguments), tokenizer_of(template), tools=tools)


def assert_same(one: TokenizedConversation, other: TokenizedConversation) -> None:
    assert one.text == other.text
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.loss_mask, other.loss_mask)


ARGUMENTS = [
    {},
    {"a": 3},
    {"to": "Rome"},
    {"to": 'São "P" 日本 \\ \n é😀', "n": 2.5, "yes": True, "list": [1, {"b": []}, None], "in": {"z": 1, "a": -0.5}},
    {"code": '{"x": "\\"1\\""}', "large": 2**70, "small": 1e-7, "b": 1, "a": 2},
]
# How exporters write JSON.
STYLES = ({}, {"ensure_ascii": False, "separators": (",", ":")}, {"indent": 2})


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_arguments_as_an_object_and_as_json_text_are_the_same_tokens(template, arguments, style):
    of_object = said(template, arguments, {"b": 1})
    assert_same(of_object, said(template, json.dumps(arguments, **style), '{"b":1}'))
    assert of_object.notes == ()


def test_arguments_are_written_once_and_right():
    compact = '{"to":"Rome","n":3}'
    written = '<call>sail{"to": "Rome", "n": 3}<|im_end|>'
    for template in ("tojson", "text or tojson", "text", "only with an answer"):
        assert written in said(template, compact).text
    assert '<call>sailto="Rome";n=3;<|im_end|>' in said("items", compact).text
    assert '"arguments": {"to": "Rome", "n": 3}}}<|im_end|>' in said("whole call", compact).text
    assert '```{"to": "Rome", "n": 3}```' in said("text within", {"to": "Rome", "n": 3}).text
    assert (
        "message 1 (assistant): its tool_calls is left out by the chat template." in said("none at all", "{}").problems
    )


def test_json_text_inside_arguments_stays_text_and_keys_keep_their_order():
    text = said("tojson", '{"z": "{\\"a\\": 1}", "a": 1}').text
    assert '{"z": "{\\"a\\": 1}", "a": 1}' in text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"to": "Ro', "not valid JSON"),
        ("[1, 2]", "not an object"),
        ("3", "not an object"),
        ("null", "not an object"),
        ("sail to Rome", "not valid JSON"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e400}', "1e400 is beyond what a number can hold"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "it is nested more than 64 deep"),
    ],
)
def test_a_text_that_is_no_object_is_refused_where_objects_are_written_and_reported_where_texts_are(text, why):
    for template in ("tojson", "whole call", "items", "only with an answer"):
        with pytest.raises(MaskRefused, match=r"the arguments of a tool call in message 1 \(assistant\)") as error:
            said(template, text)
        assert why in str(error.value)
        assert "\n" not in str(error.value)
    if "surrogate" in why or len(text) > 1000:
        return
    for template in ("text", "text or tojson"):
        row = said(template, text)
        assert f"<call>sail{text}<|im_end|>" in row.text
        assert (
            "message 1 (assistant): the arguments of a tool call (1 in all) are not a JSON object and are written "
            "as they are." in row.problems
        )


def test_an_empty_text_and_missing_arguments_are_no_arguments():
    for template in ("tojson", "text"):
        assert_same(said(template, ""), said(template, {}))
        assert_same(said(template, None), said(template, {}))


def test_what_a_text_loses_on_its_way_is_reported():
    row = said("tojson", '{"to": "Rome", "to": "Ostia", "n": 0.10000000000000000001}')
    assert '{"to": "Ostia", "n": 0.1}' in row.text
    assert any("a key occurs twice in one object, such as at 'to'" in problem for problem in row.problems)
    assert any("such as at '0.10000000000000000001'" in problem for problem in row.problems)
    with pytest.raises(MaskRefused, match="'a' is infinite"):
        said("tojson", {"a": float("inf")})
    with pytest.raises(MaskRefused, match="'a' is a set, which JSON cannot hold"):
        said("tojson", {"a": {1}})


def test_every_turn_is_trained_to_its_end_whatever_the_form():
    for template in TEMPLATES:
        if template == "none at all":
            continue
        for arguments in ({"to": "Rome"}, '{"to": "Rome"}'):
            row = said(template, arguments)
            trained = "".join(row.text[s.start : s.end] for s in row.spans if s.weight)
            assert (trained.count("<|im_end|>"), "Rome" in trained, "done" in trained) == (2, True, False)


@pytest.mark.long
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.text(max_size=4),
        st.recursive(
            st.booleans() | st.integers() | st.text(max_size=6) | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
    st.sampled_from(list(TEMPLATES)),
)
def test_any_arguments_are_the_same_tokens_as_an_object_and_as_text(arguments, template):
    assert_same(said(template, arguments), said(template, json.dumps(arguments)))


# --- what is asked is what was trained --------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_is_the_beginning_of_what_is_trained(template):
    tokenizer, tools = tokenizer_of(template), [{"name": "sail", "parameters": {"default": None}}]
    for arguments in ({"to": "Rome", "n": 1.0}, '{"to":"Rome","n":1}'):
        record = {"messages": talk(arguments), "tools": tools}
        row = recognize("tokens", record)
        trained = tokenize_conversation(row.messages, tokenizer, tools=row.tools)
        asked = prompt_tokens(tokenizer, talk(arguments)[:-1], tools)
        assert trained.tokens[: len(asked)].tolist() == asked
        assert tokenizer.decode(trained.tokens[len(asked) :]) == "There.<|im_end|>\n"
        rollout = recognize("prompts", {"prompt": talk(arguments)[:-1], "tools": tools})
        assert prompt_tokens(tokenizer, rollout.prompt, rollout.tools) == asked


def test_a_run_is_asked_with_tool_calls_as_its_rows_are_written(tiny_folder, tmp_path):
    run = mlx_nb.Run.from_yaml(
        f"model: {tiny_folder}\ndata: rows\niters: 2\nroles: {{me: user}}\nadapter_path: {tmp_path / 'a'}\n"
        f"chat_template: {json.dumps(TEMPLATES['tojson'])}",
        namespace={"rows": tiny_rows()},
    )
    tools = [{"name": "sail", "parameters": {"default": None}}]
    older = {"role": "assistant", "content": None, "function_call": {"name": "sail", "arguments": '{"to":"Rome"}'}}
    prompt = [{"role": "me", "content": "Where to?"}, older, {"role": "observation", "content": "done"}]
    called = {"role": "assistant", "content": None, "tool_calls": [call({"to": "Rome", "at": None})]}
    for call_ in called["tool_calls"]:
        call_.pop("id")
    standard = [{"role": "user", "content": "Where to?"}, called, {"role": "tool", "content": "done"}]
    first, second = run.generate([prompt, standard], max_tokens=6, tools=tools)
    assert first == second == run.generate(prompt, max_tokens=6, tools=tools)
    row = recognize("tokens", {"messages": [*standard, {"role": "assistant", "content": "There."}], "tools": tools})
    trained = tokenize_conversation(row.messages, run.tokenizer, tools=row.tools).tokens.tolist()
    asked = prompt_tokens(run.tokenizer, prompt, tools, roles=run.config.roles)
    assert trained[: len(asked)] == asked


def test_the_check_says_that_calls_are_written_whatever_form_the_template_wants():
    for template in ("tojson", "items", "text", "text within"):
        assert probe_template(tokenizer_of(template)).tool_calls == "written"
    assert probe_template(tokenizer_of("none at all")).tool_calls == "left out"


# --- the dialects of files --------------------------------------------------------------------------------------------

WEATHER = {"name": "sail", "description": "d", "parameters": {"type": "object", "properties": {}}}
USER, REPLY = {"role": "user", "content": "Where to?"}, {"role": "assistant", "content": "There."}
CALLING = {"role": "assistant", "content": None, "tool_calls": [call({"to": "Rome"})]}
RESULT = {"role": "tool", "content": "done"}


def without_ids(messages: list[dict]) -> list[dict]:
    calls = [[{k: v for k, v in each.items() if k != "id"} for each in m.get("tool_calls", ())] for m in messages]
    return [{**m, "tool_calls": each} if each else m for m, each in zip(messages, calls)]


def text_of(record: dict, template: str = "tojson", columns: Columns | None = None) -> tuple[str, list[str]]:
    """What is rendered, and the texts that are trained."""
    row = recognize("tokens", record, columns or Columns())
    made = tokenize_conversation(row.messages, tokenizer_of(template), tools=row.tools)
    return made.text, [made.text[s.start : s.end] for s in made.spans if s.weight]


STANDARD = {"messages": without_ids([USER, CALLING, RESULT, REPLY])}
FUNCTION_CALL = '{"name": "sail", "arguments": {"to": "Rome"}}'
DIALECTS = {
    "OpenAI, arguments as text": {
        "messages": [
            USER,
            {**CALLING, "tool_calls": [{k: v for k, v in call('{"to":"Rome"}').items() if k != "id"}]},
            RESULT,
            REPLY,
        ],
        "parallel_tool_calls": False,
    },
    "OpenAI, before there were tools": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "sail", "arguments": '{"to":"Rome"}'}},
            {"role": "function", "name": None, "content": "done"},
            REPLY,
        ]
    },
    "ShareGPT of LLaMA-Factory": {
        "conversations": [
            {"from": "human", "value": "Where to?"},
            {"from": "function_call", "value": FUNCTION_CALL},
            {"from": "observation", "value": "done"},
            {"from": "gpt", "value": "There."},
        ]
    },
    "ms-swift": {
        "messages": [
            USER,
            {"role": "tool_call", "content": FUNCTION_CALL},
            {"role": "tool_response", "content": "done"},
            REPLY,
        ]
    },
    "calls without `function`": {
        "messages": [USER, {**CALLING, "tool_calls": [json.loads(FUNCTION_CALL)]}, RESULT, REPLY]
    },
    "calls as text": {"messages": [USER, {**CALLING, "tool_calls": f"[{FUNCTION_CALL}]"}, RESULT, REPLY]},
    "each call as text": {"messages": [USER, {**CALLING, "tool_calls": [FUNCTION_CALL]}, RESULT, REPLY]},
    "other words": {
        "conversation": [
            {"from": "Human", "value": "Where to?"},
            {"from": "function-call", "value": json.loads(FUNCTION_CALL)},
            {"from": "function response", "value": "done"},
            {"from": "model", "value": "There."},
        ]
    },
}


@pytest.mark.parametrize("name", DIALECTS)
def test_a_tool_call_is_the_same_row_in_every_dialect(name):
    text, trained = text_of(DIALECTS[name])
    assert (text, trained) == text_of(STANDARD)
    assert trained == ['<call>sail{"to": "Rome"}<|im_end|>', "There.<|im_end|>"]


def test_calls_that_are_messages_of_their_own_are_one_turn_of_the_assistant():
    two = [{"role": "tool_call", "content": f'{{"name": "{name}", "arguments": {{}}}}'} for name in ("row", "sail")]
    for calls in (two, [{"role": "function_call", "content": f"[{two[0]['content']}, {two[1]['content']}]"}]):
        _, trained = text_of({"messages": [USER, *calls, {**RESULT, "role": "observation"}, RESULT, REPLY]})
        assert trained == ["<call>row{}<call>sail{}<|im_end|>", "There.<|im_end|>"]
    _, trained = text_of({"messages": [USER, {**REPLY, "content": "Wait."}, *two, RESULT, REPLY]})
    assert trained == ["Wait.<call>row{}<call>sail{}<|im_end|>", "There.<|im_end|>"]
    _, trained = text_of({"messages": [USER, two[0], {**two[1], "weight": 0}, RESULT, REPLY]})
    assert trained == ["<call>row{}<|im_end|>", "There.<|im_end|>"]


def test_tools_are_the_same_in_every_dialect():
    wrapped = {"type": "function", "function": WEATHER}
    expected = recognize("tokens", {"messages": [USER, REPLY], "tools": [wrapped]}).tools
    for tools in ([WEATHER], json.dumps([WEATHER]), [{"type": "function", **WEATHER}], (wrapped,)):
        assert recognize("tokens", {"messages": [USER, REPLY], "tools": tools}).tools == expected
    assert recognize("tokens", {"messages": [USER, REPLY], "functions": [WEATHER]}).tools == expected
    assert recognize("tokens", {"messages": [USER, REPLY], "tools": [{"type": "web_search", "name": "x"}]}).tools == [
        {"type": "web_search", "name": "x"}
    ]


BAD = [
    (
        {"role": "function_call", "content": "sail to Rome"},
        "is a tool call (role 'function_call'), but its text is not",
    ),
    ({"role": "tool_call", "content": '{"to": "Rome"}'}, "`roles: {tool_call: assistant}` makes it text"),
    ({"role": "tool_call", "content": '{"name": "a", "name": "b"}'}, "a key occurs twice in one object"),
    ({"role": "tool_call", "content": None}, "is a tool call"),
    ({"role": "narrator", "content": "x"}, 'Words of your own: `roles: {"narrator": user}`'),
    ({**CALLING, "function_call": {"name": "x"}}, "has both tool_calls and function_call. Remove one of them."),
    ({"role": "assistant", "function_call": "auto"}, "function_call of `messages[1]` must be an object, not text"),
]


@pytest.mark.parametrize(("message", "expected"), BAD)
def test_a_bad_call_or_role_is_one_line_with_the_cure(message, expected):
    with pytest.raises(DataError) as error:
        recognize("tokens", {"messages": [USER, message]}, row=3)
    assert str(error.value).startswith("row 3: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_custom_role_words_come_first():
    roles = {"speaker_a": "user", "speaker_b": "assistant", "api": "function_call", "function": "function"}
    columns = ExampleSettings.of(RunConfig(roles=roles)).columns
    talk = [
        {"from": "speaker_a", "value": "Where to?"},
        {"from": "api", "value": FUNCTION_CALL},
        {"from": "function", "value": "done"},
        {"from": "speaker_b", "value": "There."},
    ]
    _, trained = text_of({"conversations": talk}, columns=columns)
    assert trained == ['<call>sail{"to": "Rome"}<|im_end|>', "There.<|im_end|>"]
    assert [m["role"] for m in recognize("tokens", {"conversations": talk}, columns).messages][2] == "function"
    pair = recognize(
        "pairs", {"prompt": talk[:1], "chosen": talk[3:], "rejected": [{**talk[3], "value": "No."}]}, columns
    )
    assert [pair.prompt[0]["role"], pair.chosen[0]["role"]] == ["user", "assistant"]
    asked = prompt_tokens(tokenizer_of("tojson"), talk[:1], roles=roles)
    assert asked == prompt_tokens(tokenizer_of("tojson"), "Where to?")


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("{speaker_a: asistant}", "`roles.speaker_a` cannot be 'asistant'. Did you mean 'assistant'?"),
        ("{speaker_a: [user]}", "`roles.speaker_a` cannot be ['user']."),
        ("{1: user}", "`roles` has the key 1. Keys are text."),
        ("speaker_a", "`roles` must be a mapping"),
    ],
)
def test_roles_are_checked_with_the_settings(roles, expected):
    with pytest.raises(ConfigError) as error:
        RunConfig.from_yaml(f"iters: 1\nroles: {roles}\n")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


# --- the same rows from every kind of file ----------------------------------------------------------------------------


def tool(name: str, **properties: object) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


# Every row has keys that the others have not: Arrow gives each row all of them, in one order.
TABLE = [
    {
        "messages": [
            USER,
            {**CALLING, "tool_calls": [call({"n": 1, "deep": {"x": [{"a": 1}, {"b": 2}]}})]},
            RESULT,
            REPLY,
        ],
        "tools": [tool("sail", n={"type": "integer", "default": 3, "enum": [1, 3]}), tool("row")],
    },
    {
        "messages": [USER, {**CALLING, "tool_calls": [call({"to": "Rome", "share": 0.5}), call({})]}, RESULT, REPLY],
        "tools": [tool("sail", to={"type": "string"}, share={"type": "number", "maximum": 1.5})],
    },
    {"messages": [{**USER, "content": "Hello."}, {**REPLY, "weight": 1}], "tools": None},
    {
        "messages": [USER, {**CALLING, "tool_calls": [call({"deep": {"y": 2}, "yes": True})]}, RESULT, REPLY],
        "tools": None,
    },
]


def forms_of(dataset: object, folder: object) -> dict[str, object]:
    dataset.to_parquet(str(folder / "rows.parquet"))
    dataset.to_json(str(folder / "rows.jsonl"))
    dataset.to_pandas().to_json(str(folder / "pandas.jsonl"), orient="records", lines=True)
    return {
        "Dataset": dataset,
        "list": list(dataset),
        "parquet": folder / "rows.parquet",
        "pandas": dataset.to_pandas(),
        "list of pandas": dataset.to_pandas().to_dict("records"),
        "jsonl": folder / "rows.jsonl",
        "jsonl of pandas": folder / "pandas.jsonl",
        "numpy": dataset.with_format("numpy"),
    }


def examples_of(data: object, template: str) -> Examples:
    settings = ExampleSettings.of(RunConfig())
    return Examples(open_splits(data, val_set_size=0).train, tokenizer_of(template), settings)


@pytest.mark.parametrize("template", ["tojson", "text", "items", "whole call"])
@pytest.mark.matrix(every=2)
def test_a_table_gives_the_tokens_of_its_rows_in_every_form(template, tmp_path):
    import datasets

    expected = [examples_of(TABLE, template).view(row).conversation for row in range(len(TABLE))]
    assert '"n": 1, "deep": {"x": [{"a": 1}, {"b": 2}]}' in expected[0].text or template == "items"
    for form, data in forms_of(datasets.Dataset.from_list(TABLE), tmp_path).items():
        for row, one in enumerate(expected):
            made = examples_of(data, template).view(row).conversation
            assert made is not None, form
            assert made.text == one.text, form
            assert_same(made, one)


def test_nulls_and_whole_numbers_are_one_rule_and_reported():
    tools = [tool("sail", to={"type": "string", "default": None})]
    row = said("tojson", {"to": None, "n": 1.0, "list": [None, 2.0]}, tools=tools)
    assert_same(row, said("tojson", {"n": 1, "list": [None, 2]}, tools=[tool("sail", to={"type": "string"})]))
    assert row.notes == (
        "the tools: null is left out, such as at 'function.parameters.properties.to.default' (1 in all): in a table it "
        "says that the row has no such key. Arguments as JSON text keep it.",
        "message 1 (assistant): null is left out, such as at 'to' (1 in all): in a table it says that the row has no "
        "such key. Arguments as JSON text keep it.",
        "message 1 (assistant): a whole number is written without its decimal point, such as at 'n' (2 in all).",
    )
    assert set(row.notes) <= set(row.problems)
    kept = said("tojson", '{"to": null, "n": 1.0}')
    assert '{"to": null, "n": 1}' in kept.text
    assert kept.notes == (row.notes[2].replace("2 in", "1 in"),)


def test_a_time_that_a_table_made_of_a_text_is_text_again_and_reported():
    import datetime

    import pandas

    day, hour = datetime.datetime(2024, 1, 2), datetime.datetime(2024, 1, 2, 3, 4)
    for times in ((day, hour), (pandas.Timestamp(day), pandas.Timestamp(hour)), tuple(np.array([day, hour], "M8[ns]"))):
        row = said("tojson", {"day": times[0], "at": times[1]})
        assert '{"day": "2024-01-02", "at": "2024-01-02T03:04:00"}' in row.text
        assert any("a time is written as text, such as at 'day' (2 in all)" in problem for problem in row.problems)
        assert row.notes == ()


def test_the_check_notes_what_was_changed_by_rule_and_the_row_shows_it():
    from mlx_nb.data.check.check import check_data, row_record

    tokenizer = tokenizer_of("tojson")
    rows = [{"messages": talk({"to": None, "n": 2})}, {"messages": talk('{"a": 1, "a": 2}')}]
    result = check_data(open_splits(rows, val_set_size=0), tokenizer, RunConfig())
    found = {item.kind: item for item in result.findings}
    assert (found["tool_values"].severity, found["tool_values"].rows) == ("note", (0,))
    assert "null is left out" in found["tool_values"].what
    assert (found["mask_problem"].severity, found["mask_problem"].rows) == ("warning", (1,))
    settings = ExampleSettings.of(RunConfig())
    view = Examples(open_splits(rows, val_set_size=0).train, tokenizer, settings).view(0)
    assert any("null is left out" in problem for problem in row_record(view, settings)["problems"])
