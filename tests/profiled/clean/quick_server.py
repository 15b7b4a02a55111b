"""A server with quick handlers that is mostly idle: it waits for its callers, and is meant to."""

from __future__ import annotations

import asyncio
import contextlib
import sys

_CLIENT = """
import socket, sys, time
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    for number in range(60):
        connection.sendall(b"%d\\n" % number)
        connection.recv(100)
        time.sleep(0.02)
    connection.sendall(b"stop\\n")
"""


async def answer(line: bytes) -> bytes:
    await asyncio.sleep(0)
    return b"%d\n" % sum(range(int(line)))


async def tidy() -> None:
    while True:
        await asyncio.sleep(0.2)


async def serve() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (line := await reader.readline()).strip().isdigit():
            writer.write(await answer(line))
        writer.close()
        server.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    tidying = asyncio.create_task(tidy())
    port = server.sockets[0].getsockname()[1]
    client = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", _CLIENT, str(port))
    with contextlib.suppress(asyncio.CancelledError):
        await server.serve_forever()
    tidying.cancel()
    await client.wait()


def main(seed: int = 0) -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
