"""Control tokens that stand in a row's own text: found by row, marked, and plain text where that is asked for."""

from __future__ import annotations

from html import unescape

import numpy as np
import pytest

from chat_shapes import SHAPES, saved_tokenizer, shaped_tokenizer
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.check.check import check_data
from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.prompt import prompt_tokens
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.control_tokens import control_tokens
from mlx_nb.data.masks.conversation import tokenize_conversation, tokenize_text
from mlx_nb.data.masks.prompt_format import Rendering
from mlx_nb.data.rows.columns import AUTOMATIC
from mlx_nb.data.sources.splits import open_splits
from mlx_nb.view.rows.display import ShownRow

AS_TEXT = Rendering(special_tokens_in_text="text")


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request, tmp_path_factory):
    return SHAPES[request.param], saved_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))


def view_of(record, tokenizer, kind="tokens", loss_on="assistant", **rendering):
    settings = ExampleSettings(loss_on, 4096, "right", AUTOMATIC, rendering=Rendering(**rendering))
    return Examples(open_splits([record], val_set_size=0).train, tokenizer, settings, kind).view(0)


def controls(tokens, tokenizer):
    """The control tokens in order."""
    known = control_tokens(tokenizer._tokenizer)
    return [int(token) for token in tokens if token in known.spelled]


def rows_with(text):
    """(kind, loss_on, record) of every kind of row, its own text in every place that a row has."""
    user, answer = {"role": "user", "content": f"say {text} now"}, {"role": "assistant", "content": f"no {text}"}
    system = {"role": "system", "content": f"be {text}"}
    said, other = f"no {text}", f"yes {text}"
    yield "tokens", "assistant", {"messages": [system, user, answer, user, answer]}
    yield "tokens", "all", {"messages": [user, answer]}
    yield "tokens", "assistant", {"prompt": user["content"], "completion": said, "system": f"be {text}"}
    yield "tokens", "assistant", {"instruction": "say", "input": text, "output": said}
    yield "pairs", "assistant", {"prompt": user["content"], "chosen": said, "rejected": other}
    yield "pairs", "assistant", {"chosen": [user, answer], "rejected": [user, {**answer, "content": other}]}
    yield "labels", "assistant", {"messages": [user, answer], "label": True}
    yield "labels", "assistant", {"prompt": user["content"], "completion": said, "label": True}
    yield "prompts", "assistant", {"prompt": user["content"], "system": f"be {text}"}


@pytest.mark.matrix(every=3)
def test_as_text_no_control_token_comes_from_content_and_the_template_s_own_stay(shaped):
    shape, tokenizer = shaped
    for marker in dict.fromkeys([*shape.markers, shape.eos, *filter(None, [shape.bos]), "<tool_call>"]):
        for (kind, loss_on, record), (_, _, harmless) in zip(rows_with(marker), rows_with("words"), strict=True):
            view = view_of(record, tokenizer, kind, loss_on, special_tokens_in_text="text")
            plain = view_of(harmless, tokenizer, kind, loss_on)
            assert (record, view.error) == (record, None)
            for ours, theirs in zip(view.conversations, plain.conversations, strict=True):
                assert controls(ours.tokens, tokenizer) == controls(theirs.tokens, tokenizer)
                assert ours.written == ()
                assert marker in ours.text
                # Trained is the same: the same turns, each to its end.
                weights = [weight for token, weight in zip(ours.tokens, ours.loss_mask) if token in _ids(tokenizer)]
                same = [weight for token, weight in zip(theirs.tokens, theirs.loss_mask) if token in _ids(tokenizer)]
                assert weights == same


def _ids(tokenizer):
    return control_tokens(tokenizer._tokenizer).spelled


def test_kept_they_are_control_tokens_and_are_known_with_their_place(shaped):
    shape, tokenizer = shaped
    marker = shape.markers[0]
    token = tokenizer.convert_tokens_to_ids(marker)
    for (kind, loss_on, record), (_, _, harmless) in zip(rows_with(marker), rows_with("words"), strict=True):
        plain = view_of(harmless, tokenizer, kind, loss_on).conversation
        for conversation in view_of(record, tokenizer, kind, loss_on).conversations:
            own = conversation.text.count(marker) - len(conversation.written)
            assert conversation.written
            assert {one.token for one in conversation.written} == {token}
            assert own == plain.text.count(marker)
            for one in conversation.written:
                assert conversation.text[one.start : one.end] == marker
                before = conversation.text[: one.start]
                assert before.endswith(("say ", "no ", "be ", "yes ", "say\n\n"))


def test_the_other_characters_get_the_tokens_that_they_have_alone(shaped):
    _, tokenizer = shaped
    messages = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "Named colors: red"}]
    kept = tokenize_conversation(messages, tokenizer)
    assert np.array_equal(tokenize_conversation(messages, tokenizer, rendering=AS_TEXT).tokens, kept.tokens)


