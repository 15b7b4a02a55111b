"""Profiles of a real server's own processes, taken on its admin port while they work."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from conftest import AGENTS, Server, alive, serving, submit, task_status, wait_until
from headrace import live_profile
from headrace.errors import InvalidInput, NotFound, ServiceError
from headrace.profiling.record import Record, Stack

CONFIG = """
app = "live_app.py"
http_workers = 1
task_workers = 1
concurrency = 4

[models.hot]
target = "live_app:Hot"

[models.stuck]
target = "live_app:Stuck"
"""
# One looks for so long that shares mean something; the others only have to be right.
SECONDS = 3.0


class Page(msgspec.Struct):
    """What a browser gets."""

    kind: str
    text: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "headrace.toml").write_text(CONFIG)
    env = {"STUCK_NOTE": str(folder / "stuck")}
    with serving(folder, "--config", str(folder / "headrace.toml"), verb="up", cwd=AGENTS, env=env) as found:
        yield found


def ask(server: Server, **query: Any) -> httpx.Response:
    return httpx.post(f"{server.admin}/admin/profile", params=query, timeout=40)


def record(server: Server, worker: str, seconds: float = 1.0) -> Record:
    return live_profile.fetch(server.admin, worker, seconds)


def threads(pid: int) -> dict[int, float]:
    """Seconds of processor time of each thread of a process."""
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found[int(path.name)] = int((path / "schedstat").read_text().split()[0]) / 1e9
    return found


@contextlib.contextmanager
def load(server: Server) -> Iterator[None]:
    """Three clients that ask for a fiftieth of a second of computation, again and again."""
    over = threading.Event()

    def ask_on() -> None:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            while not over.is_set():
                client.post("/models/hot/predict", json={"input": 0.02}).raise_for_status()

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(ask_on) for _ in range(3)]
        try:
            yield
        finally:
            over.set()
    for client in clients:
        client.result()


@pytest.fixture(scope="module")
def seen(server: Server) -> dict[str, Any]:
    """Four processes looked at under load, all at once: their records, and of one the page."""
    task = submit(server, "thinks", {"input": SECONDS + 5})
    wait_until(lambda: task_status(server, task)["status"] == "running", what="the agent runs")
    with load(server), ThreadPoolExecutor(4) as pool:
        page = pool.submit(ask, server, worker="worker.hot.0", seconds=SECONDS)
        looks = {name: pool.submit(record, server, name, SECONDS) for name in ("http.0", "task.0", "supervisor")}
        answer = page.result()
        found: dict[str, Any] = {name: look.result() for name, look in looks.items()}
    assert answer.status_code == 200, answer.text
    found["page"] = Page(answer.headers["content-type"], answer.text)
    return found


def names(seen: Record, stack: Stack) -> list[str]:
    return [seen.frames[number].function for number in stack.frames]


def seconds(seen: Record, stacks: list[Stack], function: str) -> float:
    """Of all stacks with a function of this name."""
    return sum(stack.seconds for stack in stacks if function in names(seen, stack))


def test_the_page_of_a_model_worker_names_its_hot_function(seen: dict[str, Any]) -> None:
    page: Page = seen["page"]
    assert page.kind == "text/html; charset=utf-8"
    assert "<h1>headrace profile: worker.hot.0</h1>" in page.text
    before_the_graph = page.text.partition('data-testid="graph"')[0]
    assert re.search(r"burn.{0,40}live_app\.py", before_the_graph), "the finding stands on top"
    assert '"burn"' in page.text.rpartition("<script")[0], "and the function in the graph"


def test_a_front_end_shows_what_its_requests_wait_for(seen: dict[str, Any]) -> None:
    found: Record = seen["http.0"]
    assert found.command == "http.0"
    # Three clients wait for their answers nearly all the time.
    assert SECONDS < seconds(found, found.waiting, "FrontEnd.__call__") < 4 * SECONDS
    assert {names(found, stack)[0] for stack in found.waiting} == {"RequestResponseCycle.run_asgi"}


def test_a_task_worker_names_the_coroutine_that_an_agent_awaits(seen: dict[str, Any]) -> None:
    found: Record = seen["task.0"]
    chains = {(*names(found, stack)[-3:], stack.waits_for) for stack in found.waiting}
    assert chains == {("thinks", "ask_the_llm", "sleep", "sleep")}, "nothing of the worker's own upkeep"
    assert any("left out" in note for note in found.notes)


def test_the_supervisor_can_be_looked_at_too(server: Server, seen: dict[str, Any]) -> None:
    found: Record = seen["supervisor"]
    assert found.pid == server.process.pid
    assert seconds(found, found.waiting, "Profiles.take") > 0


def test_looking_costs_a_hundredth(seen: dict[str, Any]) -> None:
    for name in ("http.0", "task.0", "supervisor"):
        found: Record = seen[name]
        assert found.wall_s == pytest.approx(SECONDS, abs=1)
        assert 0 < found.sampling_cpu_s < 0.015 * found.wall_s, name
        assert found.machine.fingerprint
        assert found.attached


def test_a_thousand_waiting_tasks_cost_no_more(server: Server) -> None:
    task = submit(server, "crowd", {"input": {"size": 1000, "seconds": 6.0}})
    wait_until(lambda: task_status(server, task)["status"] == "running", what="the agent runs")
    pid = server.pid_of("task.0")
    before, used = threads(pid).keys(), dict[int, float]()
    with ThreadPoolExecutor(1) as pool:
        look = pool.submit(record, server, "task.0", 2.0)
        while not look.done():
            used |= {thread: cpu for thread, cpu in threads(pid).items() if thread not in before}
            time.sleep(0.02)
    found = look.result()
    assert seconds(found, found.waiting, "ask_the_llm") == pytest.approx(2000, rel=0.5)
    # By the kernel's clocks of the threads that look and pack; one started late by the program would only add to it.
    assert used
    assert sum(used.values()) < 0.03 * 2.0, used
    wait_until(lambda: not threads(pid).keys() & used.keys(), what="they are gone")


def test_a_blocked_event_loop_is_seen(server: Server) -> None:
    task = submit(server, "blocks", {"input": 2.5})
    wait_until(lambda: task_status(server, task)["status"] == "running", what="the agent runs")
    # Had it waited for the loop, it would have seen nothing of this. The first look takes a second's budget, or more.
    found = record(server, "task.0", 2.0)
    assert seconds(found, found.cpu, "burn") > 0.3


def test_one_look_at_a_process_at_a_time_and_none_outlives_it(server: Server) -> None:
    pid = server.pid_of("worker.hot.0")
    before = len(threads(pid))
    with ThreadPoolExecutor(1) as pool:
        first: Future[httpx.Response] = pool.submit(ask, server, worker="worker.hot.0", seconds=30)
        wait_until(lambda: len(threads(pid)) > before, what="it is looked at")
        second = ask(server, worker="worker.hot.0", seconds=1)
        assert second.status_code == 429
        assert second.json()["error"]["field"] == "worker"
        assert 20 < int(second.headers["retry-after"]) <= 40
        os.kill(pid, signal.SIGKILL)
        lost = first.result(5)
    assert lost.status_code == 503
    assert lost.json()["error"]["code"] == "worker_lost"
    assert lost.json()["error"]["retryable"]
    wait_until(lambda: not alive(pid))
    wait_until(
        lambda: ask(server, worker="worker.hot.0", seconds=1).status_code == 200, what="its successor can be seen"
    )


def test_who_hangs_up_ends_the_look(server: Server) -> None:
    pid = server.pid_of("http.0")
    before = threads(pid).keys()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.admin}/admin/profile", params={"worker": "http.0", "seconds": 60}, timeout=1)
    wait_until(lambda: threads(pid).keys() <= before, 5, "nobody looks any more")
    assert record(server, "http.0").pid == pid


def test_a_held_interpreter_is_told_and_kept_out_of_the_look_at_all(server: Server) -> None:
    note = Path(str(server.log_file.parent / "stuck"))
    pid = server.pid_of("worker.stuck.0")
    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(httpx.post, f"{server.url}/models/stuck/predict", json={"input": 4}, timeout=20)
        wait_until(note.exists, what="the model holds the interpreter")
        everything = pool.submit(record, server, "all")
        answer = ask(server, worker="worker.stuck.0", seconds=1)
        found = everything.result()
        assert held.result().status_code == 200
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["code"], error["field"]) == ("deadline_exceeded", "worker")
    assert f"headrace profile --pid {pid}" in error["hint"]
    assert found.command == "supervisor"
    assert sorted(child.command for child in found.children) == ["http.0", "task.0", "worker.hot.0"]
    assert any(each.startswith("worker.stuck.0 is not in it") for each in found.notes)
    wait_until(
        lambda: ask(server, worker="worker.stuck.0", seconds=1).status_code == 200,
        what="once it is free it can be seen",
    )


BAD = [
    ({}, 422, "worker"),
    ({"worker": ""}, 422, "worker"),
    ({"worker": "worker.hot.7"}, 404, "worker"),
    ({"worker": "http.0", "seconds": "0.5"}, 422, "seconds"),
    ({"worker": "http.0", "seconds": "61"}, 422, "seconds"),
    ({"worker": "http.0", "seconds": "nan"}, 422, "seconds"),
    ({"worker": "http.0", "seconds": "ten"}, 422, "seconds"),
    ({"worker": "http.0", "format": "pdf"}, 422, "format"),
    ({"worker": "http.0", "format": "collapsed", "kind": "gpu"}, 422, "kind"),
    ({"worker": "http.0", "format": "html", "kind": "cpu"}, 422, "kind"),
    ({"worker": "http.0", "second": "1"}, 422, "second"),
]


@pytest.mark.parametrize(("query", "status", "field"), BAD, ids=str)
def test_a_wrong_parameter_is_named(server: Server, query: dict[str, str], status: int, field: str) -> None:
    answer = ask(server, **query)
    assert answer.status_code == status
    assert answer.json()["error"]["field"] == field
    assert answer.json()["error"]["hint"]


def test_it_is_asked_for_by_post_from_this_machine(server: Server) -> None:
    url = f"{server.admin}/admin/profile?worker=http.0"
    assert httpx.get(url).status_code == 405
    assert httpx.post(url, headers={"Origin": "https://evil.example"}).status_code == 403


def test_the_names_are_those_of_the_workers_page(server: Server) -> None:
    shown = httpx.get(f"{server.admin}/admin/workers").json()["processes"]
    assert {each["name"]: each["pid"] for each in shown} == {
        name: server.pid_of(name) for name in ("worker.hot.0", "worker.stuck.0", "http.0", "task.0")
    } | {"supervisor": server.process.pid}


def test_the_command_says_what_the_server_says(server: Server) -> None:
    with pytest.raises(NotFound, match="no process 'nobody'") as refused:
        record(server, "nobody")
    assert refused.value.hint
    with pytest.raises(InvalidInput):
        record(server, "http.0", 99)
    with pytest.raises(NotFound, match="there is nothing at /admin/profile"):
        live_profile.fetch(server.url, "http.0", 1)
    with pytest.raises(ServiceError, match="refused"):
        live_profile.fetch("http://127.0.0.1:9", "http.0", 1)


def test_the_end_of_the_server_ends_a_look(server: Server) -> None:
    """The last one here."""
    pid = server.pid_of("http.0")
    before = len(threads(pid))
    with ThreadPoolExecutor(1) as pool:
        look = pool.submit(ask, server, worker="all", seconds=60)
        wait_until(lambda: len(threads(pid)) > before, what="it is looked at")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        error = look.exception(5)
    assert isinstance(error, httpx.TransportError) or look.result().status_code == 503
    assert "Traceback" not in server.log
