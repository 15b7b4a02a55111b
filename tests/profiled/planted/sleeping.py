"""A poll that sleeps between two looks, with a little work in between."""

from __future__ import annotations

import random
import sys
import time


def look(number: int) -> bool:
    return sum(each * each for each in range(3_000)) % 7 == number


def poll(rounds: int) -> int:
    found = 0
    for number in range(rounds):
        found += look(number)
        time.sleep(0.02)  # HERE
    return found


def main(seed: int = 0) -> None:
    print(poll(45 + random.Random(seed).randrange(20)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
