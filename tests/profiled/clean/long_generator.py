"""A generator that lives as long as the program, and a function of no arguments that is called very often."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator

from balanced import round_of_work

_NUMBERS = itertools.count()


def next_number() -> int:
    return next(_NUMBERS)


def results(draw: random.Random, rounds: int) -> Iterator[float]:
    for _ in range(rounds):
        yield round_of_work(draw)


def main(seed: int = 0) -> None:
    draw, total = random.Random(seed), 0.0
    for each in results(draw, 400 + draw.randrange(40)):
        total += each
        for _ in range(50):
            total += next_number()
    print(total)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
