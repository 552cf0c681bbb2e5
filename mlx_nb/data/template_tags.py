"""A tagged copy of a conversation: every text replaced by private-use characters, rendered, and proved to fit.

Each text gets one code point. Where the render of the copy equals the real render except at those characters, they
show where each text went. An assistant message without any text of its own gets one character more, and the proof
is that the same render comes out without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mlx_nb.data.template_facts import STRUCTURAL_KEYS, Message, Render, RenderFailed

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TEXT_FIELDS = ("content", *REASONING_FIELDS)
_FIRST_PRIVATE, _LAST_PRIVATE = 0xF0000, 0x10FFFD


class Unproved(Exception):
    """Where a message lies could not be proved. The message says why, without a full stop."""


@dataclass(frozen=True)
class Tagging:
    """Which characters are kept (a pattern), and which texts are replaced besides contents and reasoning."""

    kept: str
    tool_names: bool = True
    other_fields: bool = True
    tool_arguments: bool = True


# From the most telling to the most cautious. Quotes and backslashes are kept because JSON escapes them: a replaced
# one would change the length. Some templates repeat a tool's name in front of its answer, or read its arguments.
TAGGINGS = (
    Tagging(kept=r"[\s\"'\\]"),
    Tagging(kept=r"[\W_]"),
    Tagging(kept=r"[\W_]", tool_names=False, other_fields=False),
    Tagging(kept=r"[\W_]", tool_names=False, other_fields=False, tool_arguments=False),
)


@dataclass(frozen=True)
class Leaf:
    """One text of one message. `rest` is what stays untagged at its end."""

    message: int
    field: str
    reported: bool
    tagged_characters: int
    rest: str


@dataclass(frozen=True)
class TaggedMessages:
    """A tagged copy of a conversation: leaf k is written with `chr(first + k)`."""

    messages: list[Message]
    leaves: list[Leaf]
    first: int

    def leaf(self, tag: str) -> Leaf:
        return self.leaves[ord(tag) - self.first]

    def tail(self, rendered: str) -> tuple[str, str]:
        """The last tag in a render, empty when there is none, and what follows it."""
        low, high = chr(self.first), chr(self.first + len(self.leaves))
        for position in range(len(rendered) - 1, -1, -1):
            if low <= rendered[position] < high:
                return rendered[position], rendered[position + 1 :]
        return "", rendered

    def runs(self, rendered: str) -> list[Run]:
        """The stretches of equal tags in a render, in order."""
        if not self.leaves:
            return []
        tags = f"[{chr(self.first)}-{chr(self.first + len(self.leaves) - 1)}]"
        found = re.finditer(rf"({tags})\1*", rendered)
        return [Run(m.start(), m.end(), m[1], self.leaf(m[1]).message) for m in found]


@dataclass(frozen=True, slots=True)
class Run:
    """Equal tags `[start, end)` in a tagged render."""

    start: int
    end: int
    tag: str
    message: int


@dataclass(frozen=True)
class TaggedRender:
    """A tagged render that is proved to fit the real one.

    text      the tagged render; equal to the real one except at tags and in `removed`
    runs      the tags in it; runs of one text with nothing else between them are joined
    removed   ranges `(start, end)` that are not in the real render
    lost      (message, field, characters lost, characters given) of texts the template leaves out
    absent    assistant messages of which nothing is rendered
    """

    tags: TaggedMessages
    text: str
    runs: list[Run]
    removed: list[tuple[int, int]]
    lost: list[tuple[int, str, int, int]]
    absent: list[int]

    def in_real(self, position: int) -> int:
        """The same place in the real render."""
        return position - sum(min(max(position - start, 0), end - start) for start, end in self.removed)


def tag_and_prove(
    messages: Sequence[Message], text: str, render: Render, constants: Sequence[str], tagging: Tagging
) -> TaggedRender:
    """Render a tagged copy of `messages` and prove it against `text`. Raises Unproved with the reason."""
    tags = _tag(messages, text, constants, tagging)
    try:
        tagged_text = render(tags.messages, False)
    except RenderFailed as error:
        raise Unproved(f"the template fails on a copy with other texts ({error})") from error
    runs = tags.runs(tagged_text)
    if not _fits(text, tagged_text, runs):
        raise Unproved("the template's own text depends on what the messages say")
    lost = list(_lost_texts(tags, runs))
    heard = {run.message for run in runs}
    silent = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and i not in heard]
    absent = [i for i in silent if _is_left_out(messages, i, text, render)]
    removed: list[tuple[int, int]] = []
    if len(silent) > len(absent):
        followed = [i for i in silent if i not in absent]
        try:
            tags, tagged_text, removed = _probe(tags, followed, text, render)
        except Unproved as error:
            left_out = next((i for i, field, *_ in lost if i in followed and field in _TEXT_FIELDS), None)
            if left_out is None:
                raise
            raise Unproved(f"the template leaves out the text of message {left_out} (assistant)") from error
        runs = tags.runs(tagged_text)
    return TaggedRender(tags, tagged_text, _joined(runs), removed, lost, absent)


def _tag(messages: Sequence[Message], text: str, constants: Sequence[str], tagging: Tagging) -> TaggedMessages:
    leaves: list[Leaf] = []
    kept = re.compile(f"(?:{'|'.join([*map(re.escape, constants), tagging.kept])})+")
    kept_without_constants = re.compile(f"{tagging.kept}+")
    first = _free_code_point(messages, text)

    def tagged(value: Any, message: int, path: tuple[str, ...]) -> Any:
        if not isinstance(value, str):
            if isinstance(value, (list, tuple)):
                return [tagged(item, message, path) for item in value]
            if isinstance(value, Mapping):
                return {key: tagged(item, message, (*path, str(key))) for key, item in value.items()}
            return value
        if not _is_text(path, tagging):
            return value
        tag = chr(first + len(leaves))
        written = _replace_others(value, kept, tag)
        if tag not in written:
            written = _replace_others(value, kept_without_constants, tag)
        if tag not in written:
            return value
        reported = path[0] == "tool_calls" or (path[0] in _TEXT_FIELDS and path[-1] in (*_TEXT_FIELDS, "text"))
        leaves.append(Leaf(message, path[0], reported, written.count(tag), written[written.rindex(tag) + 1 :]))
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


def _replace_others(value: str, kept: re.Pattern[str], tag: str) -> str:
    pieces, position = [], 0
    for match in kept.finditer(value):
        pieces += [tag * (match.start() - position), match.group()]
        position = match.end()
    return "".join([*pieces, tag * (len(value) - position)])


def _free_code_point(messages: Sequence[Message], text: str) -> int:
    """The first of a stretch of private-use code points that occur nowhere in the conversation."""
    strings = [text, *_strings(messages)]
    needed = len(strings) + len(messages)
    used = {ord(c) for string in strings if not string.isascii() for c in string if ord(c) >= _FIRST_PRIVATE}
    first = _FIRST_PRIVATE
    for code_point in sorted(used):
        if first <= code_point < first + needed:
            first = code_point + 1
    if first + needed > _LAST_PRIVATE:
        raise Unproved("the conversation uses up the private-use characters that mark texts")
    return first


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)


def _fits(text: str, tagged_text: str, runs: Sequence[Run]) -> bool:
    """Whether both renders are equal wherever there is no tag."""
    if len(text) != len(tagged_text):
        return False
    position = 0
    for run in runs:
        if text[position : run.start] != tagged_text[position : run.start]:
            return False
        position = run.end
    return text[position:] == tagged_text[position:]


def _joined(runs: Sequence[Run]) -> list[Run]:
    result: list[Run] = []
    for run in runs:
        if result and result[-1].tag == run.tag:
            result[-1] = Run(result[-1].start, run.end, run.tag, run.message)
        else:
            result.append(run)
    return result


def _lost_texts(tags: TaggedMessages, runs: Sequence[Run]) -> Iterator[tuple[int, str, int, int]]:
    present: dict[str, int] = {}
    for run in runs:
        present[run.tag] = present.get(run.tag, 0) + run.end - run.start
    for k, leaf in enumerate(tags.leaves):
        lost = leaf.tagged_characters - present.get(chr(tags.first + k), 0)
        if lost > 0 and leaf.reported:
            yield leaf.message, leaf.field, lost, leaf.tagged_characters


def _is_left_out(messages: Sequence[Message], i: int, text: str, render: Render) -> bool:
    others = [*messages[:i], *messages[i + 1 :]]
    try:
        return bool(others) and render(others, False) == text
    except RenderFailed:
        return False


def _probe(
    tags: TaggedMessages, silent: Sequence[int], text: str, render: Render
) -> tuple[TaggedMessages, str, list[tuple[int, int]]]:
    """Give each silent message one more character, and prove that without it the render is the same.

    A template may set off a text by white space that it leaves out where there is none, so up to three white
    characters on either side may go with the probe.
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
        probes = [run for run in probed.runs(tagged_text) if ord(run.tag) >= tags.first + len(tags.leaves)]
        if [run.message for run in probes] != list(silent) or any(run.end - run.start > 1 for run in probes):
            continue
        for before, after in product(range(4), range(4)):
            removed = [(run.start - before, run.end + after) for run in probes]
            cut = "".join(tagged_text[a:b] for a, b in removed)
            if len("".join(cut.split())) != len(probes):
                continue
            without = _without(tagged_text, removed)
            if _fits(text, without, tags.runs(without)):
                return probed, tagged_text, removed
    raise Unproved(f"message {silent[0]} (assistant) has no text of its own that could be followed into the render")


def _without(text: str, removed: Sequence[tuple[int, int]]) -> str:
    for start, end in reversed(removed):
        text = text[:start] + text[end:]
    return text


def _with_probe(content: Any, probe: str, at_end: bool) -> Any:
    if isinstance(content, (list, tuple)):
        part = {"type": "text", "text": probe}
        return [*content, part] if at_end else [part, *content]
    return f"{content}{probe}" if at_end else f"{probe}{content}"
