"""Errands, and profiles made of them: what a process is asked, answers and refuses, and how what it saw is drawn."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from conftest import ROOT, wait_until
from headrace import live_profile, metrics
from headrace.config import Config
from headrace.core import Cancel, Outcome, Request
from headrace.errand import Errand, Errands
from headrace.errors import DeadlineExceeded, InvalidInput, NotReady, Overloaded, WorkerLost
from headrace.profiling import live
from headrace.profiling.record import Frame, Machine, Record, Stack
from headrace.rundir import RunDir
from headrace.serving.admin import admin_app
from headrace.serving.fleet import Fleet
from headrace.serving.profiles import Profiles
from headrace.supervisor import ITSELF, Spec, Supervisor
from headrace.testing import FakeClock

CHILD = """
import sys, threading
from headrace.child import Child
from headrace.core import Hello
child = Child(sys.argv[1:])
done = threading.Event()
child.watch(lambda grace_s: done.set())
child.tell(Hello())
done.wait()
"""
DEAF = CHILD.replace("child.watch(lambda grace_s: done.set())", "")


# What this process can be asked for, in these tests.


def echo(cancelled: threading.Event, word: str = "") -> bytes:
    return f"{word} {threading.current_thread().name}".encode()


def until_cancelled(cancelled: threading.Event) -> bytes:
    return b"cancelled" if cancelled.wait(20) else b"nobody cancelled"


def refuse(cancelled: threading.Event) -> bytes:
    raise InvalidInput("no", field="word")


def no_bytes(cancelled: threading.Event) -> Any:
    return "text"


def break_down(cancelled: threading.Event) -> bytes:
    raise SystemExit(3)


class Asked:
    """Errands of this process, and what they answer."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.outcomes: queue.Queue[Outcome] = queue.Queue()
        self.errands = Errands(self.outcomes.put, self.clock)

    def ask(self, ident: int, function: Callable[..., bytes] | str, **arguments: Any) -> None:
        name = function if isinstance(function, str) else f"{__name__}:{function.__name__}"
        body = msgspec.msgpack.encode(Errand(name, arguments))
        self.errands.receive(Request(ident, body, 0, 30.0))

    def next(self) -> Outcome:
        return self.outcomes.get(timeout=10)


def test_an_errand_begins_at_once_and_runs_in_a_thread_of_its_own() -> None:
    asked = Asked()
    asked.ask(7, echo, word="hello")
    assert asked.next() == Outcome(7, last=False)
    assert asked.next() == Outcome(7, b"hello errand")


def test_a_second_errand_is_refused_until_the_first_has_ended() -> None:
    asked = Asked()
    asked.ask(1, until_cancelled)
    assert not asked.next().last
    asked.clock.advance(10)
    asked.ask(2, echo)
    refused = asked.next()
    assert refused.fault
    assert (refused.id, refused.fault.code, refused.fault.retry_after_s) == (2, "overloaded", 20.0)
    asked.errands.receive(Cancel(2))
    asked.errands.receive(Cancel(1))
    assert asked.next() == Outcome(1, b"cancelled")
    asked.ask(3, echo)
    assert [asked.next().id, asked.next().body] == [3, b" errand"]


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        (refuse, "invalid_input", "no"),
        (break_down, "internal_error", "SystemExit"),
        ("no_such_module:look", "internal_error", "no_such_module"),
        ("os:no_such_function", "internal_error", "no_such_function"),
        ("os:getcwd", "internal_error", "TypeError"),
        (no_bytes, "internal_error", "TypeError"),
    ],
)
def test_what_goes_wrong_in_an_errand_is_its_answer(
    function: Callable[..., bytes] | str, code: str, message: str
) -> None:
    asked = Asked()
    asked.ask(1, function)
    assert not asked.next().last
    fault = asked.next().fault
    assert fault
    assert fault.code == code
    assert message in fault.message
    wait_until(lambda: not any(thread.name == "errand" for thread in threading.enumerate()))


# The supervisor, which asks.


@contextlib.asynccontextmanager
async def supervising(*codes: str) -> AsyncIterator[tuple[Supervisor, RunDir]]:
    """Children in the slots ``0``, ``1``, …, all of them ready."""
    run_dir = RunDir.create(Config())
    supervisor = Supervisor(run_dir)
    try:
        for slot, code in enumerate(codes):
            supervisor.start(Spec(str(slot), (sys.executable, "-c", code), {}, start_timeout_s=20.0))
        for slot in range(len(codes)):
            assert await supervisor.wait_ready(str(slot))
        yield supervisor, run_dir
    finally:
        await supervisor.stop_all(0.2)
        supervisor.close()
        run_dir.remove()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 28))


LOOK = f"{live_profile.NAME}:look"


