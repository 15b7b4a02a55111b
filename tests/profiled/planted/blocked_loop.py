"""A handler computes for a long time on the loop, while a ticker and a client want to go on."""

from __future__ import annotations

import asyncio
import random
import sys


def similarity(size: int) -> int:
    best = 0
    for left in range(size):
        for right in range(size):
            best = max(best, (left * 31 ^ right * 17) % 101)  # HERE
    return best


async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while size := await reader.readline():
        writer.write(b"%d\n" % similarity(int(size)))
    writer.close()


async def tick(beats: list[float]) -> None:
    while True:
        await asyncio.sleep(0.01)
        beats.append(asyncio.get_running_loop().time())


async def serve(seed: int) -> None:
    draw = random.Random(seed)
    beats: list[float] = []
    ticker = asyncio.create_task(tick(beats))
    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        for _ in range(5):
            writer.write(b"%d\n" % (600 + draw.randrange(100)))
            await reader.readline()
            await asyncio.sleep(0.03)
        writer.close()
        await writer.wait_closed()
    ticker.cancel()
    print(len(beats))


def main(seed: int = 0) -> None:
    asyncio.run(serve(seed))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
