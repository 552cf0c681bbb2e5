"""Log-probabilities under the reference model, measured once per row at its first use, and cached on disk.

A sequence is measured alone, or the two answers of a pair together if packing computes their prompt once. So the
numbers do not depend on the batch, and measuring again after a resume gives the same bits.
"""

from __future__ import annotations

import hashlib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.files.whole_files import write_whole
from mlx_nb.files.written_files import REFERENCE_FILE
from mlx_nb.model.adapters import Write
from mlx_nb.model.lanes import lane_count
from mlx_nb.model.logprobs import TargetScorer, target_values
from mlx_nb.train.packing import Packing, pays


class ReferenceLogprobs:
    """A cache of log p_ref for every trained token, keyed by the content of the row.

    `scorer` creates the reference's scorer at the first cache miss. `fingerprint` identifies the reference model:
    cached numbers of another model are never used.
    """

    def __init__(self, scorer: Callable[[], TargetScorer], fingerprint: str, packing: Packing = "auto") -> None:
        self._make_scorer = scorer
        self._packing = packing
        self._scorer: TargetScorer | None = None
        self._known: dict[bytes, np.ndarray] = {}
        self._saved: tuple[Path, int] | None = None  # the folder of the last save, and the number of rows saved
        self.fingerprint = fingerprint

    @property
    def scorer(self) -> TargetScorer:
        """The reference model's scorer, made at first use."""
        if self._scorer is None:
            self._scorer = self._make_scorer()
        return self._scorer

    def __len__(self) -> int:
        """The number of cached rows."""
        return len(self._known)

    def fill(self, batch: TokenBatch) -> TokenBatch:
        """The batch with `token_values["reference"]` (B, T), 0 on untrained tokens. Measures uncached rows."""
        units = self._units(batch)
        digests = [_digest(unit) for _, unit in units]
        missing = {digest: unit for digest, (_, unit) in zip(digests, units) if digest not in self._known}
        self._measure(missing)
        reference_BT = np.zeros(batch.tokens_BT.shape, np.float32)
        for digest, (lines, unit) in zip(digests, units):
            values_LT = np.zeros(unit.tokens_BT.shape, np.float32)
            values_LT[unit.loss_mask_BT != 0] = self._known[digest]
            columns = unit.tokens_BT.shape[1]
            reference_BT[lines, :columns] = values_LT
        return batch._replace(token_values={**batch.token_values, "reference": reference_BT})

    def _units(self, batch: TokenBatch) -> list[tuple[list[int], TokenBatch]]:
        """The units of measurement: single lines of the batch, or both lines of a pair if packing them pays off."""
        rows = len(batch.rows)
        units = []
        for row in range(rows):
            lines = list(range(row, len(batch.lengths), rows))
            together = _unit(batch, lines)
            if len(lines) > 1 and pays(together, self._packing):
                units.append((lines, together))
            else:
                units += [([line], _unit(batch, [line])) for line in lines]
        return units

    def _measure(self, units: Mapping[bytes, TokenBatch]) -> None:
        """Measure units in lanes, sorted by length so that similar lengths are computed together."""
        by_length = sorted(units, key=lambda digest: units[digest].lengths)
        at_once = lane_count()
        for start in range(0, len(by_length), at_once):
            chosen = by_length[start : start + at_once]
            packed = [_packed_where_it_can_be(units[digest], self.scorer) for digest in chosen]
            self._known.update(zip(chosen, target_values(packed, self.scorer.logprobs)))

    def save(self, folder: Path, write: Write = write_whole) -> None:
        """Write the cache to `folder`, unless it is unchanged. Raises OSError."""
        count = len(self._known)
        if not count or self._saved == (folder, count):
            return
        arrays = {
            "digests": mx.array(np.frombuffer(b"".join(self._known), np.uint8).reshape(count, -1)),
            "lengths": mx.array(np.array([len(values) for values in self._known.values()], np.int32)),
            "logprobs": mx.array(np.concatenate(list(self._known.values()))),
        }
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"reference": self.fingerprint}
        write(folder / REFERENCE_FILE, lambda file: mx.save_safetensors(file, arrays, metadata=metadata))
        self._saved = (folder, count)

    def load(self, folder: Path) -> None:
        """Load the cache that a run in `folder` wrote for the same reference. Anything else is ignored."""
        path = folder / REFERENCE_FILE
        if not path.is_file():
            return
        try:
            arrays, metadata = typing.cast(Any, mx.load(str(path), return_metadata=True))
            self._take(arrays, metadata, folder)
        except (RuntimeError, ValueError, KeyError):
            return  # damaged or foreign: the rows are measured again and the file is replaced

    def _take(self, arrays: Mapping[str, mx.array], metadata: Mapping[str, str], folder: Path) -> None:
        if metadata.get("reference") != self.fingerprint:
            return
        values = np.array(arrays["logprobs"])
        ends = np.cumsum(np.array(arrays["lengths"]))
        digests = np.array(arrays["digests"])
        for digest, part in zip(digests, np.split(values, ends[:-1])):
            self._known.setdefault(digest.tobytes(), part)
        self._saved = (folder, len(self._known))


def _unit(batch: TokenBatch, lines: list[int]) -> TokenBatch:
    """Lines of the batch as a separate batch, with a mask of 0 and 1 instead of weights."""
    lengths = tuple(batch.lengths[line] for line in lines)
    tokens = batch.tokens_BT[lines, : max(lengths)]
    mask = (batch.loss_mask_BT[lines, : max(lengths)] != 0).astype(np.float32)
    return TokenBatch(tokens, mask, (0,), lengths)


def _packed_where_it_can_be(unit: TokenBatch, scorer: TargetScorer) -> TokenBatch:
    return unit._replace(packed=scorer.can_pack) if len(unit.lengths) > 1 else unit


def _digest(unit: TokenBatch) -> bytes:
    """A digest of the tokens and mask of a unit, and of its lengths if it has several lines."""
    lengths = repr(unit.lengths).encode() if len(unit.lengths) > 1 else b""
    content = unit.tokens_BT.astype("<i4").tobytes() + (unit.loss_mask_BT != 0).tobytes()
    return hashlib.sha256(lengths + content).digest()
