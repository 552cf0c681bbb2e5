"""A conversation with the model as it is now, answered between updates and shown as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mlx_nb.events import Question
from mlx_nb.view.panel.state import visible

SECONDS_BETWEEN_WORDS = 0.2

Turn = dict[str, Any]


class Chat:
    """The turns so far. `show` is given them, as data for JSON, whenever they have changed.

    Of a turn there are `role`, `content`, `by` (who answers: `base` or `model`), `update` and whether it is `done`.
    """

    def __init__(self, ask: Callable[[Question], None], show: Callable[[list[Turn]], None]) -> None:
        self._ask = ask
        self._show = show
        self._turns: list[dict[str, str]] = []
        self._told: list[Turn] = []
        self._enough = False

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return bool(self._told) and not self._told[-1]["done"]

    @property
    def last_asked(self) -> str:
        """What was asked last; empty before."""
        return next((turn["content"] for turn in reversed(self._turns) if turn["role"] == "user"), "")

    def say(self, text: str, step: int, *, base: bool) -> None:
        """Ask the model, or its base, something more."""
        text = text.strip()
        if not text or self.busy:
            return
        self._turns.append({"role": "user", "content": text})
        asked = list(self._turns)
        self._told.append({"role": "user", "content": visible(text), "by": "", "update": step, "done": True})
        answer: Turn = {"role": "assistant", "content": "", "by": "base" if base else "model", "update": step}
        self._told.append({**answer, "done": False})
        self._enough = False
        self._told_all()
        turns, shown_at = self._turns, 0.0

        def on_text(text: str, done: bool) -> bool:
            nonlocal shown_at
            if turns is not self._turns:  # a new chat was begun meanwhile
                return True
            self._told[-1] = {**answer, "content": visible(text), "done": done}
            if done:
                self._turns.append({"role": "assistant", "content": text})
            if done or time.monotonic() - shown_at > SECONDS_BETWEEN_WORDS:
                self._told_all()
                shown_at = time.monotonic()
            return self._enough

        try:
            self._ask(Question(asked, on_text, base=base))
        except Exception:
            del self._turns[-1], self._told[-2:]
            self._told_all()
            raise

    def enough(self) -> None:
        """End the answer that is on its way with what it says by now."""
        self._enough = True

    def begin_anew(self) -> None:
        """Forget what was said."""
        self._turns, self._told = [], []
        self._told_all()

    def _told_all(self) -> None:
        self._show(list(self._told))
