"""Users' own code, counted: every kind of function, every kind of end, once each."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import headrace as hr
from headrace import metrics
from headrace.metrics import current
from headrace.tracking import group as groups


@pytest.fixture(autouse=True)
def row(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[metrics.Row]:
    """This process counts in a row of the test's own, as it would as a process of a server."""
    made = metrics.Row(tmp_path / "process.0")
    monkeypatch.setattr(current, "_adopted", (made, tmp_path))
    monkeypatch.setattr(groups, "_group", None)
    yield made
    monkeypatch.setattr(groups, "_group", None)


def counts(row: metrics.Row, name: str) -> dict[str, float]:
    """By status, those that are not 0."""
    metric = next(each for each in metrics.CATALOGUE if each.name == name)
    at = metric.labels.index("status")
    found = metrics.Reader(rows=[row]).values().items()
    return {labels[at]: cells[0] for (each, labels), cells in found if each == name and cells[0]}


def observed(row: metrics.Row, name: str, *labels: str) -> tuple[int, float]:
    """How many values, and their sum."""
    *buckets, total = metrics.Reader(rows=[row]).values()[name, labels]
    return int(sum(buckets)), total


class HTTPStatusError(Exception):
    def __init__(self, code: int) -> None:
        self.response = SimpleNamespace(status_code=code)


class APITimeoutError(Exception):
    pass


ENDS: list[tuple[Callable[[], BaseException], str]] = [
    (lambda: ValueError("x"), "error"),
    (lambda: TimeoutError(), "timeout"),
    (lambda: APITimeoutError(), "timeout"),
    (lambda: asyncio.CancelledError(), "cancelled"),
    (lambda: KeyboardInterrupt(), "cancelled"),
    (lambda: HTTPStatusError(429), "rejected"),
    (lambda: HTTPStatusError(504), "timeout"),
    (lambda: HTTPStatusError(500), "error"),
    (lambda: hr.Overloaded("full"), "rejected"),
    (lambda: hr.DeadlineExceeded("late"), "timeout"),
]


@pytest.mark.parametrize(("make", "status"), ENDS, ids=lambda value: value if isinstance(value, str) else "")
def test_an_end_has_a_name(row: metrics.Row, make: Callable[[], BaseException], status: str) -> None:
    error = make()
    with contextlib.suppress(BaseException), hr.track_request(model="m"):
        raise error

    async def main() -> None:
        async with hr.track_request(model="m"):
            raise error

    with contextlib.suppress(BaseException):
        asyncio.run(main())
    assert counts(row, "agent_requests_total") == {status: 2}
    assert observed(row, "agent_request_duration_seconds", "m")[0] == 2
    assert metrics.Reader(rows=[row]).values()["agent_active_requests", ()] == [0]


def test_a_request_that_goes_well_is_active_until_its_end(row: metrics.Row) -> None:
    reader = metrics.Reader(rows=[row])
    with hr.track_request(model="m") as request:
        assert reader.values()["agent_active_requests", ()] == [1]
        assert reader.values()["agent_requests_total", ("error", "m")] == [0], "there before it is needed"
        request.tokens += 700
    assert counts(row, "agent_requests_total") == {"success": 1}
    assert observed(row, "agent_tokens_per_request", "m") == (1, 700)
    with hr.track_request(model="m") as request:
        request.status = "rejected"
    assert counts(row, "agent_requests_total") == {"success": 1, "rejected": 1}


def usage(total: int) -> Any:
    return SimpleNamespace(usage=SimpleNamespace(total_tokens=total), text="hello")


def test_every_kind_of_function_is_counted_and_keeps_its_name_and_value(row: metrics.Row) -> None:
    track = hr.track_llm_call("m", provider="p")

    @track
    def plain(x: int) -> Any:
        """Doc."""
        return usage(x)

    @track
    async def later(x: int) -> Any:
        return {"usage": {"input_tokens": x, "output_tokens": 1}}

    @track
    def words(x: int) -> Iterator[Any]:
        yield from (usage(0), usage(x))

    @track
    async def later_words(x: int) -> AsyncIterator[Any]:
        yield usage(x)

    async def main() -> None:
        async with hr.track_request(model="r"):
            assert plain(10).text == "hello"
            assert await later(20) == {"usage": {"input_tokens": 20, "output_tokens": 1}}
            assert len(list(words(30))) == 2
            assert [each.text async for each in later_words(40)] == ["hello"]

    asyncio.run(main())
    assert (plain.__name__, plain.__doc__) == ("plain", "Doc.")
    assert counts(row, "llm_api_calls_total") == {"success": 4}
    assert observed(row, "llm_api_duration_seconds", "m")[0] == 4
    assert observed(row, "agent_tokens_per_request", "r") == (1, 101)


