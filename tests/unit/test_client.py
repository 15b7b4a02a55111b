"""Both clients against a real server that answers by script. Time is a fake: nothing sleeps."""

from __future__ import annotations

import asyncio
import base64
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conftest import free_port
from headrace import errors
from headrace.client import AsyncClient, Client, Prediction
from scripted import Answer, Handler, ScriptedServer, World, fails, hang_up, reset, says, scripted_server

KEY = "secret-key-123"
GOOD = {"prediction": [1.0], "latency_ms": 3.5, "timings": {"queue_ms": 0.5, "run_ms": 2.5, "batch_size": 4}}

CLIENTS = {"sync": Client, "async": AsyncClient}


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        server.script[:] = [says(GOOD)]
        yield server


@pytest.fixture(params=["sync", "async"])
def world(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[World]:
    world = World(request.param, server, CLIENTS)
    yield world
    world.close()


# What is sent, and what comes back.


def test_a_prediction(world: World) -> None:
    world.script(says(GOOD, x_request_id="r-1"))
    answer = world.client(api_key=KEY, timeout_s=2.0).predict("hello")
    assert answer == Prediction([1.0], latency_ms=3.5, queue_ms=0.5, run_ms=2.5, batch_size=4, request_id="r-1")
    (asked,) = world.asked
    assert (asked.method, asked.path, asked.json) == ("POST", "/predict", {"input": "hello"})
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.headers["x-request-deadline-ms"] == "2000"


def test_a_model_by_its_name_below_a_prefix(world: World) -> None:
    world.client(world.server.url + "/api/").predict(1, model="a b/c")
    assert world.asked[0].path == "/api/models/a%20b%2Fc/predict"


@pytest.mark.parametrize("raw", [b"\x00\xff", bytearray(b"\x00\xff"), memoryview(b"\x00\xff")])
def test_bytes_go_as_they_are(world: World, raw: Any) -> None:
    world.client().predict(raw, model="m")
    assert world.asked[0].path == "/models/m/predict"
    assert world.asked[0].headers["content-type"] == "application/octet-stream"
    assert world.asked[0].body == b"\x00\xff"


@pytest.mark.parametrize(
    "array",
    [
        np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32),
        np.array([[1.0, 3.0], [2.0, 4.0]]).T,  # not contiguous
        np.array([[1, 2], [3, 4]], dtype=">i4"),
    ],
)
def test_arrays_go_as_lists(world: World, array: Any) -> None:
    world.client().predict(array)
    assert world.asked[0].json == {"input": [[1, 2], [3, 4]]}


@pytest.mark.parametrize("bad", [float("nan"), [1, {"x": np.float32("inf")}], np.array([1.0, np.nan]), {1, 2}])
def test_what_json_cannot_say_is_not_sent(world: World, bad: Any) -> None:
    with pytest.raises(errors.InvalidInput) as caught:
        world.client().predict(bad)
    assert caught.value.field == "input"
    assert not world.asked


def test_a_null_that_was_meant_is_sent(world: World) -> None:
    world.client().predict({"name": None})
    assert world.asked[0].json == {"input": {"name": None}}


def test_many(world: World) -> None:
    wrong = {"code": "invalid_input", "message": "must be a text", "field": "inputs[1]", "retryable": False}
    world.script(says({**GOOD, "predictions": [1, {"error": wrong}, {"error": "mine"}]}, x_request_id="r-2"))
    first, second, third = world.client().predict_many(("a", b"\x00", np.arange(2)))
    assert (first.value, first.batch_size, first.request_id) == (1, 4, "r-2")
    assert isinstance(second, errors.InvalidInput)
    assert (second.field, second.hint) == ("inputs[1]", "request id r-2")
    assert third.value == {"error": "mine"}  # a model may answer so
    assert world.asked[0].json == {"inputs": ["a", {"base64": "AA=="}, [0, 1]]}


def test_many_raises_what_befell_all(world: World) -> None:
    wrong = {"code": "invalid_input", "message": "no", "field": "inputs[0]", "retryable": False}
    world.script(says({"error": wrong, "predictions": [{"error": wrong}]}, 422))
    with pytest.raises(errors.InvalidInput) as caught:
        world.client().predict_many([1])
    assert caught.value.field == "inputs[0]"


def test_many_wants_a_list(world: World) -> None:
    with pytest.raises(errors.InvalidInput, match="list"):
        world.client().predict_many("hello")


def test_embeddings(world: World) -> None:
    rows = [np.arange(3, dtype="<f4") + index for index in range(2)]
    data = [{"index": i, "embedding": base64.b64encode(rows[i].tobytes()).decode()} for i in (1, 0)]
    world.script(says({"object": "list", "data": data}))
    vectors = world.client().embed(iter(["a", "b"]), model="m")
    assert [vector.tolist() for vector in vectors] == [[0, 1, 2], [1, 2, 3]]
    assert all(vector.dtype == np.float32 and vector.flags.writeable for vector in vectors)
    assert world.asked[0].path == "/v1/embeddings"
    assert world.asked[0].json == {"input": ["a", "b"], "model": "m", "encoding_format": "base64"}


