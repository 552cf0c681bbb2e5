"""95% confidence intervals of shares, means, ratios of sums, and paired differences, over rows drawn independently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054  # the 97.5% quantile of a normal distribution
_T = (12.7062047, 4.3026527, 3.1824463, 2.7764451)  # and of Student's t with 1 to 4 degrees of freedom


class Estimate(NamedTuple):
    """A number measured on `rows` rows, with the ends of its interval; NaN where one row says nothing about it."""

    value: float
    low: float
    high: float
    rows: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per row: `share` if all are 0 or 1, else `mean`. NaN values are left out."""
    known = [float(value) for value in values if math.isfinite(value)]
    return share(known) if all(value in (0.0, 1.0) for value in known) else mean(known)


def share(values: Sequence[float]) -> Estimate:
    """The share of 1 among zeros and ones, with Wilson's score interval (JASA 1927), which is never empty."""
    count = len(values)
    if not count:
        return _UNKNOWN
    found = sum(values) / count
    center = (found + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * math.sqrt(found * (1 - found) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return Estimate(found, min(found, max(0.0, center - half)), max(found, min(1.0, center + half)), count)


def mean(values: Sequence[float]) -> Estimate:
    """The mean, with Student's t interval."""
    return ratio(values, np.ones(len(values)))


def ratio(sums: Sequence[float], weights: Sequence[float] | np.ndarray) -> Estimate:
    """sum(sums) / sum(weights), such as nats of each row over its tokens, with the interval of a ratio estimator.

    Its variance is that of the rows' residuals `sum - ratio * weight` (Cochran, Sampling Techniques, 6.4), so that
    tokens of one row, which are not independent, count as one draw. Student's t with `rows - 1` degrees of freedom.
    """
    sums_N, weights_N = np.asarray(sums, float), np.asarray(weights, float)
    count = len(sums_N)
    if not count or weights_N.sum() == 0:
        return _UNKNOWN
    found = float(sums_N.sum() / weights_N.sum())
    if count == 1:
        return Estimate(found, math.nan, math.nan, 1)
    residual_N = sums_N - found * weights_N
    deviation = math.sqrt(count / (count - 1) * float((residual_N**2).sum())) / float(weights_N.sum())
    half = t_quantile(count - 1) * deviation
    return Estimate(found, found - half, found + half, count)


def paired(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """The mean of `after - before` over the rows that have both.

    For zeros and ones the interval of Agresti and Min (Statistics in Medicine 2005), which adds half a row to each of
    the four outcomes; otherwise Student's t of the differences. If no row differs, the interval is that one point.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if math.isfinite(a) and math.isfinite(b)]
    differences = [b - a for a, b in pairs]
    if not any(differences):
        return Estimate(0.0, 0.0, 0.0, len(pairs)) if pairs else _UNKNOWN
    if not all(value in (0.0, 1.0) for pair in pairs for value in pair):
        return mean(differences)
    count = len(pairs)
    changed, net = sum(map(abs, differences)), sum(differences)
    center = net / (count + 2)
    half = _Z * math.sqrt((changed + 1) - net**2 / (count + 2)) / (count + 2)
    found = net / count
    return Estimate(found, max(-1.0, min(found, center - half)), min(1.0, max(found, center + half)), count)


def t_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t, to four digits (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, 1)))


_UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)
