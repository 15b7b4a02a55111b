"""A server that answers by script, and either kind of client before it as plain methods. Time is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from headrace.testing import FakeClock

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Keeps what it is asked and answers with the next of the script, the last one again and again."""

    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append(Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    do_GET = do_POST = _answer  # noqa: N815 - the names that http.server looks for

    def log_message(self, *_: Any) -> None: ...


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class ScriptedServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.script: list[Answer] = [says({})]
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def says(body: Any, status: int = 200, **headers: str) -> Answer:
    """An answer, sent in one piece; a header's name is written with underscores."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"HTTP/1.1 {status} X", f"content-length: {len(content)}", *lines, "\r\n"])

    def answer(handler: Handler) -> None:
        handler.wfile.write(head.encode() + content)

    return answer


def fails(status: int, code: str, **headers: str) -> Answer:
    return says({"error": {"code": code, "message": "it failed", "retryable": True}}, status, **headers)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.close_connection = True


@dataclass
class World:
    """A server, a clock, and either client behind plain methods.

    Args:
        kind: sync or async.
        clients: the type of each kind.
    """

    kind: str
    server: ScriptedServer
    clients: dict[str, Any]
    clock: FakeClock = field(default_factory=FakeClock)
    slept: list[float] = field(default_factory=list)
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)
    closing: list[Callable[[], Any]] = field(default_factory=list)

    def client(self, url: str = "", **options: Any) -> Any:
        url = url or self.server.url
        options = {"clock": self.clock, "jitter": random.Random(7), **options}
        if self.kind == "sync":
            client = self.clients["sync"](url, sleep=self._sleep, **options)
            self.closing.append(client.close)
            return client

        async def sleep(seconds: float) -> None:
            self._sleep(seconds)

        async_client = self.clients["async"](url, sleep=sleep, **options)
        self.closing.append(lambda: self.runner.run(async_client.close()))
        return Awaited(async_client, self.runner)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds)

    def script(self, *answers: Answer) -> None:
        self.server.script[:] = answers

    @property
    def asked(self) -> list[Asked]:
        return self.server.asked

    def close(self) -> None:
        for close in self.closing:
            close()
        self.runner.close()


class Awaited:
    """A client for asyncio whose methods wait for their answers; what it gives one by one comes so."""

    def __init__(self, client: Any, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*args: Any, **options: Any) -> Any:
            made = method(*args, **options)
            return self._one_by_one(made) if hasattr(made, "__anext__") else self._runner.run(made)

        return call

    def _one_by_one(self, made: Any) -> Iterator[Any]:
        nothing = object()

        async def next_of() -> Any:
            return await anext(made, nothing)

        while (found := self._runner.run(next_of())) is not nothing:
            yield found


@contextlib.contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
