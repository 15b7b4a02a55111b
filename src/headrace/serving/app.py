"""The ASGI application of a front end: the hot path by hand, the rest an ordinary FastAPI application beside it.

The hot path costs a third of what a framework's does; `tests/contract/test_openapi.py` keeps it true to the document
that `/docs` shows. One wrapper around both gives every request its id and every error its shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace import log, metrics
from headrace.clock import perf_counter
from headrace.config import Config
from headrace.core import ModelInfo, Outcome, Timings
from headrace.errors import ClientGone, HeadraceError, InvalidInput, NotReady, Overloaded, from_fault
from headrace.ipc import decode_value
from headrace.serving import cold
from headrace.serving.items import Item, ItemReader
from headrace.serving.link import Pending
from headrace.serving.protocols import inference, native, openai
from headrace.serving.router import Admission, Route, Router
from headrace.web import (
    Headers,
    Keys,
    Receive,
    Scope,
    Send,
    compress,
    error_headers,
    hide_details,
    is_json,
    parse_json,
    read_body,
    request_id,
    require_known_type,
    require_post,
    respond,
    unexpected,
)

_log = logging.getLogger(__name__)

_STATUS = {429: "rejected", 499: "cancelled", 504: "timeout"}
_REFUSED = {429: "overloaded", 499: "abandoned", 504: "expired"}
# Under so many refusals a second, each is decided at once and sent a little later: clients that come back without a
# pause would otherwise take the processor from the model (docs/adr/0007).
_MANY_REFUSALS = 200
_HOLD_REFUSAL_S = 0.1
# Between the items of a list other requests have their turn: each item may take a millisecond to tokenise.
_ITEMS_PER_TURN = 8
# A stream that says nothing for so long sends a comment: proxies close what is silent.
_STREAM_COMMENT_S = 15.0


@dataclass(eq=False, slots=True)
class Call:
    """One request on the hot path, from its first byte to its answer."""

    method: str
    headers: dict[bytes, bytes]
    receive: Receive
    send: Send
    id: str
    endpoint: str
    model: str | None
    received: float = 0.0
    route: Route | None = None
    pending: list[Pending] = field(default_factory=list)
    watched: int = 0
    streaming: bool = False

    def timeout_s(self, route: Route) -> float:
        """The deadline: the model's, or the client's if that is shorter.

        Raises:
            InvalidInput: the header is not a positive number.
        """
        limit = route.config.request_timeout_s
        given = self.headers.get(b"x-request-deadline-ms")
        if not given:
            return limit
        try:
            asked_s = float(given) / 1000
        except ValueError:
            asked_s = 0.0
        if not 0 < asked_s < float("inf"):
            raise InvalidInput("must be a positive number of milliseconds", field="X-Request-Deadline-Ms")
        return min(limit, asked_s)

    @property
    def latency_ms(self) -> float:
        return (perf_counter() - self.received) * 1e3


class Readable(Protocol):
    """The items of a body in any protocol: how many there are is known before any is looked at."""

    @property
    def values(self) -> list[Any]: ...

    async def read(self, index: int, reader: ItemReader) -> Item: ...


class Part(Protocol):
    """Something else that a front end serves beside the models."""

    name: str

    @property
    def ready(self) -> bool: ...

    @property
    def state(self) -> str:
        """In a word, for health reports."""
        ...

    def add_routes(self, app: Any) -> None: ...

    async def start(self) -> None: ...

    def drain(self) -> None:
        """The process is about to end: hold no connection open for long."""
        ...

    async def stop(self) -> None: ...


class FrontEnd:
    """What one HTTP process serves.

    Args:
        config: the server's options.
        router: the way to the models.
        row: where metrics go.
        reader: the merged metrics of all processes, for `/metrics`.
        parts: what else is served here.
    """

    def __init__(
        self,
        config: Config,
        router: Router,
        row: metrics.Row,
        reader: metrics.Reader,
        parts: Sequence[Part] = (),
    ) -> None:
        self._router = router
        self._parts = parts
        self._readers: dict[str, ItemReader] = {}
        self._calls: set[Call] = set()
        self._watchers: set[asyncio.Task[None]] = set()
        self._metrics = _FrontMetrics(row)
        self._cold = cold.make_app(router, reader, parts)
        for part in parts:
            part.add_routes(self._cold)
        self._configure(config)
        router.on_config = self._configure
        router.on_model = self._learn
        router.on_tick.append(self._watch_slow_calls)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        headers = dict(scope["headers"])
        if scope["type"] == "websocket":
            try:
                scope["headrace.key"] = self._keys.check(headers)
            except HeadraceError as error:
                await receive()
                await send({"type": "websocket.close", "code": 4000 + error.status})
                return
            await self._cold(scope, receive, send)
            return
        ident = request_id(headers)
        log.request_id.set(ident)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        endpoint, model = _match(path)
        if endpoint:
            await self._answer(Call(scope["method"], headers, receive, send, ident, endpoint, model))
            return
        scope["headrace.request_id"] = ident
        id_header = (b"x-request-id", ident.encode())

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        if self._keys and not path.startswith(("/health/", "/v2/health/")):
            try:
                scope["headrace.key"] = self._keys.check(headers)
            except HeadraceError as error:
                await respond(send_with_id, error.status, cold.error_bytes(path, error, ident), error_headers(error))
                return
        await self._cold(scope, receive, send_with_id)

    async def _answer(self, call: Call) -> None:
        """One hot request: read, run, write; an error at any point becomes its answer in the protocol's own shape."""
        headers = [(b"x-request-id", call.id.encode())]
        try:
            self._keys.check(call.headers)
            require_post(call.method)
            kind = call.headers.get(b"content-type", b"")
            if not is_json(kind):
                require_known_type(call.headers, files=call.endpoint == "predict", binary=call.endpoint == "infer")
            body = await read_body(call.headers, call.receive, self._config.max_body_bytes)
            call.received = perf_counter()
            answer = await getattr(self, f"_{call.endpoint}")(call, kind, body)
        except Exception as found:
            answer = _failure(call, found)
        status = answer.status
        self._metrics.count(call, status)
        if status == ClientGone.status:
            return
        if status == Overloaded.status and call.route and call.route.refused_lately > _MANY_REFUSALS:
            await asyncio.sleep(_HOLD_REFUSAL_S)
        if not call.streaming:
            body, encoding = await compress(answer.body, call.headers)
            await respond(call.send, status, body, [*headers, *answer.headers, *encoding], answer.kind)
        elif status >= 400:
            await call.send({"type": "http.response.body", "body": native.event("error", answer.body)})

    async def _predict(self, call: Call, kind: bytes, body: bytes) -> Answer:
        route = await self._route(call, call.model)
        wanted = native.parse(parse_json(body)) if is_json(kind) else native.parse_files(kind, body)
        if b"text/event-stream" in call.headers.get(b"accept", b""):
            return await self._stream(call, route, wanted)
        outcomes = await self._run(call, route, wanted)
        latency_ms = call.latency_ms
        values = [self._value(outcome) for outcome in outcomes]
        timings = [outcome.timings if isinstance(outcome, Outcome) else None for outcome in outcomes]
        headers = [(b"server-timing", native.server_timing(timings, latency_ms))]
        if wanted.many:
            status, content = native.write_many(values, timings, latency_ms)
            return Answer(content, status, headers)
        value = values[0]
        if isinstance(value, HeadraceError):
            raise value
        if isinstance(value, bytes) and b"application/octet-stream" in call.headers.get(b"accept", b""):
            return Answer(value, 200, headers, b"application/octet-stream")
        return Answer(native.write_one(value, timings[0], latency_ms), 200, headers)

    async def _embeddings(self, call: Call, kind: bytes, body: bytes) -> Answer:
        decoded = parse_json(body)
        route = await self._route(call, openai.model_name(decoded))
        wanted = openai.parse(decoded, self._reader(route).info)
        outcomes = await self._run(call, route, wanted)
        tokens = sum(pending.cost for pending in call.pending)
        return Answer(openai.write(decoded, tokens, self._values_or_raise(outcomes)))

    async def _infer(self, call: Call, kind: bytes, body: bytes) -> Answer:
        route = await self._route(call, call.model)
        wanted = inference.Request.read(body, call.headers, self._reader(route).info)
        values = self._values_or_raise(await self._run(call, route, wanted))
        content, json_length = wanted.write(values)
        if json_length is None:
            return Answer(content)
        headers = [(inference.LENGTH_HEADER, str(json_length).encode())]
        return Answer(content, 200, headers, b"application/octet-stream")

    async def _route(self, call: Call, name: str | None) -> Route:
        route = call.route = self._router.route(name)
        if route.info is None:
            await self._router.meet(route)
        return route

    async def _run(self, call: Call, route: Route, wanted: Readable) -> list[Outcome | HeadraceError]:
        """Have the good items computed; admission comes before any of them is looked at, for all of them or none."""
        results: list[Any] = []
        with route.admit(len(wanted.values), self._left_s(call, route), call.id) as places:
            call.pending = places.pending
            for index in range(len(wanted.values)):
                if index % _ITEMS_PER_TURN == _ITEMS_PER_TURN - 1:
                    await asyncio.sleep(0)
                try:
                    results.append(await self._submit(places, route, wanted, index))
                except HeadraceError as error:
                    results.append(error)
            self._calls.add(call)
            try:
                for index, each in enumerate(results):
                    if isinstance(each, Pending):
                        try:
                            results[index] = await each.future
                        except ClientGone:
                            raise
                        except HeadraceError as error:
                            results[index] = error
            finally:
                self._calls.discard(call)
        return results

    async def _submit(
        self, places: Admission, route: Route, wanted: Readable, index: int, *, stream: bool = False
    ) -> Pending:
        """Prepare an item and send it to a worker."""
        while True:
            reader = self._reader(route)
            item = await wanted.read(index, reader)
            # A reload in the meantime may have brought a model that wants other items: prepare it again.
            if reader is self._reader(route):
                return places.submit(item.body, item.cost, reader.info, stream=stream and reader.info.streams)

    async def _stream(self, call: Call, route: Route, wanted: native.Wanted) -> Answer:
        """Send chunks as events while they are made. An error before the first is an ordinary answer."""
        if len(wanted.values) > 1:
            raise InvalidInput("a stream answers one item", field="inputs", hint='send {"input": …}')
        with route.admit(1, self._left_s(call, route), call.id) as places:
            pending = await self._submit(places, route, wanted, 0, stream=True)
            call.pending = places.pending
            self._calls.add(call)
            try:
                chunks = self._chunks(pending)
                event, timings = await anext(chunks)
                call.streaming = True
                await call.send(
                    {
                        "type": "http.response.start",
                        "status": 200,
                        "headers": [*_STREAM_HEADERS, (b"x-request-id", call.id.encode())],
                    }
                )
                while event is not None:
                    await call.send({"type": "http.response.body", "body": event, "more_body": True})
                    event, timings = await anext(chunks)
            finally:
                self._calls.discard(call)
        await call.send({"type": "http.response.body", "body": native.last_event(timings, call.latency_ms)})
        return Answer(b"")

    async def _chunks(self, pending: Pending) -> AsyncIterator[tuple[bytes | None, Timings | None]]:
        """Events of a stream, ``None`` after the last; a runner that does not stream gives one."""
        if not pending.streams:
            outcome = await pending.future
            yield native.event("", native.to_json(self._good(outcome))), outcome.timings
            yield None, outcome.timings
            return
        while True:
            try:
                outcome = await asyncio.wait_for(pending.next_chunk(), _STREAM_COMMENT_S)
            except TimeoutError:
                yield b": still at work\n\n", None
                continue
            if outcome.last and not outcome.fault:
                yield None, outcome.timings
                return
            yield native.event("", native.to_json(self._good(outcome))), outcome.timings

    def _left_s(self, call: Call, route: Route) -> float:
        return max(0.0, call.received + call.timeout_s(route) - perf_counter())

    def _value(self, outcome: Outcome | HeadraceError) -> Any:
        if isinstance(outcome, HeadraceError):
            return outcome
        if outcome.fault:
            return hide_details(from_fault(outcome.fault), self._config.debug)
        return decode_value(outcome.body)

    def _good(self, outcome: Outcome) -> Any:
        """The value of an outcome. Raises what stands in its place."""
        value = self._value(outcome)
        if isinstance(value, HeadraceError):
            raise value
        return value

    def _values_or_raise(self, outcomes: list[Outcome | HeadraceError]) -> list[Any]:
        """For protocols without errors of single items: the first one fails the request."""
        values = [self._value(outcome) for outcome in outcomes]
        failed = next((value for value in values if isinstance(value, HeadraceError)), None)
        if failed:
            raise failed
        return values

    def _configure(self, config: Config) -> None:
        self._config = config
        self._keys = Keys(config.api_keys)
        self._metrics.know(config.models)
        for name, reader in list(self._readers.items()):
            if name in config.models:
                self._readers[name] = ItemReader(config.models[name], reader.info)
            else:
                del self._readers[name]

    def _learn(self, info: ModelInfo) -> None:
        """A worker has said what its model takes. Made here once: reading a tokenizer takes a tenth of a second."""
        known = self._readers.get(info.name)
        if known is None or known.info != info:
            self._readers[info.name] = ItemReader(self._config.models[info.name], info)

    def _reader(self, route: Route) -> ItemReader:
        reader = self._readers.get(route.config.name)
        if reader is None:
            raise NotReady(f"model {route.config.name} is loading", retry_after_s=1.0)
        return reader

    def _watch_slow_calls(self) -> None:
        """Notice clients that hang up, for calls older than a tick: most are answered sooner and cost nothing here."""
        for call in self._calls:
            call.watched += 1
            if call.watched == 2:
                watcher = asyncio.ensure_future(_abandon_when_gone(call))
                self._watchers.add(watcher)
                watcher.add_done_callback(self._watchers.discard)

    async def start(self) -> None:
        """Begin to look for workers."""
        self._routing = asyncio.ensure_future(self._router.run())
        for part in self._parts:
            await part.start()

    @property
    def ready(self) -> bool:
        """Whether every model has a worker and every part is ready."""
        return self._router.ready and all(part.ready for part in self._parts)

    def drain(self) -> None:
        """The process is about to end."""
        for part in self._parts:
            part.drain()

    async def stop(self) -> None:
        """Close the connections to workers."""
        for part in self._parts:
            await part.stop()
        self._routing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._routing

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await self.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})