class Chunks:
    """A stream as clients of providers have it: an iterator with a context, and more."""

    def __init__(self, fail: bool = False) -> None:
        self.left = 3
        self.fail = fail
        self.closed = False
        self.request_id = "abc"

    def __iter__(self) -> Chunks:
        return self

    def __next__(self) -> int:
        if self.fail:
            raise ConnectionError
        if not self.left:
            raise StopIteration
        self.left -= 1
        return self.left

    def __aiter__(self) -> Chunks:
        return self

    def __enter__(self) -> Chunks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True


class AsyncChunks:
    def __init__(self) -> None:
        self.left = 3

    def __aiter__(self) -> AsyncChunks:
        return self

    async def __anext__(self) -> int:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return self.left


@hr.track_llm_call("m", provider="p")
def open_stream(fail: bool = False) -> Chunks:
    return Chunks(fail)


def test_a_stream_that_is_returned_ends_with_its_last_chunk(row: metrics.Row) -> None:
    stream = open_stream()
    assert stream.request_id == "abc", "it can do what it could before"
    assert next(stream) == 2
    assert counts(row, "llm_api_calls_total") == {}, "not before its end"
    assert list(stream) == [1, 0]
    assert counts(row, "llm_api_calls_total") == {"success": 1}
    del stream
    assert counts(row, "llm_api_calls_total") == {"success": 1}, "once"


def test_a_stream_that_is_left_is_cancelled_and_one_that_breaks_has_failed(row: metrics.Row) -> None:
    with open_stream() as stream:
        next(stream)
    assert stream.closed
    open_stream().close()
    dropped = open_stream()
    next(dropped)
    del dropped
    gc.collect()
    with pytest.raises(ConnectionError):
        next(open_stream(fail=True))
    assert counts(row, "llm_api_calls_total") == {"cancelled": 3, "error": 1}


def test_async_streams_end_with_their_last_chunk(row: metrics.Row) -> None:
    @hr.track_llm_call("m", provider="p")
    async def ask() -> AsyncChunks:
        return AsyncChunks()

    async def main() -> None:
        assert [each async for each in await ask()] == [2, 1, 0]

    asyncio.run(main())
    assert counts(row, "llm_api_calls_total") == {"success": 1}


def test_a_generator_that_is_not_taken_to_its_end_is_cancelled(row: metrics.Row) -> None:
    closed = []

    @hr.track_tool("count")
    def numbers() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    for _ in numbers():
        break
    gc.collect()
    assert closed == [True], "its own end is reached too"
    assert counts(row, "tool_calls_total") == {"cancelled": 1}


def test_tools_are_counted_by_name(row: metrics.Row) -> None:
    @hr.track_tool("search")
    async def search(query: str) -> list[str]:
        if not query:
            raise ValueError("empty")
        return [query]

    async def main() -> None:
        assert await search("x") == ["x"]
        with pytest.raises(ValueError, match="empty"):
            await search("")

    asyncio.run(main())
    assert counts(row, "tool_calls_total") == {"success": 1, "error": 1}


def test_threads_lose_no_call(row: metrics.Row) -> None:
    @hr.track_tool("t")
    def work() -> None:
        pass

    def many() -> None:
        for _ in range(2_000):
            work()

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts(row, "tool_calls_total") == {"success": 16_000}


async def call(app: Any, path: str = "/", receive: Any = None) -> list[Any]:
    """What an ASGI application sends for a GET."""
    sent: list[Any] = []

    async def nothing() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    await app(scope, receive or nothing, send)
    return sent


@pytest.mark.parametrize(
    ("code", "status"), [(200, "success"), (404, "rejected"), (429, "rejected"), (500, "error"), (504, "timeout")]
)
def test_the_middleware_counts_by_the_route_and_the_status(row: metrics.Row, code: int, status: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = SimpleNamespace(path="/items/{id}")
        await send({"type": "http.response.start", "status": code, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert counts(row, "headrace_requests_total") == {}, "not before the last byte"
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(call(hr.MetricsMiddleware(app, model="shop"), "/items/7"))
    assert counts(row, "headrace_requests_total") == {status: 1}
    assert observed(row, "headrace_request_duration_seconds", "shop", "/items/{id}")[0] == 1


def test_the_middleware_counts_what_breaks_and_who_left(row: metrics.Row) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("x")

    async def left(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    with pytest.raises(ValueError, match="x"):
        asyncio.run(call(hr.MetricsMiddleware(broken)))
    asyncio.run(call(hr.MetricsMiddleware(left), receive=gone))
    assert counts(row, "headrace_requests_total") == {"error": 1, "cancelled": 1}


def test_the_application_shows_what_was_counted(row: metrics.Row) -> None:
    with hr.track_request(model="m"):
        pass
    start, body = asyncio.run(call(hr.metrics_app()))
    assert start["status"] == 200
    assert b'agent_requests_total{status="success",model="m"} 1' in body["body"]
