"""Messages to tokens and loss mask, from a single render of the whole conversation."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_nb.data.masks.assistant_turns import Turn
from mlx_nb.data.masks.control_tokens import Written
from mlx_nb.data.masks.location import Located, locate_messages
from mlx_nb.data.masks.prompt_format import DEFAULT_RENDERING, Rendering
from mlx_nb.data.masks.render import ChatTemplate, encode_raw, fast_tokenizer, unwrapped
from mlx_nb.data.masks.tagging import REASONING_FIELDS, Unproved
from mlx_nb.data.masks.template_facts import Message, RenderFailed
from mlx_nb.data.masks.token_edges import Edges, TokenOffsets
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.masks.tool_messages import shown_conversation
from mlx_nb.errors import MaskRefused, did_you_mean

LOSS_ON = ("assistant", "final", "completion", "all")


@dataclass(frozen=True)
class Span:
    """Characters `[start, end)` of the rendered text that belong to one message.

    `weight` is the training weight of its tokens: 0 means seen but not trained.
    """

    start: int
    end: int
    role: str
    message: int
    weight: float


@dataclass(frozen=True, eq=False)
class TokenizedConversation:
    """A tokenized conversation, and what of it is trained.

    tokens     (T,) int32
    loss_mask  (T,) float32, the weight of each token as a target; `loss_mask[0] == 0`
    text       the rendered text, tokenized once without added special tokens
    offsets    (T, 2) int32, the characters of `text` that each token covers
    spans      the position of each message's text, in order; weight > 0 if trained
    problems   what the user should know about this mask; empty if nothing
    written    the control tokens that are written out in the row's own texts, in order
    notes      problems that are merely good to know: what was changed in tool calls and tools by rule
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    text: str
    offsets: np.ndarray
    spans: tuple[Span, ...]
    problems: tuple[str, ...] = ()
    written: tuple[Written, ...] = ()
    notes: tuple[str, ...] = ()


def tokenize_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Any] | None = None,
    loss_on: str = "assistant",
    rendering: Rendering = DEFAULT_RENDERING,
) -> TokenizedConversation:
    """Render a conversation once with the tokenizer's chat template, and find the tokens to train.

    messages   dicts with `role` and `content`; `train: false` or `weight: 0.3` set one message's weight and are
               not shown to the template
    tokenizer  a fast transformers tokenizer, or mlx-lm's wrapper around one
    tools      the `tools` argument of the template
    loss_on    "assistant": every assistant turn including its end-of-turn; "completion": the assistant's turns after
               the last user message, including tool calls; "final": the last message, which must be the
               assistant's; "all": every token except the first
    rendering  how control tokens in the texts are treated

    Raises MaskRefused, saying why and what to do, if the template cannot render the conversation or the mask cannot be
    proved.
    """
    if loss_on not in LOSS_ON:
        raise MaskRefused(f"loss_on={loss_on!r} is not one of {', '.join(LOSS_ON)}.{did_you_mean(loss_on, LOSS_ON)}")
    if not messages:
        raise MaskRefused("the conversation has no messages. Drop the row.")
    if loss_on == "final" and messages[-1].get("role") != "assistant":
        raise MaskRefused(
            f"nothing to train: loss_on='final' trains the last message, and it is from {messages[-1].get('role')!r}. "
            "Use loss_on='assistant', or drop the messages after the last answer."
        )
    fast_tokenizer(tokenizer)
    weights = _weights(messages, loss_on)
    shown = shown_conversation(messages, tools, tokenizer)
    plain = shown.messages
    template = ChatTemplate(tokenizer, shown.tools)
    try:
        text = template.render(plain, False)
    except RenderFailed as error:
        raise MaskRefused(
            f"the chat template does not render this conversation: {error}. Change the messages, or set "
            "`chat_template:` to a template that takes them."
        ) from error
    encoded = template.encode(plain, text, False, rendering)
    tokens, offsets = encoded.tokens, encoded.offsets
    if len(tokens) == 0:
        raise MaskRefused("the chat template renders this conversation to nothing. Drop the row.")
    problems = [*shown.problems, *shown.notes, *encoded.problems, *_token_problems(tokens, template.tokenizer)]
    try:
        located = locate_messages(
            plain,
            text,
            template.render,
            template.facts(),
            template.eos_ranges(encoded),
            lambda some, rendered: template.eos_ranges(template.encode(some, rendered, False, rendering)),
        )
    except Unproved as error:
        if loss_on == "all" and set(weights) == {1.0}:
            problems.append(f"the messages cannot be told apart in the text: {error}.")
            loss_mask = _all_but_first(tokens, template)
            return TokenizedConversation(
                tokens, loss_mask, text, offsets, (), tuple(problems), encoded.written, shown.notes
            )
        raise MaskRefused(
            f"no trustworthy loss mask with this chat template: {error}. Set `chat_template:` to another template, "
            "use loss_on='all', or give the row as prompt and completion with `prompt_format: raw`."
        ) from error
    spans = _spans(located, plain, weights)
    problems += _span_problems(located, plain, weights)
    edges = Edges(text, encoded, template.tokenizer)
    comparable = [turn for turn in located.turns if weights[turn.message] > 0 and turn.context_as_in_inference]
    problems += [
        f"message {turn.message} (assistant): {other}"
        for turn, other in zip(comparable, edges.other_tokens_before([turn.start for turn in comparable]))
        if other
    ]
    if loss_on == "all":
        loss_mask = _all_but_first(tokens, template)
        which, touching = edges.offsets.touching_each(_stretches(spans))
        np.multiply.at(loss_mask, touching, np.array([span.weight for span in spans], np.float32)[which])
    else:
        loss_mask, across = _train_spans(edges, spans)
        problems += across
    return TokenizedConversation(tokens, loss_mask, text, offsets, spans, tuple(problems), encoded.written, shown.notes)


