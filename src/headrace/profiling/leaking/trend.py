"""Whether a series of measurements rises for ever, levels off or only swings: from the numbers alone.

Memory is not independent noise around a line, so no single test is believed. The ranks must rise (Mann and Kendall),
the last half must still rise (Theil's and Sen's slope, its lower bound above zero), it must rise as fast as the first
half did, and the steps from block to block must be too even for a random walk. This module knows nothing of memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from headrace import stats

# short: too few values to say. saw: rises and falls back to where it was. level: rose, then stopped.
# unsure: something rises, but more values are needed to tell how. slowing: rises less and less.
Shape = Literal["short", "flat", "saw", "level", "slowing", "unsure", "growing"]

LEAST = 10  # values; fewer tell nothing
_MOST = 120  # points that slopes are taken between; more are merged
_SIGNIFICANT = 0.005
_STEADY_RATIO = 0.6
_BLOCKS = 10
_LEAST_BLOCKS, _LEAST_IN_BLOCK = 5, 4
TELLING = _LEAST_BLOCKS * _LEAST_IN_BLOCK  # values; of fewer it cannot be told that they grow
_Z = {0.95: 1.959964, 0.99: 2.575829}
# Student's t, one-sided 99 %, by degrees of freedom from 3.
_T99 = (4.541, 3.747, 3.365, 3.143, 2.998, 2.896, 2.821, 2.764)


class Trend(msgspec.Struct, frozen=True):
    """What can be said of a series.

    Args:
        slope: per unit of x; ``interval`` holds it with 95 % confidence.
        rise: from the first quarter to the last, in units of y.
        p: chance that ranks rise so much in a series without a trend.
    """

    shape: Shape
    slope: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    rise: float = 0.0
    p: float = 1.0

    @property
    def rises(self) -> bool:
        """Whether it may go on rising."""
        return self.shape in ("growing", "slowing", "unsure")


def trend(xs: Sequence[float], ys: Sequence[float], *, floor: float = 0.0, least: float = 0.0) -> Trend:
    """Judge a series.

    Args:
        xs: when each value was taken, rising, for example the number of the call.
        ys: the values.
        floor: slopes below it do not count as growth.
        least: a series that rises by less in all is flat.
    """
    if len(ys) < LEAST:
        return Trend("short")
    xs, ys = thin(xs, ys)
    falls = teeth(ys)
    if falls:
        return _trend_of_teeth(xs, ys, falls, floor, least)
    quarter = [stats.median(part) for part in parts(ys, 4)]
    slope, low, high = theil_sen(xs, ys)
    p = mann_kendall(ys)
    rise = quarter[3] - quarter[0]

    def result(shape: Shape) -> Trend:
        return Trend(shape, slope, (low, high), rise, p)

    if p >= _SIGNIFICANT or rise < least:
        return result("flat")
    half = len(ys) // 2
    head, _, _ = theil_sen(xs[: half + 1], ys[: half + 1])
    tail, tail_low, _ = theil_sen(xs[half:], ys[half:], 0.99)
    if tail_low <= 0 or tail < floor:
        stopped = quarter[3] - quarter[2] <= 0.25 * max(quarter[1] - quarter[0], quarter[2] - quarter[1])
        return result("level" if stopped else "unsure")
    if tail < _STEADY_RATIO * head:
        return result("slowing")
    return result("growing" if drifts(ys) else "unsure")


def thin(xs: Sequence[float], ys: Sequence[float], most: int = _MOST) -> tuple[list[float], list[float]]:
    """At most ``most`` points, each the medians of as many neighbours."""
    size = math.ceil(len(ys) / most)
    if size <= 1:
        return list(xs), list(ys)
    starts = range(0, len(ys) - size + 1, size)
    return (
        [stats.median(xs[start : start + size]) for start in starts],
        [stats.median(ys[start : start + size]) for start in starts],
    )


def parts(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """The values in ``count`` runs of like length."""
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    return [values[start:end] for start, end in itertools.pairwise(edges)]


def mann_kendall(ys: Sequence[float]) -> float:
    """One-sided p of a rise: the chance that so many later values exceed earlier ones by chance. Ties are counted."""
    n = len(ys)
    score = sum((b > a) - (b < a) for index, a in enumerate(ys) for b in ys[index + 1 :])
    variance = _kendall_variance(ys)
    if score <= 0 or variance <= 0 or n < 3:
        return 1.0
    return 0.5 * math.erfc((score - 1) / math.sqrt(2 * variance))


def theil_sen(xs: Sequence[float], ys: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median of the slopes between all pairs, and Sen's interval: (slope, low, high). A third may be outliers.

    Args:
        confidence: 0.95 or 0.99.
    """
    slopes = sorted(
        (y - ys[index]) / (x - xs[index])
        for index in range(len(ys))
        for x, y in zip(xs[index + 1 :], ys[index + 1 :], strict=True)
    )
    if not slopes:
        return 0.0, -math.inf, math.inf
    reach = _Z[confidence] * math.sqrt(max(0.0, _kendall_variance(ys)))
    low = math.floor((len(slopes) - reach) / 2)
    high = math.ceil((len(slopes) + reach) / 2)
    return stats.median(slopes), slopes[max(0, low - 1)], slopes[min(len(slopes) - 1, high)]


