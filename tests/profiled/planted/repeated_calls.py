"""A function without side effects is asked for the same few answers over and over."""

from __future__ import annotations

import random
import sys


def edit_distance(one: str, other: str) -> int:  # HERE
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def nearest(word: str, known: list[str]) -> str:
    return min(known, key=lambda each: edit_distance(word, each))


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    known = ["weir", "race", "sluice", "wheel", "flume", "penstock"]
    seen = ["weer", "rase", "wheal", "floom"]
    words = [draw.choice(seen) for _ in range(6_000)]
    print(sum(len(nearest(word, known)) for word in words))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
