"""What a chat template supports, found by rendering small conversations with it and inspecting the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_nb.data.masks.conversation import tokenize_conversation
from mlx_nb.data.masks.render import ChatTemplate
from mlx_nb.data.masks.tagging import REASONING_FIELDS
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.masks.tool_messages import shown_conversation
from mlx_nb.errors import MaskRefused

# Words that no template writes or looks for.
_SYSTEM, _QUESTION, _REPLY, _THOUGHT = "quillon", "marvet", "tressic", "oblenar"
_TOOL, _CITY, _RESULT = "dorvane", "lisbrook", "pelvorn"
_USER = {"role": "user", "content": _QUESTION}
_ASSISTANT = {"role": "assistant", "content": _REPLY}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "a tool",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}},
        },
    }
]
_CALL = {"type": "function", "id": "call00001", "function": {"name": _TOOL, "arguments": {"city": _CITY}}}
_THINKING_SWITCHES = ("enable_thinking", "thinking")

WRITTEN, LEFT_OUT, REFUSED = "written", "left out", "refused"


@dataclass(frozen=True)
class TemplateCheck:
    """What the chat template and tokenizer do, each fact found by rendering.

    end_of_turn         the tokens trained after a reply's text, as text; None if no mask was possible
    ends_generation     whether generation stops at one of them
    writes_bos          the rendered text starts with the tokenizer's beginning-of-sequence token
    tokenizer_adds_bos  the tokenizer itself adds one before a text
    system, tools, tool_calls, tool_results
                        "written" by the template, "left out" of the text, or "refused" with an error
    reasoning           the message field whose reasoning is written in the last reply; None without one
    reasoning_kept      it is also written in replies before the last user message
    thinking_switch     the template argument that switches thinking in the generation prompt; None without one
    problem             why no mask was possible for the simplest conversation; empty if there is one
    """

    end_of_turn: tuple[str, ...] | None
    ends_generation: bool
    writes_bos: bool
    tokenizer_adds_bos: bool
    system: str
    tools: str
    tool_calls: str
    tool_results: str
    reasoning: str | None
    reasoning_kept: bool
    thinking_switch: str | None
    problem: str = ""


def probe_template(tokenizer: Tokenizer) -> TemplateCheck | None:
    """Find out what the tokenizer's chat template supports; None without a template."""
    bare = _bare(tokenizer)
    if getattr(bare, "chat_template", None) is None:
        return None
    rendered = _render(bare, [_USER, _ASSISTANT]) or ""
    end_of_turn, ends_generation, problem = _end_of_turn(tokenizer)
    first = bare("a", verbose=False)["input_ids"][:1]
    reasoning, kept = _reasoning(bare)
    calling: list[Mapping[str, Any]] = [_USER, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
    answered = [*calling, {"role": "tool", "content": _RESULT, "tool_call_id": _CALL["id"], "name": _TOOL}]
    return TemplateCheck(
        end_of_turn,
        ends_generation,
        writes_bos=bool(bare.bos_token) and rendered.startswith(bare.bos_token),
        tokenizer_adds_bos=bool(first) and first[0] == bare.bos_token_id,
        system=_outcome_of(bare, _SYSTEM, [{"role": "system", "content": _SYSTEM}, _USER, _ASSISTANT]),
        tools=_outcome_of(bare, _TOOL, [_USER, _ASSISTANT], tools=_TOOLS),
        tool_calls=_outcome_of(bare, _CITY, calling, tools=_TOOLS),
        tool_results=_outcome_of(bare, _RESULT, [*answered, _ASSISTANT], tools=_TOOLS),
        reasoning=reasoning,
        reasoning_kept=kept,
        thinking_switch=_thinking_switch(bare),
        problem=problem,
    )


def _bare(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper; the inner `_tokenizer` has no chat template."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def _render(
    bare: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    prompt: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> str | None:
    """The rendered text, or None if the template refuses."""
    try:
        result: str | None = bare.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=prompt, tokenize=False, **(arguments or {})
        )
        return result
    except Exception:  # a template is a program and may raise anything
        return None


def _outcome_of(bare: Any, word: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
    """What rendering does with a `word` that occurs only in the part under test: "written", "left out" or "refused"."""
    shown = shown_conversation(messages, tools, bare)
    rendered = _render(bare, shown.messages, tools=shown.tools)
    if rendered is None:
        return REFUSED
    return WRITTEN if word in rendered else LEFT_OUT


def _end_of_turn(tokenizer: Tokenizer) -> tuple[tuple[str, ...] | None, bool, str]:
    try:
        conversation = tokenize_conversation([_USER, _ASSISTANT], tokenizer)
    except MaskRefused as error:
        return None, False, str(error)
    after = conversation.text.rindex(_REPLY) + len(_REPLY)
    trained = np.flatnonzero((conversation.offsets[:, 0] >= after) & (conversation.loss_mask > 0))
    texts = tuple(conversation.text[a:b] for a, b in conversation.offsets[trained])
    stops = ChatTemplate(tokenizer, None).eos_ids
    return texts, bool(stops & set(conversation.tokens[trained].tolist())), ""


def _reasoning(bare: Any) -> tuple[str | None, bool]:
    for field in REASONING_FIELDS:
        thinking = {**_ASSISTANT, field: _THOUGHT}
        if _THOUGHT in (_render(bare, [_USER, thinking]) or ""):
            return field, _THOUGHT in (_render(bare, [_USER, thinking, _USER, _ASSISTANT]) or "")
    return None, False


def _thinking_switch(bare: Any) -> str | None:
    for name in _THINKING_SWITCHES:
        on, off = (_render(bare, [_USER], prompt=True, arguments={name: value}) for value in (True, False))
        if on != off:
            return name
    return None
