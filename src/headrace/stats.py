"""The few statistics that every part reports with, so that a p99 means the same everywhere."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

_RESAMPLES = 2000


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest-rank percentile of ascending values: the smallest value that at least ``share`` of them do not exceed.

    Nearest rank, not interpolation: the answer is always something that was measured. NaN when there is nothing.
    """
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def median(values: Sequence[float]) -> float:
    """Median of any order of values, the mean of the middle two for an even count. NaN when there is nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def interval(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the median, by percentiles (Efron, 1979)."""
    draw = random.Random(seed)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return _middle(medians, confidence)


def ratio_interval(
    over: Sequence[float], under: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the ratio of two medians whose values are no pairs."""
    draw = random.Random(seed)
    ratios = sorted(
        median(draw.choices(over, k=len(over))) / median(draw.choices(under, k=len(under))) for _ in range(_RESAMPLES)
    )
    return _middle(ratios, confidence)


def _middle(ordered: Sequence[float], share: float) -> tuple[float, float]:
    tail = (1 - share) / 2
    return percentile(ordered, tail), percentile(ordered, 1 - tail)


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares of relative error through (x, y) with y > 0: returns (intercept, slope).

    Relative, because durations from 1 ms to 1 s stand in one fit and each is known to a few per cent.
    """
    w = [1.0 / (y * y) for _, y in points]
    total = sum(w)
    mean_x = sum(wi * x for wi, (x, _) in zip(w, points, strict=True)) / total
    mean_y = sum(wi * y for wi, (_, y) in zip(w, points, strict=True)) / total
    variance = sum(wi * (x - mean_x) ** 2 for wi, (x, _) in zip(w, points, strict=True))
    if variance == 0.0:
        return mean_y, 0.0
    slope = sum(wi * (x - mean_x) * (y - mean_y) for wi, (x, y) in zip(w, points, strict=True)) / variance
    return mean_y - slope * mean_x, slope
