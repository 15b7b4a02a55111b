"""A client of a headrace server, for plain and for asyncio programs.

What to send, when to try again and what an answer means is written once, in `_Core`: generators that yield what is
to be done next. `Client` and `AsyncClient` only do it: send and sleep. Knows the server by its HTTP interface alone.
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
import urllib.parse
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

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
    Unauthorized,
    UnsupportedMediaType,
    from_fault,
)
from headrace.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]

__all__ = ["AsyncClient", "Client", "Prediction"]

T = TypeVar("T")

BACKOFF_S = 0.1
MOST_BACKOFF_S = 10.0
# Refused before anything ran, or lost on the way: another try has a chance.
_RETRIED = (429, 503)
# These can break before an answer begins without any fault in the request.
_LOST = (httpx.NetworkError, httpx.RemoteProtocolError)
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


class Prediction(msgspec.Struct, frozen=True):
    """An answer of a model.

    Args:
        latency_ms: time in the server. For a list: of the whole list, as are the other figures.
        queue_ms: wait for a place in a batch; for a list the longest of its items.
        run_ms: time of the batch in the model.
        batch_size: how many items shared that batch. These three are 0 where the server does not say.
        request_id: finds the request in the server's log.
    """

    value: Any
    latency_ms: float
    queue_ms: float
    run_ms: float
    batch_size: int
    request_id: str


class Client:
    """Asks a headrace server and waits. May be shared between threads; close it, or use it in ``with``.

    Every method raises the error that the server names (`headrace.errors`), `DeadlineExceeded` when its time is up, and
    `ServiceError` when there is no connection.

    Args:
        base_url: where the server is, for example ``http://localhost:8000``.
        api_key: sent as ``Authorization: Bearer``; never shown.
        timeout_s: time for a call, its retries included; each call may name its own.
        retries: how often a call is repeated after 429, 503 or a connection that broke before an answer began.
        clock: what the deadline is measured with.
        sleep: how to wait between two tries.
        jitter: source of the spread of waits.
    """

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
        self._core = _Core(base_url, api_key, timeout_s, retries, clock, jitter)
        self._http = httpx.Client(**self._core.options)
        self._sleep = sleep

    def __repr__(self) -> str:
        return f"Client({self._core.base_url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def predict(self, input: Any, *, model: str | None = None, timeout_s: float | None = None) -> Prediction:  # noqa: A002
        """Have one item computed.

        Args:
            input: what the model takes: anything that has a JSON form, an array (sent as nested lists), or bytes, which
                are sent as they are.
            model: its name; the server's default model if ``None``.
            timeout_s: time for this call, retries included.
        """
        return self._run(self._core.predict(input, model, timeout_s))

    def predict_many(
        self, inputs: Iterable[Any], *, model: str | None = None, timeout_s: float | None = None
    ) -> list[Prediction | HeadraceError]:
        """Have several items computed in one request. An item that failed is its error, in its place.

        Raises:
            HeadraceError: the request failed, or every item did: then the error of the first.
        """
        return self._run(self._core.predict_many(inputs, model, timeout_s))

    def embed(self, texts: str | Iterable[str], *, model: str, timeout_s: float | None = None) -> list[Vector]:
        """Vectors of texts, in their order. One text that fails is the failure of all."""
        return self._run(self._core.embed(texts, model, timeout_s))

    def models(self, *, timeout_s: float | None = None) -> list[str]:
        """Names of the server's models."""
        return self._run(self._core.models(timeout_s))

    def ready(self, *, timeout_s: float | None = None) -> bool:
        """Whether every model is warm. Asks once: nobody listening, or no answer in time, is also a no."""
        return self._run(self._core.ready(timeout_s))

    def _run(self, steps: Steps[T]) -> T:
        progress = _Progress(steps)
        while (step := progress.next()) is not None:
            with progress:
                self._do(step)
        return progress.result

    def _do(self, step: _Try | float) -> None:
        if isinstance(step, float):
            self._sleep(step)
            return
        with self._http.stream(**step.request) as response:
            step.begin(response)
            for chunk in response.iter_bytes():
                step.add(chunk)


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods and errors. Belongs to one event loop."""

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
        self._core = _Core(base_url, api_key, timeout_s, retries, clock, jitter)
        self._http = httpx.AsyncClient(**self._core.options)
        self._sleep = sleep

    def __repr__(self) -> str:
        return f"AsyncClient({self._core.base_url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def predict(self, input: Any, *, model: str | None = None, timeout_s: float | None = None) -> Prediction:  # noqa: A002
        """As `Client.predict`."""
        return await self._run(self._core.predict(input, model, timeout_s))

    async def predict_many(
        self, inputs: Iterable[Any], *, model: str | None = None, timeout_s: float | None = None
    ) -> list[Prediction | HeadraceError]:
        """As `Client.predict_many`."""
        return await self._run(self._core.predict_many(inputs, model, timeout_s))

    async def embed(self, texts: str | Iterable[str], *, model: str, timeout_s: float | None = None) -> list[Vector]:
        """As `Client.embed`."""
        return await self._run(self._core.embed(texts, model, timeout_s))

    async def models(self, *, timeout_s: float | None = None) -> list[str]:
        """As `Client.models`."""
        return await self._run(self._core.models(timeout_s))

    async def ready(self, *, timeout_s: float | None = None) -> bool:
        """As `Client.ready`."""
        return await self._run(self._core.ready(timeout_s))

    async def _run(self, steps: Steps[T]) -> T:
        progress = _Progress(steps)
        while (step := progress.next()) is not None:
            with progress:
                await self._do(step)
        return progress.result

    async def _do(self, step: _Try | float) -> None:
        if isinstance(step, float):
            await self._sleep(step)
            return
        # Around it all, since httpx bounds each read for itself, and looking a name up not at all.
        async with asyncio.timeout(step.left_s), self._http.stream(**step.request) as response:
            step.begin(response)
            async for chunk in response.aiter_bytes():
                step.add(chunk)


# What the clients share: no input or output from here on.


class _Core:
    """What a client knows, and the course of each call as steps: a `_Try` is to be sent, a float slept."""

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
        self.base_url = _checked_url(base_url)
        self._api_key = _checked_key(api_key or "")
        self._timeout_s = _checked_timeout(timeout_s)
        self._retries = retries
        self._clock = clock
        self._jitter = jitter or random.Random()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of httpx's clients."""
        headers = {"accept": "application/json", "user-agent": f"headrace-client/{__version__}"}
        if self._api_key:
            headers["authorization"] = f"Bearer {self._api_key}"
        return {"base_url": self.base_url, "headers": headers}

    def predict(self, value: Any, model: str | None, timeout_s: float | None) -> Steps[Prediction]:
        if isinstance(value, bytes | bytearray | memoryview):
            ask = _Ask("POST", _predict_path(model), bytes(value), "application/octet-stream")
        else:
            ask = _Ask("POST", _predict_path(model), _to_json({"input": value}, "input"))
        answer = yield from self._exchange(ask, timeout_s)
        told = answer.decode(_One)
        return _prediction(told.prediction, told, answer.request_id)

    def predict_many(
        self, values: Iterable[Any], model: str | None, timeout_s: float | None
    ) -> Steps[list[Prediction | HeadraceError]]:
        if isinstance(values, str | bytes | Mapping):
            raise InvalidInput("must be a list of items; predict takes one", field="inputs")
        items = [_item(value) for value in values]
        ask = _Ask("POST", _predict_path(model), _to_json({"inputs": items}, "inputs"))
        answer = yield from self._exchange(ask, timeout_s)
        told = answer.decode(_Many)
        if len(told.predictions) != len(items):
            raise answer.unexpected(f"{len(told.predictions)} predictions for {len(items)} inputs")
        return [
            _typed(value["error"], HeadraceError.status, answer.request_id)
            if _is_failed(value)
            else _prediction(value, told, answer.request_id)
            for value in told.predictions
        ]

    def embed(self, texts: str | Iterable[str], model: str, timeout_s: float | None) -> Steps[list[Vector]]:
        asked = [texts] if isinstance(texts, str) else list(texts)
        body = {"input": asked, "model": model, "encoding_format": "base64"}
        answer = yield from self._exchange(_Ask("POST", "/v1/embeddings", _to_json(body, "input")), timeout_s)
        rows = sorted(answer.decode(_Embeddings).data, key=lambda row: row.index)
        if [row.index for row in rows] != list(range(len(asked))):
            raise answer.unexpected(f"{len(rows)} vectors for {len(asked)} texts")
        try:
            return [_vector(row.embedding) for row in rows]
        except ValueError as error:
            raise answer.unexpected(str(error)) from error

    def models(self, timeout_s: float | None) -> Steps[list[str]]:
        answer = yield from self._exchange(_Ask("GET", "/v1/models"), timeout_s)
        return [model.id for model in answer.decode(_Models).data]

    def ready(self, timeout_s: float | None) -> Steps[bool]:
        try:
            yield from self._exchange(_Ask("GET", "/health/ready"), timeout_s, retries=0)
        except (ServiceError, DeadlineExceeded):
            return False
        return True

    def _exchange(self, ask: _Ask, timeout_s: float | None, retries: int | None = None) -> Steps[_Answer]:
        """Ask until there is an answer that another try would not better, or no time for another try.

        Everything asked here is safe to repeat: a prediction changes nothing in the server.
        """
        allowed_s = self._timeout_s if timeout_s is None else _checked_timeout(timeout_s)
        until = self._clock.monotonic() + allowed_s
        most = self._retries if retries is None else retries
        for tried in itertools.count():
            attempt = _Try(ask, until, self._clock)
            cause: Exception | None = None
            try:
                attempt.check()
                yield attempt
            except (httpx.TimeoutException, TimeoutError) as late:
                raise DeadlineExceeded(f"no answer within {allowed_s:g} s", hint="raise timeout_s") from late
            except httpx.HTTPError as lost:
                cause, error = lost, self._lost(attempt, lost)
                again = attempt.answer is None and isinstance(lost, _LOST)
            else:
                assert attempt.answer
                if 200 <= attempt.answer.status < 300:
                    return attempt.answer
                error = attempt.answer.error()
                again = attempt.answer.status in _RETRIED
            wait_s = error.retry_after_s
            if wait_s is None:
                wait_s = self._jitter.uniform(0.0, min(MOST_BACKOFF_S, BACKOFF_S * 2.0 ** min(tried, 10)))
            if not again or tried >= most or wait_s >= attempt.left_s:
                raise error from cause
            yield wait_s
        raise AssertionError("unreachable")

    def _lost(self, attempt: _Try, error: httpx.HTTPError) -> HeadraceError:
        why = str(error) or type(error).__name__
        if attempt.answer:
            ident = attempt.answer.request_id
            return ServiceError(f"the answer broke off: {why}", hint=_with_id(None, ident))
        return ServiceError(f"no answer from {self.base_url}: {why}", hint="is the server running, and base_url right?")


