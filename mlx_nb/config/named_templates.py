"""Named chat templates for base models that have none: `chat_template: chatml`. A new template is an entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedTemplate:
    """A Jinja template, the control tokens it writes, and the token that ends a turn ("" = the tokenizer's own)."""

    source: str
    tokens: tuple[str, ...]
    end: str = ""


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token or '' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Neither has a system role: its text is put before the first message.
_SYSTEM = "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
_FIRST = "(system if loop.index0 == (1 if system else 0) else '')"
_GEMMA = (
    f"{{{{ bos_token or '' }}}}{_SYSTEM}{{% for m in messages %}}{{% if m.role != 'system' %}}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    f"{_FIRST} + m.content + '<end_of_turn>\n' }}}}{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_MISTRAL = (
    f"{{{{ bos_token or '' }}}}{_SYSTEM}{{% for m in messages %}}{{% if m.role == 'user' %}}"
    f"{{{{ '[INST] ' + {_FIRST} + m.content + ' [/INST]' }}}}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
NAMED_TEMPLATES = {
    "chatml": NamedTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama3": NamedTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "gemma": NamedTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": NamedTemplate(_MISTRAL, ()),
}
