"""What every HTTP part shares: reading bodies within limits, request ids, and errors as JSON in one place.

Knows nothing of models. `serving/app.py` uses the plain functions on its hot path; the other routes live in an
ordinary FastAPI application made by `make_app`, which answers errors in the same shape.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import itertools
import logging
import math
import os
import re
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import orjson

from headrace.errors import (
    ClientGone,
    Forbidden,
    HeadraceError,
    InvalidInput,
    MalformedBody,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    RunnerError,
    Unauthorized,
    UnsupportedMediaType,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

BODY_TIMEOUT_S = 30.0
COMPRESS_BYTES = 64 * 1024
_JSON_TYPES = re.compile(rb"^application/(?:[\w.-]+\+)?json\s*(?:;|$)", re.IGNORECASE)
_USABLE_ID = re.compile(rb"^[A-Za-z0-9._:/+=-]{1,128}$")

_process = f"{os.getpid():x}-{int.from_bytes(os.urandom(4), 'big'):08x}"
_numbers = itertools.count(1)


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The caller's `X-Request-Id` if it is harmless in a log line, else a new one."""
    given = headers.get(b"x-request-id")
    if given and _USABLE_ID.match(given):
        return given.decode()
    return f"{_process}-{next(_numbers):x}"


class Keys:
    """The server's API keys. Without any, everybody may come in.

    Args:
        text: keys, separated by commas.
    """

    def __init__(self, text: str) -> None:
        self._digests = [_digest(key.strip().encode()) for key in text.split(",") if key.strip()]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Mapping[bytes, bytes]) -> bytes:
        """The key in the headers, empty where there are none. Raises `Unauthorized` unless it is one of ours.

        Digests are compared, each in constant time and all of them, so that time says nothing of a key.
        """
        if not self._digests:
            return b""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        digest = _digest(given.strip())
        if not sum([hmac.compare_digest(digest, known) for known in self._digests]):
            raise Unauthorized(
                "this server asks for a key", field="Authorization", hint="send Authorization: Bearer KEY, or X-API-Key"
            )
        return given.strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Guard:
    """ASGI wrapper of the admin port: keys, where the server has some, and only requests that mean this machine.

    A page of another site can make a browser send a request to a port of this machine, under a name that it has
    pointed here (DNS rebinding) or across origins. `Host` and `Origin` tell.

    Args:
        hosts: names besides those of the loopback interface that mean this server.
    """

    def __init__(self, app: Any, *, keys: str, hosts: Iterable[str]) -> None:
        self._app = app
        self._keys = Keys(keys)
        self._hosts = {"localhost", "127.0.0.1", "::1", *hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            ident = scope["headrace.request_id"] = request_id(headers)
            try:
                self._check(headers)
            except HeadraceError as error:
                body = orjson.dumps({"error": error_object(error, ident)})
                await respond(send, error.status, body, [*error_headers(error), (b"x-request-id", ident.encode())])
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        # A server that listens to the network has names that only its operator knows; there the key decides.
        if not self._keys and _host_name(host) not in self._hosts:
            raise Forbidden(f"{host!r} is not a name of this server", field="Host")
        refuse_other_sites(headers)
        self._keys.check(headers)


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def require_post(method: str) -> None:
    """Raises `MethodNotAllowed`."""
    if method != "POST":
        raise MethodNotAllowed(f"{method} is not possible here", field="method", hint="use POST")


def is_json(kind: bytes) -> bool:
    """Whether a Content-Type is JSON."""
    return kind == b"application/json" or _JSON_TYPES.match(kind) is not None


def require_known_type(headers: Mapping[bytes, bytes], *, files: bool = False, binary: bool = False) -> None:
    """Let a body through that is not declared as JSON: raw bytes, or a multipart form.

    Raises:
        UnsupportedMediaType: it is neither. A type is asked for, since a page of another site can post what is
            undeclared without asking first.
        Forbidden: a form, or an undeclared body where one is allowed, comes from a page of another site.
    """
    kind = headers.get(b"content-type", b"")
    plain = kind.partition(b";")[0].strip().lower()
    if (files or binary) and plain == b"application/octet-stream":
        return
    # The Open Inference Protocol's best-known client declares nothing.
    if (files and plain == b"multipart/form-data") or (binary and not plain):
        refuse_other_sites(headers)
        return
    raise UnsupportedMediaType(
        f"the body must be JSON, not {kind.decode('latin-1') or 'undeclared'}",
        field="Content-Type",
        hint="send Content-Type: application/json (curl --json does)",
    )


def require_json_post(method: str, headers: Mapping[bytes, bytes]) -> None:
    """Raises `MethodNotAllowed` or `UnsupportedMediaType`."""
    require_post(method)
    if not is_json(headers.get(b"content-type", b"")):
        require_known_type(headers)


def refuse_other_sites(headers: Mapping[bytes, bytes]) -> None:
    """Raises `Forbidden` for a request that a browser sends on behalf of a page of another site."""
    origin = headers.get(b"origin", b"")
    if origin and origin.partition(b"://")[2] != headers.get(b"host", b""):
        raise Forbidden("requests from pages of other sites are refused", field="Origin")


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body.

    Raises:
        PayloadTooLarge: more than ``limit`` bytes are announced or come.
        RequestTimeout: the body did not come within 30 s.
        ClientGone: the client hung up on the way.
    """
    announced = headers.get(b"content-length")
    async with _body_timeout():
        if announced and int(announced) > limit:
            await _discard(receive, limit)
            raise _too_large(limit)
        message = await _receive(receive)
        body: bytes = message.get("body", b"")
        chunks, size = [body], len(body)
        while message.get("more_body"):
            message = await _receive(receive)
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                await _discard(receive, limit)
                raise _too_large(limit)
            chunks.append(chunk)
    whole = b"".join(chunks) if len(chunks) > 1 else body
    encoding = headers.get(b"content-encoding")
    return whole if encoding is None else await asyncio.to_thread(_decompress, whole, encoding, limit)


def _decompress(body: bytes, encoding: bytes, limit: int) -> bytes:
    if encoding.strip().lower() not in (b"gzip", b"deflate", b"identity"):
        raise UnsupportedMediaType(
            f"cannot undo Content-Encoding {encoding.decode('latin-1')}", field="Content-Encoding", hint="use gzip"
        )
    if encoding.strip().lower() == b"identity":
        return body
    inflate = zlib.decompressobj(wbits=47)  # zlib and gzip heads alike
    try:
        # A small body may hold a very large one: no more than the limit is ever made of it.
        plain = inflate.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedBody(f"the body is not what Content-Encoding says: {error}", field="body") from None
    if len(plain) > limit:
        raise _too_large(limit)
    if not inflate.eof:
        raise MalformedBody("the compressed body ends too early", field="body")
    return plain


async def compress(body: bytes, headers: Mapping[bytes, bytes]) -> tuple[bytes, Headers]:
    """Compress a large answer for a client that takes gzip; small ones would only cost time."""
    if len(body) < COMPRESS_BYTES or b"gzip" not in headers.get(b"accept-encoding", b""):
        return body, ()
    packed = await asyncio.to_thread(gzip.compress, body, 1)
    return packed, [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]


async def _receive(receive: Receive) -> Message:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone("the client closed the connection before its body was complete")
    return message


class _body_timeout:  # noqa: N801 - reads as a statement: `async with _body_timeout()`
    """Turns the time-out of a slow body into an answer."""

    async def __aenter__(self) -> None:
        self._timeout = asyncio.timeout(BODY_TIMEOUT_S)
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError:
            raise RequestTimeout(f"the body did not come within {BODY_TIMEOUT_S:.0f} s") from None


async def _discard(receive: Receive, limit: int) -> None:
    """Read on for a little: a client that is still sending would take a reset for the answer."""
    size, message = 0, await _receive(receive)
    while message.get("more_body") and size <= 4 * limit:
        message = await _receive(receive)
        size += len(message.get("body", b""))


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {limit} bytes", field="body", hint="raise max_body_bytes")


def parse_json(body: bytes) -> Any:
    """Decode a JSON body.

    Raises:
        InvalidInput: it holds NaN or Infinity, which JSON has not; names the place.
        MalformedBody: it is not JSON.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        place = _find_nonfinite(body)
        if place is not None:
            raise InvalidInput("NaN and Infinity are not JSON", field=place, hint="send finite numbers") from None
        raise MalformedBody(f"the body is not JSON: {error}", field="body") from None


def _find_nonfinite(body: bytes) -> str | None:
    """Path of the first NaN or Infinity in something that is JSON otherwise. Only run on small bodies that failed."""
    import json

    if len(body) > 1 << 20:
        return None
    mark = object()

    def walk(node: Any, path: str) -> str | None:
        if node is mark:
            return path or "body"
        children: Iterable[tuple[str, Any]] = ()
        if isinstance(node, dict):
            children = ((f"{path}.{key}" if path else str(key), child) for key, child in node.items())
        elif isinstance(node, list):
            children = ((f"{path}[{index}]", child) for index, child in enumerate(node))
        return next((found for where, child in children if (found := walk(child, where)) is not None), None)

    try:
        return walk(json.loads(body, parse_constant=lambda _: mark), "")
    except (ValueError, RecursionError):
        return None


def error_object(error: HeadraceError, request_id: str | None = None) -> dict[str, Any]:
    """An error as our own routes show it."""
    shown: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.field:
        shown["field"] = error.field.encode("utf-8", "backslashreplace").decode()
    if error.hint:
        shown["hint"] = error.hint
    shown["retryable"] = error.retryable
    if request_id:
        shown["request_id"] = request_id
    return shown


def error_headers(error: HeadraceError) -> list[tuple[bytes, bytes]]:
    if isinstance(error, MethodNotAllowed):
        return [(b"allow", error.allowed.encode())]
    if isinstance(error, Unauthorized):
        return [(b"www-authenticate", b"Bearer")]
    if error.retry_after_s is not None:
        return [(b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode())]
    return []


def unexpected(error: Exception) -> HeadraceError:
    """What a client sees of a defect of ours; the traceback goes to the log."""
    _log.error("unexpected error", exc_info=error)
    return HeadraceError("internal error", hint="the traceback is in the server's log")


def hide_details(error: HeadraceError, debug: bool) -> HeadraceError:
    """A model's own exception text may hold anything: only `debug` shows it to clients."""
    if isinstance(error, RunnerError) and not debug:
        return RunnerError(
            "the model failed on this input", hint="the server's log has the traceback; --debug shows the text here"
        )
    return error


async def respond(
    send: Send, status: int, body: bytes, headers: Headers = (), kind: bytes = b"application/json"
) -> None:
    """Send an answer, JSON unless said otherwise."""
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", kind),
                (b"content-length", str(len(body)).encode()),
                *headers,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


def native_error(path: str, error: HeadraceError, request_id: str | None) -> bytes:
    """Body of an error on our own routes."""
    return orjson.dumps({"error": error_object(error, request_id)})


def make_app(
    title: str, version: str, error_body: Callable[[str, HeadraceError, str | None], bytes] = native_error
) -> FastAPI:
    """A FastAPI application whose errors look like those of the hot path, without documentation from the internet.

    Args:
        error_body: the body of an error from path, error and request id: protocols have shapes of their own.
    """
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import Response
    from starlette.exceptions import HTTPException
    from starlette.requests import Request

    app = FastAPI(title=title, version=version, docs_url=None, redoc_url=None)

    def answer(request: Request, error: HeadraceError) -> Response:
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        body = error_body(path, error, request.scope.get("headrace.request_id"))
        headers = {key.decode(): value.decode() for key, value in error_headers(error)}
        return Response(body, error.status, headers, "application/json")

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, HeadraceError)
        return answer(request, error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            refused = MethodNotAllowed(f"{request.method} is not possible here", field="method")
            refused.allowed = (error.headers or {}).get("Allow", "GET")
            return answer(request, refused)
        return answer(request, NotFound(f"there is nothing at {request.url.path}", hint="/docs lists what there is"))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return answer(request, InvalidInput(first["msg"], field=".".join(map(str, first["loc"][1:]))))

    async def bug(request: Request, error: Exception) -> Response:
        return answer(request, unexpected(error))

    app.add_exception_handler(HeadraceError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, bug)
    return app
