"""Short stand-ins for a long conversation: its beginning, the messages around one of them, its last question.

What a chat template writes around a message hardly ever depends on more. Who uses a window proves on the whole text
that it does not, and asks with the whole conversation where it does.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.data.masks.template_facts import STRUCTURAL_KEYS, Message

# Up to here every beginning of a conversation is rendered as it is.
LONG = 48
# How many messages before the one in question are in its window at least, and how far its edges are moved to fit.
_BEFORE, _AFTER, _MOVED = 8, 3, 8
_IDENTIFIERS = frozenset({"id", "tool_call_id"})
_WORDS = re.compile(r"[^\W_].*[^\W_]|[^\W_]", re.DOTALL)


@dataclass(frozen=True)
class Window:
    """The messages of a conversation that stand for all of it where one of them is in question.

    indexes  which they are, in order
    slot     where among them the one in question is
    shape    equal for windows that a template can hardly treat in different ways
    """

    indexes: tuple[int, ...]
    slot: int
    shape: Hashable


class Windows:
    """The windows of a conversation. `constants` are what its template looks for inside texts, longest first."""

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
        """All before the second question, or else before the first: what follows begins with a question as well."""
        early = [user for user in self._users[:2] if user <= 2 * _MOVED]
        return early[-1] if early and early[-1] else min(4, len(self._roles))

    def _before(self, i: int) -> list[int]:
        """The beginning, the last question before, and what lies between; or only what is near the message.

        Where messages are left out, one follows that has the role of the first of them.
        """
        if i - _BEFORE <= self._beginning:
            return list(range(i))
        start = i - _BEFORE
        place = bisect_right(self._users, start)
        asked = self._users[place - 1] if place else -1
        if asked < self._beginning:
            return [*range(self._beginning), *range(start, i)]
        if start - asked <= _MOVED:
            return [*range(self._beginning), *range(asked, i)]
        places = range(start, max(start - _MOVED, asked), -1)
        start = next((k for k in places if self._roles[k] == self._roles[asked + 1]), start)
        return [*range(self._beginning), asked, *range(start, i)]

    def _after(self, i: int) -> list[int]:
        """What follows, and the last question of the conversation with its answer."""
        count, nearest = len(self._roles), i + _AFTER
        if count <= nearest + _MOVED:
            return list(range(i + 1, count))
        asked = self._users[-1] if self._users else -1
        if asked < nearest:
            return list(range(i + 1, nearest))
        places = range(nearest, min(nearest + _MOVED, asked + 1))
        end = next((k for k in places if self._roles[k - 1] == self._roles[asked - 1]), nearest)
        return [*range(i + 1, end), *range(asked, min(asked + 2, count))]

    def _outline(self, value: Any, key: str) -> Hashable:
        """A value with everything that a template may branch on; of words only that there are some."""
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
        """Less of a value: enough to tell what a template makes of messages that are farther away."""
        if isinstance(value, str):
            if key in STRUCTURAL_KEYS:
                return value if key == "role" else None
            return bool(value.strip()), frozenset(self._constants.findall(value) if self._constants else ())
        if isinstance(value, Mapping):
            return tuple([(name, self._sketch(item, str(name))) for name, item in value.items()])
        if isinstance(value, (list, tuple)):
            return len(value)
        return value if isinstance(value, bool) else None
