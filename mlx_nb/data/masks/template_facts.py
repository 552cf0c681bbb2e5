"""Facts about a chat template that hold for every conversation: strings it looks for, and how it opens a turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.config.templates import standard_jinja

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]
"""Messages and `add_generation_prompt` to text. Raises RenderFailed."""

# Keys whose values templates branch on or use for look-ups.
STRUCTURAL_KEYS = frozenset({"role", "type", "id", "tool_call_id", "name", "channel", "recipient"})
_LEXEME = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\s|.", re.DOTALL)
_USER, _OTHER = "\uf8f0", "\uf8f1"
_SEARCHING = frozenset(
    {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "replace", "find", "rfind"}
    | {"index", "count", "removeprefix", "removesuffix"}
)
_STRIPPING = frozenset({"strip", "lstrip", "rstrip"})


class RenderFailed(Exception):
    """The template itself refused these messages."""


@dataclass(frozen=True)
class TemplateFacts:
    """Facts about one template that hold for every conversation.

    constants     strings that it looks for inside texts, longest first
    header        how it opens the assistant's turn after a user's; None if it cannot be determined
    prompt_tail   everything it writes between a user's text and the start of the assistant's
    user_frame    everything it writes before a lone user text
    """

    constants: tuple[str, ...]
    header: str | None
    prompt_tail: str = ""
    user_frame: str = ""


def texts_in(value: Any, *, keys: bool) -> list[str]:
    """Every string in nested lists and mappings, in any order; with `keys` also the keys of mappings."""
    texts: list[str] = []
    waiting = [value]
    for item in waiting:  # the contents of an item are appended to the list
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
            if keys:
                waiting.extend(item)
    return texts


def lexemes(text: str) -> list[str]:
    """A template's own text in pieces that are never split: `<...>`, `[...]`, words, other single characters."""
    return _LEXEME.findall(text)


def shared_length(a: str, b: str) -> int:
    """The length of the longest common prefix of `a` and `b` that splits no lexeme of either."""
    length = 0
    for x, y in zip(_LEXEME.finditer(a), _LEXEME.finditer(b)):
        if x.group() != y.group():
            break
        length = x.end()
    return length


def study_template(source: str, render: Render) -> TemplateFacts:
    """Render one or two short messages to find out how a template opens the assistant's turn.

    The result depends on how it treats the generation prompt: on request, always, or never.
    """
    constants = _tested_constants(source)
    user, reply = {"role": "user", "content": _USER}, {"role": "assistant", "content": _OTHER}
    prompted, plain = _try(render, [user], True), _try(render, [user], False)
    if prompted is None or plain is None or prompted.count(_USER) != 1 or plain.count(_USER) != 1:
        return TemplateFacts(constants, None)
    user_frame, prompt_tail = prompted.split(_USER)
    header = prompt_tail[shared_length(prompt_tail, plain.split(_USER)[1]) :]
    if header.strip():
        return TemplateFacts(constants, header, prompt_tail, user_frame)
    before_reply = _between(_try(render, [user, reply], False))
    if before_reply is None:
        return TemplateFacts(constants, None)
    if before_reply.startswith(prompt_tail):
        # It writes the same with and without a generation prompt: what it adds before a reply is the header, if
        # anything.
        header = before_reply[len(prompt_tail) :]
        return TemplateFacts(constants, header if header.strip() else "", before_reply, user_frame)
    before_user = _between(_try(render, [user, {"role": "user", "content": _OTHER}], False))
    if before_user is None:
        return TemplateFacts(constants, None)
    # It always writes a prompt, a different one than before a given reply: their common part opens the turn.
    opened = before_reply[: shared_length(before_reply, prompt_tail)]
    header = opened[shared_length(opened, before_user) :]
    return TemplateFacts(constants, header if header.strip() else None, opened, user_frame)


def _try(render: Render, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
    try:
        return render(messages, add_generation_prompt)
    except RenderFailed:
        return None


def _between(rendered: str | None) -> str | None:
    match = re.search(f"{_USER}([^{_USER}]*){_OTHER}", rendered or "")
    return match[1] if match else None


def _tested_constants(source: str) -> tuple[str, ...]:
    """The strings that a template compares values with or looks for in them, longest first."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(standard_jinja(source))
    except jinja2.TemplateError:
        return ()
    named: dict[str, set[str]] = {}
    for assignment in tree.find_all(nodes.Assign):
        target, value = assignment.target, assignment.node
        if isinstance(target, nodes.Name) and isinstance(value, nodes.Const) and isinstance(value.value, str):
            named.setdefault(target.name, set()).add(value.value)

    def strings(node: nodes.Node) -> set[str]:
        result: set[str] = set()
        for part in [node, *node.find_all((nodes.Const, nodes.Name))]:
            if isinstance(part, nodes.Const) and isinstance(part.value, str):
                result.add(part.value)
            elif isinstance(part, nodes.Name):
                result |= named.get(part.name, set())
        return result

    found: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        for operand in compare.ops:
            if operand.op in ("in", "notin") and isinstance(compare.expr, (nodes.Const, nodes.Name)):
                found |= strings(compare.expr)
            elif operand.op in ("eq", "ne") and not (_is_structural(compare.expr) or _is_structural(operand.expr)):
                for side in (compare.expr, operand.expr):
                    found |= strings(side) if isinstance(side, nodes.Const) else set()
    for call in tree.find_all(nodes.Call):
        method = call.node.attr if isinstance(call.node, nodes.Getattr) else ""
        if method in _SEARCHING | _STRIPPING:
            arguments = set().union(*map(strings, call.args))
            found |= {c for string in arguments for c in string} if method in _STRIPPING else arguments
    for applied in tree.find_all(nodes.Filter):
        if applied.name in ("replace", "split", "trim"):
            found |= set().union(*map(strings, applied.args))
    return tuple(sorted((s for s in found if s.strip()), key=lambda s: (-len(s), s)))


def _is_structural(node: Any) -> bool:
    """Whether an expression reads a role, a type or the like, whose values are not text."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value in STRUCTURAL_KEYS
    name = node.attr if isinstance(node, nodes.Getattr) else node.name if isinstance(node, nodes.Name) else ""
    return name in STRUCTURAL_KEYS
