"""Renders conversations with their chat template and tokenizes texts: the same in training and in generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from mlx_nb.data.masks.control_tokens import Written, encode_as_text, from_content, written_out
from mlx_nb.data.masks.prompt_format import DEFAULT_RENDERING, Rendering, has_own_code
from mlx_nb.data.masks.tagging import Unproved
from mlx_nb.data.masks.template_facts import Message, RenderFailed, TemplateFacts, study_template
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import MaskRefused

_FACTS: dict[tuple[str, tuple[tuple[str, str], ...], bool], TemplateFacts] = {}
_GOES_ON = "\uf8f2"
# For templates that render only with tools.
SOME_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text as tokens.

    tokens    (T,) int32
    offsets   (T, 2) int32, the characters of the text that each token covers
    control   the control tokens that characters of the text spell, in order
    written   those of them that come from the text's author, not from the chat template
    problems  what the user should know about them
    """

    tokens: np.ndarray
    offsets: np.ndarray
    control: tuple[Written, ...]
    written: tuple[Written, ...] = ()
    problems: tuple[str, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer, always called with the same arguments, those of mlx-lm.

    Raises MaskRefused for a tokenizer without a template.
    """

    def __init__(self, tokenizer: Tokenizer, tools: Sequence[Any] | None) -> None:
        self.tokenizer = unwrapped(tokenizer)
        self.tools = list(tools) if tools else None
        # mlx-lm's wrapper adds arguments of its own (enable_thinking), and renders some models without a template.
        self._renderer = tokenizer if hasattr(tokenizer, "apply_chat_template") else self.tokenizer
        self._own_code = has_own_code(tokenizer)
        try:
            self.source: str = "" if self._own_code else self.tokenizer.get_chat_template(tools=self.tools)
        except ValueError as error:
            raise MaskRefused(
                "the tokenizer has no chat template for this row. Set `chat_template:` to one, "
                "or give the row as prompt and completion."
            ) from error
        # transformers answers `eos_token_ids` with its single eos token; mlx-lm's wrapper knows the model's whole set.
        known = () if tokenizer is self.tokenizer else getattr(tokenizer, "eos_token_ids", ())
        self.eos_ids = {i for i in (*known, self.tokenizer.eos_token_id) if i is not None}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of a conversation. Raises RenderFailed."""
        return self._render(messages, add_generation_prompt, self.tools)

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """Render the prompt for an answer: the conversation with a generation prompt.

        If the last message is the assistant's, the text ends with that message instead, which the answer continues.
        Raises RenderFailed.
        """
        return self._render_prompt(messages, self.tools)

    def _render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
        if not messages or messages[-1].get("role") != "assistant":
            return self._render(messages, True, tools)
        *before, last = messages
        text = last.get("content")
        if not isinstance(text, str) or last.get("tool_calls"):
            raise RenderFailed("the assistant's last message has tool calls, so it cannot be continued")
        # Compared with a message that continues: the end of the turn then follows the continuation.
        longer = self._render([*before, {**last, "content": text + _GOES_ON}], False, tools)
        start, found, rest = longer.partition(_GOES_ON)
        if not found or _GOES_ON in rest or not start.endswith(text):
            raise RenderFailed("the template changes the assistant's last message, so it cannot be continued")
        if not self._render(messages, False, tools).startswith(start):
            raise RenderFailed(
                "the template cuts white space at the end of the assistant's last message, or writes it "
                "differently from one with more text, so it cannot be continued"
            )
        return start

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None) -> str:
        given: dict[str, Any] = {} if self._own_code else {"chat_template": self.source}
        if tools:
            given["tools"] = list(tools)
        try:
            result: str = self._renderer.apply_chat_template(
                list(messages), add_generation_prompt=add_generation_prompt, tokenize=False, **given
            )
            return result
        except Exception as error:  # a template is a program and may raise anything
            raise RenderFailed(f"{type(error).__name__}: {error}".rstrip(".")) from error

    def encode(
        self, messages: Sequence[Message], text: str, asking: bool, rendering: Rendering = DEFAULT_RENDERING
    ) -> Encoded:
        """The tokens of `text`, which is `render_prompt(messages)` or, without `asking`, the whole conversation.

        Raises MaskRefused if control tokens are to be plain text and cannot be distinguished from the template's own.
        """
        fast = fast_tokenizer(self.tokenizer)
        tokens, offsets = encode_with_offsets(fast, text)
        found = written_out(tokens, offsets, text, fast)

        def render(given: Any) -> str:
            return self._render_prompt(given[0], given[1]) if asking else self._render(given[0], False, given[1])

        try:
            written = from_content(found, text, (messages, self.tools), render, lambda: self.facts().constants)
        except Unproved as error:
            if rendering.as_text:
                raise MaskRefused(
                    f"the control tokens in its texts cannot be distinguished from the template's own: {error}. "
                    "Remove them, or set `special_tokens_in_text: keep`."
                ) from error
            problem = f"control tokens are written in the messages, and become control tokens: {error}."
            return Encoded(tokens, offsets, found, problems=(problem,))
        if written and rendering.as_text:
            own = set(written)
            genuine = tuple(one for one in found if one not in own)
            return Encoded(*encode_as_text(text, genuine, fast), genuine)
        return Encoded(tokens, offsets, found, written)

    def facts(self) -> TemplateFacts:
        """What the template does in every conversation; studied once for each template."""
        special = tuple(sorted((name, str(token)) for name, token in self.tokenizer.special_tokens_map.items()))
        key = (self.source or str(self._renderer._chat_template), special, self.tools is not None)
        if key not in _FACTS:
            facts = study_template(self.source, lambda messages, prompt: self._render(messages, prompt, None))
            if facts.header is None and self.tools:
                with_tool = [SOME_TOOL]
                facts = study_template(self.source, lambda messages, prompt: self._render(messages, prompt, with_tool))
            _FACTS[key] = facts
        return _FACTS[key]

    def eos_ranges(self, encoded: Encoded) -> list[tuple[int, int]]:
        """The characters of each end-of-sequence token, in order."""
        is_eos = np.zeros(len(encoded.tokens), bool)
        for token in self.eos_ids:
            is_eos |= encoded.tokens == token
        return [(a, b) for a, b in encoded.offsets[is_eos].tolist()]


