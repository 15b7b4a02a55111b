"""A numeric pipeline, some calls deep, whose parts take about as long as each other."""

from __future__ import annotations

import random
import sys

from balanced import round_of_work


def work(draw: random.Random, rounds: int) -> float:
    return sum(round_of_work(draw) for _ in range(rounds))


def run(seed: int) -> float:
    draw = random.Random(seed)
    return work(draw, 500 + draw.randrange(50))


def main(seed: int = 0) -> None:
    print(run(seed))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
