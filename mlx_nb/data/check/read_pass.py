"""The first pass of the data check: reads every row, and checks shapes, roles, turns and duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_nb.data.check.duplicates import (
    NEAR,
    Groups,
    NearIndex,
    common_sequences,
    distinctive_text,
    prompt_digest,
    row_digest,
)
from mlx_nb.data.check.findings import LISTED_ROWS, Collector, RowTally
from mlx_nb.data.check.token_pass import sampled_rows
from mlx_nb.data.examples.kinds import BY_PROMPT, ROW_KINDS, recognize
from mlx_nb.data.examples.remarks import content_remarks
from mlx_nb.data.examples.settings import ExampleSettings
from mlx_nb.data.rows.content import RowContent
from mlx_nb.data.rows.preference import NothingToPrefer
from mlx_nb.data.rows.turns import format_of
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.errors import DataError

_BOILERPLATE_SAMPLE = 2000


@dataclass(frozen=True)
class Overlap:
    """Rows of `split` that are also training rows. `pairs`: the first ones, as (row, training row, similarity)."""

    split: str
    exact: int
    near: int
    pairs: tuple[tuple[int, int, float], ...]


@dataclass
class SplitReading:
    """Result of the first pass for one split. `near` groups near-duplicate rows.

    formats               number of rows by format
    first_format          the format of the first row
    first_with            the first row with a digest; `first_with_prompt` the first with a digest of its prompt
    labels                how many answers are labeled True and False
    """

    split: str
    rows: int
    collector: Collector
    shapes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    first_format: str = ""
    labels: Counter[bool] = field(default_factory=Counter)
    unreadable: RowTally = field(default_factory=RowTally)
    exact_duplicates: int = 0
    near: Groups = field(default_factory=Groups)
    first_with: dict[bytes, int] = field(default_factory=dict)
    first_with_prompt: dict[bytes, int] = field(default_factory=dict)
    shared_exactly: RowTally = field(default_factory=RowTally)


def read_splits(
    sources: dict[str, RowSource], settings: ExampleSettings, kind: str = "tokens"
) -> tuple[dict[str, SplitReading], list[Overlap]]:
    """Read every row of every split, `train` first, and read candidates for near-duplicates again one by one."""
    rows = _Rows(sources, settings, kind)
    index = NearIndex(len(rows), common_sequences(_some_texts(rows)), rows.text)
    readings = {name: SplitReading(name, len(source), Collector(name)) for name, source in sources.items()}
    for reading in readings.values():
        _read(reading, readings["train"], rows, index, settings)
    near = _compare(readings, rows, index)
    overlaps = [_overlap(reading, near[name]) for name, reading in readings.items() if name != "train"]
    return readings, overlaps


class _Rows:
    """The rows of all splits, numbered consecutively so that one index holds them all."""

    def __init__(self, sources: dict[str, RowSource], settings: ExampleSettings, kind: str) -> None:
        self.sources, self.columns, self.kind = sources, settings.columns, kind
        self.starts: dict[str, int] = {}
        self._length = 0
        for name, source in sources.items():
            self.starts[name] = self._length
            self._length += len(source)

    def __len__(self) -> int:
        return self._length

    def read(self, split: str, row: int) -> tuple[Mapping[str, Any], RowContent | DataError]:
        """The columns of a row (empty if the file is broken there), and the recognized row or why it cannot be read."""
        source, record = self.sources[split], {}
        try:
            record = source[row]
            return record, recognize(self.kind, record, self.columns, location=source.location(row))
        except DataError as error:
            return record, error

    def recognized(self, split: str, row: int) -> RowContent | DataError:
        """The recognized row, or why it cannot be read."""
        return self.read(split, row)[1]

    def place(self, number: int) -> tuple[str, int]:
        split = next(name for name in reversed(self.starts) if self.starts[name] <= number)
        return split, number - self.starts[split]

    def text(self, number: int) -> str:
        content = self.recognized(*self.place(number))
        return "" if isinstance(content, DataError) else distinctive_text(content)


def _some_texts(rows: _Rows) -> Iterator[str]:
    for row in sampled_rows(len(rows.sources["train"]), _BOILERPLATE_SAMPLE).tolist():
        yield rows.text(row)


def _read(reading: SplitReading, train: SplitReading, rows: _Rows, index: NearIndex, settings: ExampleSettings) -> None:
    first_shape = ""
    for row in range(reading.rows):
        record, content = rows.read(reading.split, row)
        if isinstance(content, DataError):
            reason = str(content)
            reading.unreadable.add(row, reason)
            reading.collector.add(
                "identical_answers" if isinstance(content, NothingToPrefer) else "unreadable", row, reason
            )
            continue
        found = content.shape
        first_shape = first_shape or found
        reading.shapes[found] += 1
        _count_format(reading, train, row, format_of(content, settings.rendering))
        if found != first_shape:
            reading.collector.add("mixed_shapes", row, f"{found}; the first row is {first_shape}")
        if "label" in (marks := content.ratings()):
            reading.labels[marks["label"]] += 1
        for kind, remark in content_remarks(record, content, settings, rows.kind).items():
            reading.collector.add(kind, row, remark)
        if not _seen_before(content, row, reading, train):
            index.add(rows.starts[reading.split] + row, distinctive_text(content))


def _count_format(reading: SplitReading, train: SplitReading, row: int, written_as: str) -> None:
    """Count the format of a row, and collect one that differs from the first row or the first training row."""
    reading.first_format = reading.first_format or written_as
    reading.formats[written_as] += 1
    first = reading.first_format
    if written_as != first:
        reading.collector.add("mixed_formats", row, f"{written_as}; the first row is {first}")
    elif train.first_format not in ("", written_as):
        reading.collector.add("mixed_formats", row, f"{written_as}; the first training row is {train.first_format}")


def _seen_before(content: RowContent, row: int, reading: SplitReading, train: SplitReading) -> bool:
    """Whether the row, or its prompt, equals an earlier one of this split or the training rows; collects it if so."""
    digest, prompt_key = row_digest(content), prompt_digest(content)
    first = first_with_prompt = reading.first_with.setdefault(digest, row)
    if prompt_key:
        first_with_prompt = reading.first_with_prompt.setdefault(prompt_key, row)
    if first != row:
        reading.exact_duplicates += 1
        reading.collector.add("exact_duplicates", row, f"the same as row {first}")
    elif first_with_prompt != row:
        reading.collector.add("repeated_prompts", row, f"the same prompt as row {first_with_prompt}")
    shared = None
    if reading is not train:
        shared = train.first_with_prompt.get(prompt_key) if prompt_key else train.first_with.get(digest)
    if shared is not None:
        reading.shared_exactly.add(row, str(shared))
        like = "the same prompt as" if prompt_key else "the same as"
        reading.collector.add(
            "shared_with_train", row, f"{like} training row {shared}", remark=BY_PROMPT if prompt_key else ""
        )
    return first_with_prompt != row or shared is not None


def _compare(
    readings: dict[str, SplitReading], rows: _Rows, index: NearIndex
) -> dict[str, dict[int, tuple[int, float]]]:
    """Group the near-duplicates within each split, and find a near-duplicate training row for rows of other splits.

    Rows already known to be similar are not compared again, so many similar rows take linear time.
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
    remark = ROW_KINDS[rows.kind].compared
    for name, reading in readings.items():
        for row, leader in sorted((row, group[0]) for group in reading.near.all() for row in group[1:]):
            reading.collector.add("near_duplicates", row, f"in a group with row {leader}", remark=remark)
        for row, (train_row, similarity) in sorted(near[name].items()):
            like = f"like training row {train_row} ({100 * similarity:.0f}% of the word sequences)"
            reading.collector.add("nearly_shared_with_train", row, like, remark=remark)
    return near


def _overlap(reading: SplitReading, near: dict[int, tuple[int, float]]) -> Overlap:
    pairs = [(row, int(train_row), 1.0) for row, train_row in reading.shared_exactly.rows]
    pairs += [(row, train_row, similarity) for row, (train_row, similarity) in sorted(near.items())]
    return Overlap(reading.split, reading.shared_exactly.count, len(near), tuple(pairs[:LISTED_ROWS]))
