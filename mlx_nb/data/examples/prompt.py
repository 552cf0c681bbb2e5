"""Prompts as tokens: the input before an answer, in rollouts and in generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_nb.data.examples.imitation import TokenizedExample, kept_part
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.masks.conversation import Span, TokenizedConversation
from mlx_nb.data.masks.prompt_format import DEFAULT_RENDERING, Rendering, has_chat_template
from mlx_nb.data.masks.render import ChatTemplate, Encoded, encode_raw, unwrapped
from mlx_nb.data.masks.template_facts import RenderFailed
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.masks.tool_messages import ShownConversation, shown_conversation
from mlx_nb.data.rows.columns import AUTOMATIC, Messages, read_messages, read_tools
from mlx_nb.data.rows.content import RowContent
from mlx_nb.data.rows.imitation import refuse_context
from mlx_nb.data.rows.prompt import PromptRow
from mlx_nb.data.rows.questions import question_in
from mlx_nb.errors import DataError


@dataclass(frozen=True, eq=False)
class PromptExample:
    """A prompt, ready to be answered.

    prompt_tokens   (T,) int32, ending with the template's generation prompt
    prompt          as in the row: text, or messages
    answer          the correct answer, if the row has one
    columns         all other columns of the row, by name
    row             number of the row in its split, from 0
    dropped_tokens  tokens removed from the start by truncation
    """

    prompt_tokens: np.ndarray
    prompt: str | Messages
    answer: Any
    columns: dict[str, Any]
    row: int
    dropped_tokens: int = 0

    @property
    def sequences(self) -> tuple[TokenizedExample, ...]:
        """The sequences that the model reads for this example; none of it is trained."""
        untrained = np.zeros(len(self.prompt_tokens), np.float32)
        return (TokenizedExample(self.prompt_tokens, untrained, self.row, self.dropped_tokens),)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_tokens)


def prompt_tokens(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    rendering: Rendering = DEFAULT_RENDERING,
    roles: Mapping[str, str] = AUTOMATIC.roles,
) -> list[int]:
    """The tokens of a prompt, ending with the template's generation prompt.

    Messages that end with the assistant's get no generation prompt: that message is continued. A text is a user
    message; with raw strings it is continued instead, after a beginning-of-sequence token if the tokenizer adds one.
    Messages, tools and `roles` are read like those of rows. Raises DataError for invalid messages, and if the template
    cannot render the prompt.
    """
    if not isinstance(prompt, str):
        prompt = read_messages(prompt, "prompt", roles)
        tools = read_tools({"tools": tools}, AUTOMATIC)
    prompt_text = _prompt_text(tokenizer, prompt, tools, rendering)
    if not getattr(unwrapped(tokenizer), "is_fast", False) and not rendering.as_text:
        return list(tokenizer.encode(prompt_text.text, add_special_tokens=prompt_text.template is None))
    result: list[int] = prompt_text.encode(tokenizer, rendering).tokens.tolist()
    return result


def tokenize_prompt(
    content: PromptRow, tokenizer: Tokenizer, rendering: Rendering = DEFAULT_RENDERING
) -> TokenizedConversation:
    """`prompt_tokens` of a row with the characters they cover; nothing is trained.

    Raises DataError if the template cannot render the prompt, MaskRefused for a tokenizer without offsets.
    """
    if content.from_texts and not isinstance(content.prompt, str) and rendering.is_raw(tokenizer):
        refuse_context(content.prompt, content.tools)
    prompt_text = _prompt_text(tokenizer, content.prompt, content.tools, rendering)
    text, encoded = prompt_text.text, prompt_text.encode(tokenizer, rendering)
    if len(encoded.tokens) == 0:
        raise DataError("the prompt has no tokens. Drop the row.")
    untrained = np.zeros(len(encoded.tokens), np.float32)
    span = Span(0, len(text), "prompt", 0, 0.0)
    problems: tuple[str, ...] = encoded.problems
    notes: tuple[str, ...] = ()
    if prompt_text.shown:
        problems, notes = (
            (*prompt_text.shown.problems, *prompt_text.shown.notes, *encoded.problems),
            prompt_text.shown.notes,
        )
    return TokenizedConversation(
        encoded.tokens, untrained, text, encoded.offsets, (span,), problems, encoded.written, notes
    )


def prompt_example(
    content: PromptRow, conversation: TokenizedConversation, row: int, settings: ExampleSettings
) -> PromptExample:
    """The example of a row. Raises DataError for a prompt over `max_seq_length`, unless `truncate` keeps its end."""
    length = len(conversation.tokens)
    if length > settings.max_seq_length and settings.truncate == "right":
        raise DataError(
            f"the prompt has {length} tokens, over max_seq_length={settings.max_seq_length}, and a question without "
            "its end cannot be answered. Raise max_seq_length, or set truncate to left or drop."
        )
    kept = kept_part(length, settings)
    return PromptExample(
        conversation.tokens[kept],
        content.as_given,
        content.answer,
        content.columns,
        row,
        length - (kept.stop - kept.start),
    )


def question_of(
    content: RowContent, record: Mapping[str, Any], row: int, tokenizer: Tokenizer, settings: ExampleSettings
) -> PromptExample:
    """The question in a row of any kind, tokenized, for the model to answer: see `question_in`.

    Its columns are those of the row, with `reference` (the reference answer) and `row` (all columns as a dict) unless
    the row has columns of these names. Raises DataError for a row without a question, or whose prompt is too long.
    """
    question = question_in(content, record)
    if question.from_texts and not isinstance(question.prompt, str) and settings.rendering.is_raw(tokenizer):
        refuse_context(question.prompt, question.tools)
        text = question.prompt[-1]["content"]
        question = dataclasses.replace(question, prompt=text, as_given=text)
    example = prompt_example(question, tokenize_prompt(question, tokenizer, settings.rendering), row, settings)
    settings.limits.require(example.prompt_tokens, more=1)
    further = {"reference": question.answer, "row": dict(record)}
    return dataclasses.replace(example, columns={**further, **example.columns})


@dataclass(frozen=True)
class _PromptText:
    """The text of a prompt, with its template and messages; raw text has neither."""

    text: str
    template: ChatTemplate | None = None
    shown: ShownConversation | None = None

    def encode(self, tokenizer: Tokenizer, rendering: Rendering) -> Encoded:
        if self.template is None or self.shown is None:
            return encode_raw(self.text, tokenizer, rendering)
        return self.template.encode(self.shown.messages, self.text, True, rendering)


def _prompt_text(
    tokenizer: Tokenizer, prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, rendering: Rendering
) -> _PromptText:
    if isinstance(prompt, str):
        if rendering.is_raw(tokenizer):
            return _PromptText(prompt)
        prompt = [{"role": "user", "content": prompt}]
    elif not has_chat_template(tokenizer):
        raise DataError("the tokenizer has no chat template for messages. Set `chat_template:` to one, or give a text.")
    shown = shown_conversation(prompt, tools, tokenizer)
    template = ChatTemplate(tokenizer, shown.tools)
    try:
        return _PromptText(template.render_prompt(shown.messages), template, shown)
    except RenderFailed as error:
        raise DataError(f"the chat template does not render this prompt: {error}") from error
