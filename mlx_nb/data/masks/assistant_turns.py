"""Finds the characters of one assistant turn in a rendered conversation.

The template's own text between two messages (the frame) is divided at two places: where the generation prompt of the
same template ends, and after the token that ends the turn. No template is treated specially.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mlx_nb.data.masks.tagging import TaggedRender, Unproved
from mlx_nb.data.masks.template_facts import Message, Render, RenderFailed, TemplateFacts, lexemes, shared_length


@dataclass(frozen=True)
class Turn:
    """The characters `[start, end)` that an assistant message generates, including its end-of-turn."""

    message: int
    start: int
    end: int
    ends_turn: bool
    context_as_in_inference: bool


@dataclass(frozen=True)
class TurnContext:
    """Everything needed to measure one turn. `eos_ranges` are in order."""

    tagged: TaggedRender
    render: Render
    facts: TemplateFacts
    text: str
    eos_ranges: Sequence[tuple[int, int]]
    _marks: dict[str, bool] = field(default_factory=dict)

    def prefix(self, count: int, generation_prompt: bool) -> str | None:
        """The render of the first `count` tagged messages, or None if the template does not render them."""
        if count == 0:
            return None
        if count == len(self.tagged.tags.messages) and not generation_prompt:
            return self.tagged.text
        return _rendered(self.tagged.tags.messages[:count], generation_prompt, self.render)

    def eos_between(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The end-of-sequence tokens within the characters `[start, end)`."""
        k = bisect_left(self.eos_ranges, (start, start))
        while k < len(self.eos_ranges) and self.eos_ranges[k][1] <= end:
            yield self.eos_ranges[k]
            k += 1

    def marks_the_assistant(self, opening: str) -> bool:
        """Whether a part of a header occurs only before assistant text."""
        if opening not in self._marks:
            self._marks[opening] = _marks_the_assistant(self, opening)
        return self._marks[opening]


def measure_turn(context: TurnContext, i: int, first_run: int, last_run: int) -> Turn:
    """The position of the assistant's message `i`, whose texts are these runs. Raises Unproved."""
    start, as_in_inference = _start(context, i, first_run)
    return Turn(i, start, *_end(context, i, last_run), as_in_inference)


def refuse_prefix_mismatch(
    turn: Turn, messages: Sequence[Message], text: str, render: Render, header: str | None
) -> None:
    """Raise Unproved if the simple method of comparing rendered prefixes applies and disagrees.

    It applies to a turn if the render of the messages before it, with a generation prompt, is a prefix of the text; and
    to its end if the render of the messages up to it is a prefix.
    """
    if turn.message == 0 or not header or not turn.context_as_in_inference:
        return
    before = _rendered(messages[: turn.message], True, render)
    if before is None or not text.startswith(before):
        raise Unproved(f"message {turn.message} (assistant) follows a different prompt than in its tagged copy")
    if before.endswith(header) and len(before) != turn.start:
        raise Unproved(f"two ways to find the start of message {turn.message} (assistant) disagree")
    until: str | None = text
    if turn.message < len(messages) - 1:
        until = _rendered(messages[: turn.message + 1], False, render)
    if turn.ends_turn or until is None or not (text.startswith(until) and until.startswith(before)):
        return
    if len(until) < turn.end or text[turn.end : len(until)].strip():
        raise Unproved(f"two ways to find the end of message {turn.message} (assistant) disagree")


def _rendered(messages: Sequence[Message], generation_prompt: bool, render: Render) -> str | None:
    try:
        return render(messages, generation_prompt)
    except RenderFailed:
        return None


def _start(context: TurnContext, i: int, first_run: int) -> tuple[int, bool]:
    """The end of the generation prompt before message `i`, and whether everything before it is as in inference."""
    tagged = context.tagged
    previous = tagged.runs[first_run - 1] if first_run else None
    boundary = previous.end if previous else 0
    frame = tagged.text[boundary : tagged.runs[first_run].start]
    prompt = context.prefix(i, True)
    length = None
    if prompt is not None:
        tag, tail = tagged.tags.tail(prompt)
        if tag == (previous.tag if previous else ""):
            length = _prompt_length(context, i, frame, tail)
    if length is None:
        length = _header_end(context, frame)
    if length is None:
        raise Unproved(f"the start of message {i} (assistant) cannot be distinguished from the template's own text")
    start = boundary + length
    as_in_inference = prompt is not None and len(prompt) == start and tagged.text.startswith(prompt)
    return tagged.in_real(start), as_in_inference


def _prompt_length(context: TurnContext, i: int, frame: str, tail: str) -> int | None:
    """The length of the prompt in `frame`, given the text of an inference prompt in its place (`tail`)."""
    header = context.facts.header
    if frame.startswith(tail) and (not frame[len(tail) :].strip() or (header and tail.endswith(header))):
        return len(tail)
    without = context.prefix(i, False)
    closed = context.tagged.tags.tail(without)[1] if without is not None else ""
    on_request = tail != closed
    if frame.startswith(tail):
        if header is None and not on_request:
            return None
        # No prompt was written in this place, yet the template opens a turn before this message as after a user's.
        opened = _opening_end(context, frame, header or "")
        return max(len(tail), opened or 0)
    shared = shared_length(tail, frame)
    opening = tail[shared_length(tail, closed) : shared] if on_request else tail[:shared]
    if on_request and context.marks_the_assistant(opening):
        return shared
    if not on_request and header and header in opening:
        return shared
    return len(closed) if frame.startswith(closed) and not frame[len(closed) :].strip() else None


