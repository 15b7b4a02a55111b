"""Four threads that compute in Python, in the hope that they would run side by side."""

from __future__ import annotations

import random
import sys
import threading


def digest(number: int, rounds: int, out: list[int]) -> None:
    value = number
    for each in range(rounds):
        value = (value * 33 + each) % 1_000_003  # HERE
    out.append(value)


def main(seed: int = 0) -> None:
    rounds = 2_000_000 + random.Random(seed).randrange(300_000)
    out: list[int] = []
    threads = [threading.Thread(target=digest, args=(number, rounds, out)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(sum(out))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