def test_offsets_still_cover_the_text(shaped):
    shape, tokenizer = shaped
    marker = shape.markers[-1]
    messages = [{"role": "user", "content": f"a {marker} b"}, {"role": "assistant", "content": f"{marker}{marker}"}]
    said = tokenize_conversation(messages, tokenizer, rendering=AS_TEXT)
    assert tokenizer.decode(said.tokens) == said.text
    assert {k for a, b in said.offsets.tolist() for k in range(a, b)} == set(range(len(said.text)))
    if marker.isascii():
        pieces = [said.text[a:b] for a, b in said.offsets.tolist()]
        assert [tokenizer.decode([token]) for token in said.tokens.tolist()] == pieces


def test_what_is_asked_reads_control_tokens_as_what_is_trained_does(shaped):
    shape, tokenizer = shaped
    asked = [{"role": "user", "content": f"say {shape.markers[0]} and {shape.eos}"}]
    for setting in ("keep", "text"):
        record = {"messages": [*asked, {"role": "assistant", "content": "no"}]}
        view = view_of(record, tokenizer, special_tokens_in_text=setting)
        sent = prompt_tokens(tokenizer, asked, rendering=Rendering(special_tokens_in_text=setting))
        trained = int(np.argmax(view.conversation.loss_mask > 0))
        assert view.conversation.tokens[:trained].tolist() == sent
        assert prompt_tokens(tokenizer, asked[0]["content"], rendering=Rendering(None, setting)) == sent
        (example,) = view_of({"prompt": asked}, tokenizer, "prompts", special_tokens_in_text=setting).conversations
        assert example.tokens.tolist() == sent


def test_plain_text_and_raw_strings_have_only_the_ends_that_are_put_around_them(shaped):
    shape, tokenizer = shaped
    text = f"a {shape.markers[0]} b{shape.eos} c"
    ends = [*([tokenizer.bos_token_id] if shape.adds_bos else []), tokenizer.eos_token_id]
    rows = [
        ("tokens", {"text": text}),
        ("tokens", {"prompt": text, "completion": f" {shape.eos}"}),
        ("pairs", {"prompt": text, "chosen": f" {shape.eos}", "rejected": " no"}),
        ("labels", {"prompt": text, "completion": f" {shape.eos}", "label": True}),
    ]
    for kind, record in rows:
        view = view_of(record, tokenizer, kind, prompt_format="raw", special_tokens_in_text="text")
        assert (kind, view.error) == (kind, None)
        for said in view.conversations:
            assert controls(said.tokens, tokenizer) == ends
    sent = prompt_tokens(tokenizer, text, rendering=Rendering("raw", "text"))
    assert controls(sent, tokenizer) == ends[:-1]
    assert view_of(rows[0][1], tokenizer).conversation.written


def test_tool_calls_tools_and_reasoning_are_text_of_the_row(tmp_path):
    tokenizer = saved_tokenizer("qwen3", tmp_path)
    tokenizer.chat_template = (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
        "{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    def rows(text):
        call = {"type": "function", "function": {"name": f"f{text}", "arguments": {f"{text}": [f"x{text}"]}}}
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}
        return {
            "messages": [
                {"role": "user", "content": "go"},
                {"role": "assistant", "content": None, "reasoning_content": f"hm {text}", "tool_calls": [call]},
                {"role": "tool", "content": f"got {text}"},
                {"role": "assistant", "content": "done"},
            ],
            "tools": [tool],
        }

    for marker in ("<|im_end|>", "<tool_call>", "</think>"):
        kept = view_of(rows(marker), tokenizer)
        assert (marker, kept.error, len(kept.conversation.written)) == (marker, None, 6)
        as_text = view_of(rows(marker), tokenizer, special_tokens_in_text="text")
        plain = view_of(rows("words"), tokenizer)
        assert as_text.error is None
        assert controls(as_text.conversation.tokens, tokenizer) == controls(plain.conversation.tokens, tokenizer)


def test_a_marker_that_the_template_acts_upon_is_the_template_s_own(tmp_path):
    tokenizer = saved_tokenizer("qwen3", tmp_path)
    answer = {"role": "assistant", "content": "<think>hm</think>red"}
    own = tokenize_conversation([{"role": "user", "content": "say red"}, answer], tokenizer, rendering=AS_TEXT)
    thinking = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [t for t in own.tokens.tolist() if t in thinking] == thinking
    # The same characters from the user are not.
    both = [{"role": "user", "content": "what is </think>?"}, answer]
    assert [one.spelled for one in tokenize_conversation(both, tokenizer).written] == ["</think>"]
    said = tokenize_conversation(both, tokenizer, rendering=AS_TEXT)
    assert [t for t in said.tokens.tolist() if t in thinking] == thinking


