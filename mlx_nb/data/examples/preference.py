"""Examples of judged answers: pairs of answers to one prompt, and single answers with a label."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_nb.data.examples.imitation import TokenizedExample, cut_to_length
from mlx_nb.data.examples.settings import ExampleSettings, LeftOut
from mlx_nb.data.masks.conversation import TokenizedConversation, tokenize_conversation, tokenize_prompt_completion
from mlx_nb.data.masks.prompt_format import DEFAULT_RENDERING, Rendering
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.rows.columns import Messages
from mlx_nb.data.rows.imitation import as_messages, refuse_context
from mlx_nb.data.rows.preference import LabeledRow, NothingToPrefer, PreferenceRow
from mlx_nb.errors import DataError, MaskRefused


@dataclass(frozen=True, eq=False)
class PreferenceExample:
    """Two answers to one prompt, each after the prompt's tokens; only the answers are trained.

    prompt_length  number of tokens that both begin with, none of them trained
    row            number of the row in its split, from 0
    margin         by how much the chosen one is better
    weight         weight of the pair in the loss
    """

    chosen: TokenizedExample
    rejected: TokenizedExample
    prompt_length: int
    row: int
    margin: float = 0.0
    weight: float = 1.0

    @property
    def sequences(self) -> tuple[TokenizedExample, ...]:
        """The sequences that the model reads for this example: the chosen, then the rejected answer."""
        return (self.chosen, self.rejected)

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        return len(self.chosen.tokens) + len(self.rejected.tokens)

    @property
    def dropped_tokens(self) -> int:
        """Tokens removed from both by truncation."""
        return self.chosen.dropped_tokens + self.rejected.dropped_tokens


@dataclass(frozen=True, eq=False)
class LabeledExample:
    """An answer after its prompt, and whether it is a good one; only the answer is trained.

    prompt_length  tokens before the first trained one
    row            number of the row in its split, from 0
    mismatched     the same prompt with the answer of a row that has another prompt; None if there is no other row
    """

    example: TokenizedExample
    label: bool
    prompt_length: int
    row: int
    mismatched: TokenizedExample | None = None

    @property
    def sequences(self) -> tuple[TokenizedExample, ...]:
        """The row's own tokens."""
        return (self.example,)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.example.tokens)

    @property
    def dropped_tokens(self) -> int:
        """Tokens removed by truncation."""
        return self.example.dropped_tokens


def tokenize_pair(
    content: PreferenceRow, tokenizer: Tokenizer, loss_on: str, rendering: Rendering = DEFAULT_RENDERING
) -> tuple[TokenizedConversation, TokenizedConversation]:
    """The prompt with the chosen and with the rejected answer. Raises MaskRefused, naming the answer."""
    _refuse_raw_context(content, tokenizer, rendering)
    with _errors_about("chosen"):
        chosen = tokenize_answer(content.prompt, content.chosen, content.tools, tokenizer, loss_on, rendering)
    with _errors_about("rejected"):
        rejected = tokenize_answer(content.prompt, content.rejected, content.tools, tokenizer, loss_on, rendering)
    until = _first_trained(chosen.loss_mask), _first_trained(rejected.loss_mask)
    if not np.array_equal(chosen.tokens[: until[0]], rejected.tokens[: until[1]]):
        problem = "chosen and rejected: the tokens before the two answers are not the same, though the prompt is."
        chosen = dataclasses.replace(chosen, problems=(*chosen.problems, problem))
    return chosen, rejected


def tokenize_labeled(
    content: LabeledRow, tokenizer: Tokenizer, loss_on: str, rendering: Rendering = DEFAULT_RENDERING
) -> TokenizedConversation:
    """The prompt with the judged answer. Raises as `tokenize_answer` does."""
    _refuse_raw_context(content, tokenizer, rendering)
    return tokenize_answer(content.prompt, content.completion, content.tools, tokenizer, loss_on, rendering)


def _refuse_raw_context(content: PreferenceRow | LabeledRow, tokenizer: Tokenizer, rendering: Rendering) -> None:
    if content.from_texts and not isinstance(content.prompt, str) and rendering.is_raw(tokenizer):
        refuse_context(content.prompt, content.tools)


def tokenize_answer(
    prompt: str | Messages,
    answer: str | Messages,
    tools: Sequence[Any] | None,
    tokenizer: Tokenizer,
    loss_on: str,
    rendering: Rendering = DEFAULT_RENDERING,
) -> TokenizedConversation:
    """A prompt and an answer, of which only the answer is trained.

    Texts become a user and an assistant message, or raw text in which the answer continues the prompt. Raises
    MaskRefused if no trustworthy mask exists, and for loss_on='all'.
    """
    if loss_on == "all":
        raise MaskRefused(
            "loss_on='all' trains the prompt too, and answers are judged without it. "
            "Set loss_on to assistant, completion or final."
        )
    if isinstance(prompt, str) and isinstance(answer, str):
        if rendering.is_raw(tokenizer):
            return tokenize_prompt_completion(prompt, answer, tokenizer, rendering=rendering)
    context = [{**message, "train": False} for message in as_messages("user", prompt)]
    messages = [*context, *as_messages("assistant", answer)]
    return tokenize_conversation(messages, tokenizer, tools=tools, loss_on=loss_on, rendering=rendering)


