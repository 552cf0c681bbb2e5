"""The second pass of the data check: tokenizes rows as training does, and counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_nb.data.check.findings import Collector, RowTally
from mlx_nb.data.examples.examples import beyond_context, examples_of, tokenize_as
from mlx_nb.data.examples.kinds import ROW_KINDS, Conversations, Example, recognize
from mlx_nb.data.examples.limits import BeyondPositions, OutsideVocabulary
from mlx_nb.data.examples.settings import ExampleSettings, TooLong
from mlx_nb.data.masks.control_tokens import control_tokens
from mlx_nb.data.masks.conversation import written_sentences
from mlx_nb.data.masks.render import fast_tokenizer
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.rows.content import RowContent
from mlx_nb.data.rows.imitation import TextRow
from mlx_nb.data.rows.preference import NothingToPrefer
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.errors import DataError, MaskRefused

_BARS = 24
_KINDS_OF_ERRORS = {
    NothingToPrefer: "identical_answers",
    TooLong: "too_long",
    OutsideVocabulary: "outside_vocabulary",
    BeyondPositions: "beyond_positions",
}
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


@dataclass(frozen=True)
class LengthSummary:
    """Distribution of tokens per row, before truncation.

    keeps_99          the smallest max_seq_length at which 99 of 100 rows stay whole
    histogram_counts  rows with histogram_edges[i] <= tokens < histogram_edges[i + 1]; the last bar may be wider
    """

    shortest: int
    median: float
    mean: float
    p95: float
    longest: int
    over_max_seq_length: int
    keeps_99: int
    histogram_edges: tuple[int, ...]
    histogram_counts: tuple[int, ...]

    @property
    def last_bar_is_wider(self) -> bool:
        """Whether the last bar of the histogram holds the few rows that are far longer than the others."""
        edges = self.histogram_edges
        return len(edges) > 2 and edges[-1] - edges[-2] != edges[1] - edges[0]


def sampled_rows(total: int, wanted: int | None) -> np.ndarray:
    """Which rows are tokenized, in order: all, or `wanted` of them drawn as a function of `total` alone."""
    if wanted is None or wanted >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng([total, wanted]).choice(total, wanted, replace=False))


@dataclass
class TokenCounts:
    """Counts for the tokenized rows of one split. `lengths` are before truncation, the other numbers after it.

    For pairs, `lengths` has both answers, each with its prompt. `longer_chosen` and `longer_rejected` count the pairs
    in which that answer has more trained tokens before truncation. A trainable row is one of the `examples`, or several
    with `truncate: split`.
    """

    checked: int
    lengths: list[int] = field(default_factory=list)
    trainable: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longer_chosen: int = 0
    longer_rejected: int = 0
    refused: RowTally = field(default_factory=RowTally)
    left_out: RowTally = field(default_factory=RowTally)
    truncated: RowTally = field(default_factory=RowTally)


def count_tokens(
    source: RowSource,
    rows: np.ndarray,
    tokenizer: Tokenizer,
    settings: ExampleSettings,
    collector: Collector,
    kind: str = "tokens",
) -> TokenCounts:
    """Make the examples of these rows, count their tokens, and collect findings.

    Rows that cannot be read are skipped: the first pass reports them.
    """
    counts = TokenCounts(len(rows))
    for row in rows.tolist():
        try:
            content = recognize(kind, source[row], settings.columns)
        except DataError:
            continue
        try:
            conversations = tokenize_as(kind, content, tokenizer, settings)
        except DataError as error:
            _collect_refusal(error, row, counts, collector)
            continue
        counts.lengths += [len(conversation.tokens) for conversation in conversations]
        _compare_answers(conversations, counts)
        _collect_written(content, conversations, row, tokenizer, collector)
        notes = [note for conversation in conversations for note in conversation.notes]
        problems = [
            problem for conversation in conversations for problem in conversation.problems if problem not in notes
        ]
        _collect("mask_problem", problems, row, collector)
        _collect("tool_values", notes, row, collector)
        try:
            examples = examples_of(kind, content, conversations, row, settings)
        except MaskRefused as error:
            _collect_refusal(error, row, counts, collector)
            continue
        except DataError as error:
            counts.left_out.add(row, str(error))
            collector.add(_why_left_out(error, kind, settings), row, str(error))
            continue
        counts.trainable += 1
        counts.examples += len(examples)
        _count_examples(examples, row, counts, collector)
        _collect_context(examples, row, settings, collector)
    return counts


def _count_examples(examples: Sequence[Example], row: int, counts: TokenCounts, collector: Collector) -> None:
    sequences = [sequence for example in examples for sequence in example.sequences]
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    counts.tokens += tokens
    counts.trained_tokens += sum(int(np.count_nonzero(sequence.loss_mask)) for sequence in sequences)
    dropped = sum(sequence.dropped_tokens for sequence in sequences)
    if dropped:
        reason = f"{dropped:,} of {tokens + dropped:,} tokens are cut"
        counts.truncated.add(row, reason)
        collector.add("truncated", row, reason)


def _collect_context(examples: Sequence[Example], row: int, settings: ExampleSettings, collector: Collector) -> None:
    if length := beyond_context(examples, settings):
        collector.add(
            "beyond_context", row, f"{length:,} tokens", remark=f"it was made for {settings.limits.context:,}"
        )


def _compare_answers(conversations: Conversations, counts: TokenCounts) -> None:
    if len(conversations) == 2:
        chosen, rejected = (int(np.count_nonzero(answer.loss_mask)) for answer in conversations)
        counts.longer_chosen += chosen > rejected
        counts.longer_rejected += chosen < rejected


def _collect_written(
    content: RowContent, conversations: Conversations, row: int, tokenizer: Tokenizer, collector: Collector
) -> None:
    """Collect a row whose text contains control tokens; only a note for plain text, which may be a chat written out."""
    sentences = [sentence for conversation in conversations for sentence in written_sentences(conversation)]
    if sentences:
        special = control_tokens(fast_tokenizer(tokenizer)).special
        plain = isinstance(content, TextRow) or not any(
            one.token in special for c in conversations for one in c.written
        )
        collector.add("markers" if plain else "control_tokens", row, sentences[0])


def _collect(finding: str, remarks: Sequence[str], row: int, collector: Collector) -> None:
    """Collect the first remark of each kind."""
    first_of_kind = {kind_of(remark): remark for remark in reversed(remarks)}
    for kind, remark in sorted(first_of_kind.items()):
        collector.add(finding, row, remark, remark=kind)


def _collect_refusal(error: DataError, row: int, counts: TokenCounts, collector: Collector) -> None:
    counts.refused.add(row, str(error))
    collector.add("refused", row, str(error), remark=kind_of(str(error)))


def _why_left_out(error: DataError, kind: str, settings: ExampleSettings) -> str:
    """The kind of finding for a row that makes no example: too long, or a pair of the same tokens."""
    for raised, found in _KINDS_OF_ERRORS.items():
        if isinstance(error, raised):
            return found
    if settings.truncate == "drop":
        return "dropped"
    return "long_left_out" if settings.truncate == "split" or not ROW_KINDS[kind].answered else "reply_cut_away"


def kind_of(problem: str) -> str:
    """The first sentence of a remark, generalized: quoted texts become … and numbers N."""
    general = re.sub(r"\b\d+(?:[.,]\d+)*", "N", _QUOTED.sub("…", problem))
    return general.split(". ")[0].rstrip(".")


def length_summary(lengths: Sequence[int], max_seq_length: int) -> LengthSummary | None:
    """The summary of some token counts; None without any."""
    if not len(lengths):
        return None
    ordered = np.sort(np.asarray(lengths, np.int64))
    keeps_99 = int(ordered[math.ceil(0.99 * len(ordered)) - 1])
    edges = _bar_edges(keeps_99, int(ordered[-1]))
    return LengthSummary(
        shortest=int(ordered[0]),
        median=float(np.median(ordered)),
        mean=round(float(ordered.mean()), 2),
        p95=float(np.percentile(ordered, 95)),
        longest=int(ordered[-1]),
        over_max_seq_length=int((ordered > max_seq_length).sum()),
        keeps_99=keeps_99,
        histogram_edges=tuple(edges),
        histogram_counts=tuple(np.histogram(ordered, edges)[0].tolist()),
    )


def _bar_edges(most: int, longest: int) -> list[int]:
    """Edges of equal bars from 0 past `most`, their width 1, 2 or 5 times a power of ten; one last bar for the rest."""
    width = next(w for k in range(12) for w in (10**k, 2 * 10**k, 5 * 10**k) if w * _BARS > most)
    edges = list(range(0, most + width + 1, width))
    if longest < edges[-1]:
        return edges
    return [*edges, edges[-1] + width] if longest < edges[-1] + width else [*edges, longest + 1]