async def _abandon_when_gone(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass
    for pending in call.pending:
        pending.abandon()


@dataclass(frozen=True, slots=True)
class Answer:
    body: bytes
    status: int = 200
    headers: Headers = ()
    kind: bytes = b"application/json"


def _failure(call: Call, found: Exception) -> Answer:
    """The answer that an error is. A function of its own: an exception kept in a frame that is in its own traceback
    lives until the next garbage collection, with all that the frame holds."""
    error = found if isinstance(found, HeadraceError) else unexpected(found)
    path = {"predict": "/predict", "embeddings": "/v1/", "infer": "/v2/"}[call.endpoint]
    return Answer(cold.error_bytes(path, error, call.id), error.status, error_headers(error))


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]


def _match(path: str) -> tuple[str, str | None]:
    """Endpoint and model of a hot path; an empty endpoint for any other."""
    if path == "/predict":
        return "predict", None
    if path == "/v1/embeddings":
        return "embeddings", None
    parts = path.split("/")
    if len(parts) == 4 and parts[1] == "models" and parts[3] == "predict" and parts[2]:
        return "predict", parts[2]
    if parts[1:3] == ["v2", "models"] and parts[-1] == "infer" and inference.is_model_path(parts[3:-1]):
        return "infer", parts[3]
    return "", None


