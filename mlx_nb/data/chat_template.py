"""Messages to tokens and loss mask, from one render of the whole conversation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    """What the model will see, and what of it is trained.

    tokens     (T,) int32
    loss_mask  (T,) float32, the weight of each token as a target; `loss_mask[0] == 0`
    text       the rendered text, tokenised once without added special tokens
    offsets    (T, 2) int32, the characters of `text` that each token covers
    spans      where each message's text lies, in order; weight > 0 where trained
    problems   what a person should know about this mask; empty when there is nothing to say
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    text: str
    offsets: np.ndarray
    spans: tuple[Span, ...]
    problems: tuple[str, ...] = ()
