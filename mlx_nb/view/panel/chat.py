"""The chat of the panel: a conversation with the current model, answered between updates and streamed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from mlx_nb.events import Question
from mlx_nb.view.panel.state import visible

SECONDS_BETWEEN_WORDS = 0.2

Turn = dict[str, Any]


class Chat:
    """The turns of a chat. `show` is called with them, as data for JSON, after each change.

    A turn has `role`, `content`, `by` (who answers: `base` or `model`), `update`, and whether it is `done`.
    """

    def __init__(self, ask: Callable[[Question], None], show: Callable[[list[Turn]], None]) -> None:
        self._ask = ask
        self._show = show
        self._turns: list[dict[str, str]] = []
        self._shown: list[Turn] = []
        self._stopped = False

    @property
    def busy(self) -> bool:
        """Whether an answer is in progress."""
        return bool(self._shown) and not self._shown[-1]["done"]

    @property
    def last_message(self) -> str:
        """The last message of the user, or empty."""
        return next((turn["content"] for turn in reversed(self._turns) if turn["role"] == "user"), "")

    def send(self, text: str, step: int, *, base: bool) -> None:
        """Send a message to the model, or to its base."""
        text = text.strip()
        if not text or self.busy:
            return
        self._turns.append({"role": "user", "content": text})
        messages = list(self._turns)
        self._shown.append({"role": "user", "content": visible(text), "by": "", "update": step, "done": True})
        answer: Turn = {"role": "assistant", "content": "", "by": "base" if base else "model", "update": step}
        self._shown.append({**answer, "done": False})
        self._stopped = False
        self._show_turns()
        turns, shown_at = self._turns, 0.0

        def on_text(text: str, done: bool) -> bool:
            nonlocal shown_at
            if turns is not self._turns:  # a new chat was started meanwhile
                return True
            self._shown[-1] = {**answer, "content": visible(text), "done": done}
            if done:
                self._turns.append({"role": "assistant", "content": text})
            if done or time.monotonic() - shown_at > SECONDS_BETWEEN_WORDS:
                self._show_turns()
                shown_at = time.monotonic()
            return self._stopped

        try:
            self._ask(Question(messages, on_text, base=base))
        except Exception:
            del self._turns[-1], self._shown[-2:]
            self._show_turns()
            raise

    def stop_answer(self) -> None:
        """End the current answer with its text so far."""
        self._stopped = True

    def restart(self) -> None:
        """Start a new chat."""
        self._turns, self._shown = [], []
        self._show_turns()

    def _show_turns(self) -> None:
        self._show(list(self._shown))
