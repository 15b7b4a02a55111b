"""Twelve pieces of ordinary work that take about as long as each other: nothing here is worth a word."""

from __future__ import annotations

import itertools
import random


def drawn(draw: random.Random) -> list[float]:
    return [each * 0.5 + 1.0 for each in draw.randbytes(2000)]


def smoothed(values: list[float]) -> list[float]:
    found, last = [0.0] * len(values), 0.0
    for at in range(0, len(values), 2):
        last = 0.9 * last + 0.1 * values[at]
        found[at] = found[at + 1] = last
    return found


def differences(values: list[float]) -> list[float]:
    found = [0.0] * len(values)
    for at in range(1, 1500):
        found[at] = values[at] - values[at - 1]
    return found


def signs(values: list[float]) -> list[int]:
    counts = [0] * 3
    for value in values[:1100]:
        counts[(value > 0) + (value > 9)] += 1
    return counts


def ranked(values: list[float]) -> list[float]:
    return sorted(values[:900]) + sorted(values[900:1700], reverse=True)


def checked(values: list[float]) -> float:
    total = 0.0
    for value in values[:1800]:
        total = (total * 1.01 + value) % 1000.0
    return total


def named(values: list[float]) -> int:
    return len({f"{value:.1f}" for value in values[:300]})


def mixed(values: list[float]) -> int:
    state = 1
    for value in values[:1300]:
        state = (state * 33 ^ (value > 0.0)) & 0xFFFF
    return state


def folded(values: list[float]) -> float:
    low = high = 0.0
    for value in values[:1700]:
        if value < low:
            low = value
        elif value > high:
            high = value
    return high - low


def paired(values: list[float]) -> list[tuple[float, float]]:
    return [(left, right) for left, right in itertools.pairwise(values[:1500]) if left < right]


def powers(values: list[float]) -> list[float]:
    return [value**3 - 2.0 * value for value in values[:900]]


def steps(values: list[float]) -> int:
    count, before = 0, 0.0
    for value in values[:1700]:
        count += before < value
        before = value
    return count


def round_of_work(draw: random.Random) -> float:
    values = drawn(draw)
    smooth = smoothed(values)
    found = differences(smooth)
    total = sum(signs(found)) + ranked(found)[0] + checked(smooth) + named(found) + mixed(found)
    return total + folded(values) + len(paired(values)) + powers(smooth)[0] + steps(values)