class _Progress(Generic[T]):
    """Takes steps one by one; used as ``with``, it hands what failed to the next."""

    result: T

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._error: Exception | None = None

    def next(self) -> _Try | float | None:
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


class _Ask(msgspec.Struct, frozen=True):
    """A request without its time."""

    method: str
    path: str
    content: bytes | None = None
    kind: str = "application/json"


class _Try:
    """One sending of a request, and what has come of it."""

    def __init__(self, ask: _Ask, until: float, clock: Clock) -> None:
        self._ask = ask
        self._until = until
        self._clock = clock
        self.answer: _Answer | None = None

    @property
    def left_s(self) -> float:
        return self._until - self._clock.monotonic()

    def check(self) -> None:
        """Raises `TimeoutError` if no time is left."""
        if self.left_s <= 0:
            raise TimeoutError

    @property
    def request(self) -> dict[str, Any]:
        """Arguments of httpx's ``stream``."""
        headers = {"x-request-deadline-ms": str(max(1, int(self.left_s * 1e3)))}
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
        self.answer = _Answer(response.status_code, response.headers)

    def add(self, chunk: bytes) -> None:
        """A piece of its body has come. Raises `TimeoutError` if that is too late."""
        assert self.answer
        self.answer.body += chunk
        self.check()


class _Left(Mapping[str, float]):
    """httpx's time-outs of connecting, writing and reading: each gets what is left when it begins, not a time anew."""

    def __init__(self, attempt: _Try) -> None:
        self._attempt = attempt

    def __getitem__(self, phase: str) -> float:
        return max(0.001, self._attempt.left_s)  # 0 would mean: do not block

    def __iter__(self) -> Iterator[str]:
        return iter(("connect", "read", "write", "pool"))

    def __len__(self) -> int:
        return 4


