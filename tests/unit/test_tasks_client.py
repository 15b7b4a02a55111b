"""Both clients of tasks against a real server that answers by script, and the parsing of events. Nothing sleeps."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import free_port
from headrace import errors
from headrace.tasks_client import AsyncTasks, EventParser, Task, TaskEvent, Tasks
from scripted import Answer, Handler, ScriptedServer, World, fails, hang_up, reset, says, scripted_server

CLIENTS = {"sync": Tasks, "async": AsyncTasks}
RUNNING = {"task_id": "t", "status": "running", "poll_interval_ms": 1000}
DONE = {**RUNNING, "status": "completed", "result": {"text": "HI"}}
FAILED = {**RUNNING, "status": "failed", "error": {"code": "agent_error", "message": "ValueError: no"}}


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def world(request: pytest.FixtureRequest, server: ScriptedServer) -> Iterator[World]:
    world = World(request.param, server, CLIENTS)
    yield world
    world.close()


def streams(*pieces: str, breaks: bool = False) -> Answer:
    """An answer of events, piece by piece; it ends as it should, or breaks off."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        for piece in map(str.encode, pieces):
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if breaks:
            handler.close_connection = True
        else:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def event(number: int, type_: str = "CUSTOM", **fields: Any) -> str:
    return f"id: 100-{number}\ndata: {json.dumps({'type': type_, **fields})}\n\n"


def ids(events: Iterator[TaskEvent]) -> list[str]:
    return [each.id.removeprefix("100-") for each in events]


# Submit, and what is done to a task.


def test_submit(world: World) -> None:
    world.script(says({"task_id": "t", "status": "pending"}, 202))
    task = world.client(api_key="secret").submit("shout", message="hi", priority="batch", timeout_s=5.0)
    assert task == Task(task_id="t", status="pending")
    assert not task.ended
    (asked,) = world.asked
    assert (asked.method, asked.path) == ("POST", "/agent/submit")
    assert asked.json == {"agent": "shout", "message": "hi", "priority": "batch", "timeout_s": 5.0}
    assert asked.headers["authorization"] == "Bearer secret"


def test_an_input_that_is_null_is_an_input(world: World) -> None:
    world.script(says({"task_id": "t", "status": "pending"}, 202))
    client = world.client()
    client.submit(input=None)
    client.submit(input={"a": [1]}, idempotency_key="mine")
    client.submit()
    assert [asked.json for asked in world.asked] == [{"input": None}, {"input": {"a": [1]}}, {}]
    keys = [asked.headers["idempotency-key"] for asked in world.asked]
    assert keys[1] == "mine"
    assert len(set(keys)) == 3


def half(handler: Handler) -> None:
    handler.wfile.write(b'HTTP/1.1 202 Accepted\r\ncontent-length: 99\r\n\r\n{"task_id"')
    handler.close_connection = True


@pytest.mark.parametrize("lost", [hang_up, reset, half, fails(503, "store_unavailable")])
def test_a_submit_whose_answer_was_lost_is_repeated_with_its_key(world: World, lost: Answer) -> None:
    world.script(lost, says({"task_id": "t", "status": "pending"}, 202))
    assert world.client().submit("shout", message="hi").task_id == "t"
    first, second = world.asked
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert first.body == second.body


def test_a_full_server_says_when_to_come_back(world: World) -> None:
    world.script(fails(429, "overloaded", retry_after="7"), says({"task_id": "t", "status": "pending"}, 202))
    world.client().submit("shout", message="hi")
    assert world.slept == [7.0]


def test_what_is_done_to_a_task(world: World) -> None:
    world.script(says(RUNNING))
    client = world.client()
    for task in (client.get("a b/c"), client.cancel("t"), client.retry("t"), client.retry("t", fresh=True)):
        assert task.status == "running"
    client.answer("t", {"sure": True})
    assert [(asked.method, asked.path) for asked in world.asked] == [
        ("GET", "/agent/status/a%20b%2Fc"),
        ("POST", "/agent/cancel/t"),
        ("POST", "/agent/retry/t"),
        ("POST", "/agent/retry/t?fresh=1"),
        ("POST", "/agent/input/t"),
    ]
    assert world.asked[-1].json == {"input": {"sure": True}}


def test_a_retry_that_is_refused_after_a_lost_answer_says_what_that_may_mean(world: World) -> None:
    world.script(fails(409, "task_conflict"))
    with pytest.raises(errors.TaskConflict) as caught:
        world.client().retry("t")
    assert caught.value.hint is None
    world.script(hang_up, fails(409, "task_conflict"))
    with pytest.raises(errors.TaskConflict) as caught:
        world.client().retry("t")
    assert "earlier try" in (caught.value.hint or "")


def test_what_the_server_says_of_a_task(world: World) -> None:
    told = {
        **RUNNING,
        "status": "input_required",
        "created_at": "2026-01-02T03:04:05.678Z",
        "input_required": {"prompt": "sure?", "schema": {"type": "boolean"}},
        "something": "new",
    }
    world.script(says(told))
    task = world.client().get("t")
    assert task.created_at
    assert task.created_at.isoformat() == "2026-01-02T03:04:05.678000+00:00"
    assert task.input_required
    assert task.input_required.prompt == "sure?"


