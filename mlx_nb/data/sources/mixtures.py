"""Holds rows out for validation, and mixes several sources with weights."""

from __future__ import annotations

import hashlib
import json
import os
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_nb.config.mixture_sources import FEATURES, ROW_COLUMNS, is_mixture, source_problem
from mlx_nb.data.sources.row_source import RowSource, gathered
from mlx_nb.data.sources.row_values import OddRow
from mlx_nb.errors import DataError, did_you_mean

_HELD_OUT_AT_MOST = 200


@dataclass(frozen=True)
class SplitWords:
    """The names of splits and subset that the user chose."""

    train_split: str | None = None
    valid_split: str | None = None
    test_split: str | None = None
    subset: str | None = None

    def refuse(self, names: Sequence[str], what: str) -> None:
        """Raise DataError for the first of `names` that is given."""
        for name in names:
            if getattr(self, name) is not None:
                raise DataError(f"`{name}: {getattr(self, name)}` has no effect: {what}. Remove it.")


@dataclass(frozen=True)
class SourceSpec:
    """One source of a mixture."""

    path: Any
    weight: float | None
    words: SplitWords
    columns: dict[str, str]


_ANSWERED = {"prompt", "completion", "chosen", "rejected"}
_MOST_REPEATS = 100


def mixture_specs(found: object) -> list[SourceSpec] | None:
    """The sources of a mixture; None if `found` is not a mixture."""
    if not is_mixture(found):
        return None
    return [_spec(item, number) for number, item in enumerate(typing.cast(Sequence[Any], found), start=1)]


def _spec(item: Any, number: int) -> SourceSpec:
    if (problem := source_problem(item, number)) is not None:
        raise DataError(problem[1])
    if isinstance(item, (str, os.PathLike)):
        return SourceSpec(item, None, SplitWords(), {})
    weight = item.get("weight")
    words = SplitWords(**{name: item.get(name) for name in vars(SplitWords())})
    columns = {standard: item[key] for key, standard in FEATURES.items() if item.get(key) is not None}
    return SourceSpec(item["path"], None if weight is None else float(weight), words, columns)


def hold_out(
    trains: Sequence[RowSource], val_set_size: float, seed: int
) -> tuple[list[RowSource], RowSource | None, str]:
    """The training sources without the held-out rows, the held-out rows, and a note. No source becomes empty."""
    lengths = np.array([len(source) for source in trains])
    total = int(lengths.sum())
    count = _held_out_count(val_set_size, total)
    count = min(count, total - len(trains))
    if not count:
        reason = "too few training rows" if val_set_size else "val_set_size: 0"
        return list(trains), None, f"No validation: no validation split, and nothing held out ({reason})."
    starts = np.concatenate([[0], np.cumsum(lengths)])
    left, held = lengths.copy(), []
    for row in np.random.default_rng([seed, total]).permutation(total):
        owner = int(np.searchsorted(starts, row, side="right")) - 1
        if left[owner] > 1:
            left[owner] -= 1
            held.append(int(row))
            if len(held) == count:
                break
    held_rows = np.sort(np.array(held, dtype=np.int64))
    held_sources = (np.searchsorted(starts, held_rows, side="right") - 1).astype(np.int32)
    valid = gathered(trains, held_sources, held_rows - starts[held_sources])
    remaining = []
    for index, source in enumerate(trains):
        kept = np.delete(np.arange(len(source)), held_rows[held_sources == index] - starts[index])
        remaining.append(gathered([source], np.zeros(len(kept), dtype=np.int32), kept))
    note = f"No validation split: held out {count} of {total} training rows (seed {seed})."
    return remaining, valid, note


def _held_out_count(val_set_size: float, total: int) -> int:
    if isinstance(val_set_size, bool) or not isinstance(val_set_size, (int, float)) or not val_set_size >= 0:
        raise DataError(f"val_set_size must be a share such as 0.1 or a number of rows, not {val_set_size!r}.")
    if val_set_size < 1:
        return min(_HELD_OUT_AT_MOST, max(1, round(val_set_size * total))) if val_set_size else 0
    if val_set_size != int(val_set_size):
        raise DataError(f"val_set_size must be a whole number of rows, at least 1, not {val_set_size:g}.")
    if val_set_size >= total:
        raise DataError(f"val_set_size: {int(val_set_size)} would hold out all {total} training rows. Lower it.")
    return int(val_set_size)


def renamed(source: RowSource, columns: Mapping[str, str]) -> RowSource:
    """The rows with their columns under the standard names, without the columns of other shapes."""
    shaping = set(columns) & ROW_COLUMNS
    others = set(columns.values())
    if shaping:
        others |= ROW_COLUMNS - (_ANSWERED if shaping & _ANSWERED else set())

    def read(row: int) -> dict[str, Any]:
        record = source[row]
        for column in columns.values():
            if column not in record:
                names = ", ".join(map(repr, record))
                raise DataError(
                    f"{source.location(row)}: no column {column!r}. The row has: {names}.{did_you_mean(column, record)}"
                )
        kept = {key: value for key, value in record.items() if key not in others}
        return {**kept, **{standard: record[column] for standard, column in columns.items()}}

    def digest() -> str:
        return hashlib.sha256((source.fingerprint() + json.dumps(columns, sort_keys=True)).encode()).hexdigest()

    with suppress(OddRow):
        read(0)
    return RowSource(source.name, len(source), read, source.location, digest, source.changed, of_sources=True)


def mixed(sources: Sequence[RowSource], weights: Sequence[float | None], seed: int) -> tuple[RowSource, str]:
    """One epoch of the mixture (see `open_splits`), and a note with the numbers of rows."""
    lengths = [len(source) for source in sources]
    if any(weight is not None for weight in weights):
        shares = [1.0 if weight is None else weight for weight in weights]
        rounds = max(length / share for length, share in zip(lengths, shares))
        draws = [max(length, round(share * rounds)) for length, share in zip(lengths, shares)]
        if sum(draws) > _MOST_REPEATS * sum(lengths):
            raise DataError(
                f"the weights of data ({', '.join(f'{share:g}' for share in shares)}) make an epoch of "
                f"{sum(draws)} rows out of {sum(lengths)}. Bring them closer together."
            )
    else:
        draws = list(lengths)
    times, source_ids, row_ids = [], [], []
    for index, (length, count) in enumerate(zip(lengths, draws)):
        random = np.random.default_rng([seed, index])
        passes = [random.permutation(length) for _ in range(-(-count // length))]
        row_ids.append(np.concatenate(passes)[:count])
        times.append((np.arange(count) + random.random()) / count)
        source_ids.append(np.full(count, index, dtype=np.int32))
    order = np.argsort(np.concatenate(times), kind="stable")
    train = gathered(sources, np.concatenate(source_ids)[order], np.concatenate(row_ids)[order])
    parts = [
        f"{count} from {source.name}" + (f" ({length} rows, repeated)" if count > length else "")
        for source, length, count in zip(sources, lengths, draws)
    ]
    return train, f"Mixed {len(train)} training rows an epoch: {', '.join(parts)}."
