"""The Modelfile with which Ollama runs a GGUF file as it was trained: template in Go's language, and end tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.export.gguf_tokenizer import end_tokens, plain_tokenizer

_ROLES = ("system", "user", "assistant")
_MARK = "\u2237{}\u2237"
# In the second message, if the first one is the system's.
_SYSTEM_IN_GO = (
    '{{{{ if eq $i 1 }}}}{{{{ if eq (index $.Messages 0).Role "system" }}}}{{{{ (index $.Messages 0).Content }}}}{}'
    "{{{{ end }}}}{{{{ end }}}}"
)
_TRIES: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "a b"),),
    (("system", "c"), ("user", "d")),
    (("user", "e"), ("assistant", "f\ng"), ("user", "h")),
    (("system", "i"), ("user", "j"), ("assistant", "k"), ("user", "l"), ("assistant", "m"), ("user", "n")),
)


@dataclass(frozen=True)
class TurnTemplate:
    """A chat template as text around each turn: `begin`, then for each message `before` + content + `after`.

    `without_system` comes instead of a system message if there is none; `answer` begins the answer. With `joined` a
    system message is no turn: it is in the first question, and `joined` follows it there.
    """

    begin: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    without_system: str
    answer: str
    joined: str | None = None

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """A conversation up to the beginning of the answer."""
        start = self.begin + ("" if messages[0][0] == "system" else self.without_system)
        if messages[0][0] == "system" and self.joined is not None:
            (_, system), (role, question), *others = messages
            messages = [(role, system + self.joined + question), *others]
        return start + "".join(self.before[role] + text + self.after[role] for role, text in messages) + self.answer

    def in_go(self) -> str:
        """The template in Go's language, with Ollama's variables."""
        turns = ""
        for number, role in enumerate(role for role in _ROLES if role in self.before):
            condition = f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}'
            system = _SYSTEM_IN_GO.format(_go(self.joined)) if role == "user" and self.joined is not None else ""
            turns += f"{condition}{_go(self.before[role])}{system}{{{{ .Content }}}}{_go(self.after[role])}"
        start = _go(self.begin)
        if self.without_system:
            start += f"{{{{ if not .System }}}}{_go(self.without_system)}{{{{ end }}}}"
        messages = ".Messages" if self.joined is None else "$i, $_ := .Messages"
        return f"{start}{{{{ range {messages} }}}}{turns}{{{{ end }}}}{{{{ end }}}}{_go(self.answer)}"


def _go(text: str) -> str:
    """A text as it is written in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def turn_template(tokenizer: Any) -> TurnTemplate | None:
    """The chat template of a tokenizer as a TurnTemplate; None if it cannot be expressed so.

    It is found from conversations with marked contents, and proved on others: both must give the same text.
    """
    try:
        template = _found(tokenizer)
        proved = template is not None and all(
            template.render(tried) == _rendered(tokenizer, tried) for tried in _tries(template)
        )
    except Exception:  # a template may refuse a conversation in any way
        return None
    return template if proved else None


def _tries(template: TurnTemplate) -> list[tuple[tuple[str, str], ...]]:
    system = "system" in template.before or template.joined is not None
    return [tried for tried in _TRIES if system or tried[0][0] != "system"]


def _rendered(tokenizer: Any, messages: Sequence[tuple[str, str]], *, answer: bool = True) -> str:
    fast = plain_tokenizer(tokenizer)
    listed = [{"role": role, "content": text} for role, text in messages]
    rendered = str(fast.apply_chat_template(listed, tokenize=False, add_generation_prompt=answer))
    begun = fast("a")["input_ids"]
    bos = fast.bos_token
    # Whoever tokenizes the text adds it, if the tokenizer does.
    return rendered.removeprefix(bos) if bos and begun and begun[0] == fast.bos_token_id else rendered


def _found(tokenizer: Any) -> TurnTemplate | None:
    one, two, three = (_MARK.format(number) for number in range(3))
    turns = (("user", one), ("assistant", two), ("user", three))
    text, unanswered = _rendered(tokenizer, turns), _rendered(tokenizer, turns, answer=False)
    head, _, rest = text.partition(one)
    between, _, rest = rest.partition(two)
    again, _, tail = rest.partition(three)
    if not text.startswith(unanswered):
        return None
    answer = text[len(unanswered) :]
    user_after = tail.removesuffix(answer)
    assistant_after = _rendered(tokenizer, turns[:2], answer=False).partition(two)[2]
    user_before = again.removeprefix(assistant_after)
    before = {"user": user_before, "assistant": between.removeprefix(user_after)}
    after = {"user": user_after, "assistant": assistant_after}
    begin, without_system = head.removesuffix(user_before), ""
    try:
        start, _, rest = _rendered(tokenizer, (("system", one), ("user", two))).partition(one)
    except Exception:  # this template has no system messages
        return TurnTemplate(begin, before, after, without_system, answer)
    middle, _, end = rest.partition(two)
    if start == begin + user_before and end == user_after + answer:
        return TurnTemplate(begin, before, after, without_system, answer, middle)
    if not start.startswith(begin):  # a default system message
        begin, without_system = "", begin
    before["system"], after["system"] = start.removeprefix(begin), middle.removesuffix(user_before)
    return TurnTemplate(begin, before, after, without_system, answer)


def modelfile(tokenizer: Any, source: str, adapter: str | None = None) -> str:
    """A Modelfile: the model `source`, or an adapter for it, with the template and end tokens of the training."""
    lines = [f"FROM {source}", *([f"ADAPTER {adapter}"] if adapter else [])]
    template = turn_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template.in_go()}"""')
    else:
        lines.append("# The chat template cannot be written in Ollama's language; Ollama looks for one like it itself.")
    fast = plain_tokenizer(tokenizer)
    lines += [
        f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}"
        for token in fast.convert_ids_to_tokens(end_tokens(tokenizer))
    ]
    return "\n".join(lines) + "\n"
