"""Chat templates of many shapes, with the tokenizers that use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_nb.data.masks.conversation import (
    TokenizedConversation,
)

MARKERS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "<|end|>"]

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "user assistant system model tool hello world, it is 4! yes no\n\nNamed colors: blue green red",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}\n\n\n',
]

Messages = list[dict]


def after_thinking(messages: Messages, i: int) -> str:
    return messages[i]["content"].split("</think>")[-1]


@dataclass(frozen=True)
class Template:
    """A template, and the text that an assistant message becomes in it: `shown(messages, i)`."""

    source: str
    shown: Callable[[Messages, int], str]


def said(messages: Messages, i: int) -> str:
    return messages[i]["content"]


def is_last(messages: Messages, i: int) -> bool:
    return i == len(messages) - 1


TEMPLATES = {
    "chatml": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda ms, i: said(ms, i) + "<|im_end|>",
    ),
    "forgets earlier thinking": Template(
        "{% for m in messages %}{% set text = m.content %}"
        "{% if m.role == 'assistant' and not loop.last and '</think>' in text %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
        lambda ms, i: (said(ms, i) if is_last(ms, i) else after_thinking(ms, i)) + "<|im_end|>",
    ),
    "trims": Template(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content | trim + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        lambda ms, i: said(ms, i).strip() + "</s>",
    ),
    "eos only at the end": Template(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        lambda ms, i: said(ms, i) + ("</s>" if is_last(ms, i) else ""),
    ),
    "no end of turn": Template(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        said,
    ),
    "moves the system message": Template(
        "{% set ns = namespace(system='', last=-1) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content %}"
        "{% elif m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' }}"
        "{% if loop.index0 == ns.last %}{{ ns.system }}{% endif %}{{ m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        lambda ms, i: said(ms, i) + "</s>",
    ),
    "alternation only": Template(
        "{% set offset = 1 if messages[0].role == 'system' else 0 %}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == offset) and m.role != 'system' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        lambda ms, i: said(ms, i) + "<|end|>",
    ),
    "never writes a prompt": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
        lambda ms, i: said(ms, i) + "<|im_end|>",
    ),
    "with tools": Template(
        "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '<tool_call>' }}"
        "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}{{ '</tool_call>' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda ms, i: said(ms, i) + "<|im_end|>",
    ),
}


@cache
def byte_level_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def new_tokenizer(source: str | None, **special_tokens: str) -> PreTrainedTokenizerFast:
    special_tokens = special_tokens or {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level_bpe()), clean_up_tokenization_spaces=False, **special_tokens
    )
    tokenizer.add_tokens(MARKERS, special_tokens=True)
    tokenizer.chat_template = source
    return tokenizer


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return new_tokenizer(TEMPLATES[name].source)


def chat(*texts: str, system: str | None = None) -> Messages:
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def trained_texts(row: TokenizedConversation, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The trained tokens of each trained span, decoded. Together they are all the trained tokens."""
    texts, seen = [], np.zeros(len(row.tokens), bool)
    for span in row.spans:
        if span.weight > 0:
            own = (row.offsets[:, 0] < span.end) & (row.offsets[:, 1] > span.start)
            own[0] = False
            assert (row.loss_mask[own] > 0).all()
            seen |= own
            texts.append(tokenizer.decode(row.tokens[own], skip_special_tokens=False))
    assert (row.loss_mask[~seen] == 0).all()
    return texts
