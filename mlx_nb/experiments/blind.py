"""A blind vote: two answers to one prompt without names, in random order, and a running score."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_nb.errors import CommandError
from mlx_nb.experiments.display import prompt_text
from mlx_nb.rollouts.intervals import share

if TYPE_CHECKING:
    from mlx_nb.experiments.comparison import Comparison

EQUAL = 0


class BlindVote:
    """Pairs of answers to vote on: `vote(1)`, `vote(2)` or `vote(0)` for equal, or the buttons where it is displayed.

    The seed determines the order of rows and sides. Rows to which both gave the same answer are left out. Which answer
    is whose is never shown; only the score has names.
    """

    def __init__(self, found: Comparison, seed: int = 0) -> None:
        last = found.differences[-1]
        self.names = (last.before, last.after)
        one, other = (found.answers.get(name, {}) for name in self.names)
        rows = [row for row in one if row in other and one[row] != other[row]]
        if not rows:
            raise CommandError("there are no rows to vote on: both gave the same answer to each.")
        random = np.random.default_rng(seed)
        self._rows = [rows[place] for place in random.permutation(len(rows))]
        self._swapped = random.integers(0, 2, len(rows)).astype(bool).tolist()
        self._found = found
        self.votes: list[int | None] = []  # the index of the winner in `names`; None = equal
        self._view: Any = None

    @property
    def over(self) -> bool:
        """Whether every pair has a vote."""
        return len(self.votes) == len(self._rows)

    @property
    def question(self) -> tuple[str, str, str]:
        """The prompt of the current pair and its two answers. Raises CommandError if the vote is over."""
        if self.over:
            raise CommandError(f"the vote is over. {self.score}")
        row = self._rows[len(self.votes)]
        answers = [self._found.answers[name][row] for name in self.names]
        first, second = reversed(answers) if self._swapped[len(self.votes)] else answers
        return prompt_text(self._found.prompts.get(row)), first, second

    def vote(self, winner: int) -> str:
        """Vote for answer 1 or 2 of the current pair, or 0 if they are equally good. Returns the score."""
        if winner not in (EQUAL, 1, 2):
            raise CommandError(f"vote for 1 or 2, or 0 for equal, not {winner!r}.")
        _ = self.question
        swapped = self._swapped[len(self.votes)]
        self.votes.append(None if winner == EQUAL else (winner - 1) ^ swapped)
        return self.score

    @property
    def score(self) -> str:
        """The votes by name, with the interval of the share of the second among those that decide."""
        wins = [self.votes.count(0), self.votes.count(1)]
        words = f"{self.names[0]} {wins[0]}, {self.names[1]} {wins[1]}, equal {self.votes.count(None)}"
        if not sum(wins):
            return words
        found = share([0.0] * wins[0] + [1.0] * wins[1])
        return f"{words}: {self.names[1]} wins {found.value:.0%} (95% interval {found.low:.0%} to {found.high:.0%})"

    def __repr__(self) -> str:
        if self.over:
            return self.score
        prompt, first, second = self.question
        return f"{prompt}\n\n1: {first}\n\n2: {second}\n\n{len(self.votes)} of {len(self._rows)} votes. {self.score}"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if self._view is None:
            self._view = self._widgets()
        display(self._view)

    def _widgets(self) -> Any:
        import ipywidgets

        text = ipywidgets.Output()
        buttons = [ipywidgets.Button(description=word) for word in ("1 is better", "2 is better", "equal")]

        def show() -> None:
            text.outputs = ({"output_type": "display_data", "data": {"text/plain": repr(self)}, "metadata": {}},)
            for button in buttons:
                button.disabled = self.over

        def voting_for(winner: int) -> Callable[[Any], None]:
            def on_click(_: Any) -> None:
                self.vote(winner)
                show()

            return on_click

        for button, winner in zip(buttons, (1, 2, EQUAL)):
            button.on_click(voting_for(winner))
        show()
        return ipywidgets.VBox([text, ipywidgets.HBox(buttons)])
