"""A coroutine calls a function that sleeps the thread, so every other task sleeps with it."""

from __future__ import annotations

import asyncio
import random
import sys
import time


def fetch(number: int) -> int:
    time.sleep(0.12)  # HERE
    return number


async def handle(number: int) -> int:
    await asyncio.sleep(0.005)
    return fetch(number)


async def tick() -> None:
    while True:
        await asyncio.sleep(0.01)


async def serve(requests: int) -> None:
    ticker = asyncio.create_task(tick())
    await asyncio.gather(*(handle(number) for number in range(requests)))
    ticker.cancel()


def main(seed: int = 0) -> None:
    asyncio.run(serve(8 + random.Random(seed).randrange(4)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
