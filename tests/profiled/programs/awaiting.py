"""Four workers that each wait for an answer eight times, through two coroutines."""

from __future__ import annotations

import asyncio


async def ask() -> None:
    await asyncio.sleep(0.05)  # SLEEP


async def step() -> None:
    await ask()  # ASK


async def worker() -> None:
    for _ in range(8):
        await step()  # STEP


async def main() -> None:
    await asyncio.gather(*[worker() for _ in range(4)])  # GATHER
    print("done")


if __name__ == "__main__":
    asyncio.run(main())
