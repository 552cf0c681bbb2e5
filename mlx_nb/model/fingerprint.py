"""What tells one model's files from another's, without reading gigabytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16


Weights = tuple[tuple[str, str], ...]


def weights_fingerprint(folder: Path) -> Weights:
    """(file name, digest) of each file with weights in a model's folder. An adapter that lies there is none."""
    return tuple((file.name, sampled_digest(file)) for file in sorted(folder.glob("model*.safetensors")))


def base_identity(fingerprint: Weights, load_in_bits: int | None) -> dict[str, Any]:
    """What an adapter says of the base it was trained on: a digest of its weights, and how it was quantized on load."""
    weights = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()
    return {"weights": weights, "load_in_bits": load_in_bits}


def sampled_digest(file: Path) -> str:
    """Of size and blocks spread over the file, its header among them: another model differs, gigabytes stay unread."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        for block in range(SAMPLED_BLOCKS):
            handle.seek(block * size // SAMPLED_BLOCKS)
            digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()
