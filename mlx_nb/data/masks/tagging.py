"""Finds each text of a conversation in its render, using a copy in which private-use characters replace the texts.

Each text gets one code point. Where the render of the copy equals the real render except at those characters, they show
where each text went. An assistant message without any text of its own gets one extra character, and the proof is that
the same render comes out without it.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, pairwise, product
from typing import Any, NamedTuple

import numpy as np

from mlx_nb.data.masks.omissions import omitted_messages, omitted_together
from mlx_nb.data.masks.template_facts import STRUCTURAL_KEYS, Message, Render, RenderFailed, texts_in

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TEXT_FIELDS = ("content", *REASONING_FIELDS)
# Ranges of code points that no text has: private use, and for very long conversations unassigned planes.
_STRETCHES = ((0xF0000, 0x10FFFD), (0x40000, 0xDFFFD))


class Unproved(Exception):
    """The position of a message could not be proved. The text says why, without a full stop."""


@dataclass(frozen=True)
class Tagging:
    """How texts are tagged: which characters stay, and which texts besides contents and reasoning are replaced.

    `kept` is the inside of a regular expression's brackets.
    """

    kept: str
    tool_names: bool = True
    other_fields: bool = True
    tool_arguments: bool = True


# From the most informative to the most cautious. Quotes and backslashes are kept because JSON escapes them: replacing
# one would change the length. Some templates repeat a tool's name before its answer, or read its arguments.
TAGGINGS = (
    Tagging(kept=r"\s\"'\\"),
    Tagging(kept=r"\W_"),
    Tagging(kept=r"\W_", tool_names=False, other_fields=False),
    Tagging(kept=r"\W_", tool_names=False, other_fields=False, tool_arguments=False),
)


class Leaf(NamedTuple):
    """One text of one message. `rest` is the untagged part at its end."""

    message: int
    field: str
    reported: bool
    tagged_characters: int
    rest: str


@dataclass(frozen=True)
class TaggedMessages:
    """A tagged copy of a conversation: leaf k is written as `chr(first + k)`."""

    messages: list[Message]
    leaves: list[Leaf]
    first: int

    def leaf(self, tag: str) -> Leaf:
        """The text that a tag replaces."""
        return self.leaves[ord(tag) - self.first]

    @cached_property
    def of_message(self) -> dict[int, list[int]]:
        """The numbers of the leaves of each message that has any."""
        found: dict[int, list[int]] = {}
        for k, leaf in enumerate(self.leaves):
            found.setdefault(leaf.message, []).append(k)
        return found

    def tail(self, rendered: str) -> tuple[str, str]:
        """The last tag in a render (empty without one), and the text after it."""
        low, high = chr(self.first), chr(self.first + len(self.leaves))
        for position in range(len(rendered) - 1, -1, -1):
            if low <= rendered[position] < high:
                return rendered[position], rendered[position + 1 :]
        return "", rendered

    def numbers(self, codes: np.ndarray) -> np.ndarray:
        """(T,) for each character of a render the number of the leaf that it tags; -1 for no tag."""
        numbers = codes.astype(np.int64) - self.first
        numbers[numbers >= len(self.leaves)] = -1
        return np.maximum(numbers, -1)

    def runs(self, numbers: np.ndarray) -> list[Run]:
        """The runs of a render in order: stretches without another tag. `numbers` are those of the render."""
        at = np.flatnonzero(numbers >= 0)
        which = numbers[at]
        if not len(at):
            return []
        parts = np.flatnonzero(which[1:] != which[:-1])
        first, last = np.append(0, parts + 1), np.append(parts, len(at) - 1)
        leaves = self.leaves
        return [
            Run(start, end, chr(self.first + k), leaves[k].message)
            for start, end, k in zip(at[first].tolist(), (at[last] + 1).tolist(), which[first].tolist())
        ]


class Run(NamedTuple):
    """Characters `[start, end)` of a tagged render with the tags of one text only."""

    start: int
    end: int
    tag: str
    message: int


@dataclass(frozen=True)
class TaggedRender:
    """A tagged render that is proved to fit the real one.

    text      the tagged render; equal to the real one except at tags and in `removed`
    runs      the tags in it; runs of one text with nothing else between them are joined
    removed   ranges `(start, end)` that are not in the real render, in order
    lost      (message, field, characters lost, characters given) of texts that the template leaves out
    absent    assistant messages of which nothing is rendered
    """

    tags: TaggedMessages
    text: str
    runs: list[Run]
    removed: list[tuple[int, int]]
    lost: list[tuple[int, str, int, int]]
    absent: list[int]

    def in_real(self, position: int) -> int:
        """The same position in the real render."""
        if not self.removed:
            return position
        starts, ends, lengths = self._removed_parts
        passed, entered = bisect_right(ends, position), bisect_left(starts, position)
        return position - lengths[passed] - sum(position - start for start in starts[passed:entered])

    @cached_property
    def _removed_parts(self) -> tuple[list[int], list[int], list[int]]:
        """Starts and ends of the removed ranges, and the number of characters in the first k of them."""
        lengths = accumulate((end - start for start, end in self.removed), initial=0)
        return [start for start, _ in self.removed], [end for _, end in self.removed], list(lengths)


def tag_and_prove(
    messages: Sequence[Message], text: str, render: Render, constants: Sequence[str], tagging: Tagging
) -> TaggedRender:
    """Render a tagged copy of `messages` and prove it against `text`. Raises Unproved with the reason."""
    tags = _tag(messages, text, constants, tagging)
    try:
        tagged_text = render(tags.messages, False)
    except RenderFailed as error:
        raise Unproved(f"the template fails on a copy with other texts ({error})") from error
    real, codes = _codes(text), _codes(tagged_text)
    numbers = tags.numbers(codes)
    if not _fits(real, codes, numbers):
        raise Unproved("the template's own text depends on what the messages say")
    runs, lost = tags.runs(numbers), list(_lost_texts(tags, numbers))
    found = {run.message for run in runs}
    silent = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and i not in found]
    absent = omitted_messages(messages, silent, text, render, constants)
    removed: list[tuple[int, int]] = []
    if len(silent) > len(absent):
        found |= set(absent)
        followed = [i for i in silent if i not in found]
        try:
            if gone := omitted_together(messages, followed, {run.message for run in runs}, text, render):
                absent = sorted([*absent, *gone])
                followed = [i for i in followed if i not in gone]
            if followed:
                tags, tagged_text, removed = _probe(tags, followed, real, render)
        except Unproved as error:
            left_out = next((i for i, field, *_ in lost if i in followed and field in _TEXT_FIELDS), None)
            if left_out is None:
                raise
            raise Unproved(f"the template leaves out the text of message {left_out} (assistant)") from error
        runs = tags.runs(tags.numbers(_codes(tagged_text)))
    return TaggedRender(tags, tagged_text, runs, removed, lost, absent)


def _tag(messages: Sequence[Message], text: str, constants: Sequence[str], tagging: Tagging) -> TaggedMessages:
    leaves: list[Leaf] = []
    kept, others = _patterns(tuple(constants), tagging.kept)
    first = _free_code_point(messages, text)
    kinds: dict[tuple[str, ...], tuple[bool, bool]] = {}

    def tagged(value: Any, message: int, path: tuple[str, ...]) -> Any:
        if not isinstance(value, str):
            if isinstance(value, (list, tuple)):
                return [tagged(item, message, path) for item in value]
            if isinstance(value, Mapping):
                return {key: tagged(item, message, (*path, str(key))) for key, item in value.items()}
            return value
        if path not in kinds:
            kinds[path] = _is_text(path, tagging), _is_reported(path)
        is_text, reported = kinds[path]
        if not is_text:
            return value
        tag, count = chr(first + len(leaves)), 0
        if any(constant in value for constant in constants):
            written = _replace_others(value, kept, tag)
            count = written.count(tag)
        if not count:
            written, count = others.subn(tag, value)
        if not count:
            return value
        leaves.append(Leaf(message, path[0], reported, count, written[written.rindex(tag) + 1 :]))
        return written

    return TaggedMessages([tagged(m, i, ()) for i, m in enumerate(messages)], leaves, first)


def _is_text(path: tuple[str, ...], tagging: Tagging) -> bool:
    if path[0] == "tool_calls":
        if "arguments" in path:
            return tagging.tool_arguments
        return path[-1] == "name" and tagging.tool_names
    if path[-1] in STRUCTURAL_KEYS:
        return False
    return path[0] in _TEXT_FIELDS or tagging.other_fields


@cache
def _patterns(constants: tuple[str, ...], kept: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns for what is kept in a text with one of the constants, and for a character that is replaced in others."""
    alternatives = "|".join([*map(re.escape, constants), f"[{kept}]"])
    return re.compile(f"(?:{alternatives})+"), re.compile(f"[^{kept}]")


