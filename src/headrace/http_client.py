"""What the clients of a headrace server share: one call as steps, and the two ways to take them.

What to send, when to try again and what an answer means is written once, in generators that yield what is to be done
next (`Core`). `SyncHttp` and `AsyncHttp` only do it: send and sleep. Knows the server by its HTTP interface alone.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import email.utils
import itertools
import json
import math
import random
import re
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

import httpx
import msgspec
import orjson

from headrace.clock import SYSTEM, Clock, sleep
from headrace.errors import (
    ConfigError,
    DeadlineExceeded,
    Fault,
    Forbidden,
    HeadraceError,
    InvalidInput,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    RequestError,
    RequestTimeout,
    ServiceError,
    TaskConflict,
    Unauthorized,
    UnsupportedMediaType,
    from_fault,
)
from headrace.version import __version__

T = TypeVar("T")
C = TypeVar("C", bound="Core")

BACKOFF_S = 0.1
MOST_BACKOFF_S = 10.0
# Refused before anything ran, or lost on the way: another try has a chance.
_RETRIED = (429, 503)
# These can break before an answer begins without any fault in the request.
LOST = (httpx.NetworkError, httpx.RemoteProtocolError)
_EXCERPT = 200
# What a status means when the body does not say it in words that we know.
_BY_STATUS = {
    kind.status: kind.code
    for kind in (
        Unauthorized,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        RequestTimeout,
        PayloadTooLarge,
        UnsupportedMediaType,
        InvalidInput,
        Overloaded,
        DeadlineExceeded,
        HeadraceError,
    )
}


class SyncHttp(Generic[C]):
    """Takes the steps of a core and waits.

    Args:
        base_url: where the server is, for example ``http://localhost:8000``.
        api_key: sent as ``Authorization: Bearer``; never shown.
        timeout_s: time for a call, its retries included.
        retries: how often a call is repeated after 429, 503 or a connection that broke before an answer began.
        clock: what the deadline is measured with.
        sleep: how to wait between two tries.
        jitter: source of the spread of waits.
    """

    _core_type: type[C]

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        clock: Clock = SYSTEM,
        sleep: Callable[[float], None] = sleep,
        jitter: random.Random | None = None,
    ) -> None:
        self._core = self._core_type(base_url, api_key, timeout_s, retries, clock, jitter)
        self._http = httpx.Client(**self._core.options)
        self._sleep = sleep

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.base_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _run(self, steps: Steps[T]) -> T:
        progress = Progress(steps)
        while (step := progress.next()) is not None:
            with progress:
                self._do(step)
        return progress.result

    def _do(self, step: Try | float) -> None:
        if isinstance(step, float):
            self._sleep(step)
            return
        with self._http.stream(**step.request) as response:
            step.begin(response)
            for chunk in response.iter_bytes():
                step.add(chunk)


class AsyncHttp(Generic[C]):
    """`SyncHttp` for asyncio: the same arguments. Belongs to one event loop."""

    _core_type: type[C]

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        clock: Clock = SYSTEM,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: random.Random | None = None,
    ) -> None:
        self._core = self._core_type(base_url, api_key, timeout_s, retries, clock, jitter)
        self._http = httpx.AsyncClient(**self._core.options)
        self._sleep = sleep

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._core.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _run(self, steps: Steps[T]) -> T:
        progress = Progress(steps)
        while (step := progress.next()) is not None:
            with progress:
                await self._do(step)
        return progress.result

    async def _do(self, step: Try | float) -> None:
        if isinstance(step, float):
            await self._sleep(step)
            return
        # Around it all, since httpx bounds each read for itself, and looking a name up not at all.
        async with asyncio.timeout(step.left_s), self._http.stream(**step.request) as response:
            step.begin(response)
            async for chunk in response.aiter_bytes():
                step.add(chunk)


# No input or output from here on.


class Core:
    """What a client knows, and the course of each call as steps: a `Try` is to be sent, a float slept."""

    url_field: ClassVar[str] = "base_url"

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        timeout_s: float,
        retries: int,
        clock: Clock,
        jitter: random.Random | None,
    ) -> None:
        if retries < 0:
            raise ConfigError("must not be negative", field="retries")
        self.base_url = _checked_url(base_url, self.url_field)
        self._api_key = _checked_key(api_key or "")
        self._timeout_s = checked_timeout(timeout_s)
        self._retries = retries
        self._clock = clock
        self._jitter = jitter or random.Random()
        self.reached = False  # whether the server has ever answered

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of httpx's clients."""
        headers = {"accept": "application/json", "user-agent": f"headrace-client/{__version__}"}
        if self._api_key:
            headers["authorization"] = f"Bearer {self._api_key}"
        return {"base_url": self.base_url, "headers": headers}

    def exchange(self, ask: Ask, timeout_s: float | None, retries: int | None = None) -> Steps[Answer]:
        """Ask until there is an answer that another try would not better, or no time for another try.

        Everything asked here may be done twice: a prediction changes nothing in the server, a task is made once per
        key, and what is done to a task already is refused the second time.
        """
        allowed_s = self._timeout_s if timeout_s is None else checked_timeout(timeout_s)
        until = self._clock.monotonic() + allowed_s
        most = self._retries if retries is None else retries
        for tried in itertools.count():
            attempt = Try(ask, until, self._clock)
            cause: Exception | None = None
            try:
                attempt.check()
                yield attempt
            except (httpx.TimeoutException, TimeoutError) as late:
                raise DeadlineExceeded(f"no answer within {allowed_s:g} s", hint="raise timeout_s") from late
            except httpx.HTTPError as lost:
                cause, error = lost, self.lost_error(attempt, lost)
                again = isinstance(lost, LOST) and (attempt.answer is None or ask.again_when_broken)
            else:
                assert attempt.answer
                self.reached = True
                if 200 <= attempt.answer.status < 300:
                    return attempt.answer
                error = attempt.answer.error()
                again = attempt.answer.status in _RETRIED
                if tried and isinstance(error, TaskConflict) and not error.field:
                    error.hint = "it may be an earlier try, whose answer was lost, that has done it: look at the task"
            wait_s = self.pause_s(tried) if error.retry_after_s is None else error.retry_after_s
            if not again or tried >= most or wait_s >= attempt.left_s:
                raise error from cause
            yield wait_s
        raise AssertionError("unreachable")

    def pause_s(self, failures: int, most_s: float = MOST_BACKOFF_S) -> float:
        """How long to wait after so many failures, where the server does not say."""
        return self._jitter.uniform(0.0, min(most_s, BACKOFF_S * 2.0 ** min(failures, 10)))

    def lost_error(self, attempt: Try, error: httpx.HTTPError) -> HeadraceError:
        """What a broken connection becomes."""
        why = str(error) or type(error).__name__
        if attempt.answer:
            ident = attempt.answer.request_id
            return ServiceError(f"the answer broke off: {why}", hint=_with_id(None, ident))
        return ServiceError(f"no answer from {self.base_url}: {why}", hint="is the server running, and the URL right?")