class _Answer:
    """An answer of the server, or what has come of it."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.body = bytearray()
        self._headers = headers

    @property
    def request_id(self) -> str:
        return self._headers.get("x-request-id", "")

    def decode(self, kind: type[T]) -> T:
        """The body of a success."""
        try:
            return msgspec.json.decode(self.body, type=kind)
        except (msgspec.DecodeError, ValueError) as error:
            raise self.unexpected(str(error)) from error

    def unexpected(self, why: str) -> HeadraceError:
        return ServiceError(
            f"the answer is not one of a headrace server: {why}",
            hint=_with_id("is base_url right?", self.request_id),
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
                told["hint"] = f"the server redirects to {self._headers['location']}: is base_url right?"
        return _typed(told, self.status, self.request_id, _retry_after_s(self._headers))


Steps = Generator[_Try | float, None, T]


class _Timings(msgspec.Struct, frozen=True):
    queue_ms: float = 0.0
    run_ms: float = 0.0
    batch_size: int = 0


class _Timed(msgspec.Struct, kw_only=True):
    latency_ms: float = 0.0
    timings: _Timings = _Timings()


class _One(_Timed):
    prediction: Any


class _Many(_Timed):
    predictions: list[Any]


class _Embedding(msgspec.Struct):
    index: int
    embedding: str


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _prediction(value: Any, told: _Timed, request_id: str) -> Prediction:
    timings = told.timings
    return Prediction(value, told.latency_ms, timings.queue_ms, timings.run_ms, timings.batch_size, request_id)


def _is_failed(value: Any) -> bool:
    """Whether an item of a list is an error. A model's own answer would have to imitate its whole shape."""
    told = value.get("error") if isinstance(value, dict) and len(value) == 1 else None
    return isinstance(told, dict) and {"code", "message", "retryable"} <= told.keys()


