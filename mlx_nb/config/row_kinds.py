"""What settings and messages need to know about each kind of row. A new kind begins with an entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KindFacts:
    """What all methods with one kind of rows have in common.

    judged       rows rate answers: without `beta` nothing is left to learn, and prompts are not trained
    pairs        a row has two answers, each a sequence of its own; they can be compared without a reference
    sampled      rows are prompts only, and the model's own answers are trained
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


# A new kind also has an entry in `data/examples/kinds.py` and in `objectives/kinds.py`, and nowhere else.
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
