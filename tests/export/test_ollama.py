"""A Modelfile has the chat template and the end tokens of the training, in Ollama's language."""

from __future__ import annotations

import re

import jinja2
import pytest

from mlx_nb.config.named_templates import NAMED_TEMPLATES
from mlx_nb.export.ollama import modelfile, turn_template
from mlx_nb.model.loading import load_tokenizer

CONVERSATIONS = (
    [("user", "hi")],
    [("system", "Be {{kind}}."), ("user", "hi")],
    [("user", "a"), ("assistant", "b"), ("user", "c\n\nd"), ("assistant", "e"), ("user", "f")],
)


def with_template(tiny_folder, source):
    tokenizer = load_tokenizer(tiny_folder)
    tokenizer._tokenizer.chat_template = source
    return tokenizer


def in_jinja(template):
    """A template in Go's language, of the parts that are used here, in Jinja."""
    made, open_blocks = "", []
    for text, tag in re.findall(r"(.*?)(\{\{.*?\}\}|$)", template, re.S):
        made += "{% raw %}" + text + "{% endraw %}" if text else ""
        inner = tag[2:-2].strip()
        if inner in ("range .Messages", "range $i, $_ := .Messages"):
            made += "{% for m in messages %}"
            open_blocks.append("for")
        elif inner.startswith(("if eq .Role ", "else if eq .Role ")):
            made += "{% " + ("elif" if inner.startswith("else") else "if") + f" m.role == {inner.split()[-1]} %}}"
            if not inner.startswith("else"):
                open_blocks.append("if")
        elif inner == "if eq $i 1":
            made += "{% if loop.index0 == 1 %}"
            open_blocks.append("if")
        elif inner == 'if eq (index $.Messages 0).Role "system"':
            made += "{% if messages[0].role == 'system' %}"
            open_blocks.append("if")
        elif inner == "(index $.Messages 0).Content":
            made += "{{ messages[0].content }}"
        elif inner == "if not .System":
            made += "{% if not system %}"
            open_blocks.append("if")
        elif inner == ".Content":
            made += "{{ m.content }}"
        elif inner == "end":
            made += "{% end" + open_blocks.pop() + " %}"
        else:
            assert tag == "", tag
    return made


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_template_in_go_writes_what_the_trained_one_writes(name, tiny_folder):
    tokenizer = with_template(tiny_folder, NAMED_TEMPLATES[name].source)
    text = modelfile(tokenizer, "./bees.gguf")
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]
    environment = jinja2.Environment(keep_trailing_newline=True)
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        wanted = tokenizer._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        system = "".join(content for role, content in turns if role == "system")
        rendered = environment.from_string(in_jinja(template)).render(messages=messages, system=system)
        assert rendered == wanted


def test_a_default_system_message_comes_without_one_only(tiny_folder):
    source = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>Be nice.</s>{% endif %}"
        "{{ '<s>' if m['role'] == 'system' else m['role'] + ':' }}{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = turn_template(with_template(tiny_folder, source))
    assert template.without_system == "<s>Be nice.</s>"
    assert template.render([("user", "x")]) == "<s>Be nice.</s>user:x</s>assistant:"
    assert template.render([("system", "y"), ("user", "x")]) == "<s>y</s>user:x</s>assistant:"


def test_a_template_that_is_not_turn_by_turn_is_left_to_ollama_and_reported(tiny_folder):
    counting = "{% for m in messages %}{{ loop.index }}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    text = modelfile(with_template(tiny_folder, counting), "./bees.gguf", "./bees-lora.gguf")
    assert "TEMPLATE" not in text
    assert "cannot be written in Ollama's language" in text
    assert text.startswith("FROM ./bees.gguf\nADAPTER ./bees-lora.gguf\n")
    assert 'PARAMETER stop "<|end|>"' in text
