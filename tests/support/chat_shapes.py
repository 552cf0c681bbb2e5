"""Small chat templates of well-known shapes, each with a tokenizer that has its markers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe of use.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% set first = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first %}{{ first }}{% endif %}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% set before = '' %}{% set turns = messages %}"
    "{% if messages[0].role == 'system' %}{% set before = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST]{% if loop.first %}{{ before }}{% endif %}"
    "{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}"
    "{{ m.content }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
_DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
_QWEN3 = (
    "{% set at = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set at.user = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > at.user %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_GPT_OSS = (
    "<|start|>system<|message|>You answer.<|end|>"
    "{% for m in messages %}{% if m.role == 'system' %}<|start|>developer<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A template with the tokens that its tokenizer knows. `adds_bos`: the tokenizer puts a BOS before texts."""

    source: str
    markers: tuple[str, ...]
    eos: str
    bos: str | None = None
    adds_bos: bool = False
    plain_markers: tuple[str, ...] = ()


SHAPES = {
    "chatml": Shape(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": Shape(
        _LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<|begin_of_text|>",
        adds_bos=True,
    ),
    "gemma": Shape(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<bos>", adds_bos=True),
    "mistral": Shape(_MISTRAL, ("[INST]", "[/INST]"), "</s>", "<s>", adds_bos=True),
    "phi": Shape(_PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>"),
    "zephyr": Shape(_ZEPHYR, ("<|system|>", "<|user|>", "<|assistant|>"), "</s>", "<s>", adds_bos=True),
    "command-r": Shape(
        _COMMAND_R,
        ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        adds_bos=True,
    ),
    "deepseek": Shape(
        _DEEPSEEK, ("<｜User｜>", "<｜Assistant｜>"), "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", adds_bos=True
    ),
    "qwen3": Shape(
        _QWEN3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", plain_markers=("<think>", "</think>", "<tool_call>")
    ),
    "gpt-oss": Shape(
        _GPT_OSS, ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"), "<|return|>", "<|startoftext|>"
    ),
}
# How models since Llama 3 part words: a run of line breaks stays whole, whatever follows it.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEXTS = (
    "\n\n and \n\n again \n\n ",
    "the quick brown fox says arr to a small dog, it is 4! yes no\n\nNamed colors: blue green red system user",
)


@cache
def shaped_tokenizer(name: str) -> Any:
    """A fast tokenizer with the template and the tokens of this shape."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    shape = SHAPES[name]
    backend = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_WORDS), "isolated"), as_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    named = {"eos_token": shape.eos, **({"bos_token": shape.bos} if shape.bos else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.add_tokens(list(shape.markers), special_tokens=True)
    tokenizer.add_tokens(list(shape.plain_markers))
    if shape.adds_bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{shape.bos}:0 $A:0", special_tokens=[(shape.bos, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = shape.source
    return tokenizer


def saved_tokenizer(name: str, folder: Path) -> Any:
    """The same tokenizer from a folder, as `mlx_lm.load` returns it."""
    from mlx_lm.tokenizer_utils import load

    shaped_tokenizer(name).save_pretrained(folder)
    return load(folder)
