"""Rows that could break markup, and the pages that show them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_nb.data.masks.conversation import Span, TokenizedConversation

WORDS = "What is the capital of France? Arr, the capital be Paris, me hearty. You are a helpful assistant.\n"

MESSAGES = [
    ("system", "You are a helpful assistant."),
    ("user", "What is the capital of France?"),
    ("assistant", "Arr, the capital be Paris, me hearty."),
]

NASTY = (
    '<script>alert(1)</script><img src=x onerror="alert(2)"> \' & &lt; </span></div> '
    "\x1b[31mred\x1b]0;title\x07 "
    "\x9b2J \u202egnirts\u202c \u200b \ufeff \u00ad \u2066 \u00a0 \u2028 \x00 \r\n \U000e0041 👩‍👩‍👧 ❤️ שלום "
    "Z" + "\u0301" * 40
)

TAGS = {"div", "span", "bdi", "b", "br", "sup", "details", "summary"}
ATTRIBUTES = {"class", "dir", "style", "title", "open"}


class PlainTokenizer:
    """A byte-level BPE trained here, with the few methods of a Hugging Face tokenizer that the views use."""

    all_special_ids = (0, 1, 2)
    added_tokens_decoder: dict = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.bpe = Tokenizer(models.BPE())
        self.bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.bpe.train_from_iterator([WORDS] * 20, trainer)

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) -> str:
        return self.bpe.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.bpe.id_to_token(token_id)


TOKENIZER = PlainTokenizer()


def conversation(messages=MESSAGES, *, weight: float = 1.0, problems=()) -> TokenizedConversation:
    """ChatML with the assistant's text and its end token trained."""
    text, spans = "", []
    for index, (role, content) in enumerate(messages):
        text += f"<|im_start|>{role}\n"
        start = len(text)
        text += content + "<|im_end|>"
        trained = weight if role == "assistant" else 0.0
        spans.append(Span(start, len(text), role, index, trained))
        text += "\n"
    encoded = TOKENIZER.bpe.encode(text)
    offsets = np.array(encoded.offsets, dtype=np.int32).reshape(-1, 2)
    loss_mask = np.zeros(len(encoded.ids), dtype=np.float32)
    for span in spans:
        loss_mask[(offsets[:, 0] >= span.start) & (offsets[:, 1] <= span.end)] = span.weight
    return TokenizedConversation(
        np.array(encoded.ids, dtype=np.int32), loss_mask, text, offsets, tuple(spans), tuple(problems)
    )


def long_conversation(length: int) -> TokenizedConversation:
    row = conversation([("user", WORDS), ("assistant", WORDS)] * (length // 40))
    assert len(row.tokens) >= length
    text = row.text[: row.offsets[length - 1][1]]
    spans = tuple(span for span in row.spans if span.start < len(text))
    return TokenizedConversation(row.tokens[:length], row.loss_mask[:length], text, row.offsets[:length], spans)


class Page(HTMLParser):
    """Elements as (tag, attributes, text). Raises if the markup is not balanced."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.stack: list[int] = []
        self.feed(html)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag != "br":
            self.stack.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self.stack.pop()][0] == tag

    def handle_data(self, data):
        for index in self.stack:
            self.elements[index][2].append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def titles(self) -> list[str]:
        return [attributes["title"] for _, attributes, _ in self.elements if attributes.get("title")]

    def tokens(self) -> list[tuple[str, str, str]]:
        """(title, style, text) of each element that shows tokens."""
        return [
            (attributes["title"], attributes.get("style", ""), "".join(text))
            for _, attributes, text in self.elements
            if re.match(r"tokens? \d", attributes.get("title") or "")
        ]
