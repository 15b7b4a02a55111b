"""Long pieces of work on an event loop on which nobody else waits."""

from __future__ import annotations

import asyncio
import random
import sys

from balanced import round_of_work


async def job(draw: random.Random, pieces: int) -> float:
    total = 0.0
    for _ in range(pieces):
        total += sum(round_of_work(draw) for _ in range(90))
        await asyncio.sleep(0)
    return total


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    print(asyncio.run(job(draw, 6 + draw.randrange(3))))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
