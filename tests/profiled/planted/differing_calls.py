"""A function of its own for each of very many numbers, no two alike."""

from __future__ import annotations

import random
import sys


def squash(value: float) -> float:  # HERE
    return (
        value / (1.0 + abs(value)) * 0.5 + (value * value) / (3.0 + value * value) - 0.25 * value / (2.0 + abs(value))
    )


def total(values: list[float]) -> float:
    found = 0.0
    for value in values:
        found += squash(value)
    return found


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    print(total([draw.random() for _ in range(600_000)]))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
