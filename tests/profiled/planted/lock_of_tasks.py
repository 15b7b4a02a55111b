"""Tasks that hold an asyncio lock while they wait for something slow."""

from __future__ import annotations

import asyncio
import random
import sys


async def store(lock: asyncio.Lock, rows: list[int], number: int) -> None:
    async with lock:  # HERE
        await asyncio.sleep(0.006)
        rows.append(number)


async def work(lock: asyncio.Lock, rows: list[int], rounds: int) -> None:
    for number in range(rounds):
        await store(lock, rows, number)


async def together(rounds: int) -> None:
    lock, rows = asyncio.Lock(), list[int]()
    await asyncio.gather(*(work(lock, rows, rounds) for _ in range(6)))
    print(len(rows))


def main(seed: int = 0) -> None:
    asyncio.run(together(25 + random.Random(seed).randrange(8)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
