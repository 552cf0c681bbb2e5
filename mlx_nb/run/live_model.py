"""Computes with the live model of a run, or its base: the losses of a row, and streamed answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_nb.data.examples.examples import RowView
from mlx_nb.errors import DataError
from mlx_nb.events import Question
from mlx_nb.run.inputs import RunInputs


def token_losses(inputs: RunInputs, row: RowView, *, base: bool, rejected: bool = False) -> Any:
    """(T,) current loss in nats of each token of a row; NaN for the first. `base` measures without the adapter.

    Of a pair it measures the prompt with the chosen answer, or with the rejected one.
    """
    from mlx_nb.model.logprobs import TargetScorer

    conversation = row.rejected if rejected else row.conversation
    if conversation is None:
        raise DataError(f"{row.error or f'row {row.row} is not a pair.'} It has no tokens to measure.")
    inputs.limits.require(conversation.tokens, np.ones(len(conversation.tokens)), name=f"row {row.row}")
    model = inputs.base_model if base else inputs.loaded.model
    model.eval()
    return TargetScorer(model).token_losses(conversation.tokens)


def stream_answer(inputs: RunInputs, question: Question) -> Iterator[str]:
    """Stream the answer to a question: the text so far, first empty, then after each token."""
    from mlx_nb.rollouts.generation import stream_text

    model = inputs.base_model if question.base else inputs.loaded.model
    yield ""
    messages = question.messages
    if not isinstance(messages, str) and inputs.prompt_rendering.is_raw(inputs.tokenizer):
        # Raw text has no turns: the model continues the whole conversation.
        messages = "".join(message["content"] for message in messages)
    yield from stream_text(model, inputs.tokenizer, messages, question.max_tokens, inputs.prompt_rendering)


class SampleAnswers:
    """The answers to sample prompts. Those of the base, which never change, are computed once."""

    def __init__(self, inputs: RunInputs) -> None:
        self._inputs = inputs
        self._of_base: dict[tuple[str, int], str] = {}

    def __call__(self, prompt: str, max_tokens: int) -> Iterator[tuple[str, str | None]]:
        """Stream the greedy answers of the model and of its base, as (answer, base answer)."""
        from mlx_nb.rollouts.generation import stream_text

        inputs, key, answer = self._inputs, (prompt, max_tokens), ""
        for answer in stream_text(inputs.loaded.model, inputs.tokenizer, *key, inputs.prompt_rendering):
            yield answer, None
        if inputs.config.fine_tune_type == "full":
            return
        if key not in self._of_base:
            of_base = ""
            for of_base in stream_text(inputs.base_model, inputs.tokenizer, *key, inputs.prompt_rendering):
                yield answer, of_base
            self._of_base[key] = of_base
        yield answer, self._of_base[key]
