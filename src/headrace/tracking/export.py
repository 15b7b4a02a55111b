"""Metrics out of a user's own program: an application to mount, a small server, a middleware that counts requests."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from headrace import metrics
from headrace.clock import SYSTEM
from headrace.errors import ConfigError, Overloaded
from headrace.metrics.current import status_of
from headrace.rundir import try_exclusive
from headrace.tracking.group import group

if TYPE_CHECKING:
    from headrace.web import Message, Receive, Scope, Send

_LATE = (408, 504)
_CLIENT_GONE = 499
_SERVERS_FAULT = 500
_CLIENTS_FAULT = 400


class MetricsApp:
    """An ASGI application that shows the metrics of all processes of this program: ``app.mount("/metrics", …)``."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, send)

    async def _answer(self, scope: Scope, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await send({"type": "http.response.start", "status": 405, "headers": [(b"allow", b"GET, HEAD")]})
            await send({"type": "http.response.body", "body": b""})
            return
        content, kind = group().scrape(dict(scope["headers"]).get(b"accept", b"").decode("latin-1"))
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content if scope["method"] == "GET" else b""})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def metrics_app() -> MetricsApp:
    """An ASGI application that shows the metrics of all processes of this program, in the format that is asked for."""
    return MetricsApp()


class MetricsMiddleware:
    """ASGI middleware that counts a user's own requests: ``app.add_middleware(hr.MetricsMiddleware, model="shop")``.

    Each is counted once, at the last byte of its answer: `headrace_requests_total` and
    `headrace_request_duration_seconds` with the path of the route as ``endpoint``, ``other`` where none matched.

    Args:
        model: the label of these metrics.
    """

    def __init__(self, app: Any, model: str = "app") -> None:
        self._app = app
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, code, ended, gone = SYSTEM.monotonic(), 0, False, False

        def end(status: str) -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._count(scope, status, SYSTEM.monotonic() - began)

        async def hear() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def tell(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                end(status_of_code(code))

        try:
            await self._app(scope, hear, tell)
        except BaseException as error:
            end("cancelled" if gone else status_of(error))
            raise
        end("cancelled" if gone else "error")  # it returned without a whole answer

    def _count(self, scope: Scope, status: str, took_s: float) -> None:
        row = group().row
        endpoint = getattr(scope.get("route"), "path", "other")
        row.by_status(metrics.REQUESTS, model=self._model, endpoint=endpoint)[status].inc()
        row.histogram(metrics.REQUEST_DURATION, model=self._model, endpoint=endpoint).observe(took_s)


def status_of_code(code: int) -> str:
    """How metrics call an HTTP status. A client's own mistake is rejected: it says nothing about the service."""
    if code in _LATE:
        return "timeout"
    if code == _CLIENT_GONE:
        return "cancelled"
    if code == Overloaded.status:
        return "rejected"
    return "error" if code >= _SERVERS_FAULT else "rejected" if code >= _CLIENTS_FAULT else "success"


class MetricsServer:
    """A running server of `/metrics`. ``port`` is the one it has."""

    def __init__(self, host: str, port: int) -> None:
        self._mark = group().member_file(f"port {host.replace('/', '')} {port}")
        try:
            # Members share the port, and any of them shows the sum. A stranger's port is not shared.
            if try_exclusive(self._mark):
                _probe(host, port)
            fcntl.flock(self._mark, fcntl.LOCK_SH)
            self._server = _Server((host, port), _Handler)
        except BaseException:
            os.close(self._mark)
            raise
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()
        _running.add(self)

    @property
    def port(self) -> int:
        return self._server.server_port

    def stop(self) -> None:
        """Close the port. What was counted stays."""
        self._server.shutdown()
        self._thread.join()
        self.let_go()

    def let_go(self) -> None:
        """Close this process's own end of it."""
        _running.discard(self)
        self._server.server_close()
        os.close(self._mark)


_running: set[MetricsServer] = set()


def _forget() -> None:
    """After a fork: the thread is the parent's, and a port that nobody listens on swallows connections."""
    for server in list(_running):
        server.let_go()


os.register_at_fork(after_in_child=_forget)


class _Server(ThreadingHTTPServer):
    allow_reuse_port = True
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a connection may be silent

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        content, kind = group().scrape(self.headers.get("Accept", ""))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has in the base class
        """A scrape every few seconds is no news."""


def _probe(host: str, port: int) -> None:
    """Raises `OSError` if another program listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def start_metrics_server(port: int, host: str = "127.0.0.1") -> MetricsServer:
    """Show the metrics of all processes of this program on a port of their own, from a thread.

    Each process of the program may call it: they share the port.

    Args:
        port: 0 picks a free one.

    Raises:
        ConfigError: the port is another program's.
    """
    try:
        return MetricsServer(host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}",
            field="port",
            hint="port 0 picks a free one",
        ) from None
