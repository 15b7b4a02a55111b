"""A function that is asked the same thing tens of thousands of times, and has its answers stored already."""

from __future__ import annotations

import functools
import random
import sys

from balanced import round_of_work


@functools.lru_cache(maxsize=1000)
def weight(key: int) -> int:
    return sum(each % 7 for each in range(key))


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    total = 0.0
    for _ in range(400 + draw.randrange(40)):
        total += round_of_work(draw)
        for key in range(100):
            total += weight(key)
    print(total)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
