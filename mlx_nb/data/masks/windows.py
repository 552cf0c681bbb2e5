"""Windows: short conversations that stand in for a long one at one of its messages.

A window has the beginning, the messages around the one in question, and the last question. What a chat template writes
around a message hardly ever depends on more. Callers verify that on the whole text, and use the whole conversation if
it fails.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.data.masks.template_facts import STRUCTURAL_KEYS, Message

# Up to this length every prefix of a conversation is rendered as it is.
LONG = 48
# Minimum number of messages before the one in question, and how far the window's edges may be shifted to fit.
_BEFORE, _AFTER, _MOVED = 8, 3, 8
_IDENTIFIERS = frozenset({"id", "tool_call_id"})
_WORDS = re.compile(r"[^\W_].*[^\W_]|[^\W_]", re.DOTALL)


@dataclass(frozen=True)
class Window:
    """The messages of a conversation that stand in for all of it at one of them.

    indexes  their indices, in order
    slot     the index among them of the message in question
    shape    equal for windows that a template can hardly treat differently
    """

    indexes: tuple[int, ...]
    slot: int
    shape: Hashable


class Windows:
    """The windows of a conversation.

    `constants` are strings that its template looks for inside texts, longest first.
    """

    def __init__(self, messages: Sequence[Message], constants: Sequence[str]) -> None:
        self._roles = [message.get("role") for message in messages]
        self._users = [i for i, role in enumerate(self._roles) if role == "user"]
        self._constants = re.compile("|".join(map(re.escape, constants))) if constants else None
        numbers: dict[Hashable, int] = {}
        self._near = [numbers.setdefault(self._outline(message, ""), len(numbers)) for message in messages]
        self._far = [numbers.setdefault(self._sketch(message, ""), len(numbers)) for message in messages]
        self._beginning = self._end_of_beginning()

    def around(self, i: int) -> Window:
        """The window of message `i`."""
        before, after = self._before(i), self._after(i)
        near, far = self._near, self._far
        shape = (
            *[far[k] for k in before[:-1]],
            None,
            *[near[k] for k in (*before[-1:], i, *after[:1])],
            None,
            *[far[k] for k in after[1:]],
        )
        return Window((*before, i, *after), len(before), shape)

    def _end_of_beginning(self) -> int:
        """The end of what precedes the second question, or else the first: the next message is a question."""
        early = [user for user in self._users[:2] if user <= 2 * _MOVED]
        return early[-1] if early and early[-1] else min(4, len(self._roles))

    def _before(self, i: int) -> list[int]:
        """Indices of the beginning, the last question before, and what lies between; or only the nearest messages.

        If messages are left out, the next one has the role of the first of them.
        """
        if i - _BEFORE <= self._beginning:
            return list(range(i))
        start = i - _BEFORE
        place = bisect_right(self._users, start)
        question = self._users[place - 1] if place else -1
        if question < self._beginning:
            return [*range(self._beginning), *range(start, i)]
        if start - question <= _MOVED:
            return [*range(self._beginning), *range(question, i)]
        places = range(start, max(start - _MOVED, question), -1)
        start = next((k for k in places if self._roles[k] == self._roles[question + 1]), start)
        return [*range(self._beginning), question, *range(start, i)]

    def _after(self, i: int) -> list[int]:
        """Indices of the following messages, and of the last question of the conversation with its answer."""
        count, nearest = len(self._roles), i + _AFTER
        if count <= nearest + _MOVED:
            return list(range(i + 1, count))
        question = self._users[-1] if self._users else -1
        if question < nearest:
            return list(range(i + 1, nearest))
        places = range(nearest, min(nearest + _MOVED, question + 1))
        end = next((k for k in places if self._roles[k - 1] == self._roles[question - 1]), nearest)
        return [*range(i + 1, end), *range(question, min(question + 2, count))]

    def _outline(self, value: Any, key: str) -> Hashable:
        """A value reduced to what a template may branch on; words only by their presence."""
        if isinstance(value, str):
            if key in STRUCTURAL_KEYS:
                return len(value) if key in _IDENTIFIERS else value
            if self._constants is None:
                return _WORDS.sub("x", value)
            found, position = [], 0
            for match in self._constants.finditer(value):
                found += [_WORDS.sub("x", value[position : match.start()]), match.group()]
                position = match.end()
            return (*found, _WORDS.sub("x", value[position:]))
        if isinstance(value, Mapping):
            return tuple([(name, self._outline(item, str(name))) for name, item in value.items()])
        if isinstance(value, (list, tuple)):
            return tuple([self._outline(item, key) for item in value])
        return value if value is None or isinstance(value, bool) else type(value).__name__

    def _sketch(self, value: Any, key: str) -> Hashable:
        """A coarser outline, for messages that are farther away."""
        if isinstance(value, str):
            if key in STRUCTURAL_KEYS:
                return value if key == "role" else None
            return bool(value.strip()), frozenset(self._constants.findall(value) if self._constants else ())
        if isinstance(value, Mapping):
            return tuple([(name, self._sketch(item, str(name))) for name, item in value.items()])
        if isinstance(value, (list, tuple)):
            return len(value)
        return value if isinstance(value, bool) else None
