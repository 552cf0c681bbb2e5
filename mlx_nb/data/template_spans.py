"""Where each message lies in a rendered conversation.

The template's own text between two messages (the frame) is divided in two places: where the generation prompt of
the same template ends, and after the token that ends the turn. Nothing is known beforehand of any template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlx_nb.data.template_facts import Message, Render, RenderFailed, TemplateFacts, lexemes, shared_length
from mlx_nb.data.template_tags import TAGGINGS, TaggedRender, Unproved, tag_and_prove


@dataclass(frozen=True)
class Turn:
    """The characters `[start, end)` that an assistant message generates, its end-of-turn included."""

    message: int
    start: int
    end: int
    ends_turn: bool
    context_as_in_inference: bool


@dataclass(frozen=True)
class Located:
    """Where every message lies in the rendered text.

    turns     one for each assistant message that is in the text, in order
    regions   (message, start, end) of the texts of the other messages
    lost      (message, field, characters lost, characters given), for texts the template leaves out
    absent    assistant messages of which nothing is in the text
    """

    turns: tuple[Turn, ...]
    regions: tuple[tuple[int, int, int], ...]
    lost: tuple[tuple[int, str, int, int], ...]
    absent: tuple[int, ...]


@dataclass(frozen=True)
class _Scene:
    """All that is needed to measure one turn."""

    tagged: TaggedRender
    render: Render
    facts: TemplateFacts
    text: str
    eos_ranges: Sequence[tuple[int, int]]

    def prefix(self, count: int, generation_prompt: bool) -> str | None:
        """The render of the first `count` tagged messages, or None where the template does not render them."""
        if count == 0:
            return None
        if count == len(self.tagged.tags.messages) and not generation_prompt:
            return self.tagged.text
        try:
            return self.render(self.tagged.tags.messages[:count], generation_prompt)
        except RenderFailed:
            return None


def locate_messages(
    messages: Sequence[Message],
    text: str,
    render: Render,
    facts: TemplateFacts,
    eos_ranges: Sequence[tuple[int, int]],
) -> Located:
    """Find every message in `text`, which is `render(messages, False)`.

    `eos_ranges` are the character ranges of the end-of-sequence tokens in `text`, in order.
    Raises Unproved, with the reason of the first attempt, when no way of tagging leads to a proof.
    """
    reason: Unproved | None = None
    for tagging in TAGGINGS:
        try:
            tagged = tag_and_prove(messages, text, render, facts.constants, tagging)
            return _measure(messages, _Scene(tagged, render, facts, text, eos_ranges))
        except Unproved as error:
            reason = reason or error
    raise reason or Unproved("no text could be tagged")


def _measure(messages: Sequence[Message], scene: _Scene) -> Located:
    own: dict[int, list[int]] = {}
    for k, run in enumerate(scene.tagged.runs):
        own.setdefault(run.message, []).append(k)
    turns: list[Turn] = []
    for i, runs in own.items():
        if messages[i].get("role") == "assistant":
            if len(runs) != runs[-1] - runs[0] + 1:
                raise Unproved(f"the text of message {i} (assistant) is mixed with that of others")
            start, as_in_inference = _start(scene, i, runs[0])
            turns.append(Turn(i, start, *_end(scene, i, runs[-1]), as_in_inference))
    turns.sort(key=lambda turn: turn.start)
    for before, after in pairwise(turns):
        if before.end > after.start:
            raise Unproved(f"messages {before.message} and {after.message} overlap in the text")
    regions = [r for r in _regions(scene.tagged) if messages[r[0]].get("role") != "assistant"]
    return Located(tuple(turns), tuple(regions), tuple(scene.tagged.lost), tuple(scene.tagged.absent))


def _regions(tagged: TaggedRender) -> Iterator[tuple[int, int, int]]:
    """The texts of each message; those that no other message interrupts are one region."""
    first = 0
    runs = tagged.runs
    for k, run in enumerate(runs):
        if k + 1 == len(runs) or runs[k + 1].message != run.message:
            yield run.message, tagged.in_real(runs[first].start), tagged.in_real(run.end)
            first = k + 1


def _start(scene: _Scene, i: int, first_run: int) -> tuple[int, bool]:
    """Where the generation prompt before message `i` ends, and whether all before it is what inference gives."""
    tagged = scene.tagged
    previous = tagged.runs[first_run - 1] if first_run else None
    boundary = previous.end if previous else 0
    frame = tagged.text[boundary : tagged.runs[first_run].start]
    prompt = scene.prefix(i, True)
    length = None
    if prompt is not None:
        tag, tail = tagged.tags.tail(prompt)
        if tag == (previous.tag if previous else ""):
            length = _prompt_length(scene, i, frame, tail)
    if length is None:
        length = _header_end(scene, frame)
    if length is None:
        raise Unproved(f"the start of message {i} (assistant) cannot be told from the template's own text")
    start = boundary + length
    as_in_inference = prompt is not None and len(prompt) == start and tagged.text.startswith(prompt)
    return tagged.in_real(start), as_in_inference


def _prompt_length(scene: _Scene, i: int, frame: str, tail: str) -> int | None:
    """How much of `frame` is the prompt, given what an inference prompt has in its place (`tail`)."""
    header = scene.facts.header
    if frame.startswith(tail) and (not frame[len(tail) :].strip() or (header and tail.endswith(header))):
        return len(tail)
    without = scene.prefix(i, False)
    closed = scene.tagged.tags.tail(without)[1] if without is not None else ""
    asked = tail != closed
    if frame.startswith(tail):
        if header is None and not asked:
            return None
        # No prompt was written here, yet before this message the template opens a turn as after a user's.
        opened = _opening_end(scene, frame, header or "")
        return max(len(tail), opened or 0)
    shared = shared_length(tail, frame)
    opening = tail[shared_length(tail, closed) : shared] if asked else tail[:shared]
    if asked and _marks_the_assistant(scene, opening):
        return shared
    if not asked and header and header in opening:
        return shared
    return len(closed) if frame.startswith(closed) and not frame[len(closed) :].strip() else None


def _header_end(scene: _Scene, frame: str) -> int | None:
    """Where the assistant's header ends in a frame for which no inference prompt exists."""
    header = scene.facts.header
    if header is None:
        return None
    end = _opening_end(scene, frame, header) if header in frame else None
    if end is None:
        pieces = lexemes(scene.facts.prompt_tail)
        endings = ("".join(pieces[k:]) for k in range(len(pieces)))
        ending = next((e for e in endings if e in frame and _marks_the_assistant(scene, e)), None)
        end = frame.rindex(ending) + len(ending) if ending else _opening_end(scene, frame, header)
    if end is None and (not frame.strip() or scene.facts.user_frame.startswith(frame)):
        # No header: what also stands before a user's text is not the assistant's either.
        return len(frame)
    return end


