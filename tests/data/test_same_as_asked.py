"""What is trained is what will be asked: the prompt of a trained row is, token for token, what generation sends."""

from __future__ import annotations

import numpy as np
import pytest

from chat_shapes import SHAPES, saved_tokenizer
from mlx_nb import Run, RunConfig
from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.prompt import prompt_tokens
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.prompt_format import Rendering
from mlx_nb.data.rows.columns import AUTOMATIC
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import DataError

SYSTEM = {"role": "system", "content": "You are a pirate."}
USER = {"role": "user", "content": "say red 4"}
ANSWER = {"role": "assistant", "content": "redred"}
OTHER = {"role": "assistant", "content": "Blue, no."}
EARLIER = [{"role": "user", "content": " hello\n"}, {"role": "assistant", "content": "arr!"}]
CONVERSATIONS = {
    "one question": [USER],
    "with a system prompt": [SYSTEM, USER],
    "several turns": [*EARLIER, USER],
    "several turns with a system prompt": [SYSTEM, *EARLIER, USER],
}


def rows_of(messages):
    """(kind, record) of every form in which a row can give this prompt."""
    pair = {"chosen": [ANSWER], "rejected": [OTHER]}
    yield "tokens", {"messages": [*messages, ANSWER]}
    yield "tokens", {"prompt": messages, "completion": [ANSWER]}
    yield "tokens", {"conversations": [{"from": m["role"], "value": m["content"]} for m in [*messages, ANSWER]]}
    yield "pairs", {"prompt": messages, **pair}
    yield "pairs", {"chosen": [*messages, ANSWER], "rejected": [*messages, OTHER]}
    yield "labels", {"prompt": messages, "completion": [ANSWER], "label": True}
    yield "labels", {"messages": [*messages, ANSWER], "label": True}
    yield "prompts", {"prompt": messages}
    if messages[-2:-1] in ([], [SYSTEM]):
        system = {"system": SYSTEM["content"]} if SYSTEM in messages else {}
        asked, answers = USER["content"], {"chosen": ANSWER["content"], "rejected": OTHER["content"]}
        yield "tokens", {"prompt": asked, "completion": ANSWER["content"], **system}
        yield "tokens", {"instruction": asked, "output": ANSWER["content"], **system}
        yield "pairs", {"prompt": asked, **answers, **system}
        yield "labels", {"prompt": asked, "completion": ANSWER["content"], "label": False, **system}
        yield "prompts", {"prompt": asked, **system}


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request, tmp_path_factory):
    return SHAPES[request.param], saved_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


def view_of(record, tokenizer, kind, **rendering):
    examples = Examples(open_splits([record], val_set_size=0).train, tokenizer, settings_with(**rendering), kind)
    return examples.view(0)


def settings_with(**rendering):
    return ExampleSettings("final", 512, "right", AUTOMATIC, rendering=Rendering(**rendering))


