"""One function with a loop of its own takes nearly all of the time."""

from __future__ import annotations

import random
import sys


def tokens(draw: random.Random, number: int) -> list[int]:
    return [draw.randrange(1000) for _ in range(number)]


def inversions(values: list[int]) -> int:
    found = 0
    for at, value in enumerate(values):
        for other in values[at + 1 :]:
            found += other < value  # HERE
    return found


def summarise(counts: list[int]) -> int:
    return max(counts) - min(counts)


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    counts = [inversions(tokens(draw, 900)) for _ in range(30 + draw.randrange(10))]
    print(summarise(counts))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
