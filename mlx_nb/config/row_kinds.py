"""The kinds of rows that training methods take, as far as settings and words need to know them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KindFacts:
    """What every method that takes rows of one kind has in common.

    judged       the rows judge answers, so without `beta` nothing is left to learn, and prompts are not trained
    pairs        two answers stand against each other, which can do without a reference
    sampled      the rows only ask, and the model's own answers are trained
    words        what is learned from
    pieces       a long text may be trained in pieces (`truncate: split`)
    loss_of_row  what the loss of one row is; empty where the loss function decides
    """

    words: str
    judged: bool = False
    pairs: bool = False
    sampled: bool = False
    pieces: bool = False
    loss_of_row: str = ""


# With `data/examples/kinds.py` and `objectives/kinds.py` these are all places that a new kind has.
ROW_KINDS = {
    "tokens": KindFacts("rows to imitate", pieces=True),
    "pairs": KindFacts("pairs of answers, one better", judged=True, pairs=True, loss_of_row="of the pair"),
    "labels": KindFacts("answers labeled good or bad", judged=True, loss_of_row="of the answer"),
    "prompts": KindFacts(
        "rewards of what the model writes",
        sampled=True,
        loss_of_row="minus the mean reward where measured, of the completions where trained",
    ),
}