def _kendall_variance(ys: Sequence[float]) -> float:
    n = len(ys)
    counts: dict[float, int] = {}
    for y in ys:
        counts[y] = counts.get(y, 0) + 1
    ties = sum(t * (t - 1) * (2 * t + 5) for t in counts.values())
    return (n * (n - 1) * (2 * n + 5) - ties) / 18


def drifts(ys: Sequence[float]) -> bool:
    """Whether the steps from block to block are too even and too often upwards for a random walk.

    Where an allocator finds room is a random walk; it rises by long stretches without anything being lost.
    """
    count = min(_BLOCKS, len(ys) // _LEAST_IN_BLOCK)
    if count < _LEAST_BLOCKS:
        return False
    levels = [stats.median(block) for block in parts(ys, count)]
    steps = [after - before for before, after in itertools.pairwise(levels)]
    mean = sum(steps) / len(steps)
    spread = math.sqrt(sum((step - mean) ** 2 for step in steps) / (len(steps) - 1))
    bound = _T99[min(len(steps) - 1 - 3, len(_T99) - 1)]
    return mean > 0 and mean * math.sqrt(len(steps)) > bound * spread


def teeth(ys: Sequence[float]) -> list[int]:
    """Where a saw-tooth has just fallen: by at least half of the whole range, in one step.

    A tooth climbs in many steps and falls in one. Where values jump up as they fall, it is noise: then there are none.
    """
    reach = (max(ys) - min(ys)) / 2
    if reach <= 0:
        return []
    steps = [after - before for before, after in itertools.pairwise(ys)]
    falls = [index + 1 for index, step in enumerate(steps) if step <= -reach]
    jumps = sum(step >= reach for step in steps)
    return falls if jumps <= len(falls) / 2 else []


def _trend_of_teeth(xs: list[float], ys: list[float], falls: list[int], floor: float, least: float) -> Trend:
    """Growth under a saw-tooth is growth of what it falls back to."""
    height = max(ys) - min(ys)
    if len(falls) == 1:
        # One fall is a tooth if it leads back to where the series began; else it was something else, once.
        if ys[falls[0]] <= min(ys[: falls[0]]) + 0.1 * height:
            return Trend("saw")
        after = falls[0]
        return trend(xs[after:], ys[after:], floor=floor, least=least) if len(ys) - after >= 20 else Trend("unsure")
    at, troughs = [xs[index] for index in falls], [ys[index] for index in falls]
    slope, low, high = theil_sen(at, troughs)
    rise = troughs[-1] - troughs[0]
    rising = all(after > before for before, after in itertools.pairwise(troughs))
    if not rising or rise < least or slope < floor or rise < 0.01 * height:
        return Trend("saw", slope, (low, high), rise)
    # Six in order by chance: 1 in 720.
    return Trend("growing" if len(falls) >= 6 else "unsure", slope, (low, high), rise, 1 / math.factorial(len(falls)))


def levelled_at(ys: Sequence[float], least: float) -> int | None:
    """The index from which a series that rose stays level, or ``None`` if it never rose, or never stopped.

    Args:
        least: a rise of less does not count.
    """
    if len(ys) < LEAST:
        return None
    tail = ys[len(ys) // 2 :]
    level = stats.median(tail)
    noise = 3 * stats.median([abs(y - level) for y in tail])
    if level - ys[0] < max(least, 2 * noise):
        return None
    return next((index for index, y in enumerate(ys) if y >= level - noise), None)