def test_a_child_and_the_supervisor_itself_can_be_asked() -> None:
    async def main() -> None:
        async with supervising(CHILD) as (supervisor, _):
            for slot in ("0", ITSELF):
                body = await supervisor.ask(slot, Errand(LOOK, {"seconds": 0.1}), within_s=20)
                assert msgspec.json.decode(body, type=Record).pid == supervisor.pids()[slot]

    run(main())


def test_who_asks_a_child_that_cannot_answer_is_told() -> None:
    async def main() -> None:
        async with supervising(CHILD, DEAF) as (supervisor, _):
            with pytest.raises(NotReady):
                await supervisor.ask("nobody", Errand(LOOK), within_s=1)
            deaf = asyncio.ensure_future(supervisor.ask("1", Errand(LOOK, {"seconds": 1}), within_s=1))
            long = asyncio.ensure_future(supervisor.ask("0", Errand(LOOK, {"seconds": 60}), within_s=60))
            with pytest.raises(DeadlineExceeded):
                await deaf
            assert not long.done()
            with pytest.raises(Overloaded):
                await supervisor.ask("0", Errand(LOOK, {"seconds": 1}), within_s=1)
            os.kill(supervisor.pid("0"), signal.SIGKILL)
            async with asyncio.timeout(5):
                with pytest.raises(WorkerLost):
                    await long

    run(main())


def test_an_errand_that_nobody_waits_for_any_more_ends() -> None:
    async def main() -> None:
        async with supervising(CHILD) as (supervisor, _):
            with pytest.raises(DeadlineExceeded):
                await supervisor.ask("0", Errand(LOOK, {"seconds": 60}), within_s=0.2)
            async with asyncio.timeout(5):
                while True:
                    with contextlib.suppress(Overloaded):
                        await supervisor.ask("0", Errand(LOOK, {"seconds": 0.1}), within_s=20)
                        break

    run(main())


# The admin port.


@contextlib.asynccontextmanager
async def admin(keys: str = "", module: str = live_profile.NAME) -> AsyncIterator[httpx.AsyncClient]:
    async with supervising() as (supervisor, run_dir):
        row = metrics.Row(run_dir.metrics_file("supervisor"))
        config = Config(api_keys=keys)

        async def reload() -> dict[str, Any]:
            return {}

        fleet = Fleet(config, run_dir, supervisor, row)
        profiles = Profiles(supervisor, module)
        app = admin_app(config, fleet, reload, metrics.Reader(run_dir.metrics), profiles)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            yield client
        row.close()


PROFILE = f"/admin/profile?worker={ITSELF}&seconds=1"


def test_a_key_is_asked_for_and_opens() -> None:
    async def main() -> None:
        async with admin("secret") as client:
            assert (await client.post(PROFILE)).status_code == 401
            answer = await client.post(f"{PROFILE}&format=json", headers={"X-API-Key": "secret"})
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"] == "application/json"
            found = msgspec.json.decode(answer.content, type=Record)
            assert (found.command, found.pid) == (ITSELF, os.getpid())

    run(main())


def test_without_a_profiler_there_are_no_profiles() -> None:
    async def main() -> None:
        async with admin(module="") as client:
            assert (await client.post(PROFILE)).status_code == 404

    run(main())


def test_what_cannot_be_drawn_is_an_error_and_no_half_of_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
from headrace.live_profile import look
if __name__ == "__main__":
    print("half of a page")
    raise SystemExit(3)
