"""A worker of coroutines that backs off between two tries; nothing else happens."""

from __future__ import annotations

import asyncio
import random
import sys


async def back_off(attempt: int) -> None:
    await asyncio.sleep(0.02 * (attempt % 3 + 1))  # HERE


async def job(tries: int) -> None:
    for attempt in range(tries):
        sum(range(2000))
        await back_off(attempt)


def main(seed: int = 0) -> None:
    asyncio.run(job(25 + random.Random(seed).randrange(10)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
