"""The limits of a model's input, and the errors for rows beyond them: unknown ids, positions that were not learned."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlx_nb.errors import DataError


class OutsideVocabulary(DataError):
    """A token of a row has no embedding, or no logit, in the model."""


class BeyondPositions(DataError):
    """A row is longer than the model's table of learned positions."""


class ModelLimits(NamedTuple):
    """What a model can read. None = unknown, or no limit.

    ids        input ids from 0 to ids - 1 have an embedding
    targets    ids from 0 to targets - 1 have a logit
    positions  number of learned positions
    context    tokens that the model was made for, by its config.json; longer rows can be read, usually badly
    """

    ids: int | None = None
    targets: int | None = None
    positions: int | None = None
    context: int | None = None

    def within(self, other: ModelLimits) -> ModelLimits:
        """The limits of what both models can read."""
        return ModelLimits(*(min((one for one in pair if one is not None), default=None) for pair in zip(self, other)))

    def require(
        self, tokens: np.ndarray, loss_mask: np.ndarray | None = None, *, more: int = 0, name: str = ""
    ) -> None:
        """Raise OutsideVocabulary or BeyondPositions for tokens that the model cannot read, with `more` after them.

        `name` is put before the message and says whose tokens they are.
        """
        about = f"{name}: " if name else ""
        _require_ids(tokens, self.ids, "embedding", about)
        if loss_mask is not None:
            _require_ids(np.where(loss_mask != 0, tokens, 0), self.targets, "output", about)
        if self.positions is not None and len(tokens) + more > self.positions:
            raise BeyondPositions(
                f"{about}{len(tokens)} tokens{f' and an answer of {more}' if more else ''}, and the model has learned "
                f"{self.positions} positions. Shorten it, or lower max_seq_length or max_completion_length."
            )


UNLIMITED = ModelLimits()


def _require_ids(tokens: np.ndarray, known: int | None, what: str, about: str) -> None:
    if known is None:
        return
    (outside,) = np.nonzero((tokens < 0) | (tokens >= known))
    if len(outside):
        place = int(outside[0])
        raise OutsideVocabulary(
            f"{about}token {place} is {int(tokens[place])} in the tokenizer, and the model's {what} has ids 0 to "
            f"{known - 1}. Use the tokenizer that the model was trained with, or take the token out."
        )
