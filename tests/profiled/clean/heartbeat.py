"""Tasks that only tick, beside one that works in small steps: that they sleep holds nobody up."""

from __future__ import annotations

import asyncio
import random
import sys

from balanced import round_of_work


async def tick(every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)


async def work(draw: random.Random) -> float:
    tickers = [asyncio.create_task(tick(every_s)) for every_s in (0.05, 0.5, 5.0)]
    total = 0.0
    for _ in range(500 + draw.randrange(40)):
        total += round_of_work(draw)
        await asyncio.sleep(0)
    for ticker in tickers:
        ticker.cancel()
    return total


def main(seed: int = 0) -> None:
    print(asyncio.run(work(random.Random(seed))))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
