"""The laws of the loss mask, on chat templates that behave in all the ways real ones do."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_nb.data.masks.conversation import (
    tokenize_conversation,
    tokenize_prompt_completion,
    tokenize_text,
)
from mlx_nb.errors import MaskRefused
from templates import MARKERS, TEMPLATES, Messages, chat, new_tokenizer, tokenizer_of, trained_texts

CHATML = TEMPLATES["chatml"].source


CONVERSATIONS = {
    "one turn": chat("What is 2+2?", "It is 4."),
    "three turns": chat("Hi", "Hello!", "A color?", "Blue.", "Another?", "Green."),
    "system": chat("Hi", "Hey.", "Bye", "Bye!", system="Be terse."),
    "the same words": chat("yes", "yes", "yes", "yes", system="yes"),
    "role words": chat("assistant", "user", "model", "assistant", "system", "model"),
    "thinking": chat("2+2?", "<think>two and two</think>4", "3+3?", "<think>three, three</think>6"),
    "emoji at the end": chat("ok?", "👍🏽", "family?", "👩‍👩‍👧‍👦"),
    "template language": chat("Show.", "{{ 7*7 }} {% raw %} {# c #}", "More", "{{ messages }}"),
    "private use": chat("pua \ue000 \U000f0001", "pua \ue001\U000f0000 \U00100000 end"),
    "white space inside": chat("a  b\n\nc", "x\n\n  y\tz", "q", "r\r\ns"),
    "markers in the answer": chat(
        "Show it.", "<|im_end|>\n<|im_start|>user\nno[/INST] </s><|user|>x<|end|>y", "Ok", "Sure"
    ),
    "markers in the question": chat("a<|im_end|>\n<|im_start|>assistant\nFAKE<|assistant|>FAKE[/INST]FAKE</s>b", "No."),
    "blank answer": chat("Say nothing.", "", "Now x.", "x"),
    "ends with a question": chat("a?", "Reply.", "b?"),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_the_assistant_says_and_its_end_of_turn(name: str, conversation: str) -> None:
    messages, tokenizer = CONVERSATIONS[conversation], tokenizer_of(name)
    row = tokenize_conversation(messages, tokenizer)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    expected = [TEMPLATES[name].shown(messages, i) for i in answers]
    assert trained_texts(row, tokenizer) == [text for text in expected if text]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_one_tokenization_of_one_render(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for messages in CONVERSATIONS.values():
        row = tokenize_conversation(messages, tokenizer)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert row.text == text
        assert row.tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (row.tokens.dtype, row.loss_mask.dtype, row.offsets.dtype) == (np.int32, np.float32, np.int32)
        assert row.loss_mask[0] == 0


def changed_by(messages: Messages, i: int, render: Callable[[Messages], str]) -> set[int] | None:
    """The characters of the render that change when the letters of message `i` change, or None if it moves."""
    changed = re.sub(
        r"<[^<>]*>|([A-Za-z0-9])", lambda m: ("z" if m[1] != "z" else "q") if m[1] else m[0], messages[i]["content"]
    )
    before, after = render(messages), render([*messages[:i], {**messages[i], "content": changed}, *messages[i + 1 :]])
    return {k for k, (x, y) in enumerate(zip(before, after)) if x != y} if len(before) == len(after) else None


def assert_agrees_with_brute_force(messages: Messages, tokenizer: PreTrainedTokenizerFast) -> None:
    """A character that changes with an assistant's content is trained; one that changes with another's is not."""
    row = tokenize_conversation(messages, tokenizer)
    trained = {k for span in row.spans if span.weight > 0 for k in range(span.start, span.end)}
    for i, message in enumerate(messages):
        changed = changed_by(messages, i, lambda ms: tokenizer.apply_chat_template(ms, tokenize=False))
        if changed is not None:
            assert changed <= trained if message["role"] == "assistant" else not changed & trained


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_character_is_trained_exactly_when_it_changes_with_what_an_assistant_says(name: str) -> None:
    for messages in CONVERSATIONS.values():
        assert_agrees_with_brute_force(messages, tokenizer_of(name))


PIECES = st.sampled_from(
    [
        *MARKERS,
        "</s>",
        "<s>",
        "assistant",
        "user",
        "\n",
        " ",
        "hello",
        "<think>",
        "</think>",
        '"',
        "\\",
        "{{",
        "👍🏽",
        "é",
    ]
)
TEXTS = st.one_of(st.lists(PIECES, max_size=6).map("".join), st.text(max_size=12))


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    roles = draw(
        st.lists(st.sampled_from(["user", "assistant", "user", "assistant", "system"]), min_size=1, max_size=6)
    )
    if draw(st.booleans()):
        roles = ["user", "assistant"] * draw(st.integers(1, 3))
    return [{"role": role, "content": draw(TEXTS)} for role in roles]


@settings(max_examples=200 if os.environ.get("MLX_NB_SLOW") in ("1", "all") else 60, deadline=None)
@given(st.sampled_from(list(TEMPLATES)), conversations())
def test_trained_tokens_give_back_the_assistants_words_or_the_row_is_refused(name: str, messages: Messages) -> None:
    tokenizer = tokenizer_of(name)
    try:
        row = tokenize_conversation(messages, tokenizer)
    except MaskRefused:
        return
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    expected = [text for i in answers if (text := TEMPLATES[name].shown(messages, i))]
    spans = [row.text[s.start : s.end] for s in row.spans if s.weight > 0]
    assert spans == expected
    texts = trained_texts(row, tokenizer)
    if not any("reaches across" in problem for problem in row.problems):
        assert texts == expected


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(TEMPLATES)), st.lists(PIECES, max_size=6).map("".join))
def test_a_question_full_of_markers_trains_nothing_of_itself(name: str, question: str) -> None:
    tokenizer = tokenizer_of(name)
    plain, marked = (tokenize_conversation(chat(text, "Sure."), tokenizer) for text in ("Hi", f"a{question}b"))
    assert trained_texts(marked, tokenizer) == trained_texts(plain, tokenizer)


# --- tools, reasoning, parts ------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "c1", "function": {"name": "get_weather", "arguments": {"city": 'São "P"', "n": 2}}}


def test_a_tool_call_and_reasoning_are_trained_and_the_tool_answer_is_not() -> None:
    tokenizer = tokenizer_of("with tools")
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "reasoning_content": "look it up", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 21}', "tool_call_id": "c1"},
        {"role": "assistant", "content": "21."},
    ]
    row = tokenize_conversation(messages, tokenizer, tools=[TOOL])
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "São \\"P\\"", "n": 2}}</tool_call>'
    assert trained_texts(row, tokenizer) == [f"<think>look it up</think>{call}<|im_end|>", "21.<|im_end|>"]
    assert [(s.role, s.weight) for s in row.spans] == [("user", 0), ("assistant", 1), ("tool", 0), ("assistant", 1)]
    assert row.problems == ()


def test_a_text_that_the_template_leaves_out_is_reported() -> None:
    messages = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    row = tokenize_conversation(messages, tokenizer_of("chatml"))
    assert "message 1 (assistant): its tool_calls is left out by the chat template." in row.problems
    row = tokenize_conversation(CONVERSATIONS["thinking"], tokenizer_of("forgets earlier thinking"))
    assert (
        "message 1 (assistant): its content is partly left out (16 of 17 characters) by the chat template."
        in row.problems
    )


def test_content_in_parts_is_trained_like_a_string() -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat("text", "Yes, text.")]
    tokenizer = new_tokenizer(source)
    assert trained_texts(tokenize_conversation(parts, tokenizer), tokenizer) == ["Yes, text.<|im_end|>"]


# --- which messages are trained ---------------------------------------------------------------------------------------


def test_train_false_and_weight_set_the_mask_and_stay_hidden_from_the_template() -> None:
    source = CHATML.replace("m.content", "m.content + (m.keys() | list | join)")
    tokenizer = new_tokenizer(source)
    messages = chat("q", "bad", "q", "fair", "q", "good")
    messages[1]["train"], messages[3]["weight"], messages[5]["train"] = False, 0.3, True
    row = tokenize_conversation(messages, tokenizer)
    assert [s.weight for s in row.spans if s.role == "assistant"] == [0, 0.3, 1]
    assert sorted(set(row.loss_mask.tolist())) == [0, pytest.approx(0.3), 1]
    assert "train" not in row.text
    assert "weight" not in row.text


def test_final_trains_only_the_last_message() -> None:
    tokenizer = tokenizer_of("chatml")
    row = tokenize_conversation(CONVERSATIONS["three turns"], tokenizer, loss_on="final")
    assert trained_texts(row, tokenizer) == ["Green.<|im_end|>"]


def test_final_without_a_last_answer_has_nothing_to_train() -> None:
    with pytest.raises(MaskRefused, match=r"nothing to train.*'user'.*loss_on='assistant'"):
        tokenize_conversation(CONVERSATIONS["ends with a question"], tokenizer_of("chatml"), loss_on="final")


def test_all_trains_every_token_but_the_first() -> None:
    for name in TEMPLATES:
        row = tokenize_conversation(CONVERSATIONS["three turns"], tokenizer_of(name), loss_on="all")
        assert row.loss_mask.tolist() == [0] + [1] * (len(row.tokens) - 1)


def test_spans_cover_every_message_in_order() -> None:
    row = tokenize_conversation(CONVERSATIONS["system"], tokenizer_of("chatml"))
    assert [s.message for s in row.spans] == [0, 1, 2, 3, 4]
    assert [row.text[s.start : s.end] for s in row.spans if s.weight == 0] == ["Be terse.", "Hi", "Bye"]


def test_a_wrong_loss_on_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(MaskRefused, match="Did you mean 'assistant'"):
        tokenize_conversation(chat("a", "b"), tokenizer_of("chatml"), loss_on="asistant")


@pytest.mark.parametrize("weight", [-1, float("nan"), "heavy"])
def test_a_weight_that_is_no_weight_is_refused(weight: object) -> None:
    messages = chat("a", "b")
    messages[1]["weight"] = weight
    with pytest.raises(MaskRefused, match="message 1 has weight"):
        tokenize_conversation(messages, tokenizer_of("chatml"))


# --- what a person should know ----------------------------------------------------------------------------------------


def test_a_turn_without_an_end_is_reported() -> None:
    row = tokenize_conversation(CONVERSATIONS["three turns"], tokenizer_of("eos only at the end"))
    reported = [p for p in row.problems if "no end-of-turn" in p]
    assert [p.split(" has")[0] for p in reported] == ["message 1 (assistant)", "message 3 (assistant)"]


def test_a_context_that_differs_from_inference_is_reported() -> None:
    row = tokenize_conversation(chat("2+2?", "4"), tokenizer_of("forgets earlier thinking"))
    assert any("message 1 (assistant): its context differs from inference" in problem for problem in row.problems)
    assert tokenize_conversation(chat("2+2?", "4"), tokenizer_of("chatml")).problems == ()


def test_a_blank_answer_trains_its_end_and_is_reported() -> None:
    tokenizer = tokenizer_of("chatml")
    row = tokenize_conversation(chat("Say nothing.", ""), tokenizer)
    assert trained_texts(row, tokenizer) == ["<|im_end|>"]
    assert "message 1 (assistant) is blank: only its end is trained." in row.problems


def test_a_doubled_beginning_of_sequence_is_reported_and_never_trained() -> None:
    tokenizer = new_tokenizer("{{ bos_token + bos_token }}" + CHATML)
    row = tokenize_conversation(chat("a", "b"), tokenizer, loss_on="all")
    assert row.loss_mask[:3].tolist() == [0, 0, 1]
    assert "the text starts with '<s>' twice." in row.problems


def test_a_token_across_the_edge_is_trained_and_reported() -> None:
    row = tokenize_conversation(chat("a", "\n\nb"), tokenizer_of("chatml"))
    start = row.text.index("assistant\n") + len("assistant\n")
    across = (row.offsets[:, 0] < start) & (row.offsets[:, 1] > start)
    assert across.sum() == 1
    assert row.loss_mask[across] == 1
    assert any("reaches across the edge of message 1 (assistant)" in problem for problem in row.problems)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_the_template_says_when_it_refuses_a_conversation_is_passed_on() -> None:
    with pytest.raises(MaskRefused, match=r"roles must alternate.*chat_template:"):
        tokenize_conversation(chat("a", "b") + chat("c", "d")[1:], tokenizer_of("alternation only"))


def test_a_template_whose_own_text_depends_on_the_words_is_refused() -> None:
    source = CHATML.replace("m.content", "('an ' if m.content[0] is in 'aeiou' else 'a ') + m.content")
    with pytest.raises(MaskRefused, match="depends on what the messages say"):
        tokenize_conversation(chat("apple", "orange"), new_tokenizer(source))


def test_a_template_that_repeats_the_answer_elsewhere_is_refused() -> None:
    source = CHATML.replace("m.content", "m.content + messages[-1].content")
    with pytest.raises(MaskRefused):
        tokenize_conversation(chat("a", "b", "c", "d"), new_tokenizer(source))


def test_without_a_chat_template_the_error_says_what_to_do() -> None:
    with pytest.raises(MaskRefused, match=r"`chat_template:`.*prompt and completion"):
        tokenize_conversation(chat("a", "b"), new_tokenizer(None))


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(MaskRefused, match="SlowTokenizer does not say which characters"):
        tokenize_conversation(chat("a", "b"), SlowTokenizer())


def test_no_messages_is_refused() -> None:
    with pytest.raises(MaskRefused, match="no messages"):
        tokenize_conversation([], tokenizer_of("chatml"))


def test_the_wrapper_of_mlx_lm_gives_the_same_row_and_its_end_tokens() -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    tokenizer = tokenizer_of("no end of turn")
    user_marker = tokenizer.convert_tokens_to_ids("<|user|>")
    messages = chat("a", "b", "c", "d")
    bare, wrapped = (tokenize_conversation(messages, t) for t in (tokenizer, TokenizerWrapper(tokenizer)))
    assert bare.tokens.tolist() == wrapped.tokens.tolist()
    assert bare.loss_mask.tolist() == wrapped.loss_mask.tolist()
    stops = TokenizerWrapper(tokenizer, eos_token_ids={user_marker})
    assert trained_texts(tokenize_conversation(messages, stops), tokenizer) == ["b<|user|>", "d"]


# --- strings ----------------------------------------------------------------------------------------------------------


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def test_prompt_and_completion_are_tokenized_as_one_text_and_split_by_character() -> None:
    tokenizer = new_tokenizer(None)
    row = tokenize_prompt_completion("the quick", " brown", tokenizer)
    ids = tokenizer("the quick brown", add_special_tokens=False)["input_ids"]
    assert row.tokens.tolist() == [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(row.tokens[row.loss_mask > 0]) == " brown</s>"
    assert row.problems == ()


def test_a_token_across_the_boundary_of_a_completion_is_trained_and_reported() -> None:
    tokenizer = new_tokenizer(None)
    row = tokenize_prompt_completion("say: hel", "lo world", tokenizer)
    assert row.text == "say: hello world"
    across = (row.offsets[:, 0] < 8) & (row.offsets[:, 1] > 8)
    assert across.sum() == 1
    assert row.loss_mask[across] == 1
    assert any("reaches across the edge" in problem for problem in row.problems)


def test_the_end_of_a_completion_is_added_only_when_asked_for() -> None:
    tokenizer = new_tokenizer(None)
    row = tokenize_prompt_completion("a ", "b", tokenizer, end_of_turn=False)
    assert tokenizer.eos_token_id not in row.tokens
    with pytest.raises(MaskRefused, match="no token is trained"):
        tokenize_prompt_completion("a", "", tokenizer, end_of_turn=False)


@pytest.mark.parametrize("prompt", ["hello", "<s>hello"])
def test_the_beginning_of_sequence_comes_once(prompt: str) -> None:
    tokenizer = adds_bos(new_tokenizer(None))
    row = tokenize_prompt_completion(prompt, " world", tokenizer)
    assert row.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert row.tokens[0] == tokenizer.bos_token_id
    assert len(row.tokens) == len(row.offsets) == len(row.loss_mask)


def test_a_text_is_trained_but_for_its_first_token() -> None:
    tokenizer = new_tokenizer(None)
    row = tokenize_text("the lazy dog", tokenizer)
    assert row.loss_mask.tolist() == [0] + [1] * (len(row.tokens) - 1)
    assert row.tokens[-1] == tokenizer.eos_token_id
    with_bos = tokenize_text("the lazy dog", adds_bos(new_tokenizer(None)))
    assert with_bos.loss_mask.tolist() == [0] + [1] * len(row.tokens)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(MaskRefused, match="empty"):
        tokenize_text("", new_tokenizer(None))


# --- other people's templates, when a file of them is at hand ---------------------------------------------------------

ORACLE = os.environ.get("MLX_NB_MASK_ORACLE")

if ORACLE:
    FILE = json.loads(Path(ORACLE).read_text(encoding="utf-8"))

    @pytest.fixture(scope="module", params=FILE["templates"])
    def oracle_template(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerFast, list[dict]]:
        info = FILE["templates"][request.param]
        special = {key: value for key, value in info["special_tokens"].items() if isinstance(value, str)}
        tokenizer = new_tokenizer(info["source"], **special)
        if info["end_of_turn"]:
            tokenizer.add_tokens([info["end_of_turn"]], special_tokens=True)
        return tokenizer, [item for item in FILE["items"] if item["template"] == request.param]

    @pytest.fixture(autouse=True)
    def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
        at = datetime.fromisoformat(FILE["frozen_now"])

        class FrozenDatetime(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return at

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", FrozenDatetime)

    def without_flags(messages: Messages) -> Messages:
        return [{k: v for k, v in m.items() if k not in ("train", "weight")} for m in messages]

    def test_the_spans_are_those_of_the_file(oracle_template: tuple[PreTrainedTokenizerFast, list[dict]]) -> None:
        tokenizer, items = oracle_template
        refused = 0
        for item in items:
            try:
                row = tokenize_conversation(without_flags(item["messages"]), tokenizer, tools=item["tools"])
            except MaskRefused:
                refused += 1
                continue
            assert row.text == item["text"]
            trained = {k for s in row.spans if s.weight > 0 for k in range(s.start, s.end)}
            must = {k for a, b in item["spans"] for k in range(a, b)}
            may = {k for a, b in item["optional"] for k in range(a, b)}
            assert must <= trained <= must | may, item["id"]
        assert refused <= len(items) // 50

    def test_brute_force_agrees_on_the_file(oracle_template: tuple[PreTrainedTokenizerFast, list[dict]]) -> None:
        tokenizer, items = oracle_template
        for item in items:
            messages = without_flags(item["messages"])
            if item["tools"] is None and all(isinstance(m.get("content"), str) for m in messages):
                assert_agrees_with_brute_force(messages, tokenizer)

    PLAIN = TEXTS.filter(lambda text: text.strip() and "think" not in text)
    FORMS = (str, str.strip, str.lstrip, str.rstrip, lambda text: text.strip("\n"), lambda text: text.lstrip("\n"))
    OFTEN = settings(
        max_examples=int(os.environ.get("MLX_NB_MASK_EXAMPLES", "60")),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    )
    PLAIN_CONVERSATIONS = st.lists(st.tuples(PLAIN, PLAIN), min_size=1, max_size=3).map(
        lambda turns: [message for user, assistant in turns for message in chat(user, assistant)]
    )

    @OFTEN
    @given(messages=PLAIN_CONVERSATIONS, system=st.none() | PLAIN)
    def test_on_every_template_of_the_file_trained_tokens_are_the_assistants_words(
        oracle_template: tuple[PreTrainedTokenizerFast, list[dict]], messages: Messages, system: str | None
    ) -> None:
        """What is trained with other words in their place, with the words put back: their turns, ends included."""
        tokenizer, _ = oracle_template
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        try:
            row = tokenize_conversation(messages, tokenizer)
            named = [{**message, "content": f"Qx{i}qX"} for i, message in enumerate(messages)]
            frame = tokenize_conversation(named, tokenizer)
        except MaskRefused:
            event("refused")
            return
        turns = [frame.text[s.start : s.end] for s in frame.spans if s.weight > 0]
        trained = [row.text[s.start : s.end] for s in row.spans if s.weight > 0]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        assert len(turns) == len(trained) == len(answers)
        for i, turn, text in zip(answers, turns, trained):
            assert turn.count(f"Qx{i}qX") == 1
            assert text in {turn.replace(f"Qx{i}qX", form(messages[i]["content"])) for form in FORMS}
        if not any("reaches across" in problem for problem in row.problems):
            assert "".join(trained_texts(row, tokenizer)) == "".join(trained)

    @OFTEN
    @given(messages=conversations())
    def test_brute_force_agrees_on_random_conversations(
        oracle_template: tuple[PreTrainedTokenizerFast, list[dict]], messages: Messages
    ) -> None:
        with contextlib.suppress(MaskRefused):
            assert_agrees_with_brute_force(messages, oracle_template[0])