class Progress(Generic[T]):
    """Takes steps one by one; used as ``with``, it hands what failed to the next."""

    result: T

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._error: Exception | None = None

    def next(self) -> Try | float | None:
        """What is to be done, or ``None`` once there is a `result`."""
        error, self._error = self._error, None
        try:
            return self._steps.throw(error) if error else next(self._steps)
        except StopIteration as done:
            self.result = done.value
            return None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if isinstance(error, Exception):
            self._error = error
        return isinstance(error, Exception)


class Ask(msgspec.Struct, frozen=True):
    """A request without its time.

    Args:
        again_when_broken: it costs nothing to ask again when the answer breaks off in its middle.
    """

    method: str
    path: str
    content: bytes | None = None
    kind: str = "application/json"
    headers: dict[str, str] = {}
    again_when_broken: bool = False


class Try:
    """One sending of a request, and what has come of it."""

    def __init__(self, ask: Ask, until: float, clock: Clock) -> None:
        self._ask = ask
        self._until = until
        self._clock = clock
        self.answer: Answer | None = None

    @property
    def left_s(self) -> float:
        return self._until - self._clock.monotonic()

    def patience_s(self, phase: str) -> float:
        """For one of httpx's phases: connect, read, write or pool."""
        return self.left_s

    def check(self) -> None:
        """Raises `TimeoutError` if no time is left."""
        if self.left_s <= 0:
            raise TimeoutError

    @property
    def request(self) -> dict[str, Any]:
        """Arguments of httpx's ``stream``."""
        headers = dict(self._ask.headers)
        if math.isfinite(self.left_s):
            headers["x-request-deadline-ms"] = str(max(1, int(self.left_s * 1e3)))
        if self._ask.content is not None:
            headers["content-type"] = self._ask.kind
        return {
            "method": self._ask.method,
            "url": self._ask.path,
            "content": self._ask.content,
            "headers": headers,
            "extensions": {"timeout": _Left(self)},
        }

    def begin(self, response: httpx.Response) -> None:
        """The head of an answer has come."""
        self.answer = Answer(response.status_code, response.headers)

    def add(self, chunk: bytes) -> None:
        """A piece of its body has come. Raises `TimeoutError` if that is too late."""
        assert self.answer
        self.answer.body += chunk
        self.check()


class _Left(Mapping[str, float]):
    """httpx's time-outs of connecting, writing and reading: each gets what is left when it begins, not a time anew."""

    def __init__(self, attempt: Try) -> None:
        self._attempt = attempt

    def __getitem__(self, phase: str) -> float:
        return max(0.001, self._attempt.patience_s(phase))  # 0 would mean: do not block

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "read", "write", "pool"))

    def __len__(self) -> int:
        return 4


