"""Calls, of which the first one warms something up and takes as long as all of the others together."""

from __future__ import annotations

import random
import sys

_TABLE: list[int] = []


def answer(number: int) -> int:  # HERE
    if not _TABLE:
        low = high = 1
        for each in range(2_000_000):
            low, high = high, (low + high + each) % 1_000_003
            if each % 1000 == 0:
                _TABLE.append(low)
    return sum(one * other for one, other in zip(_TABLE, _TABLE[number:], strict=False)) % 10


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    print(sum(answer(draw.randrange(400)) for _ in range(600)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