def _is_reported(path: tuple[str, ...]) -> bool:
    return path[0] == "tool_calls" or (path[0] in _TEXT_FIELDS and path[-1] in (*_TEXT_FIELDS, "text"))


def _replace_others(value: str, kept: re.Pattern[str], tag: str) -> str:
    pieces, position = [], 0
    for match in kept.finditer(value):
        pieces += [tag * (match.start() - position), match.group()]
        position = match.end()
    return "".join([*pieces, tag * (len(value) - position)])


def _free_code_point(messages: Sequence[Message], text: str) -> int:
    """The first of a range of private-use code points that do not occur in the conversation."""
    strings = [text, *texts_in(messages, keys=False)]
    needed = len(strings) + len(messages)
    codes = _codes("".join([string for string in strings if not string.isascii()]))
    used = np.unique(codes[codes >= _STRETCHES[-1][0]]).tolist() if len(codes) else []
    for first, last in _STRETCHES:
        for code_point in used:
            if first <= code_point < first + needed:
                first = code_point + 1
        if first + needed <= last:
            return first
    raise Unproved("the conversation uses up the private-use characters that mark texts")


def _codes(text: str) -> np.ndarray:
    """(T,) uint32, the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _fits(real: np.ndarray, tagged: np.ndarray, numbers: np.ndarray) -> bool:
    """Whether both renders, as code points, are equal wherever the tagged one has no tag."""
    return len(real) == len(tagged) and bool(((real == tagged) | (numbers >= 0)).all())


def _lost_texts(tags: TaggedMessages, numbers: np.ndarray) -> Iterator[tuple[int, str, int, int]]:
    present = np.bincount(numbers[numbers >= 0], minlength=len(tags.leaves)).tolist()
    for leaf, found in zip(tags.leaves, present):
        lost = leaf.tagged_characters - found
        if lost > 0 and leaf.reported:
            yield leaf.message, leaf.field, lost, leaf.tagged_characters


def _probe(
    tags: TaggedMessages, silent: Sequence[int], real: np.ndarray, render: Render
) -> tuple[TaggedMessages, str, list[tuple[int, int]]]:
    """Give each silent message one extra character, and prove that the render without it is the same.

    A template may set off a text with white space that it omits for an empty text, so up to three white characters on
    either side may be removed with the probe.
    """
    for at_end in (True, False):
        leaves, messages = list(tags.leaves), list(tags.messages)
        for i in silent:
            content = messages[i].get("content", "")
            rest = "" if at_end or not isinstance(content, str) else content
            probe = chr(tags.first + len(leaves))
            leaves.append(Leaf(i, "content", False, 1, rest))
            messages[i] = {**messages[i], "content": _with_probe(content, probe, at_end)}
        probed = replace(tags, messages=messages, leaves=leaves)
        try:
            tagged_text = render(messages, False)
        except RenderFailed:
            continue
        probes = [
            run
            for run in probed.runs(probed.numbers(_codes(tagged_text)))
            if ord(run.tag) >= tags.first + len(tags.leaves)
        ]
        if [run.message for run in probes] != list(silent) or any(run.end - run.start > 1 for run in probes):
            continue
        for wider in product(range(4), range(4)):
            removed = [(run.start - wider[0], run.end + wider[1]) for run in probes]
            cut = "".join(tagged_text[a:b] for a, b in removed)
            if len("".join(cut.split())) != len(probes):
                continue
            if any(before[1] > after[0] for before, after in pairwise(removed)):
                continue
            without = _codes(_without(tagged_text, removed))
            if _fits(real, without, tags.numbers(without)):
                return probed, tagged_text, removed
    raise Unproved(f"message {silent[0]} (assistant) has no text of its own that could be followed into the render")


def _without(text: str, removed: Sequence[tuple[int, int]]) -> str:
    edges = [0, *(edge for both in removed for edge in both), len(text)]
    return "".join(text[start:end] for start, end in zip(edges[::2], edges[1::2]))


def _with_probe(content: Any, probe: str, at_end: bool) -> Any:
    if isinstance(content, (list, tuple)):
        part = {"type": "text", "text": probe}
        return [*content, part] if at_end else [part, *content]
    return f"{content}{probe}" if at_end else f"{probe}{content}"