class Answer:
    """An answer of the server, or what has come of it."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.body = bytearray()
        self._headers = headers

    @property
    def request_id(self) -> str:
        return self._headers.get("x-request-id", "")

    def is_kind(self, kind: str) -> bool:
        """Whether its body is of a media type."""
        return self._headers.get("content-type", "").partition(";")[0].strip().lower() == kind

    def decode(self, kind: type[T]) -> T:
        """The body of a success."""
        try:
            return msgspec.json.decode(self.body, type=kind)
        except (msgspec.DecodeError, ValueError) as error:
            raise self.unexpected(str(error)) from error

    def unexpected(self, why: str) -> HeadraceError:
        return ServiceError(
            f"the answer is not one of a headrace server: {why}",
            hint=_with_id("is the URL right?", self.request_id),
        )

    def error(self) -> HeadraceError:
        """What the server refused or failed with."""
        try:
            body = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            body = None
        told = body.get("error") if isinstance(body, dict) else None
        if not isinstance(told, dict):
            shown = told if isinstance(told, str) else self.body[:_EXCERPT].decode("utf-8", "replace").strip()
            told = {"message": f"HTTP {self.status}" + (f": {shown}" if shown else "")}
            if "location" in self._headers:
                told["hint"] = f"the server redirects to {self._headers['location']}: is the URL right?"
        return typed(told, self.status, self.request_id, _retry_after_s(self._headers))


Steps = Generator[Try | float, None, T]


def typed(told: dict[str, Any], status: int, request_id: str, retry_after_s: float | None = None) -> HeadraceError:
    """The error that a server tells of, in our own shape or in OpenAI's, as an exception.

    A code that is not ours (an older client, another server) counts as what its status means.
    """
    default = _BY_STATUS.get(status, RequestError.code if status < 500 else ServiceError.code)
    code, field = told.get("code"), told.get("field") or told.get("param")
    fault = Fault(
        code if isinstance(code, str) else default,
        str(told.get("message") or f"HTTP {status}"),
        str(field) if field else None,
        _with_id(told.get("hint"), request_id or str(told.get("request_id") or "")),
        retry_after_s,
    )
    error = from_fault(fault)
    return error if error.code == fault.code else from_fault(msgspec.structs.replace(fault, code=default))


def _with_id(hint: Any, request_id: str) -> str | None:
    return "; ".join(filter(None, (str(hint or ""), request_id and f"request id {request_id}"))) or None


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds, or a date: that is compared with the server's own clock, which need not agree with ours."""
    given = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", given):
        return float(given)
    try:
        until, now = (email.utils.parsedate_to_datetime(each) for each in (given, headers.get("date", "")))
        return max(0.0, (until - now).total_seconds())
    except (TypeError, ValueError):  # no date, or one with and one without a zone
        return None


def to_json(body: dict[str, Any], field: str) -> bytes:
    """Raises `InvalidInput` for what JSON cannot say."""
    try:
        content = _dumps(body)
    except TypeError as error:
        raise InvalidInput(f"has no JSON form: {error}", field=field) from error
    # orjson writes NaN as null, and a model could take that for an answer of its caller's.
    if b"null" in content:
        try:
            json.dumps(body, allow_nan=False, skipkeys=True, default=_children)
        except ValueError:
            raise InvalidInput("NaN and Infinity are not JSON", field=field, hint="send finite numbers") from None
    return content


def _dumps(body: Any) -> bytes:
    try:
        return orjson.dumps(body, default=plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # perhaps only an array in the byte order of another machine, for which `plain` is not asked
        return orjson.dumps(body, default=plain, option=orjson.OPT_NON_STR_KEYS)


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):  # arrays in a layout or type that orjson does not take, tensors
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _children(value: Any) -> Any:
    """Where else a number may hide: in what orjson writes by itself and `json` does not."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value.tolist() if hasattr(value, "tolist") else None


def _checked_url(given: str, field: str) -> str:
    """Raises `ConfigError`."""
    hint = "for example http://localhost:8000"
    try:
        url = httpx.URL(given)
        url.host.encode("idna")  # as looking it up will
    except (httpx.InvalidURL, TypeError, UnicodeError):
        raise ConfigError("is not a URL", field=field, hint=hint) from None
    if url.userinfo:
        raise ConfigError("must hold no user and password", field=field, hint="use api_key")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{given!r} is not the URL of a server", field=field, hint=hint)
    return given.rstrip("/")


def _checked_key(given: str) -> str:
    """Raises `ConfigError`, which does not show the key; httpx's own complaint would."""
    key = given.strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError("must be printable ASCII without spaces", field="api_key")
    return key


def checked_timeout(given: float) -> float:
    """Raises `ConfigError`. What is not above 0 has passed already, which the call then says."""
    if not math.isfinite(given):
        raise ConfigError("must be a finite number of seconds", field="timeout_s")
    return given