def preference_example(
    content: PreferenceRow,
    pair: tuple[TokenizedConversation, TokenizedConversation],
    row: int,
    settings: ExampleSettings,
) -> PreferenceExample:
    """The example of a pair, both answers within `max_seq_length`.

    Raises DataError, naming the answer, and NothingToPrefer if both became the same tokens.
    """
    with _errors_about("chosen"):
        chosen = cut_to_length(pair[0], row, settings)
    with _errors_about("rejected"):
        rejected = cut_to_length(pair[1], row, settings)
    _require_difference(chosen, rejected, settings)
    return PreferenceExample(chosen, rejected, _shared_prompt(chosen, rejected), row, content.margin, content.weight)


def _require_difference(chosen: TokenizedExample, rejected: TokenizedExample, settings: ExampleSettings) -> None:
    """Refuse a pair of equal tokens, which would train without effect: the loss of DPO stays at ln 2."""
    same = np.array_equal(chosen.tokens, rejected.tokens) and np.array_equal(chosen.loss_mask, rejected.loss_mask)
    if not same:
        return
    if chosen.dropped_tokens or rejected.dropped_tokens:
        other = "left" if settings.truncate == "right" else "right"
        raise NothingToPrefer(
            f"chosen and rejected are the same within max_seq_length={settings.max_seq_length}: there is nothing to "
            f"prefer. Raise max_seq_length, set truncate to {other} or drop, or drop the row."
        )
    raise NothingToPrefer("chosen and rejected are the same tokens: there is nothing to prefer. Drop the row.")


def labeled_example(
    content: LabeledRow, conversation: TokenizedConversation, row: int, settings: ExampleSettings
) -> LabeledExample:
    """The example of a labeled answer, without `mismatched`. Raises DataError if nothing is left to train on."""
    example = cut_to_length(conversation, row, settings)
    return LabeledExample(example, content.label, _first_trained(example.loss_mask), row)


def with_mismatched(
    results: Iterable[LabeledExample | LeftOut], settings: ExampleSettings
) -> Iterator[LabeledExample | LeftOut]:
    """Add to each example the answer of the next row that has another prompt (for KTO's estimate of the KL).

    Next in row order, the first row following the last; simply the next row if all prompts are the same.
    """
    results = list(results)
    kept = [result for result in results if isinstance(result, LabeledExample)]
    others = iter(_next_with_another_prompt(kept))
    for result in results:
        if isinstance(result, LeftOut) or len(kept) == 1:
            yield result
        else:
            yield dataclasses.replace(result, mismatched=_spliced(result, kept[next(others)], settings))


def _next_with_another_prompt(examples: Sequence[LabeledExample]) -> list[int]:
    prompts = [example.example.tokens[: example.prompt_length].tobytes() for example in examples]
    count = len(prompts)
    following = [(k + 1) % count for k in range(count)]
    if len(set(prompts)) > 1:
        # Twice around: a series of equal prompts may continue past the last row.
        for k in reversed(range(2 * count)):
            this, after = k % count, (k + 1) % count
            following[this] = following[after] if prompts[this] == prompts[after] else after
    return following


def _spliced(prompt_of: LabeledExample, answer_of: LabeledExample, settings: ExampleSettings) -> TokenizedExample:
    """The prompt of one example with the answer of another, within `max_seq_length`."""
    own, other, start = prompt_of.example, answer_of.example, answer_of.prompt_length
    tokens = np.concatenate([own.tokens[: prompt_of.prompt_length], other.tokens[start:]])
    loss_mask = np.concatenate([np.zeros(prompt_of.prompt_length, np.float32), other.loss_mask[start:]])
    longest = min(settings.max_seq_length, settings.limits.positions or settings.max_seq_length)
    dropped = max(0, len(tokens) - longest)
    kept = slice(dropped, None) if settings.truncate == "left" else slice(0, len(tokens) - dropped)
    tokens, loss_mask = tokens[kept], loss_mask[kept]
    loss_mask[0] = 0
    return TokenizedExample(tokens, loss_mask, prompt_of.row, dropped)


def _shared_prompt(chosen: TokenizedExample, rejected: TokenizedExample) -> int:
    most = min(_first_trained(chosen.loss_mask), _first_trained(rejected.loss_mask))
    differ = np.flatnonzero(chosen.tokens[:most] != rejected.tokens[:most])
    return int(differ[0]) if len(differ) else most


def _first_trained(loss_mask: np.ndarray) -> int:
    """Number of tokens before the first trained one; all of them if none is trained."""
    return int(np.argmax(loss_mask > 0)) if loss_mask.any() else len(loss_mask)


@contextmanager
def _errors_about(answer: str) -> Iterator[None]:
    """A context in which errors name the answer of the pair that they are about."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{answer}: {error}") from error