def test_models_and_readiness(world: World) -> None:
    world.script(
        says({"object": "list", "data": [{"id": "a"}, {"id": "b"}]}),
        says({"status": "ready"}),
        says({"status": "not_ready"}, 503, retry_after="1"),
        hang_up,
        fails(401, "unauthorized"),
    )
    client = world.client()
    assert client.models() == ["a", "b"]
    assert [client.ready() for _ in range(3)] == [True, False, False]
    with pytest.raises(errors.Unauthorized):
        client.ready()
    assert [asked.path for asked in world.asked] == ["/v1/models", *["/health/ready"] * 4]
    assert not world.slept


@pytest.mark.parametrize(
    "body",
    [
        b"<html>welcome",
        {"predictions": [1, 2]},
        {"data": [{"index": 0, "embedding": "AAA="}]},
        {"data": [{"index": 0, "embedding": "?"}]},
        {"data": [{"index": 1, "embedding": ""}]},
    ],
)
def test_a_success_that_is_none_of_ours(world: World, body: Any) -> None:
    world.script(says(body, x_request_id="r-9"))
    client = world.client()
    for call in (client.predict, client.predict_many, lambda texts: client.embed(texts, model="m")):
        with pytest.raises(errors.ServiceError, match="headrace server") as caught:
            call(["a"])
        assert "r-9" in (caught.value.hint or "")
    assert len(world.asked) == 3


# Errors.


def test_an_error_of_ours_has_all_its_parts(world: World) -> None:
    told = {"code": "payload_too_large", "message": "too large", "field": "body", "hint": "cut it", "request_id": "r"}
    world.script(says({"error": told}, 413, x_request_id="r"))
    with pytest.raises(errors.PayloadTooLarge) as caught:
        world.client().predict("x")
    error = caught.value
    assert (error.message, error.field, error.hint) == ("too large", "body", "cut it; request id r")


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (
            404,
            {"error": {"message": "m", "type": "t", "param": "model", "code": "model_not_found"}},
            "ModelNotFound",
            "m",
        ),
        (401, {"error": {"message": "m", "type": "t", "param": None, "code": "invalid_api_key"}}, "Unauthorized", "m"),
        (400, {"error": {"message": "m", "code": 400}}, "RequestError", "m"),
        (400, {"error": "said v2"}, "RequestError", "HTTP 400: said v2"),
        (422, {"detail": "x"}, "InvalidInput", 'HTTP 422: {"detail": "x"}'),
        (504, b"", "DeadlineExceeded", "HTTP 504"),
        (502, b"<html>" + b"x" * 999, "ServiceError", "HTTP 502: <html>" + "x" * 194),
        (500, b"\xff[", "HeadraceError", "HTTP 500: \ufffd["),
        (500, {"error": {"code": "runner_error", "message": "m"}}, "RunnerError", "m"),
        (418, [], "RequestError", "HTTP 418: []"),
    ],
)
def test_what_is_not_retried_and_what_it_becomes(world: World, status: int, body: Any, kind: str, message: str) -> None:
    world.script(says(body, status, retry_after="0"))
    with pytest.raises(errors.HeadraceError) as caught:
        world.client().predict("x")
    assert (type(caught.value).__name__, caught.value.message) == (kind, message)
    assert len(world.asked) == 1


def test_a_redirect_says_where_to(world: World) -> None:
    world.script(says(b"", 308, location="https://elsewhere"))
    with pytest.raises(errors.RequestError) as caught:
        world.client().predict("x")
    assert "https://elsewhere" in (caught.value.hint or "")


# Another try.


@pytest.mark.parametrize(("status", "code"), [(429, "overloaded"), (503, "not_ready")])
def test_a_refusal_is_tried_again_when_the_server_says(world: World, status: int, code: str) -> None:
    world.script(fails(status, code, retry_after="3"), fails(status, code, retry_after="2"), says(GOOD))
    assert world.client(timeout_s=10.0).predict("x").value == [1.0]
    assert world.slept == [3.0, 2.0]
    assert [asked.headers["x-request-deadline-ms"] for asked in world.asked] == ["10000", "7000", "5000"]
    assert len({asked.body for asked in world.asked}) == 1


def test_a_date_to_come_back_at_is_read_by_the_servers_clock(world: World) -> None:
    date = "Sun, 06 Nov 1994 08:49:{:02} GMT".format
    world.script(fails(503, "draining", retry_after=date(41), date=date(37)), says(GOOD))
    world.client().predict("x")
    assert world.slept == [4.0]


@pytest.mark.parametrize("given", ["soon", "-1", "inf", "", "Sun, 06 Nov 1994 08:49:37 GMT"])
def test_without_a_figure_the_waits_grow(world: World, given: str) -> None:
    world.script(fails(503, "worker_lost", retry_after=given))
    with pytest.raises(errors.WorkerLost) as caught:
        world.client(retries=4).predict("x")
    assert caught.value.retry_after_s is None
    dice = random.Random(7)
    assert world.slept == [dice.uniform(0, limit) for limit in (0.1, 0.2, 0.4, 0.8)]
    assert len(world.asked) == 5


