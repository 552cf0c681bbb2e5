"""GRPO's advantage: how much better a completion is than the others for its prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_nb.errors import ConfigError, did_you_mean

EPSILON = 1e-4  # added to a standard deviation, as in TRL
EQUAL_WITHIN = 1e-6  # rewards that differ by no more are considered equal


@dataclass(frozen=True)
class Advantages:
    """The advantages of N completions.

    advantage_N          (N,) float32; 0 where there is nothing to learn
    valid_N              (N,) bool; False where the completion has no reward
    zero_variance_share  share of the groups whose rewards are all equal, or with fewer than 2 known rewards
    """

    advantage_N: np.ndarray
    valid_N: np.ndarray
    zero_variance_share: float


def group_advantages(total_N: np.ndarray, group_size: int, *, scale: str) -> Advantages:
    """A = (r - mean of its group) / scale, for N = P * G rewards, those of one prompt adjacent.

    scale: `group`  std of the group + 1e-4 (Shao et al. 2024, DeepSeekMath, section 4.1.2)
           `batch`  std of all rewards of the batch + 1e-4
           `none`   1 (Liu et al. 2025, Understanding R1-Zero-Like Training: Dr. GRPO)

    The std is that of a sample (ddof = 1), as in TRL. NaN rewards are excluded from means and deviations. A group whose
    rewards are all equal within 1e-6, or with fewer than 2 rewards, gets exactly 0. Raises ConfigError for an unknown
    scale and ValueError if N is not a multiple of `group_size`.
    """
    if scale not in SCALES:
        known = ", ".join(SCALES)
        raise ConfigError(f"`scale_rewards` cannot be {scale!r}. Choose one of: {known}.{did_you_mean(scale, SCALES)}")
    if group_size < 1 or len(total_N) % group_size:
        raise ValueError(f"{len(total_N)} rewards cannot be divided into groups of {group_size}")
    rewards_PG = np.asarray(total_N, np.float64).reshape(-1, group_size)
    valid_PG = np.isfinite(rewards_PG)
    known_PG = np.where(valid_PG, rewards_PG, 0.0)
    centered_PG = np.where(valid_PG, known_PG - _mean(known_PG, valid_PG), 0.0)
    spread_P = np.max(centered_PG, axis=1, initial=-np.inf, where=valid_PG)
    spread_P = spread_P - np.min(centered_PG, axis=1, initial=np.inf, where=valid_PG)
    informative_P = spread_P > EQUAL_WITHIN
    advantage_PG = np.where(informative_P[:, None], centered_PG / SCALES[scale](known_PG, valid_PG), 0.0)
    return Advantages(
        advantage_N=advantage_PG.reshape(-1).astype(np.float32),
        valid_N=valid_PG.reshape(-1),
        zero_variance_share=float(1 - informative_P.mean()) if len(informative_P) else 0.0,
    )


def _mean(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean of the valid values of each row of the array, (rows, 1)."""
    counts = np.maximum(1, valid.sum(axis=1, keepdims=True))
    result: np.ndarray = np.sum(values, axis=1, keepdims=True, where=valid) / counts
    return result


def _deviation(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Sample standard deviation of the valid values of each row of the array, (rows, 1); 0 for fewer than 2."""
    squares = np.sum((values - _mean(values, valid)) ** 2, axis=1, keepdims=True, where=valid)
    result: np.ndarray = np.sqrt(squares / np.maximum(1, valid.sum(axis=1, keepdims=True) - 1))
    return result


SCALES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray | float]] = {
    "group": lambda rewards_PG, valid_PG: _deviation(rewards_PG, valid_PG) + EPSILON,
    "batch": lambda rewards_PG, valid_PG: _deviation(rewards_PG.reshape(1, -1), valid_PG.reshape(1, -1)) + EPSILON,
    "none": lambda rewards_PG, valid_PG: 1.0,
}