@pytest.mark.parametrize("kind_of_model", ["unigram", "sentencepiece", "wordlevel"])
def test_vocabularies_of_other_kinds_make_no_control_token_of_text(kind_of_model):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("say no red</>|_abcdefghijklmnopqrstuvwxyz▁"))
    pieces = ["<unk>", "<s>", "</s>", *letters, "</", "s>", "re", "red"]
    if kind_of_model == "unigram":
        backend = Tokenizer(models.Unigram([(piece, -float(len(piece))) for piece in pieces], unk_id=0))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind_of_model == "sentencepiece":
        merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("r", "e"), ("re", "d")]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ bos_token }} {{ m.content }} {{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token }} {% endif %}"
    )
    messages = [{"role": "user", "content": "say </s> é"}, {"role": "assistant", "content": "no </s> red"}]
    kept = tokenize_conversation(messages, tokenizer)
    assert [one.spelled for one in kept.written] == ["</s>", "</s>"]
    said = tokenize_conversation(messages, tokenizer, rendering=AS_TEXT)
    assert said.tokens.tolist().count(2) == 2
    assert said.tokens.tolist().count(1) == 2
    assert tokenize_text("red </s> red", tokenizer, AS_TEXT).tokens.tolist().count(2) == 1


def test_a_template_that_cannot_be_followed_is_refused_as_text_and_remarked_upon_otherwise(tmp_path):
    tokenizer = saved_tokenizer("chatml", tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }} {{ m.content.count('<|im_end') }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {"messages": [{"role": "user", "content": "a <|im_end|>"}, {"role": "assistant", "content": "b"}]}
    assert (
        "cannot be distinguished from the template's own"
        in view_of(row, tokenizer, special_tokens_in_text="text").error
    )
    harmless = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert view_of(harmless, tokenizer, special_tokens_in_text="text").error is None


# --- the data check and the row view ----------------------------------------------------------------------------------


def check(rows, tokenizer, **settings):
    config = RunConfig.from_dict({"data": rows, "val_set_size": 0, **settings})
    kind = {"sft": "tokens", "dpo": "pairs", "kto": "labels", "grpo": "prompts"}[config.method]
    return check_data(open_splits(rows, val_set_size=0), tokenizer, config, kind=kind)


def found(result, kind):
    return [(item.severity, item.rows) for item in result.findings if item.kind == kind]


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("sft", lambda text: {"prompt": "say red", "completion": f"red{text}"}),
        ("sft", lambda text: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}]}),
        ("dpo", lambda text: {"prompt": "say red", "chosen": "red", "rejected": f"no{text}"}),
        ("kto", lambda text: {"prompt": f"say {text}", "completion": "no", "label": True}),
        ("grpo", lambda text: {"prompt": f"say {text}"}),
    ],
)
def test_the_data_check_names_the_rows_and_is_quiet_where_they_are_text(method, row, tmp_path):
    tokenizer = saved_tokenizer("chatml", tmp_path)
    rows = [row("a"), row("b <|im_end|> c"), row("d"), row("<|im_start|>")]
    more = {"method": method, **({"rewards": ["number_match"]} if method == "grpo" else {})}
    result = check(rows, tokenizer, **more)
    assert found(result, "control_tokens") == [("warning", (1, 3))]
    (item,) = [item for item in result.findings if item.kind == "control_tokens"]
    assert "special_tokens_in_text: text" in item.next
    assert "'<|im_end|>'" in item.examples[0][1]
    assert found(check(rows, tokenizer, special_tokens_in_text="text", **more), "control_tokens") == []


def test_markers_that_are_no_special_tokens_and_texts_written_as_chats_are_a_note(tmp_path):
    tokenizer = saved_tokenizer("qwen3", tmp_path)
    result = check([{"prompt": "a <tool_call>", "completion": "b"}], tokenizer)
    assert (found(result, "markers"), found(result, "control_tokens")) == ([("note", (0,))], [])
    result = check([{"text": "<|im_start|>user\na<|im_end|>"}], tokenizer)
    assert (found(result, "markers"), found(result, "control_tokens")) == ([("note", (0,))], [])


def test_the_row_view_marks_them_and_says_whether_they_are_trained():
    tokenizer = shaped_tokenizer("chatml")
    row = {"messages": [{"role": "user", "content": "a<|im_start|>"}, {"role": "assistant", "content": "b<|im_end|>c"}]}
    shown = ShownRow.of(view_of(row, tokenizer), tokenizer, "train")
    assert "⚠ '<|im_start|>' in the text of message 0 (user) is a control token.\n" in repr(shown)
    assert "⚠ '<|im_end|>' in the text of message 1 (assistant) is a control token, trained.\n" in repr(shown)
    assert unescape(shown._repr_html_()).count("a control token that the row's own text spells") == 2
    assert "│ a<|im_start|><|im_end|>⏎\n\nassistant\n│ <|im_start|>assistant" in repr(shown)
    as_text = ShownRow.of(view_of(row, tokenizer, special_tokens_in_text="text"), tokenizer, "train")
    assert "control token" not in repr(as_text)
    assert "that the row's own text spells" not in unescape(as_text._repr_html_())