class _FrontMetrics:
    """Handles of the front end's metrics, so that each series is at 0 before its first event."""

    def __init__(self, row: metrics.Row) -> None:
        self._row = row
        self._requests: dict[tuple[str, str, str], metrics.Counter] = {}
        self._durations: dict[tuple[str, str], metrics.Histogram] = {}
        self._refused: dict[tuple[str, str], metrics.Counter] = {}
        self._refusal_durations: dict[str, metrics.Histogram] = {}
        self.know(["other"])

    def know(self, models: Iterable[str]) -> None:
        """Make the series of these models."""
        row = self._row
        for model in models:
            for endpoint in metrics.ENDPOINTS:
                for status in metrics.STATUSES:
                    self._requests[model, endpoint, status] = row.counter(
                        metrics.REQUESTS, model=model, endpoint=endpoint, status=status
                    )
                self._durations[model, endpoint] = row.histogram(
                    metrics.REQUEST_DURATION, model=model, endpoint=endpoint
                )
            self._refusal_durations[model] = row.histogram(metrics.REFUSAL_DURATION, model=model)
            for reason in metrics.REFUSAL_REASONS:
                self._refused[model, reason] = row.counter(metrics.REFUSED, model=model, reason=reason)

    def count(self, call: Call, status: int) -> None:
        model = call.route.config.name if call.route else "other"
        # A client's own mistake is not a failure of the service: it is counted with what was refused.
        kind = _STATUS.get(status) or ("success" if status < 400 else "error" if status >= 500 else "rejected")
        self._requests[model, call.endpoint, kind].inc()
        if call.received:
            seconds = perf_counter() - call.received
            self._durations[model, call.endpoint].observe(seconds, call.id)
            if status == Overloaded.status:
                self._refusal_durations[model].observe(seconds)
        if kind in ("rejected", "timeout", "cancelled"):
            self._refused[model, _REFUSED.get(status, "invalid")].inc()