def test_lists_are_fetched_page_by_page_as_far_as_one_goes(world: World) -> None:
    pages = [
        says({"tasks": [{**RUNNING, "task_id": ident} for ident in names], "next": following})
        for names, following in (("ab", "17"), ("", "12"), ("c", None))
    ]
    world.script(*pages)
    found = world.client().list(status="running", agent="a&b")
    assert [next(found).task_id, next(found).task_id] == ["a", "b"]
    assert len(world.asked) == 1
    assert [task.task_id for task in found] == ["c"]
    assert [asked.path.partition("?")[2] for asked in world.asked] == [
        "status=running&agent=a%26b&limit=100",
        "status=running&agent=a%26b&after=17&limit=100",
        "status=running&agent=a%26b&after=12&limit=100",
    ]


# Waiting.


def test_wait_looks_ever_more_seldom(world: World) -> None:
    world.script(*[says(RUNNING)] * 12, says(DONE))
    assert world.client().wait("t").result == {"text": "HI"}
    assert world.slept[0] < 0.1
    assert world.slept == sorted(world.slept)
    assert world.slept[-1] == 1.0  # what the server asks for


def test_result(world: World) -> None:
    world.script(says(DONE), says(FAILED), says({**RUNNING, "status": "cancelled"}))
    client = world.client()
    assert client.result("t") == {"text": "HI"}
    with pytest.raises(errors.TaskFailed, match="ValueError: no") as caught:
        client.result("t")
    assert caught.value.reason == "agent_error"
    with pytest.raises(errors.TaskCancelled):
        client.result("t")


def test_a_wait_that_is_too_long_leaves_the_task_alone(world: World) -> None:
    world.script(says(RUNNING))
    with pytest.raises(errors.DeadlineExceeded, match=r"not done after 5 s; it goes on"):
        world.client().result("t", timeout_s=5.0)
    assert sum(world.slept) == pytest.approx(5.0)


def test_a_task_that_is_done_is_seen_without_any_time(world: World) -> None:
    world.script(says(DONE))
    assert world.client().wait("t", timeout_s=0).ended


def test_waiting_outlives_an_outage(world: World) -> None:
    world.script(says(RUNNING), *[fails(503, "store_unavailable", retry_after="2")] * 9, says(DONE))
    assert world.client().wait("t").ended
    assert sum(world.slept) > 18.0


def test_an_outage_that_does_not_end_does(world: World) -> None:
    world.script(says(RUNNING), fails(503, "store_unavailable", retry_after="2"))
    with pytest.raises(errors.StoreDown):
        world.client(timeout_s=30.0).wait("t")
    assert 30.0 <= sum(world.slept) < 60.0


def test_nobody_waits_for_a_task_that_there_is_not(world: World) -> None:
    world.script(fails(404, "task_not_found"))
    client = world.client()
    for call in (client.wait, client.result, lambda ident: next(client.events(ident))):
        with pytest.raises(errors.TaskNotFound):
            call("t")
    assert len(world.asked) == 3


def test_where_nobody_has_ever_answered_nobody_waits_long(world: World) -> None:
    client = world.client(f"http://127.0.0.1:{free_port()}")
    for call in (client.wait, lambda ident: next(client.events(ident))):
        with pytest.raises(errors.ServiceError, match="no answer from"):
            call("t")
    assert sum(world.slept) < 30.0


# Events.


def test_events_up_to_the_final_one(world: World) -> None:
    world.script(streams(": hello\n\n", event(1, name="progress", value=0.5), event(2, "RUN_FINISHED", result=3)))
    first, last = world.client().events("t")
    assert first == TaskEvent("100-1", "CUSTOM", {"type": "CUSTOM", "name": "progress", "value": 0.5})
    assert (last.id, last.final, last.data["result"]) == ("100-2", True, 3)
    (asked,) = world.asked
    assert asked.path == "/agent/events/t"
    assert asked.headers["accept"] == "text/event-stream"
    assert "last-event-id" not in asked.headers


def test_a_stream_that_breaks_off_goes_on_behind_the_last_whole_event(world: World) -> None:
    second = event(2)
    world.script(
        streams(event(1), second[:-1], breaks=True),
        hang_up,
        reset,
        fails(503, "draining", retry_after="1"),
        says(b"<html>bad gateway", 502),
        streams(second, breaks=True),
        streams(event(3, "RUN_ERROR", code="x", message="y"), breaks=True),
    )
    assert ids(world.client().events("t")) == ["1", "2", "3"]
    last = [asked.headers.get("last-event-id", "-") for asked in world.asked]
    assert last == ["-", *["100-1"] * 5, "100-2"]


def test_a_gateway_that_says_good_bye_is_asked_again(world: World) -> None:
    world.script(
        streams(event(1)),
        says(RUNNING),
        streams(": the task store is away; come back\n\nretry: 1500\n\n"),
        says(RUNNING),
        streams(event(2, "RUN_FINISHED")),
    )
    assert ids(world.client().events("t")) == ["1", "2"]
    assert world.slept[-1] == 1.5
    assert [asked.path for asked in world.asked] == list(
        itertools.islice(itertools.cycle(["/agent/events/t", "/agent/status/t"]), 5)
    )