def test_as_often_as_allowed(world: World) -> None:
    world.script(fails(429, "overloaded", retry_after="1"))
    for retries in (0, 2):
        world.asked.clear()
        with pytest.raises(errors.Overloaded) as caught:
            world.client(retries=retries).predict("x")
        assert caught.value.retry_after_s == 1.0
        assert len(world.asked) == retries + 1


def test_nobody_waits_for_a_try_that_comes_too_late(world: World) -> None:
    world.script(fails(429, "overloaded", retry_after="2"))
    with pytest.raises(errors.Overloaded):
        world.client().predict("x", timeout_s=5.0)
    assert world.slept == [2.0, 2.0]
    with pytest.raises(errors.Overloaded):
        world.client(timeout_s=2.0).predict("x")
    assert world.slept == [2.0, 2.0]


@pytest.mark.parametrize("breaks", [hang_up, reset])
def test_a_connection_that_breaks_before_the_answer(world: World, breaks: Answer) -> None:
    world.script(breaks, says(GOOD))
    assert world.client().predict("x").value == [1.0]
    assert len(world.slept) == 1


def test_an_answer_that_breaks_off_is_not_asked_for_again(world: World) -> None:
    def half(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-request-id: r-5\r\ncontent-length: 99\r\n\r\n{")
        handler.close_connection = True

    world.script(half)
    with pytest.raises(errors.ServiceError, match="broke off") as caught:
        world.client().predict("x")
    assert caught.value.hint == "request id r-5"
    assert len(world.asked) == 1


def test_nobody_listens(world: World) -> None:
    client = world.client(f"http://127.0.0.1:{free_port()}", retries=2, api_key=KEY)
    with pytest.raises(errors.ServiceError, match="no answer from") as caught:
        client.predict("x")
    assert type(caught.value) is errors.ServiceError
    assert caught.value.hint
    assert KEY not in str(caught.value)
    assert len(world.slept) == 2
    assert client.ready() is False


# The deadline.


def test_a_server_that_says_nothing(world: World) -> None:
    done = threading.Event()
    world.script(lambda handler: done.wait(10) and hang_up(handler))
    client = world.client(timeout_s=0.05)
    with pytest.raises(errors.DeadlineExceeded, match=r"0\.05 s"):
        client.predict("x")
    assert client.ready() is False
    done.set()
    assert not world.slept


def test_an_answer_in_pieces_past_the_deadline(world: World) -> None:
    """Each piece comes soon after the one before, so that no single wait is too long."""

    def drip(handler: Handler) -> None:
        world.clock.advance(100.0)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{")
        handler.rfile.read(1)  # until the client hangs up

    world.script(drip)
    with pytest.raises(errors.DeadlineExceeded):
        world.client().predict("x")


def test_no_time_at_all(world: World) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        world.client().predict("x", timeout_s=0.0)
    assert not world.asked


# Construction.


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_the_key_is_not_shown(kind: Any) -> None:
    client = kind("http://localhost:1/", api_key=f" {KEY}\n")
    assert repr(client) == f"{kind.__name__}('http://localhost:1')"
    assert KEY not in repr(vars(client))


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("field", "url", "options"),
    [
        ("base_url", "localhost:8000", {}),
        ("base_url", "ftp://host", {}),
        ("base_url", "http://", {}),
        ("base_url", "http://a..b", {}),
        ("base_url", "http://host:port", {}),
        ("base_url", "http://user:word@host", {}),
        ("api_key", "http://host", {"api_key": "wo rd"}),
        ("retries", "http://host", {"retries": -1}),
        ("timeout_s", "http://host", {"timeout_s": float("inf")}),
    ],
)
def test_wrong_options_are_named(kind: Any, field: str, url: str, options: Any) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        kind(url, **options)
    assert caught.value.field == field
    shown = f"{caught.value} {caught.value.hint}"
    assert "user:word" not in shown
    assert "wo rd" not in shown


def test_both_close_at_the_end_of_a_block(server: ScriptedServer) -> None:
    with Client(server.url) as client:
        assert client.predict("x").value == [1.0]
    assert client._http.is_closed

    async def story() -> list[Any]:
        async with AsyncClient(server.url) as client:
            answers = await asyncio.gather(*(client.predict(each) for each in range(8)))
        assert client._http.is_closed
        return answers

    assert [answer.batch_size for answer in asyncio.run(story())] == [4] * 8


def test_a_cancelled_call_stays_cancelled(server: ScriptedServer) -> None:
    asked, done = threading.Event(), threading.Event()

    def hang(handler: Handler) -> None:
        asked.set()
        done.wait(10)
        hang_up(handler)

    async def story() -> None:
        async with AsyncClient(server.url) as client:
            call = asyncio.ensure_future(client.predict("x"))
            await asyncio.to_thread(asked.wait, 10)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            done.set()

    server.script[:] = [hang]
    asyncio.run(story())
    assert len(server.asked) == 1