def encode_raw(text: str, tokenizer: Tokenizer, rendering: Rendering = DEFAULT_RENDERING) -> Encoded:
    """The tokens of a text without a template, after the tokenizer's usual leading tokens.

    Those are mostly one beginning-of-sequence token, and never two. Raises MaskRefused for a tokenizer without offsets.
    """
    fast = fast_tokenizer(tokenizer)
    tokens, offsets = encode_with_offsets(fast, text)
    written = written_out(tokens, offsets, text, fast)
    if written and rendering.as_text:
        tokens, offsets = encode_as_text(text, (), fast)
        written = ()
    first = np.array(leading_tokens(fast), np.int32)
    if len(first) and not np.array_equal(tokens[: len(first)], first):
        tokens = np.concatenate([first, tokens])
        offsets = np.concatenate([np.zeros((len(first), 2), np.int32), offsets])
    return Encoded(tokens, offsets, written, written)


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that a tokenizer puts before a text by default."""
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    alone = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    starts = (k for k in range(len(whole)) if whole[k : k + len(alone)] == alone)
    return whole[: next(starts, 0)]


def unwrapped(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    # A fast tokenizer of transformers has a `_tokenizer` of its own, which has no chat template.
    return inner if hasattr(inner, "apply_chat_template") else tokenizer


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper. Raises MaskRefused for one without offsets."""
    inner = unwrapped(tokenizer)
    if not getattr(inner, "is_fast", False):
        raise MaskRefused(
            f"{type(inner).__name__} does not say which characters a token covers. "
            "Load the model with a fast tokenizer (tokenizer.json)."
        )
    return inner


def encode_with_offsets(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
    """(T,) int32 tokens and (T, 2) int32 characters they cover, without added special tokens."""
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding or backend.encode_special_tokens != tokenizer.split_special_tokens:
        tokenizer(
            "", add_special_tokens=False, verbose=False
        )  # each call of transformers sets padding and truncation anew
    encoding = backend.encode(text, add_special_tokens=False)
    offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int32).reshape(-1, 2)
    return np.array(encoding.ids, np.int32), offsets