def _opening_end(scene: _Scene, frame: str, header: str) -> int | None:
    """Where the header, or the longest beginning of it that marks the assistant, ends in the frame."""
    if header.strip() and header in frame:
        return frame.rindex(header) + len(header)
    pieces = lexemes(header)
    for k in range(len(pieces) - 1, 0, -1):
        opening = "".join(pieces[:k])
        if opening in frame and _marks_the_assistant(scene, opening):
            return frame.rindex(opening) + len(opening)
    return None


def _marks_the_assistant(scene: _Scene, opening: str) -> bool:
    """Whether a piece of a header is written before the assistant's texts only."""
    if not opening.strip() or opening in scene.facts.user_frame:
        return False
    position, tagged = 0, scene.tagged
    for run in tagged.runs:
        role = tagged.tags.messages[run.message].get("role")
        if role != "assistant" and opening in tagged.text[position : run.start]:
            return False
        position = run.end
    return True


def _end(scene: _Scene, i: int, last_run: int) -> tuple[int, bool]:
    """Where message `i` ends in the real text, and whether an end-of-turn is part of it."""
    tagged = scene.tagged
    run = tagged.runs[last_run]
    following = tagged.runs[last_run + 1].start if last_run + 1 < len(tagged.runs) else len(tagged.text)
    frame = tagged.text[run.end : following]
    closed = scene.prefix(i + 1, False)
    shared = content = 0
    if closed is not None:
        tail = _own_tail(scene, i, run.tag, closed)
        shared = shared_length(tail, frame)
        rest = tagged.tags.leaf(run.tag).rest
        content = len(rest) if frame[:shared].startswith(rest) else 0
    if not frame[content:shared].strip() and i + 1 < len(tagged.tags.messages):
        shared = max(shared, _closing_before_prompt(scene, i, frame))
    # A template may refuse a conversation that ends with a tool call: then the first end after the text is its own.
    closed_by = following if closed is None and not shared else run.end + shared
    origin, limit = tagged.in_real(run.end + content), tagged.in_real(closed_by)
    for start, end in scene.eos_ranges:
        if origin <= start and end <= limit:
            return end, True
    closing = frame[content:shared].rstrip()
    end_of_closing = tagged.in_real(run.end + content + len(closing))
    for start, end in scene.eos_ranges:
        # Closed in another way when it is the last message, or by the marker of the next role.
        if end_of_closing <= start and end <= tagged.in_real(following):
            if not scene.text[end_of_closing:start].strip():
                return end, True
            break
    if closed is not None and tagged.text.startswith(closed) and len(closed) < run.end + content + len(closing):
        raise Unproved(f"message {i} (assistant) seems to go on into what follows it")
    return end_of_closing, any(len(lexeme) > 2 and lexeme[0] in "<[" for lexeme in lexemes(closing))


def _own_tail(scene: _Scene, i: int, last_tag: str, closed: str) -> str:
    """What follows message `i` when it is the last. Raises Unproved when its texts are then others."""
    tags, text = scene.tagged.tags, scene.tagged.text
    tag, tail = tags.tail(closed)
    if tag != last_tag:
        raise Unproved(f"message {i} (assistant) ends with another text when it is the last message")
    for k, leaf in enumerate(tags.leaves):
        own = chr(tags.first + k)
        if leaf.message == i and text.count(own) > closed.count(own):
            raise Unproved(f"the {leaf.field} of message {i} (assistant) is repeated in what follows it")
    return tail


def _closing_before_prompt(scene: _Scene, i: int, frame: str) -> int:
    """How much of `frame` closes message `i` when a generation prompt follows: some templates close only then."""
    header, tags = scene.facts.header, scene.tagged.tags
    prompted = scene.prefix(i + 1, True)
    if not header or prompted is None:
        return 0
    tag, tail = tags.tail(prompted)
    if not tag or tags.leaf(tag).message != i:
        return 0
    if tail.endswith(header):
        return shared_length(tail[: -len(header)], frame)
    return len(tail) if frame.startswith(tail) else 0