def tokenize_prompt_completion(
    prompt: str,
    completion: str,
    tokenizer: Tokenizer,
    *,
    end_of_turn: bool = True,
    rendering: Rendering = DEFAULT_RENDERING,
) -> TokenizedConversation:
    """Tokenize prompt and completion as one raw text; train the tokens that touch the completion.

    A token across the boundary is trained, with a note in `problems`. With `end_of_turn` the end-of-sequence token is
    appended and trained. A beginning-of-sequence token comes first if the tokenizer adds one, never twice. Raises
    MaskRefused for a tokenizer without character offsets, and if there is nothing to train.
    """
    boundary = len(prompt)
    spans = (
        Span(0, boundary, "prompt", 0, 0.0),
        Span(boundary, boundary + len(completion), "completion", 1, 1.0),
    )
    return _tokenize_strings(prompt + completion, spans, tokenizer, end_of_turn, rendering)


def tokenize_text(text: str, tokenizer: Tokenizer, rendering: Rendering = DEFAULT_RENDERING) -> TokenizedConversation:
    """Tokenize a text and train all of it except position 0; an end-of-sequence token is appended and trained.

    Raises MaskRefused for a tokenizer without character offsets, and for an empty text.
    """
    return _tokenize_strings(text, (Span(0, len(text), "text", 0, 1.0),), tokenizer, True, rendering)


def _tokenize_strings(
    text: str, spans: tuple[Span, ...], tokenizer: Tokenizer, end: bool, rendering: Rendering
) -> TokenizedConversation:
    if not text:
        raise MaskRefused("the row is empty: there is nothing to train. Drop the row.")
    encoded = encode_raw(text, tokenizer, rendering)
    tokens, offsets, eos = encoded.tokens, encoded.offsets, unwrapped(tokenizer).eos_token_id
    problems = _token_problems(tokens, unwrapped(tokenizer))
    edges = Edges(text, encoded, unwrapped(tokenizer))
    loss_mask, across = _train_spans(edges, spans)
    for span in spans:
        if span.weight > 0:
            problems += [f"the {span.role}: {other}" for other in edges.other_tokens_before([span.start]) if other]
            problems += across
            if not text[span.start : span.end].strip():
                problems.append(f"the {span.role} is blank: only the end of the sequence is trained.")
    if end and eos is None:
        problems.append("the tokenizer has no end-of-sequence token: the model does not learn where to stop.")
    elif end and (len(tokens) == 0 or tokens[-1] != eos):
        tokens, loss_mask = np.append(tokens, np.int32(eos)), np.append(loss_mask, np.float32(1))
        offsets = np.append(offsets, np.full((1, 2), len(text), np.int32), axis=0)
    if not loss_mask[1:].any():
        raise MaskRefused("no token is trained: the completion is empty and no end of sequence is added. Drop the row.")
    loss_mask[0] = 0
    return TokenizedConversation(tokens, loss_mask, text, offsets, spans, tuple(problems), encoded.written)


# --- weights, spans, mask --------------------------------------------------------------------------------------------


def _weights(messages: Sequence[Message], loss_on: str) -> list[float]:
    """The training weight of each message. Raises MaskRefused for one that is not a number of at least 0."""
    weights = []
    users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    first = {"final": len(messages) - 1, "completion": max(users, default=-1)}.get(loss_on, 0)
    for i, message in enumerate(messages):
        weight = 1.0 if message.get("weight") is None else message["weight"]
        if isinstance(weight, str) or not math.isfinite(weight) or weight < 0:
            raise MaskRefused(f"message {i} has weight={weight!r}. A weight is a number of at least 0.")
        chosen = loss_on == "all" or (message.get("role") == "assistant" and i >= first)
        weights.append(float(weight) if chosen and message.get("train") is not False else 0.0)
    return weights


def _spans(located: Located, messages: Sequence[Message], weights: Sequence[float]) -> tuple[Span, ...]:
    ranges = [(turn.start, turn.end, turn.message) for turn in located.turns]
    ranges += [(start, end, message) for message, start, end in located.regions]
    return tuple(Span(a, b, str(messages[i].get("role")), i, weights[i]) for a, b, i in sorted(ranges) if a < b)