def asked_by_mlx_lm(tokenizer, messages):
    """As the command `mlx_lm.generate` does it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def prompt_of(view):
    """The tokens before the first that is trained; all of them where nothing is."""
    mask = view.conversation.loss_mask
    return view.conversation.tokens[: int(np.argmax(mask > 0)) if mask.any() else len(mask)].tolist()


@pytest.mark.parametrize("special_tokens_in_text", ["keep", "text"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.matrix
def test_the_prompt_of_every_kind_of_row_is_what_generation_sends(conversation, special_tokens_in_text, shaped):
    shape, tokenizer = shaped
    messages = CONVERSATIONS[conversation]
    asked = asked_by_mlx_lm(tokenizer, messages)
    rendering = Rendering(special_tokens_in_text=special_tokens_in_text)
    assert prompt_tokens(tokenizer, messages, rendering=rendering) == asked
    for kind, record in rows_of(messages):
        view = view_of(record, tokenizer, kind, special_tokens_in_text=special_tokens_in_text)
        assert (record, view.error) == (record, None)
        assert (record, prompt_of(view)) == (record, asked)
        assert view.format == "chat template"
        if view.rejected is not None:
            assert view.rejected.tokens[: len(asked)].tolist() == asked
    if shape.bos:
        assert asked.count(tokenizer.bos_token_id) == ("bos_token" in shape.source)


def test_a_text_that_is_asked_is_the_user_message_that_is_trained(shaped):
    _, tokenizer = shaped
    assert prompt_tokens(tokenizer, USER["content"]) == asked_by_mlx_lm(tokenizer, [USER])


@pytest.mark.parametrize("written_bos", [False, True])
def test_raw_prompts_are_trained_as_they_are_asked_with_one_bos(written_bos, shaped):
    shape, tokenizer = shaped
    if written_bos and not shape.bos:
        return
    text = f"{shape.bos if written_bos else ''}say red 4"
    asked = prompt_tokens(tokenizer, text, rendering=Rendering(prompt_format="raw"))
    assert asked == tokenizer.encode(text, add_special_tokens=not written_bos)
    assert asked.count(tokenizer.bos_token_id) == bool(written_bos or shape.adds_bos)
    records = [
        ("tokens", {"prompt": text, "completion": " Arr."}),
        ("pairs", {"prompt": text, "chosen": " Arr.", "rejected": " No."}),
        ("labels", {"prompt": text, "completion": " Arr.", "label": 1}),
        ("prompts", {"prompt": text}),
    ]
    for kind, record in records:
        view = view_of(record, tokenizer, kind, prompt_format="raw")
        assert (kind, view.error, view.format) == (kind, None, "raw text")
        assert (kind, prompt_of(view)) == (kind, asked)


def test_the_arguments_that_mlx_lm_gives_a_template_are_given_in_training_too(tmp_path):
    # Without thinking tokens in the vocabulary mlx-lm switches thinking off, and the template writes another prompt.
    tokenizer = saved_tokenizer("chatml", tmp_path)
    tokenizer.chat_template = SHAPES["qwen3"].source
    asked = asked_by_mlx_lm(tokenizer, [USER])
    assert tokenizer.decode(asked).endswith("<think>\n\n</think>\n\n")
    assert prompt_tokens(tokenizer, [USER]) == asked
    for kind, record in rows_of([USER]):
        assert (record, prompt_of(view_of(record, tokenizer, kind))) == (record, asked)


def test_generate_answers_what_mlx_lm_answers_to_the_same_conversation(tiny_folder):
    from mlx_lm import generate, load

    from mlx_nb.rollouts.generation import generate_texts, stream_text

    model, tokenizer = load(str(tiny_folder))
    for messages in CONVERSATIONS.values():
        theirs = generate(model, tokenizer, prompt=asked_by_mlx_lm(tokenizer, messages), max_tokens=8)
        ours = generate_texts(model, tokenizer, [messages], max_tokens=8, temperature=0.0, seed=0)
        assert ours == [theirs]
        assert [*stream_text(model, tokenizer, messages, 8)][-1] == theirs


def test_a_prompt_that_is_read_in_other_tokens_before_an_answer_is_named(tmp_path):
    from tokenizers import pre_tokenizers

    tokenizer = saved_tokenizer("llama3", tmp_path)
    rows = [{"messages": [USER, ANSWER]}, {"prompt": "say red:\n\n", "completion": "redred"}]
    formats = [{}, {"prompt_format": "raw"}]
    for record, rendering in zip(rows, formats):
        assert view_of(record, tokenizer, "tokens", **rendering).conversation.problems == ()
    # As GPT-2 did: of two line breaks the second goes with the word that follows.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for record, rendering in zip(rows, formats):
        view = view_of(record, tokenizer, "tokens", **rendering)
        asked = prompt_tokens(
            tokenizer, [USER] if "messages" in record else record["prompt"], None, Rendering(**rendering)
        )
        assert prompt_of(view) != asked
        assert any(
            "before it has other tokens when the model is prompted" in text for text in view.conversation.problems
        )


def test_a_prompt_that_generation_writes_differently_is_named(tmp_path):
    tokenizer = saved_tokenizer("deepseek", tmp_path)
    tokenizer.chat_template = SHAPES["deepseek"].source.replace(
        "<｜Assistant｜>{% endif %}", "<｜Assistant｜><think>\n{% endif %}"
    )
    view = view_of({"messages": [USER, ANSWER]}, tokenizer, "tokens")
    assert prompt_of(view) != asked_by_mlx_lm(tokenizer, [USER])
    assert any("its context differs from inference" in problem for problem in view.conversation.problems)


def continued_by_transformers(tokenizer, messages):
    inner = tokenizer._tokenizer if hasattr(tokenizer, "_tokenizer") else tokenizer
    text = inner.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    return tokenizer.encode(text, add_special_tokens=False)


BEGUN = {
    "begun": [USER, {"role": "assistant", "content": "say red"}],
    "after turns": [SYSTEM, USER, ANSWER, USER, {"role": "assistant", "content": "4 red"}],
}


@pytest.mark.parametrize("case", BEGUN)
def test_an_answer_that_was_begun_is_continued_as_transformers_continues_it(case, shaped):
    _, tokenizer = shaped
    messages = BEGUN[case]
    asked = prompt_tokens(tokenizer, messages)
    assert asked == continued_by_transformers(tokenizer, messages)
    longer = [*messages[:-1], {"role": "assistant", "content": messages[-1]["content"] + " red"}]
    view = view_of({"messages": longer}, tokenizer, "tokens")
    assert view.conversation.text.startswith(tokenizer.decode(asked))


def test_what_a_template_does_not_continue_exactly_is_one_line(tmp_path):
    tokenizer = saved_tokenizer("chatml", tmp_path)
    begun = [USER, {"role": "assistant", "content": "say "}]
    assert tokenizer.decode(prompt_tokens(tokenizer, begun)).endswith("assistant\nsay ")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    cases = [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}", begun[1], "cuts white space"),
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}\n{% endfor %}",
            begun[1],
            "changes the assistant's",
        ),
        (tokenizer.chat_template, {"role": "assistant", "content": "x", "tool_calls": [call]}, "has tool calls"),
    ]
    for template, last, words in cases:
        tokenizer.chat_template = template
        with pytest.raises(DataError, match=words) as error:
            prompt_tokens(tokenizer, [USER, last])
        assert "\n" not in str(error.value)


def test_generate_continues_with_an_answer_that_was_begun(tiny_folder):
    from mlx_lm import generate

    run = Run(RunConfig(model=str(tiny_folder), data=[{"messages": [USER, ANSWER]}] * 4, val_set_size=0))
    begun = [USER, {"role": "assistant", "content": "say"}]
    text = run.tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) + "say"
    asked = run.tokenizer.encode(text, add_special_tokens=False)
    assert prompt_tokens(run.tokenizer, begun) == asked
    rest = run.generate(begun, max_tokens=6)
    assert rest == generate(run.model, run.tokenizer, prompt=asked, max_tokens=6)
    assert run.generate([begun, [USER]], max_tokens=6) == [rest, run.generate([USER], max_tokens=6)]
