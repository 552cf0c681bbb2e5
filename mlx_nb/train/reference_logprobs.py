"""Log-probabilities of the reference model, measured once for each row when it is first needed, and kept on disk.

A row is always measured alone, so its numbers do not depend on the batch it came in, and measuring it again after a
resume gives the same bits.
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


class ReferenceLogprobs:
    """log p_ref of every trained token, by the content of its row.

    `scorer` makes the reference's scorer, at the first row that is not known yet. `fingerprint` says which model that
    is: numbers of another one are never read.
    """

    def __init__(self, scorer: Callable[[], TargetScorer], fingerprint: str) -> None:
        self._make_scorer = scorer
        self._scorer: TargetScorer | None = None
        self._known: dict[bytes, np.ndarray] = {}
        self._saved: tuple[Path, int] | None = None  # the folder that has them all, and how many
        self.fingerprint = fingerprint

    @property
    def scorer(self) -> TargetScorer:
        """The reference model's scorer, made at first use."""
        if self._scorer is None:
            self._scorer = self._make_scorer()
        return self._scorer

    def __len__(self) -> int:
        """How many rows are known."""
        return len(self._known)

    def fill(self, batch: TokenBatch) -> TokenBatch:
        """The batch with `token_values["reference"]` (B, T), 0 where nothing is trained. Measures what is not known."""
        lines = _lines(batch)
        digests = [_digest(line) for line in lines]
        missing = {digest: line for digest, line in zip(digests, lines) if digest not in self._known}
        self._measure(missing)
        reference_BT = np.zeros(batch.tokens_BT.shape, np.float32)
        for index, (digest, line) in enumerate(zip(digests, lines)):
            values_T = reference_BT[index, : line.lengths[0]]
            values_T[line.loss_mask_BT[0] != 0] = self._known[digest]
        return batch._replace(token_values={**batch.token_values, "reference": reference_BT})

    def _measure(self, lines: Mapping[bytes, TokenBatch]) -> None:
        """As many at the same time as there are lanes, those of like length together."""
        by_length = sorted(lines, key=lambda digest: lines[digest].lengths)
        at_once = lane_count()
        for start in range(0, len(by_length), at_once):
            chosen = by_length[start : start + at_once]
            self._known.update(zip(chosen, target_values([lines[key] for key in chosen], self.scorer.logprobs)))

    def save(self, folder: Path, write: Write = write_whole) -> None:
        """Write what is known beside the run, unless nothing is new. Raises OSError."""
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
        """Take over what a run in `folder` measured with the same reference; pass over anything else."""
        path = folder / REFERENCE_FILE
        if not path.is_file():
            return
        try:
            arrays, metadata = typing.cast(Any, mx.load(str(path), return_metadata=True))
            self._take(arrays, metadata, folder)
        except (RuntimeError, ValueError, KeyError):
            return  # torn or foreign: it will be measured again and replaced

    def _take(self, arrays: Mapping[str, mx.array], metadata: Mapping[str, str], folder: Path) -> None:
        if metadata.get("reference") != self.fingerprint:
            return
        values = np.array(arrays["logprobs"])
        ends = np.cumsum(np.array(arrays["lengths"]))
        digests = np.array(arrays["digests"])
        for digest, part in zip(digests, np.split(values, ends[:-1])):
            self._known.setdefault(digest.tobytes(), part)
        self._saved = (folder, len(self._known))


def _lines(batch: TokenBatch) -> list[TokenBatch]:
    """Each line of the batch as a batch of its own, without padding and without the weights of its tokens."""
    return [
        TokenBatch(tokens[None, :length], (loss_mask[None, :length] != 0).astype(np.float32), (0,), (length,))
        for tokens, loss_mask, length in zip(batch.tokens_BT, batch.loss_mask_BT, batch.lengths)
    ]


def _digest(line: TokenBatch) -> bytes:
    return hashlib.sha256(line.tokens_BT.astype("<i4").tobytes() + (line.loss_mask_BT != 0).tobytes()).digest()