def test_a_task_that_ends_while_its_stream_is_lost_still_gives_its_last_events(world: World) -> None:
    world.script(streams(event(1)), says(DONE), streams(event(2), event(3, "RUN_FINISHED")))
    assert ids(world.client().events("t")) == ["1", "2", "3"]


def test_behind_the_final_event_there_is_nothing(world: World) -> None:
    world.script(streams(), says(DONE), streams())
    assert list(world.client().events("t", after="100-9")) == []
    assert [asked.headers.get("last-event-id") for asked in world.asked] == ["100-9", None, "100-9"]
    assert not world.slept


def test_a_server_that_ends_every_stream_at_once_is_not_pressed(world: World) -> None:
    world.script(*[streams(), says(RUNNING)] * 12, streams(event(1, "RUN_FINISHED")))
    assert ids(world.client().events("t")) == ["1"]
    assert sum(world.slept) > 2.0


def test_events_have_a_time_limit(world: World) -> None:
    def late(handler: Handler) -> None:
        world.clock.advance(100.0)
        streams(event(1), event(2))(handler)

    world.script(streams(event(0), breaks=True), late)
    events = world.client().events("t", timeout_s=60.0)
    assert next(events).id == "100-0"
    with pytest.raises(errors.DeadlineExceeded, match="it goes on"):
        list(events)


@pytest.mark.parametrize("answer", [says({"a": 1}), streams("data: no json\n\n"), streams("data: {}\n\n")])
def test_what_is_no_stream_of_events_is_refused(world: World, answer: Answer) -> None:
    world.script(answer)
    with pytest.raises(errors.ServiceError, match="headrace server"):
        list(world.client().events("t"))
    assert len(world.asked) == 1


def test_a_page_that_comes_instead_of_a_task_is_not_waited_for(world: World) -> None:
    world.script(says(b"<html>welcome"))
    with pytest.raises(errors.ServiceError, match="headrace server"):
        world.client().wait("t")
    assert len(world.asked) == 1


def test_a_reader_that_leaves_early_hangs_up(server: ScriptedServer) -> None:
    left = threading.Event()

    def wait_for_the_end(handler: Handler) -> None:
        streams(event(1), breaks=True)(handler)
        if handler.rfile.read(1) == b"":  # the client has hung up
            left.set()

    server.script[:] = [wait_for_the_end]
    with Tasks(server.url) as tasks:
        events = tasks.events("t")
        assert next(events).id == "100-1"
        events.close()  # type: ignore[attr-defined]
        assert left.wait(10)


def test_no_time_limit_of_ours_interrupts_the_reader(server: ScriptedServer) -> None:
    """The limit passes while the reader does something else: it is told when it comes back, not in the middle."""
    server.script[:] = [streams(event(1), event(2))]

    async def story() -> str:
        async with AsyncTasks(server.url) as tasks:
            events = tasks.events("t", timeout_s=0.3)
            first = await anext(events)
            await asyncio.sleep(0.5)
            with pytest.raises(errors.DeadlineExceeded):
                [each async for each in events]
        return first.id

    assert asyncio.run(story()) == "100-1"


# Server-sent events.


def parse(*pieces: bytes) -> list[tuple[str, str]]:
    parser = EventParser()
    return [found for piece in pieces for found in parser.feed(piece)]


TEXT = (
    "\ufeff: hi\nid: 1\ndata: {\ndata:  ä}\n\ndata: second\nid\nunknown: x\n\nid: 3\n\ndata:\n\ndata: half\n".encode()
)
PARSED = [("1", "{\n ä}"), ("", "second"), ("3", "")]


def test_lines_of_data_are_joined_and_the_id_is_that_of_the_last_one() -> None:
    assert parse(TEXT) == PARSED


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@given(cuts=st.lists(st.integers(0, len(TEXT) + 10), max_size=20))
def test_however_the_text_is_cut_the_events_are_the_same(line_end: bytes, cuts: list[int]) -> None:
    text = TEXT.replace(b"\n", line_end)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    assert parse(*(text[begin:end] for begin, end in itertools.pairwise(places))) == PARSED


def test_half_of_an_event_is_none() -> None:
    assert parse(b"id: 1\ndata: x\n") == []
    assert parse(b"id: 1\ndata: x\n", b"\n") == [("1", "x")]


def test_the_server_may_say_when_to_come_back() -> None:
    parser = EventParser()
    assert list(parser.feed(b"retry: soon\n\n")) == []
    assert parser.retry_ms is None
    assert list(parser.feed(b"retry: 1500\n\n")) == []
    assert parser.retry_ms == 1500


# Construction.


@pytest.mark.parametrize("kind", [Tasks, AsyncTasks])
def test_wrong_options_are_named(kind: Any) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        kind("localhost:8000")
    assert caught.value.field == "url"
    assert repr(kind(api_key="secret")) == f"{kind.__name__}('http://localhost:8000')"
