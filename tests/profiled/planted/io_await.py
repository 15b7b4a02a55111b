"""Coroutines that ask a late server one after the other, three at a time; the wait is far below the task's start."""

from __future__ import annotations

import asyncio
import random
import sys


async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while question := await reader.readline():
        await asyncio.sleep(0.03)
        writer.write(question)
    writer.close()


async def llm(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: str) -> str:
    writer.write(f"{question}\n".encode())
    return (await reader.readline()).decode()  # HERE


async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> str:
    return await llm(reader, writer, f"step {number}")


async def agent(port: int, steps: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in range(steps):
        await step(reader, writer, number)
    writer.close()
    await writer.wait_closed()


async def talk(seed: int) -> None:
    server = await asyncio.start_server(late, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        steps = 30 + random.Random(seed).randrange(20)
        await asyncio.gather(*(agent(port, steps) for _ in range(3)))


def main(seed: int = 0) -> None:
    asyncio.run(talk(seed))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
