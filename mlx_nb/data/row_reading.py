"""The first pass of the data check: every row is read, for its shape, its roles, its turns and its doubles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mlx_nb.data.duplicates import NEAR, Groups, NearIndex, common_sequences, row_digest, spoken_text
from mlx_nb.data.examples import ExampleSettings
from mlx_nb.data.findings import LISTED_ROWS, Collector, RowTally
from mlx_nb.data.rows import ChatRow, PromptCompletionRow, Row, recognise
from mlx_nb.data.sources import RowSource
from mlx_nb.data.template_tags import REASONING_FIELDS
from mlx_nb.data.token_counts import sampled_rows
from mlx_nb.errors import DataError

_BOILERPLATE_SAMPLE = 2000
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Overlap:
    """Rows of `split` that are training rows too. `pairs`: the first, as (row, training row, similarity)."""

    split: str
    exact: int
    near: int
    pairs: tuple[tuple[int, int, float], ...]


@dataclass
class SplitReading:
    """What reading all rows of one split gives. `near` joins the rows that are nearly the same."""

    split: str
    rows: int
    collector: Collector
    shapes: Counter[str] = field(default_factory=Counter)
    unreadable: RowTally = field(default_factory=RowTally)
    exact_duplicates: int = 0
    near: Groups = field(default_factory=Groups)
    first_with: dict[bytes, int] = field(default_factory=dict)
    shared_exactly: RowTally = field(default_factory=RowTally)


def read_splits(
    sources: dict[str, RowSource], settings: ExampleSettings
) -> tuple[dict[str, SplitReading], list[Overlap]]:
    """Read every row of every split, `train` first; and again, one by one, the rows that may be nearly the same."""
    rows = _Rows(sources, settings)
    index = NearIndex(len(rows), common_sequences(_some_texts(rows)), rows.text)
    readings = {name: SplitReading(name, len(source), Collector(name)) for name, source in sources.items()}
    for reading in readings.values():
        _read(reading, readings["train"], rows, index, settings)
    near = _compare(readings, rows, index)
    overlaps = [_overlap(reading, near[name]) for name, reading in readings.items() if name != "train"]
    return readings, overlaps


class _Rows:
    """The rows of all splits under one count, so that one index holds them all."""

    def __init__(self, sources: dict[str, RowSource], settings: ExampleSettings) -> None:
        self.sources, self.columns = sources, settings.columns
        self.starts: dict[str, int] = {}
        self._length = 0
        for name, source in sources.items():
            self.starts[name] = self._length
            self._length += len(source)

    def __len__(self) -> int:
        return self._length

    def recognised(self, split: str, row: int) -> Row | str:
        """The row, or why it cannot be read."""
        source = self.sources[split]
        try:
            return recognise(source[row], self.columns, location=source.location(row))
        except DataError as error:
            return str(error)

    def place(self, number: int) -> tuple[str, int]:
        split = next(name for name in reversed(self.starts) if self.starts[name] <= number)
        return split, number - self.starts[split]

    def text(self, number: int) -> str:
        content = self.recognised(*self.place(number))
        return "" if isinstance(content, str) else spoken_text(content)


def _some_texts(rows: _Rows) -> Iterator[str]:
    for row in sampled_rows(len(rows.sources["train"]), _BOILERPLATE_SAMPLE).tolist():
        yield rows.text(row)


def _read(reading: SplitReading, train: SplitReading, rows: _Rows, index: NearIndex, settings: ExampleSettings) -> None:
    long_turn = _CHARACTERS_PER_TOKEN * settings.max_seq_length
    first_shape = ""
    for row in range(reading.rows):
        content = rows.recognised(reading.split, row)
        if isinstance(content, str):
            reading.unreadable.add(row, content)
            reading.collector.add("unreadable", row, content)
            continue
        shape = _shape(content)
        first_shape = first_shape or shape
        reading.shapes[shape] += 1
        if shape != first_shape:
            reading.collector.add("mixed_shapes", row, f"{shape}; the first row is {first_shape}")
        _look_at_turns(content, row, reading.collector, long_turn)
        if not _seen_before(content, row, reading, train):
            index.add(rows.starts[reading.split] + row, spoken_text(content))


def _seen_before(content: Row, row: int, reading: SplitReading, train: SplitReading) -> bool:
    """Whether an earlier row, of this split or of the training rows, is exactly this one; collected if so."""
    digest = row_digest(content)
    first = reading.first_with.setdefault(digest, row)
    if first != row:
        reading.exact_duplicates += 1
        reading.collector.add("exact_duplicates", row, f"the same as row {first}")
    shared = train.first_with.get(digest) if reading is not train else None
    if shared is not None:
        reading.shared_exactly.add(row, str(shared))
        reading.collector.add("shared_with_train", row, f"the same as training row {shared}")
    return first != row or shared is not None


def _compare(
    readings: dict[str, SplitReading], rows: _Rows, index: NearIndex
) -> dict[str, dict[int, tuple[int, float]]]:
    """Join the rows of a split that are nearly the same; find for others one training row that is, by row number.

    Rows already known to be alike are not compared again, so a crowd of alike rows takes linear time.
    """
    near: dict[str, dict[int, tuple[int, float]]] = {name: {} for name in readings}
    for first, second in index.candidates():
        (split, a), (later_split, b) = rows.place(first), rows.place(second)
        groups = readings[split].near
        if split == later_split:
            if groups.leader(a) != groups.leader(b) and index.similarity(first, second) >= NEAR:
                groups.join(a, b)
        elif split == "train" and b not in near[later_split]:
            similarity = index.similarity(first, second)
            if similarity >= NEAR:
                near[later_split][b] = (a, round(similarity, 3))
    for name, reading in readings.items():
        for row, leader in sorted((row, group[0]) for group in reading.near.all() for row in group[1:]):
            reading.collector.add("near_duplicates", row, f"in a group with row {leader}")
        for row, (train_row, similarity) in sorted(near[name].items()):
            like = f"like training row {train_row} ({100 * similarity:.0f}% of the word sequences)"
            reading.collector.add("nearly_shared_with_train", row, like)
    return near


def _overlap(reading: SplitReading, near: dict[int, tuple[int, float]]) -> Overlap:
    pairs = [(row, int(train_row), 1.0) for row, train_row in reading.shared_exactly.rows]
    pairs += [(row, train_row, similarity) for row, (train_row, similarity) in sorted(near.items())]
    return Overlap(reading.split, reading.shared_exactly.count, len(near), tuple(pairs[:LISTED_ROWS]))


def _shape(content: Row) -> str:
    if isinstance(content, ChatRow):
        return "chat"
    return "prompt + completion" if isinstance(content, PromptCompletionRow) else "text"


def _look_at_turns(content: Row, row: int, collector: Collector, long_turn: int) -> None:
    if isinstance(content, ChatRow):
        _look_at_roles([message["role"] for message in content.messages], row, collector)
        turns = [(f"message {i} ({m['role']})", m) for i, m in enumerate(content.messages)]
    elif isinstance(content, PromptCompletionRow):
        turns = [("the prompt", {"content": content.prompt}), ("the completion", {"content": content.completion})]
    else:
        return
    for name, message in turns:
        text = message.get("content") or ""
        if not text.strip() and not any(message.get(field) for field in ("tool_calls", *REASONING_FIELDS)):
            collector.add("empty_turns", row, f"{name} is empty")
        elif len(text) > long_turn:
            collector.add("long_turns", row, f"{name} has {len(text):,} characters")


def _look_at_roles(roles: Sequence[str], row: int, collector: Collector) -> None:
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] == ["assistant"]:
        collector.add("assistant_first", row)
    again = [a for a, b in pairwise(spoken) if a == b and a in ("user", "assistant")]
    if again:
        collector.add("same_role_twice", row, f"two messages in a row from the {again[0]}")
    if "system" in roles[1:]:
        collector.add("late_system", row, f"message {roles.index('system', 1)} is from the system")
    if roles[-1] != "assistant":
        collector.add("last_not_assistant", row, f"the last message is from {roles[-1]}")
