"""Long conversations: the same masks as short ones, at a cost that grows as their length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from chat_shapes import SHAPES, shaped_tokenizer
from mlx_nb.data.masks.conversation import tokenize_conversation
from mlx_nb.data.masks.prompt_format import Rendering
from mlx_nb.data.masks.render import ChatTemplate
from mlx_nb.data.masks.token_edges import Edges
from templates import TEMPLATES, Messages, chat, new_tokenizer, tokenizer_of, trained_texts


class CountsMessages:
    """A tokenizer that counts the messages its chat template is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.messages = tokenizer, 0

    def apply_chat_template(self, messages: Messages, **arguments: Any) -> str:
        self.messages += len(messages)
        return self._tokenizer.apply_chat_template(messages, **arguments)


def long_chat(count: int) -> Messages:
    """Questions and answers, no two the same, some of them blank or with thoughts."""
    texts: dict[int, Callable[[int], str]] = {
        1: lambda i: f"There are {i}.",
        3: lambda i: f'"{i}", he said, "and {i + 1}"',
        5: lambda i: "",
        7: lambda i: f"<think>\n{i} and one\n</think>{i + 1}",
    }
    return chat(*(texts[i % 8](i) if i % 2 else f"How many are {i}?" for i in range(count)))


def agent(count: int) -> Messages:
    """One question, and then calls and their results."""
    messages: Messages = [{"role": "user", "content": "Count the files."}]
    for i in range((count - 1) // 2):
        call = {"type": "function", "id": f"call{i:05}", "function": {"name": f"tool_{i % 7}", "arguments": {"at": i}}}
        messages.append({"role": "assistant", "content": f"Step {i}.", "tool_calls": [call]})
        messages.append({"role": "tool", "content": f"{i} files", "tool_call_id": f"call{i:05}"})
    return messages


def cost(messages: Messages, tokenizer: Any, **arguments: Any) -> int:
    """Messages given to the template until the row is tokenized."""
    tokenize_conversation(messages[:4], tokenizer)  # what is found out once for each template
    counting = CountsMessages(tokenizer)
    tokenize_conversation(messages, counting, **arguments)
    return counting.messages


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.matrix(every=5)
def test_four_times_the_messages_cost_about_four_times_as_much(name: str) -> None:
    tokenizer = shaped_tokenizer(name)
    few, many = (cost(long_chat(count), tokenizer) for count in (300, 1200))
    assert many < 6 * few
    assert many < 40 * 1200


@pytest.mark.long
def test_a_long_row_of_tool_calls_costs_as_much_as_it_is_long() -> None:
    tokenizer = tokenizer_of("with tools")
    few, many = (cost(agent(count), tokenizer) for count in (301, 1201))
    assert many < 6 * few


@pytest.mark.parametrize("special_tokens_in_text", ["keep", "text"])
@pytest.mark.parametrize("spelled", ["</think>", "<|im_end|>"])
@pytest.mark.matrix(every=4)
def test_control_tokens_in_every_message_cost_as_much_as_there_are(spelled: str, special_tokens_in_text: str) -> None:
    tokenizer, rendering = shaped_tokenizer("qwen3"), Rendering(None, special_tokens_in_text)

    def spelling(count: int) -> Messages:
        return chat(*(f"{i} {spelled if i % 2 else ''} and {i}" for i in range(count)))

    few, many = (cost(spelling(count), tokenizer, rendering=rendering) for count in (200, 800))
    assert many < 6 * few


def test_answers_that_the_template_leaves_out_cost_as_much_as_there_are() -> None:
    skips = (
        "{% for m in messages if m.content %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = new_tokenizer(skips)

    def mostly_blank(count: int) -> Messages:
        return chat(*(f"What of {i}?" if i % 2 == 0 else f"{i}" if i % 12 == 1 else "" for i in range(count)))

    few, many = (cost(mostly_blank(count), tokenizer) for count in (200, 800))
    assert many < 6 * few
    messages = mostly_blank(120)
    row = tokenize_conversation(messages, tokenizer)
    assert trained_texts(row, tokenizer) == [f"{i}<|im_end|>" for i in range(1, 120, 12)]
    assert sum("is left out by the chat template" in problem for problem in row.problems) == 50


@pytest.mark.parametrize("count", [49, 61, 62, 131])
def test_a_long_past_that_the_template_leaves_out_is_left_out_of_a_long_conversation(count: int) -> None:
    """The messages before the last 40 are in no window of their own left out."""
    tokenizer = new_tokenizer(
        "{% for m in messages %}{% if loop.revindex <= 40 %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = chat(*(f"{i}" if i % 2 == 0 or i % 6 == 1 else "" for i in range(count)))
    row = tokenize_conversation(messages, tokenizer)
    kept = [i for i in range(count - 40, count) if i % 2]
    assert trained_texts(row, tokenizer) == [f"{i if i % 6 == 1 else ''}<|im_end|>" for i in kept]
    assert [span.message for span in row.spans if span.weight] == kept


@pytest.mark.parametrize("count", [49, 130, 131])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.matrix
def test_what_is_trained_of_a_long_conversation_is_what_the_assistant_says(name: str, count: int) -> None:
    messages, tokenizer = long_chat(count), tokenizer_of(name)
    expected = [TEMPLATES[name].shown(messages, i) for i in range(1, count, 2)]
    row = tokenize_conversation(messages, tokenizer)
    assert trained_texts(row, tokenizer) == [text for text in expected if text]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.matrix(every=3)
def test_an_early_turn_is_trained_the_same_however_long_the_conversation(name: str) -> None:
    tokenizer, count = shaped_tokenizer(name), 40
    short, long = (tokenize_conversation(long_chat(n), tokenizer) for n in (count, 150))
    shared = min(span.start for span in long.spans if span.message == count - 2)
    assert short.text[:shared] == long.text[:shared]
    early = [[span for span in row.spans if span.message < count - 2] for row in (short, long)]
    assert early[0] == early[1]
    tokens = int(np.searchsorted(long.offsets[:, 1], shared))
    assert short.loss_mask[:tokens].tolist() == long.loss_mask[:tokens].tolist()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.matrix(every=3)
def test_the_turns_of_a_repeated_exchange_are_trained_alike_to_the_end(name: str) -> None:
    tokenizer = shaped_tokenizer(name)
    row = tokenize_conversation(chat(*["How many?", "There are four."] * 70), tokenizer)
    trained = [row.text[span.start : span.end] for span in row.spans if span.weight > 0]
    assert len(trained) == 70
    assert set(trained[:-1]) == {trained[0]}
    assert "There are four." in trained[-1]


def test_a_template_that_numbers_its_turns_is_asked_with_the_whole_conversation() -> None:
    numbers = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + loop.index | string + ': ' + m.content + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>' + (messages | length + 1) | string + ': ' }}{% endif %}"
    )
    tokenizer = new_tokenizer(numbers)
    row = tokenize_conversation(long_chat(90), tokenizer)
    expected = [f"{m['content']}<|end|>" for m in long_chat(90) if m["role"] == "assistant"]
    assert [row.text[s.start : s.end] for s in row.spans if s.role == "assistant"] == expected


def test_a_context_that_differs_only_far_into_a_conversation_is_reported_there() -> None:
    forgets = tokenizer_of("forgets earlier thinking")
    plain = chat(*("How many?" if i % 2 == 0 else "Four." for i in range(120)))
    thinking = [{**m, "content": "<think>two</think>Four."} if i == 101 else m for i, m in enumerate(plain)]
    row = tokenize_conversation(thinking, forgets)
    assert row.text.count("two") == 0
    assert trained_texts(row, forgets) == ["Four.<|im_end|>"] * 60


@pytest.mark.long
def test_more_messages_than_there_are_characters_of_private_use_can_be_told_apart() -> None:
    messages = chat(*(f"{i}" for i in range(44_000)))
    row = tokenize_conversation(messages, tokenizer_of("chatml"))
    trained = [row.text[span.start : span.end] for span in row.spans if span.weight > 0]
    assert trained == [f"{i}<|im_end|>" for i in range(1, 44_000, 2)]


def test_only_the_end_of_a_long_text_without_control_tokens_is_tokenized() -> None:
    tokenizer = shaped_tokenizer("llama3")
    template = ChatTemplate(tokenizer, None)
    for before in ("Answer: ", "Answer:\n\n", "Answer:  "):
        said = []
        for words in (50, 5000):
            text = "so many words " * words + before + "\n\nThere are four."
            start = text.index("\n\nThere") if before != "Answer:  " else text.index("There") - 2
            encoded = template.encode([], text, False)
            said += Edges(text, encoded, tokenizer).other_tokens_before([start])
        assert said[0] == said[1]