def _header_end(context: TurnContext, frame: str) -> int | None:
    """The end of the assistant's header in a frame for which no inference prompt exists."""
    header = context.facts.header
    if header is None:
        return None
    end = _opening_end(context, frame, header) if header in frame else None
    if end is None:
        pieces = lexemes(context.facts.prompt_tail)
        endings = ("".join(pieces[k:]) for k in range(len(pieces)))
        ending = next((e for e in endings if e in frame and context.marks_the_assistant(e)), None)
        end = frame.rindex(ending) + len(ending) if ending else _opening_end(context, frame, header)
    if end is None and (not frame.strip() or context.facts.user_frame.startswith(frame)):
        # No header: text that also precedes a user's text is not the assistant's either.
        return len(frame)
    return end


def _opening_end(context: TurnContext, frame: str, header: str) -> int | None:
    """The end of the header in the frame, or of its longest prefix that marks the assistant."""
    if header.strip() and header in frame:
        return frame.rindex(header) + len(header)
    pieces = lexemes(header)
    for k in range(len(pieces) - 1, 0, -1):
        opening = "".join(pieces[:k])
        if opening in frame and context.marks_the_assistant(opening):
            return frame.rindex(opening) + len(opening)
    return None


def _marks_the_assistant(context: TurnContext, opening: str) -> bool:
    """Whether a part of a header occurs only before assistant text."""
    if not opening.strip() or opening in context.facts.user_frame:
        return False
    position, tagged = 0, context.tagged
    for run in tagged.runs:
        role = tagged.tags.messages[run.message].get("role")
        if role != "assistant" and opening in tagged.text[position : run.start]:
            return False
        position = run.end
    return True


def _end(context: TurnContext, i: int, last_run: int) -> tuple[int, bool]:
    """The end of message `i` in the real text, and whether it includes an end-of-turn."""
    tagged = context.tagged
    run = tagged.runs[last_run]
    following = tagged.runs[last_run + 1].start if last_run + 1 < len(tagged.runs) else len(tagged.text)
    frame = tagged.text[run.end : following]
    closed = context.prefix(i + 1, False)
    shared = content = 0
    if closed is not None:
        tail = _own_tail(context, i, run.tag, closed)
        shared = shared_length(tail, frame)
        rest = tagged.tags.leaf(run.tag).rest
        content = len(rest) if frame[:shared].startswith(rest) else 0
    if not frame[content:shared].strip() and i + 1 < len(tagged.tags.messages):
        shared = max(shared, _closing_before_prompt(context, i, frame))
    # A template may refuse a conversation that ends with a tool call: then the first end after the text belongs to it.
    closed_by = following if closed is None and not shared else run.end + shared
    origin, limit = tagged.in_real(run.end + content), tagged.in_real(closed_by)
    if eos := next(context.eos_between(origin, limit), None):
        return eos[1], True
    closing = frame[content:shared].rstrip()
    end_of_closing = tagged.in_real(run.end + content + len(closing))
    # Closed differently when it is the last message, or by the marker of the next role.
    eos = next(context.eos_between(end_of_closing, tagged.in_real(following)), None)
    if eos and not context.text[end_of_closing : eos[0]].strip():
        return eos[1], True
    if closed is not None and tagged.text.startswith(closed) and len(closed) < run.end + content + len(closing):
        raise Unproved(f"message {i} (assistant) seems to continue into what follows it")
    return end_of_closing, any(len(lexeme) > 2 and lexeme[0] in "<[" for lexeme in lexemes(closing))


def _own_tail(context: TurnContext, i: int, last_tag: str, closed: str) -> str:
    """The text after message `i` when it is the last. Raises Unproved if its own texts then differ."""
    tags, text = context.tagged.tags, context.tagged.text
    tag, tail = tags.tail(closed)
    if tag != last_tag:
        raise Unproved(f"message {i} (assistant) ends with another text when it is the last message")
    for k in tags.of_message.get(i, ()):
        own = chr(tags.first + k)
        if text.count(own) > closed.count(own):
            raise Unproved(f"the {tags.leaves[k].field} of message {i} (assistant) is repeated in what follows it")
    return tail


def _closing_before_prompt(context: TurnContext, i: int, frame: str) -> int:
    """Length of the text in `frame` that closes message `i`; some templates close only before a generation prompt."""
    header, tags = context.facts.header, context.tagged.tags
    prompted = context.prefix(i + 1, True)
    if not header or prompted is None:
        return 0
    tag, tail = tags.tail(prompted)
    if not tag or tags.leaf(tag).message != i:
        return 0
    if tail.endswith(header):
        return shared_length(tail[: -len(header)], frame)
    return len(tail) if frame.startswith(tail) else 0
