"""How many of the interrupts and kills at random moments are made.

A third of them, unless the environment variable MLX_NB_FAULTS is `all`: `pytest -m faults` sets it.
"""

from __future__ import annotations

import os

_ALL = os.environ.get("MLX_NB_FAULTS") == "all"


def part_of(number: int) -> int:
    """Of so many, how many are made: at least one."""
    return number if _ALL else -(-number // 3)