def _train_spans(edges: Edges, spans: Sequence[Span]) -> tuple[np.ndarray, list[str]]:
    """The loss mask of the trained spans, and a sentence for each token that also covers characters outside.

    The mask is (T,) float32: the weight of the span that a token touches (the larger of two); 0 at position 0.
    """
    trained = [span for span in spans if span.weight > 0]
    stretches = _stretches(trained)
    which, tokens = touching = edges.offsets.touching_each(stretches)
    loss_mask = np.zeros(len(edges.tokens), np.float32)
    np.maximum.at(loss_mask, tokens, np.array([span.weight for span in trained], np.float32)[which])
    loss_mask[:1] = 0
    across = [(trained[k], text) for k, text in edges.straddling(stretches, touching)]
    return loss_mask, [
        f"one token, {text!r}, reaches across the edge of message {span.message} ({span.role}): it is trained."
        for span, text in across
    ]


def _stretches(spans: Sequence[Span]) -> np.ndarray:
    """(S, 2) int32, the characters `[start, end)` of each span."""
    return np.array([(span.start, span.end) for span in spans], np.int32).reshape(-1, 2)


def _all_but_first(tokens: np.ndarray, template: ChatTemplate) -> np.ndarray:
    loss_mask = np.ones(len(tokens), np.float32)
    loss_mask[0] = 0
    if len(tokens) > 1 and tokens[0] == tokens[1] == template.tokenizer.bos_token_id:
        loss_mask[1] = 0
    return loss_mask


# --- notes for the user ---------------------------------------------------------------------------------------------


def row_remarks(conversation: TokenizedConversation) -> list[str]:
    """Everything the user should know about a row: its problems, and the control tokens in its own text."""
    return [*conversation.problems, *written_sentences(conversation)]


def written_sentences(conversation: TokenizedConversation) -> list[str]:
    """A sentence for each control token spelled by the row's own text: where it is, and whether it is trained."""
    sentences: dict[str, None] = {}
    if not conversation.written:
        return []
    offsets, spans = TokenOffsets(conversation.offsets), conversation.spans
    span_starts = [span.start for span in spans]
    for one in conversation.written:
        near = spans[max(bisect_right(span_starts, one.start) - 1, 0)] if spans else None
        at = near if near and near.start <= one.start < near.end else None
        where = "" if at is None or at.role == "text" else f" of the {at.role}"
        if at and at.role not in ("prompt", "completion", "text"):
            where = f" of message {at.message} ({at.role})"
        covering = offsets.touching(one.start, one.end)
        covering = covering[(offsets.starts[covering] <= one.start) & (offsets.ends[covering] >= one.end)]
        trained = ", trained" if conversation.loss_mask[covering].any() else ""
        sentences[f"{one.spelled!r} in the text{where} is a control token{trained}."] = None
    return list(sentences)


def _token_problems(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    bos = tokenizer.bos_token_id
    if bos is not None and len(tokens) > 1 and tokens[0] == tokens[1] == bos:
        return [f"the text starts with {tokenizer.bos_token!r} twice."]
    return []


def _span_problems(located: Located, messages: Sequence[Message], weights: Sequence[float]) -> list[str]:
    problems = [_lost_sentence(messages, *lost) for lost in _first_of_each_field(located.lost)]
    for i in located.absent:
        problems.append(f"message {i} (assistant) is left out by the chat template: nothing of it is trained.")
    if not any(message.get("role") == "assistant" for message in messages):
        problems.append("no message is from the assistant.")
    for turn in located.turns:
        if weights[turn.message] > 0:
            problems += _turn_problems(turn, messages[turn.message])
    return problems


def _turn_problems(turn: Turn, message: Message) -> list[str]:
    name, problems = f"message {turn.message} (assistant)", []
    if not turn.ends_turn:
        problems.append(f"{name} has no end-of-turn in this chat template: the model does not learn to stop there.")
    if turn.message > 0 and not turn.context_as_in_inference:
        problems.append(
            f"{name}: its context differs from inference, where the template writes another prompt before it. "
            "One row for each assistant turn, with loss_on='final', comes closer."
        )
    content = message.get("content", "")
    if not content or (isinstance(content, str) and not content.strip()):
        if not any(message.get(field) for field in ("tool_calls", *REASONING_FIELDS)):
            problems.append(f"{name} is blank: only its end is trained.")
    return problems


def _first_of_each_field(lost: Sequence[tuple[int, str, int, int]]) -> list[tuple[int, str, int, int]]:
    totals: dict[tuple[int, str], tuple[int, int]] = {}
    for message, field, missing, given in lost:
        a, b = totals.get((message, field), (0, 0))
        totals[message, field] = (a + missing, b + given)
    return [(message, field, *counts) for (message, field), counts in totals.items()]


def _lost_sentence(messages: Sequence[Mapping[str, Any]], message: int, field: str, missing: int, given: int) -> str:
    what = "is left out" if missing >= given else f"is partly left out ({missing} of {given} characters)"
    return f"message {message} ({messages[message].get('role')}): its {field} {what} by the chat template."
