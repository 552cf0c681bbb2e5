"""The kinds of findings of the data check: each declared once, with its severity and what to do about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
SHOWN_ROWS, SHOWN_EXAMPLES, LISTED_ROWS = 20, 3, 50


@dataclass(frozen=True)
class Kind:
    """One kind of finding. `what` describes the rows; `next` says what to do, with {row} for the first of them."""

    severity: str
    what: str
    next: str


KINDS: dict[str, Kind] = {
    "unreadable": Kind(ERROR, "rows that cannot be read", "Fix or delete them: they are left out."),
    "identical_answers": Kind(
        WARNING,
        "pairs whose two answers are the same, left out",
        "Correct one of the answers, or delete the row; raise max_seq_length where the cut made them the same.",
    ),
    "too_long": Kind(
        ERROR,
        "rows over max_seq_length, with `truncate: error`",
        "Raise max_seq_length, or set truncate to right, left or drop.",
    ),
    "outside_vocabulary": Kind(
        ERROR,
        "rows with tokens that the model does not have, left out",
        "Use the tokenizer that the model was trained with, or take the tokens out of the rows.",
    ),
    "nothing_to_train": Kind(ERROR, "not one row can be trained", "See below why rows are refused or left out."),
    "refused": Kind(
        WARNING,
        "rows refused and left out",
        "Change the rows, `loss_on` or `chat_template`, as the reason says.",
    ),
    "reply_cut_away": Kind(
        WARNING,
        "rows left out: nothing trained is left within max_seq_length",
        "Raise max_seq_length, or shorten the rows.",
    ),
    "long_left_out": Kind(
        WARNING, "rows over max_seq_length, left out", "Raise max_seq_length, or set another `truncate`."
    ),
    "beyond_positions": Kind(
        WARNING,
        "rows longer than the positions that the model has learned, left out",
        "Lower max_seq_length to that number to cut them, or shorten the rows.",
    ),
    "beyond_context": Kind(
        WARNING,
        "rows longer than the model was made for",
        "Lower max_seq_length, or set rope_scaling in the model's config.json: far positions are new to the model.",
    ),
    "dropped": Kind(
        NOTE, "rows over max_seq_length, left out by `truncate: drop`", "Raise max_seq_length to train them."
    ),
    "truncated": Kind(
        WARNING,
        "rows cut at max_seq_length",
        "Raise max_seq_length, or set `truncate: drop`. A cut reply has no end to learn from.",
    ),
    "shared_with_train": Kind(
        WARNING,
        "rows that are in the training rows too",
        "Remove them from one split: the loss on them says nothing about new rows.",
    ),
    "nearly_shared_with_train": Kind(
        WARNING, "rows nearly the same as a training row", "Look at the pairs; keep similar rows in one split."
    ),
    "exact_duplicates": Kind(
        WARNING, "rows that repeat an earlier row exactly", "Remove the copies, unless they are meant to count more."
    ),
    "near_duplicates": Kind(NOTE, "rows nearly the same as another row", "Look at the groups; keep the best of each."),
    "repeated_prompts": Kind(
        NOTE, "rows with the same prompt as an earlier row", "Fine if the answers differ; such a prompt counts more."
    ),
    "missing_answers": Kind(
        WARNING,
        "prompts without an answer",
        "Set answer_feature to the column with the right answer, unless the rewards need none.",
    ),
    "answer_length": Kind(
        WARNING,
        "chosen and rejected answers differ in length",
        "Such pairs teach length too: balance them, or watch how long the model's answers get.",
    ),
    "lopsided_labels": Kind(
        NOTE,
        "most labels are the same",
        "Set desirable_weight and undesirable_weight so that both sides weigh about the same.",
    ),
    "two_systems": Kind(
        WARNING,
        "rows whose `system` column is not used, because their messages begin with another system prompt",
        "Remove one of the two. `system_feature: system` refuses such rows.",
    ),
    "labeled_bad": Kind(
        WARNING,
        "rows whose `label` says that the answer is bad",
        "Set `method: kto`, which learns from it, or drop them: as it is, the answer is imitated.",
    ),
    "mixed_shapes": Kind(
        NOTE, "rows of another shape than the first row", "Check that the columns mean the same in all of them."
    ),
    "mixed_formats": Kind(
        WARNING,
        "rows written in another format than the first: raw text beside the chat template",
        "The model learns two formats but is prompted in one. Set `prompt_format`, or make the rows alike.",
    ),
    "control_tokens": Kind(
        WARNING,
        "rows with a control token in their own text",
        "It becomes the real token. Remove it, or `special_tokens_in_text: text` turns it into ordinary text.",
    ),
    "markers": Kind(
        NOTE,
        "rows with a marker of the model in their own text",
        "Fine if intended; `special_tokens_in_text: text` turns it into ordinary text.",
    ),
    "empty_turns": Kind(
        WARNING,
        "rows with an empty turn",
        "Fill the turn or drop the row. An empty reply teaches silence.",
    ),
    "long_turns": Kind(
        NOTE, "rows with a very long turn", "See whether something was pasted whole, such as a log or a page."
    ),
    "assistant_first": Kind(
        WARNING, "conversations that start with the assistant", "Put the user's message in front, or drop the row."
    ),
    "same_role_twice": Kind(
        WARNING,
        "conversations with the same role twice in a row",
        "Join the two messages, or add the missing one between them.",
    ),
    "late_system": Kind(
        WARNING,
        "conversations with a system message that is not the first",
        "Move it to the front, or make it a user message.",
    ),
    "last_not_assistant": Kind(
        WARNING,
        "conversations that do not end with the assistant",
        "Drop the messages after the last reply: they are never trained.",
    ),
    "mask_problem": Kind(WARNING, "loss mask", "Look at it token by token: `%finetune row {row}`."),
    "tool_values": Kind(
        NOTE,
        "values in tool calls and tools",
        "Nothing to do if a table wrote them. Otherwise see what is trained: `%finetune row {row}`.",
    ),
    "no_chat_template": Kind(
        ERROR,
        "conversations, but the tokenizer has no chat template",
        "Set `chat_template:` to one, or use an instruct model.",
    ),
    "no_end_of_turn": Kind(
        WARNING,
        "the chat template trains no end of turn",
        "The model will not learn to stop. Set `chat_template:` to one that ends turns.",
    ),
    "end_does_not_stop": Kind(
        WARNING,
        "generation does not stop at the trained end of turn",
        "Add that token to `eos_token_id` in the model's config.json.",
    ),
    "double_bos": Kind(
        NOTE,
        "the template writes a BOS and the tokenizer adds another",
        "Nothing to do here: one is kept. Elsewhere, tokenize with add_special_tokens=False.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A finding about the rows of a split, or about the chat template (then `split` is None).

    severity  "error": a run would stop; "warning": trained, but probably not as intended; "note": good to know
    count     how many rows, out of `looked_at` that were checked for it
    rows      the first of them, from 0
    examples  some of them in words, as (row, text)
    """

    kind: str
    severity: str
    split: str | None
    what: str
    next: str
    count: int = 0
    looked_at: int = 0
    rows: tuple[int, ...] = ()
    examples: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class RowList:
    """A number of rows, and the first of them as (row, reason)."""

    count: int
    rows: tuple[tuple[int, str], ...]