"""
    (tmp_path / "careless_profiler.py").write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def main() -> None:
        async with admin(module="careless_profiler") as client:
            answer = await client.post(PROFILE)
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == "what was seen could not be drawn"

    run(main())


# What one process sees of itself.


def record(name: str, cpu_s: float, **more: Any) -> Record:
    frames = [Frame("main", "/app/main.py", 1), Frame(f"work;of <{name}>", "/app/main.py", 9)]
    stacks = [Stack([0, 1], [3, 12], cpu_s, 90, "MainThread")]
    waiting = [Stack([0], [4], 2.0, 90, "Task-1", "socket")]
    return Record(
        command="",
        directory="/app",
        started=1.0,
        pid=len(name),
        machine=Machine("", "", 0, "", ""),
        attached=True,
        wall_s=3.0,
        cpu_s=cpu_s,
        frames=frames,
        cpu=stacks,
        waiting=waiting,
        **more,
    )


def test_only_what_somebody_waits_for_is_kept() -> None:
    uvicorn, run_py = live.TASKS[0], live.TASKS[2]
    frames = [
        Frame("Server.main_loop", "/x/uvicorn/server.py", 1, "library"),
        Frame(uvicorn[1], f"/x{uvicorn[0]}", 1, "library"),
        Frame(run_py[1], f"/x{run_py[0]}", 1, "library"),
        Frame("agent", "/app/agents.py", 1),
        Frame(live.THREADS[1][1], f"/x{live.THREADS[1][0]}", 1, "library"),
        Frame("sleep", "/x/asyncio/tasks.py", 1, "library"),
    ]

    def kept(*numbers: int) -> bool:
        return bool(live.on_behalf(frames, [Stack([*numbers], [1] * len(numbers), 1.0, 1, "", "sleep")]))

    assert not kept(0, 5), "the server's own upkeep"
    assert kept(1, 5), "a request"
    assert kept(2, 3, 5), "a task"
    assert not kept(0, 2, 3, 5), "who waits for that task, waits for the same"
    assert kept(3, 5), "a task that the program itself has made"
    assert kept(0, 4, 5), "a batch"


@pytest.mark.parametrize(("file", "function"), [*live.TASKS, *live.THREADS])
def test_the_places_where_work_begins_are_there(file: str, function: str) -> None:
    root = ROOT / "src"
    if file.startswith("/uvicorn/"):
        spec = importlib.util.find_spec("uvicorn")
        assert spec
        assert spec.origin
        root = Path(spec.origin).parent.parent
    tree = ast.parse((root / file[1:]).read_text())
    body: list[ast.stmt] = tree.body
    for name in function.split("."):
        (found,) = [each for each in body if getattr(each, "name", "") == name]
        body = getattr(found, "body", [])


def test_a_look_is_a_record_of_what_ran_and_ends_when_it_is_cancelled() -> None:
    cancelled = threading.Event()
    before = threading.active_count()
    threading.Timer(0.2, cancelled.set).start()
    found = msgspec.json.decode(live_profile.look(60.0, cancelled), type=Record)
    assert 0.1 < found.wall_s < 10
    assert found.attached
    assert any("looks" in note for note in found.notes) == (found.rate_hz * found.wall_s < 20)
    wait_until(lambda: threading.active_count() == before)


# What is drawn of it.


ONE = {"worker.m.0": record("one", 2.5)}
THREE = {"worker.m.0": record("one", 2.5), ITSELF: record("itself", 0.1), "http.0": record("two", 2.7)}


def test_one_process_is_the_record() -> None:
    command = [sys.executable, "-P", "-m", live_profile.NAME, "json", "cpu"]
    given = msgspec.json.encode({"processes": ONE, "lost": {}})
    printed = subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True, timeout=25).stdout
    found = msgspec.json.decode(printed, type=Record)
    assert found == msgspec.structs.replace(ONE["worker.m.0"], command="worker.m.0", machine=found.machine)
    assert found.machine.fingerprint


def test_all_processes_are_the_supervisor_with_children() -> None:
    found = live_profile.whole(THREE, {"task.0": "it has ended meanwhile"})
    assert found.command == ITSELF
    assert [(child.command, child.cpu_s) for child in found.children] == [("http.0", 2.7), ("worker.m.0", 2.5)]
    assert found.children_cpu_s == pytest.approx(5.2)
    assert found.notes[-1] == "task.0 is not in it: it has ended meanwhile"


def test_findings_are_those_of_each_process_by_its_name() -> None:
    one = live_profile.findings(live_profile.whole(ONE, {}))
    assert [finding.code for finding in one] == ["cpu_hot_spot"]
    assert not one[0].title.startswith("worker")
    all_ = live_profile.findings(live_profile.whole(THREE, {}))
    assert {finding.title.partition(": ")[0] for finding in all_ if finding.code == "cpu_hot_spot"} == {
        "worker.m.0",
        "http.0",
    }
    assert "child_processes" not in {finding.code for finding in all_}


def test_the_page_is_whole_and_escapes_what_it_shows() -> None:
    page = live_profile.draw(THREE, {}, "html", "cpu").decode()
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "work;of &lt;one&gt;" in page
    assert "<one>" not in page
    assert "worker.m.0 (3)" in page


def test_collapsed_stacks_begin_with_the_process_where_there_are_several() -> None:
    assert live_profile.draw(ONE, {}, "collapsed", "cpu") == b"main (main.py:1);work,of <one> (main.py:9) 2500000\n"
    lines = live_profile.draw(THREE, {}, "collapsed", "waiting").decode().splitlines()
    assert [line.partition(";")[0] for line in lines] == [ITSELF, "http.0", "worker.m.0"]
    assert {line.partition(";")[2] for line in lines} == {"main (main.py:1);waits for: socket 2000000"}


def test_speedscope_has_a_profile_of_each() -> None:
    names = [
        each["name"] for each in msgspec.json.decode(live_profile.draw(THREE, {}, "speedscope", "cpu"))["profiles"]
    ]
    assert names == [
        "CPU",
        "Waiting",
        *(f"{kind} of {each}" for each in ("http.0 (3)", "worker.m.0 (3)") for kind in ("CPU", "Waiting")),
    ]