def _typed(told: dict[str, Any], status: int, request_id: str, retry_after_s: float | None = None) -> HeadraceError:
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


def _predict_path(model: str | None) -> str:
    return "/predict" if model is None else f"/models/{urllib.parse.quote(model, safe='')}/predict"


def _item(value: Any) -> Any:
    """An item of a list: bytes have no JSON form but the one that the server takes for bytes."""
    return {"base64": _plain(bytes(value))} if isinstance(value, bytes | bytearray | memoryview) else value


def _to_json(body: dict[str, Any], field: str) -> bytes:
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
        return orjson.dumps(body, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # perhaps only an array in the byte order of another machine, for which `_plain` is not asked
        return orjson.dumps(body, default=_plain, option=orjson.OPT_NON_STR_KEYS)


def _plain(value: Any) -> Any:
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


def _vector(text: str) -> Vector:
    import numpy as np

    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)


def _checked_url(given: str) -> str:
    """Raises `ConfigError`."""
    hint = "for example http://localhost:8000"
    try:
        url = httpx.URL(given)
        url.host.encode("idna")  # as looking it up will
    except (httpx.InvalidURL, TypeError, UnicodeError):
        raise ConfigError("is not a URL", field="base_url", hint=hint) from None
    if url.userinfo:
        raise ConfigError("must hold no user and password", field="base_url", hint="use api_key")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{given!r} is not the URL of a server", field="base_url", hint=hint)
    return given.rstrip("/")


def _checked_key(given: str) -> str:
    """Raises `ConfigError`, which does not show the key; httpx's own complaint would."""
    key = given.strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError("must be printable ASCII without spaces", field="api_key")
    return key


def _checked_timeout(given: float) -> float:
    """Raises `ConfigError`. What is not above 0 has passed already, which the call then says."""
    if not math.isfinite(given):
        raise ConfigError("must be a finite number of seconds", field="timeout_s")
    return given
