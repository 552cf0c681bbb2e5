"""Fingerprints of model files, from samples of their contents instead of gigabytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16
_NOTES = ("_name_or_path", "transformers_version")


Weights = tuple[tuple[str, str], ...]


def weights_fingerprint(folder: Path) -> Weights:
    """(file name, digest) of each weights file in a model folder. Adapter files are not included."""
    return tuple((file.name, sampled_digest(file)) for file in sorted(folder.glob("model*.safetensors")))


def configuration_digest(config: Mapping[str, Any]) -> str:
    """A digest of a model's configuration, as read from config.json, without notes about where the model comes from."""
    told = {name: value for name, value in config.items() if name not in _NOTES}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def base_identity(fingerprint: Weights, load_in_bits: int | None) -> dict[str, Any]:
    """The identity of a base model as stored in an adapter: a digest of the weights, and `load_in_bits`."""
    weights = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()
    return {"weights": weights, "load_in_bits": load_in_bits}


def sampled_digest(file: Path) -> str:
    """A digest of the file's size and of blocks spread over it, including its header."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        for block in range(SAMPLED_BLOCKS):
            handle.seek(block * size // SAMPLED_BLOCKS)
            digest.update(handle.read(BLOCK_BYTES))
    return digest.hexdigest()