@dataclass
class RowTally:
    """Counts rows and stores the first of them with their reasons."""

    count: int = 0
    rows: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, reason: str) -> None:
        """Count a row, and store it if there are few so far."""
        self.count += 1
        if len(self.rows) < LISTED_ROWS:
            self.rows.append((row, reason))

    def listed(self) -> RowList:
        """The rows counted so far."""
        return RowList(self.count, tuple(self.rows))


@dataclass
class _Rows:
    count: int = 0
    rows: list[int] = field(default_factory=list)
    examples: list[tuple[int, str]] = field(default_factory=list)


class Collector:
    """Collects the findings of one split by kind: all counts, but only the first rows and examples."""

    def __init__(self, split: str) -> None:
        self.split = split
        self._found: dict[tuple[str, str], _Rows] = {}

    def add(self, kind: str, row: int, example: str = "", *, remark: str = "") -> None:
        """Record that row `row` is of this kind. Rows with different `remark`s are separate findings."""
        found = self._found.setdefault((kind, remark), _Rows())
        found.count += 1
        if len(found.rows) < SHOWN_ROWS:
            found.rows.append(row)
        if example and len(found.examples) < SHOWN_EXAMPLES:
            found.examples.append((row, example))

    def findings(self, looked_at: int) -> list[Finding]:
        """The collected findings; `looked_at` is how many rows were checked."""
        other_split = "" if self.split == "train" else f" --split {self.split}"
        return [
            dataclasses.replace(
                about := finding(kind, self.split, remark),
                next=about.next.replace("{row}", f"{found.rows[0]}{other_split}"),
                count=found.count,
                looked_at=looked_at,
                rows=tuple(found.rows),
                examples=tuple(found.examples),
            )
            for (kind, remark), found in self._found.items()
        ]


def finding(kind: str, split: str | None = None, remark: str = "") -> Finding:
    """A finding of a declared kind; `remark` adds details."""
    declared = KINDS[kind]
    what = f"{declared.what}: {remark}" if remark else declared.what
    return Finding(kind, declared.severity, split, what, declared.next)


def in_order(findings: list[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes; within each in the order of the table, then by number of rows."""
    kinds = list(KINDS)
    return tuple(
        sorted(findings, key=lambda item: (SEVERITIES.index(item.severity), kinds.index(item.kind), -item.count))
    )
