"""Random streams that depend only on (seed, purpose, step). The user's own stream is restored after use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


def seed_for(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed derived from the run's seed, the purpose and the step."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def random_stream(seed: int) -> Iterator[None]:
    """A context in which `mx.random` starts from `seed`. The user's stream is restored afterwards."""
    # Read the two words now, because an interrupted trace leaves placeholders in mx.random.state.
    key: Any = mx.random.state[0]  # type: ignore[index]
    high, low = key.tolist()
    try:
        mx.random.seed(seed)
        yield
    finally:
        mx.random.seed((high << 32) | low)


def random_key() -> mx.array:
    """A copy of the current key of `mx.random`."""
    return mx.stop_gradient(_key())


@contextmanager
def drawing_from(key: mx.array) -> Iterator[None]:
    """A context that repeats the draws made after `random_key()`, also in a traced graph. The stream is restored."""
    before = random_key()
    try:
        _key()[:] = key
        yield
    finally:
        _key()[:] = before


def _key() -> mx.array:
    """The key array itself, which each draw changes in place."""
    state: Any = mx.random.state
    result: mx.array = state[0]
    return result
