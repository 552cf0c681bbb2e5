"""All randomness of a run is a function of (seed, purpose, step); the user's own stream is given back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


def seed_for(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed from the run's seed, what it is for, and the step."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def random_stream(seed: int) -> Iterator[None]:
    """`mx.random` starts from `seed` while inside; afterwards the user's stream goes on where it was."""
    # The two words are read now: an interrupted trace leaves placeholders in mx.random.state.
    key: Any = mx.random.state[0]  # type: ignore[index]
    high, low = key.tolist()
    try:
        mx.random.seed(seed)
        yield
    finally:
        mx.random.seed((high << 32) | low)


def random_key() -> mx.array:
    """The key that the next numbers of `mx.random` are drawn from, as it is now."""
    return mx.stop_gradient(_key())


@contextmanager
def drawing_from(key: mx.array) -> Iterator[None]:
    """Draws inside are those that followed `random_key()`, in a traced graph too; the stream stays as it was."""
    before = random_key()
    try:
        _key()[:] = key
        yield
    finally:
        _key()[:] = before


def _key() -> mx.array:
    """The key itself, which changes in place with each draw."""
    state: Any = mx.random.state
    result: mx.array = state[0]
    return result
