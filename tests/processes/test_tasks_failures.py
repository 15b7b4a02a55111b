"""What happens to tasks when something dies: the failure table, line by line, with real processes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import websockets.exceptions
import websockets.sync.client

from conftest import (
    Server,
    Stage,
    Watcher,
    alive,
    children,
    free_port,
    programs_of,
    stage,
    submit,
    task_status,
    wait_for_end,
    wait_until,
)
from headrace.errors import LeaseLost
from headrace.tasks import embedded
from headrace.tasks.delivery import connection
from headrace.tasks.store import Change, Claim, Store, Submission

pytestmark = pytest.mark.usefixtures("needs_proc")

# What starting processes and finding a place may take on a busy machine, beside the lease.
SLACK_S = 5.0


def sum_of_squares(steps: int) -> int:
    return sum(number * number for number in range(steps))


def worker_of(server: Server) -> int:
    """The task worker process of a command."""
    return int(wait_until(lambda: server.pid_of("task.0"), 20, "a task worker"))


def bodies(play: Stage, ident: str) -> tuple[Counter[str], Counter[str]]:
    """How often the body of each step has begun, and ended."""
    return (
        Counter(line[2] for line in play.notes("begin", ident)),
        Counter(line[2] for line in play.notes("end", ident)),
    )


def history(server: Server, ident: str) -> list[dict[str, Any]]:
    """All events of a task that has ended."""
    watcher = Watcher(ident, server.url)
    watcher.join(20)
    assert not watcher.fault(), watcher.fault()
    return [payload for _, payload in watcher.events]


def began_at(events: list[dict[str, Any]], attempt: int) -> float:
    """When an attempt began, in seconds since 1970."""
    for event in events:
        if event["type"] == "RUN_STARTED" and event["metadata"]["attempt"] == attempt:
            return float(event["timestamp"]) / 1000
    raise AssertionError(f"there was no attempt {attempt}: {events}")


def finished_steps(events: list[dict[str, Any]]) -> list[str]:
    return [event["stepName"] for event in events if event["type"] == "STEP_FINISHED"]


def test_an_accepted_task_survives_kill_9_of_every_process(tmp_path: Path) -> None:
    with stage(tmp_path, "--lease-s", "1") as play:
        server = play.start()
        ident = submit(server, "squares", steps=6, pause_s=0.4)
        wait_until(lambda: len(play.notes("end", ident)) >= 2, 20, "two steps")

        play.kill(server)
        for pid in play.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not play.processes(), 10, "nothing runs")
        ended_before = {line[2] for line in play.notes("end", ident)}

        again = play.start()
        task = wait_for_end(again, ident)
        assert (task["status"], task["result"], task["steps"]) == ("completed", sum_of_squares(6), 6)
        begun, _ = bodies(play, ident)
        twice = {number for number, times in begun.items() if times > 1}
        assert len(twice) <= 1, f"only the step in flight runs again: {begun}"
        assert not twice & ended_before - {max(ended_before)}, "what was finished is not run again"
        assert finished_steps(history(again, ident)) == [f"square {number}" for number in range(6)]


def test_a_gateway_that_dies_before_its_answer_leaves_one_task_per_key(tmp_path: Path) -> None:
    with stage(tmp_path) as play:
        server = play.start()
        body = b'{"agent": "shout", "input": "hi"}'
        keys = [f"key-{number}" for number in range(6)]
        for number, key in enumerate(keys):
            wait_until(server.ready, 20, "a gateway")
            front_end = server.pid_of("http.0")
            head = (
                "POST /agent/submit HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nIdempotency-Key: {key}\r\n\r\n"
            )
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
                sock.sendall(head.encode() + body)
                time.sleep(number * 0.002)  # killed at another place of its work each time
                os.kill(front_end, signal.SIGKILL)
            wait_until(lambda pid=front_end: not alive(pid), 10, "the front end is dead")
        wait_until(server.ready, 20, "a gateway")

        def retry(key: str) -> str:
            headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
            answer = server.client.post("/agent/submit", content=body, headers=headers)
            assert answer.status_code == 202, answer.text
            return str(answer.json()["task_id"])

        first, second = [retry(key) for key in keys], [retry(key) for key in keys]
        assert first == second
        for ident in first:
            assert wait_for_end(server, ident)["result"] == {"text": "HI", "length": 2}
        listed = server.client.get("/agent/tasks").json()["tasks"]
        assert sorted(task["task_id"] for task in listed) == sorted(first), "no key has made two tasks"


def test_a_task_that_was_accepted_but_not_queued_is_handed_over_all_the_same(tmp_path: Path) -> None:
    with stage(tmp_path) as play:
        server = play.start()

        async def accept() -> str:
            async with connection(embedded.ensure(play.data).url) as opened:
                store = Store(opened, result_ttl_s=3600, max_tasks=100)
                await store.open()
                queued, ident, _ = await store.submit(Submission("shout", b'"lost"', timeout_s=60))
                assert queued is not None  # a gateway would queue it now; this one dies
                return ident

        assert wait_for_end(server, asyncio.run(accept()))["result"] == {"text": "LOST", "length": 4}


@pytest.mark.long
def test_a_stream_goes_on_at_another_gateway_without_gap_or_repeat(tmp_path: Path) -> None:
    with stage(tmp_path) as play:
        first = play.start()
        second = play.start("gateway")
        ident = submit(first, "squares", steps=8, pause_s=0.3)
        watcher = Watcher(ident, second.url, first.url)
        wait_until(lambda: "STEP_FINISHED" in watcher.types(), 20, "the first step is seen")
        play.kill(second)
        watcher.join(25)
        assert watcher.fault() == ""
        assert watcher.connections == 2
        assert [payload for _, payload in watcher.events] == history(first, ident)
        assert finished_steps(history(first, ident)) == [f"square {number}" for number in range(8)]


def test_a_dead_worker_costs_the_step_in_flight_and_little_more_than_a_lease(tmp_path: Path) -> None:
    lease_s = 3.0
    with stage(tmp_path, "--lease-s", str(lease_s)) as play:
        gateway = play.start("gateway")
        workers = [play.start("task worker") for _ in range(2)]
        ident = submit(gateway, "squares", steps=4, pause_s=1.0)
        wait_until(lambda: len(play.notes("begin", ident)) == 2, 20, "the second step is in flight")
        owner = owner_of(play, workers, ident)
        play.kill(owner)
        killed = time.time()

        task = wait_for_end(gateway, ident)
        assert (task["result"], task["attempt"], task["steps"]) == (sum_of_squares(4), 2, 4)
        begun, ended = bodies(play, ident)
        assert begun == {"0": 1, "1": 2, "2": 1, "3": 1}
        assert set(ended.values()) == {1}
        events = history(gateway, ident)
        assert finished_steps(events) == [f"square {number}" for number in range(4)]
        assert began_at(events, 2) - killed < 1.3 * lease_s + 1.5


def owner_of(play: Stage, workers: list[Server], ident: str) -> Server:
    """The command whose worker runs a task, by the message that its place holds."""
    with redis.Redis.from_url(embedded.ensure(play.data).url, decode_responses=True) as client:
        return owner_in(client, workers, ident)


def owner_in(client: Any, workers: list[Server], ident: str) -> Server:
    message = client.hget(f"{{hr}}:task:{ident}", "message")
    for lane in ("default", "interactive", "batch"):
        stream = f"hr-{lane}:stream"
        if not client.exists(stream):
            continue
        for pending in client.xpending_range(stream, "docket-workers", "-", "+", 1000):
            if pending["message_id"] == message:
                # HOST-PID-RANDOM.LANE.INDEX
                pid = int(pending["consumer"].split(".")[0].split("-")[-2])
                return next(server for server in workers if pid in children(server.process.pid))
    raise AssertionError(f"nobody has {ident}")


def test_a_worker_that_wakes_up_after_its_lease_can_do_nothing_any_more(tmp_path: Path) -> None:
    with stage(tmp_path, "--lease-s", "1.5") as play:
        gateway = play.start("gateway")
        workers = [play.start("task worker") for _ in range(2)]
        ident = submit(gateway, "squares", steps=4, pause_s=1.2)
        wait_until(lambda: len(play.notes("begin", ident)) == 2, 20, "the second step is in flight")
        stalled = owner_of(play, workers, ident)
        # The supervisor as well: it would end a child that is suspended.
        frozen = [stalled.process.pid, *children(stalled.process.pid)]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: play.notes("begin", ident, 1, 2), 20, "another worker has taken over")
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: f"let go of task {ident}" in stalled.log, 10, "the stalled one has let it go")

        # Had the stalled one acknowledged the message of the new owner, nobody would take over from that one.
        new = next(each for each in workers if each is not stalled)
        assert task_status(gateway, ident)["status"] == "running"
        assert asyncio.run(refused(play, ident, fence=1)) == 6, "nor can it write, publish or finish"
        play.kill(new)
        task = wait_for_end(gateway, ident)
        assert (task["result"], task["attempt"], task["steps"]) == (sum_of_squares(4), 3, 4)
        assert finished_steps(history(gateway, ident)) == [f"square {number}" for number in range(4)]


async def refused(play: Stage, ident: str, fence: int) -> int:
    """How many kinds of write the store refuses to a former owner of a task."""
    old = Claim(ident, fence, 1, "squares", "default", "", b"", 0, 0, 0, {})
    changes = [
        Change("1.90", "9:forged", b"1"),
        Change("1.91", events=[b'{"type":"CUSTOM"}']),
        *(Change(f"1.{what}", what=what, argument=b"1", events=[b"{}"]) for what in ("complete", "fail", "release")),
        Change("1.92", what="sleep", argument=b"1"),
    ]
    count = 0
    async with connection(embedded.ensure(play.data).url) as opened:
        store = Store(opened, result_ttl_s=3600, max_tasks=100)
        await store.open()
        for change in changes:
            try:
                await store.write(old, change)
            except LeaseLost:
                count += 1
    return count


class Valkey:
    """A server of our own on a TCP port, with a password: as a company's would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://:s3cret@127.0.0.1:{self.port}/0"
        folder.mkdir()
        self.start()

    def start(self) -> None:
        """Start it, on what it has written."""
        program = embedded.find_server()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(str(program), "--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", "s3cret"),
                    *("--dir", str(self.folder), "--appendonly", "yes", "--save", ""),
                ],
                stdout=log,
                stderr=log,
            )

        def answers() -> bool:
            with contextlib.suppress(redis.RedisError), self.client() as client:
                return bool(client.ping())
            return False

        wait_until(answers, 20, "the server answers")

    def client(self) -> Any:
        return redis.Redis.from_url(self.url, decode_responses=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path / "valkey")
    yield server
    server.kill()


def test_an_outage_of_the_store_does_not_end_a_step_nor_block_the_other_places(tmp_path: Path, valkey: Valkey) -> None:
    with stage(tmp_path, "--lease-s", "5", "--concurrency", "2", redis_url=valkey.url) as play:
        server = play.start()
        # Longer than a lease: its renewal has to go on after the outage as well.
        long = submit(server, "squares", steps=1, pause_s=10)
        wait_until(lambda: play.notes("begin", long), 20, "the long step is in flight")
        valkey.kill()

        began = time.monotonic()
        refused = server.client.post("/agent/submit", json={"agent": "shout", "message": "hi"})
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "store_unavailable"
        assert refused.json()["error"]["retryable"]
        assert "retry-after" in refused.headers
        assert time.monotonic() - began < 6
        valkey.start()

        def accepted() -> str:
            answer = server.client.post("/agent/submit", json={"agent": "shout", "message": "hi"})
            return str(answer.json()["task_id"]) if answer.status_code == 202 else ""

        for _ in range(4):
            wait_for_end(server, wait_until(accepted, 10, "submissions are accepted again"))
        assert not play.notes("end", long), "they did not have to wait for the long step"
        task = wait_for_end(server, long)
        assert (task["status"], task["attempt"]) == ("completed", 1)
        assert len(play.notes("begin", long)) == 1


@pytest.mark.long
def test_an_outage_longer_than_the_lease_ends_what_runs_and_all_goes_on_afterwards(
    tmp_path: Path, valkey: Valkey
) -> None:
    with stage(tmp_path, "--lease-s", "2", redis_url=valkey.url) as play:
        server = play.start()
        short = submit(server, "squares", steps=2, pause_s=1.0)
        endless = submit(server, "hang")
        watcher = Watcher(short, server.url)
        wait_until(lambda: play.notes("begin", short) and play.notes("hang", endless), 20, "both run")
        valkey.kill()
        wait_until(lambda: play.notes("end", short), 10, "a running step goes on without the store")
        wait_until(lambda: play.notes("interrupted", endless), 10, "until the lease is gone")
        valkey.start()

        assert wait_for_end(server, short)["result"] == sum_of_squares(2)
        wait_until(lambda: len(play.notes("hang", endless)) == 2, 20, "the other one runs again, too")
        answer = wait_until(lambda: server.client.post(f"/agent/cancel/{endless}"), 10)
        assert answer.json()["status"] == "cancelled"
        watcher.join(20)
        assert watcher.fault() == ""
        assert finished_steps([payload for _, payload in watcher.events]) == ["square 0", "square 1"]


@pytest.mark.long
def test_a_store_that_only_hangs_is_an_outage_like_any_other(tmp_path: Path, valkey: Valkey) -> None:
    with stage(tmp_path, "--lease-s", "2", redis_url=valkey.url) as play:
        server = play.start()
        ident = submit(server, "squares", steps=3, pause_s=0.8)
        wait_until(lambda: play.notes("begin", ident), 20, "it runs")
        os.kill(valkey.process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            answer = server.client.post("/agent/submit", json={"agent": "shout", "message": "hi"})
            assert answer.status_code == 503, answer.text
            assert time.monotonic() - began < 10
            assert server.client.get("/health/live").status_code == 200
        finally:
            os.kill(valkey.process.pid, signal.SIGCONT)
        task = wait_for_end(server, ident)
        assert (task["status"], task["result"]) == ("completed", sum_of_squares(3))
        assert finished_steps(history(server, ident)) == ["square 0", "square 1", "square 2"]
        # The submission that was not answered may have been taken all the same: it is somebody's task then, and ends.
        for other in server.client.get("/agent/tasks").json()["tasks"]:
            assert wait_for_end(server, other["task_id"])["status"] == "completed"


def test_whoever_is_there_revives_the_embedded_store(tmp_path: Path) -> None:
    with stage(tmp_path) as play:
        gateway = play.start("gateway")
        ident = submit(gateway, "shout", {"message": "still here"})
        store = play.store_pid()
        os.kill(store, signal.SIGKILL)
        wait_until(lambda: play.store_pid() not in (0, store), 20, "the gateway alone has started it again")
        assert wait_until(lambda: task_status(gateway, ident)["status"] == "pending", 10)
        play.start("task worker")
        assert wait_for_end(gateway, ident)["result"] == {"text": "STILL HERE", "length": 10}


@pytest.mark.long
def test_a_store_that_somebody_elses_session_revives_is_where_the_others_look_for_it(tmp_path: Path) -> None:
    with stage(tmp_path) as play:
        gateway = play.start("gateway")
        elsewhere = play.short / "session"
        elsewhere.mkdir()
        worker = play.start("task worker", env={"XDG_RUNTIME_DIR": str(elsewhere)})
        # Only the worker is there to find the store dead.
        frozen = [gateway.process.pid, *children(gateway.process.pid)]
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        store = play.store_pid()
        os.kill(store, signal.SIGKILL)
        wait_until(lambda: play.store_pid() not in (0, store), 20, "the worker has started it again")
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)

        def accepted() -> str:
            answer = gateway.client.post("/agent/submit", json={"agent": "shout", "message": "found"})
            return str(answer.json()["task_id"]) if answer.status_code == 202 else ""

        ident = wait_until(accepted, 15, "the gateway finds it")
        assert wait_for_end(gateway, ident)["result"] == {"text": "FOUND", "length": 5}
        play.stop(worker)


@pytest.mark.long
def test_a_gateway_that_finds_no_usable_store_goes_on_when_there_is_one(tmp_path: Path) -> None:
    with stage(tmp_path) as play:
        gateway = play.start("gateway")
        ident = submit(gateway, "shout", {"message": "ready"})
        manifest = play.data / "appendonlydir" / "appendonly.aof.manifest"
        kept = manifest.read_bytes()
        manifest.write_text("not a manifest")
        os.kill(play.store_pid(), signal.SIGKILL)
        os.kill(gateway.pid_of("http.0"), signal.SIGKILL)
        wait_until(lambda: "no tasks can be taken for now" in gateway.log, 20, "it says so")
        assert gateway.client.get(f"/agent/status/{ident}").status_code == 503
        manifest.write_bytes(kept)
        wait_until(gateway.ready, 20, "it is ready")
        assert task_status(gateway, ident)["status"] == "pending"


def test_sigterm_lets_tasks_finish_takes_no_new_ones_and_hands_over_the_rest_at_once(tmp_path: Path) -> None:
    with stage(tmp_path, "--lease-s", "30", "--shutdown-grace-s", "7") as play:
        gateway = play.start("gateway")
        leaving = play.start("task worker")
        short = submit(gateway, "squares", steps=1, pause_s=4)
        long = submit(gateway, "squares", steps=1, pause_s=25)
        wait_until(lambda: play.notes("begin", short) and play.notes("begin", long), 20, "both run")
        leaving.process.terminate()
        wait_until(lambda: "stopping: 2 tasks run" in leaving.log, 5, "it stops")
        staying = play.start("task worker")
        later = [submit(gateway, "squares", steps=1, pause_s=0.1) for _ in range(6)]
        for ident in later:
            assert wait_for_end(gateway, ident)["attempt"] == 1
        assert leaving.process.wait(20) == 0
        ended = time.time()

        task = wait_for_end(gateway, short)
        assert (task["status"], task["attempt"]) == ("completed", 1)
        assert len(play.notes("end", short)) == 1
        wait_until(lambda: play.notes("begin", long, 0, 2), 10, "the other one goes on elsewhere")
        assert time.time() - ended < 10, "long before its lease has run out"
        play.kill(staying)


def test_a_task_that_kills_its_worker_fails_in_the_end_with_the_reason(tmp_path: Path) -> None:
    with stage(tmp_path, "--lease-s", "1", "--max-attempts", "3") as play:
        server = play.start()
        ident = submit(server, "crash")
        task = wait_for_end(server, ident)
        assert (task["status"], task["error"]["code"]) == ("failed", "attempts_exhausted")
        assert "3" in task["error"]["message"]
        assert len(play.notes("crash", ident)) == 3
        good = submit(server, "shout", {"message": "next"})
        assert wait_for_end(server, good)["status"] == "completed"
        assert "RUN_ERROR" in [event["type"] for event in history(server, ident)]


def test_a_deadline_holds_across_attempts(tmp_path: Path) -> None:
    with stage(tmp_path, "--lease-s", "1") as play:
        server = play.start()
        ident = submit(server, "hang", {"timeout_s": 6})
        wait_until(lambda: play.notes("hang", ident), 20, "it runs")
        os.kill(worker_of(server), signal.SIGKILL)
        wait_until(lambda: len(play.notes("hang", ident)) == 2, 6, "it runs again")
        task = wait_for_end(server, ident)
        assert (task["status"], task["error"]["code"]) == ("failed", "deadline_exceeded")
        took = at(task["updated_at"]) - at(task["created_at"])
        assert 5.5 < took < 6 + 3, "the second attempt got no time of its own"


@pytest.mark.long
def test_a_deadline_also_ends_a_task_that_nobody_runs(tmp_path: Path) -> None:
    with stage(tmp_path) as play:
        gateway = play.start("gateway")
        ident = submit(gateway, "hang", {"timeout_s": 1})
        task = wait_for_end(gateway, ident)
        assert (task["status"], task["error"]["code"]) == ("failed", "deadline_exceeded")


def at(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


@pytest.mark.long
def test_up_stops_the_store_that_it_started_unless_others_use_it(tmp_path: Path) -> None:
    with stage(tmp_path) as play:
        first = play.start()
        second = play.start("gateway")
        store = play.store_pid()
        play.stop(first)
        assert play.store_pid() == store, "the gateway uses it"
        ident = submit(second, "shout", {"message": "kept"})
        play.stop(second)
        assert play.store_pid() == store, "a gateway leaves it running for a minute"
        third = play.start()
        assert wait_for_end(third, ident)["result"] == {"text": "KEPT", "length": 4}
        play.stop(third)
        assert play.store_pid() == store, "it did not start it"
        assert play.command("down").stdout.strip() == "the task store has stopped"
        wait_until(lambda: not play.processes(), 10, "nothing runs, no keeper either")
        assert play.command("down").stdout.strip() == "no task store runs"
        fourth = play.start()
        assert task_status(fourth, ident)["status"] == "completed"
        play.stop(fourth)
        wait_until(lambda: not play.processes(), 10, "it has stopped what it started")


NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
  upstream gateways {{
    server 127.0.0.1:{first} max_fails=1 fail_timeout=1s;
    server 127.0.0.1:{second} max_fails=1 fail_timeout=1s;
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://gateways;
      proxy_http_version 1.1;
      proxy_set_header Host $http_host;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_read_timeout 3600s;
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def nginx() -> str:
    return programs_of("nginx-light", "nginx")[0]


@contextlib.contextmanager
def proxy(program: str, folder: Path, first: int, second: int) -> Iterator[str]:
    """nginx before two gateways: its URL."""
    port = free_port()
    settings = folder / "nginx.conf"
    settings.write_text(NGINX.format(folder=folder, port=port, first=first, second=second))
    with (folder / "nginx.log").open("wb") as log:
        process = subprocess.Popen([program, "-p", str(folder), "-c", str(settings)], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:

        def answers() -> bool:
            assert process.poll() is None, (folder / "nginx.log").read_text()
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{url}/health/ready").status_code == 200
            return False

        wait_until(answers, 20, "nginx answers")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_two_gateways_behind_nginx_and_two_workers_share_one_redis(tmp_path: Path, valkey: Valkey, nginx: str) -> None:
    with stage(tmp_path, "--lease-s", "2", redis_url=valkey.url) as play:
        first, second = [play.start("gateway", ready=False) for _ in range(2)]
        for _ in range(2):
            play.start("task worker", "--concurrency", "2", ready=False)
        for server in play.servers:
            play.await_ready(server)
        with proxy(nginx, tmp_path, first.port, second.port) as url:
            # Submitted at one, watched at the other, over both protocols.
            crossed = submit(first, "squares", steps=4, pause_s=0.3)
            frames = websocket_frames(second.url, crossed)
            watcher = Watcher(crossed, second.url)
            watcher.join(20)
            assert watcher.fault() == ""
            assert frames[0]["type"] == "STATE_SNAPSHOT"
            assert frames[-1]["status"] == "completed"
            assert frames[-1]["result"] == sum_of_squares(4)
            assert [frame["id"] for frame in frames[1:]] == [ident for ident, _ in watcher.events]

            # Through nginx events come as they happen, and a gateway's death is a reconnect.
            idents = [
                httpx.post(
                    f"{url}/agent/submit", json={"agent": "squares", "input": {"steps": 6, "pause_s": 0.4}}
                ).json()["task_id"]
                for _ in range(6)
            ]
            watchers = [Watcher(ident, url) for ident in idents]
            seen = [wait_until(lambda w=each: "STEP_FINISHED" in w.types(), 20) for each in watchers[:4]]
            assert all(seen)
            assert not all(each.done for each in watchers), "they are seen while the task runs"
            frames = websocket_frames(url, idents[0], stop_after=3)
            assert len(frames) == 3
            play.kill(second)
            for each in watchers:
                each.join(25)
                assert each.fault() == ""
                assert finished_steps([payload for _, payload in each.events]) == [f"square {n}" for n in range(6)]
            assert {task_status(first, ident)["status"] for ident in idents} == {"completed"}


def websocket_frames(url: str, ident: str, stop_after: int = 0) -> list[dict[str, Any]]:
    """What a WebSocket client is told, to the end or so many frames."""
    frames: list[dict[str, Any]] = []
    address = f"{url.replace('http', 'ws')}/agent/ws/{ident}"
    with (
        websockets.sync.client.connect(address) as socket_,
        contextlib.suppress(websockets.exceptions.ConnectionClosedOK),
    ):
        while not stop_after or len(frames) < stop_after:
            frames.append(json.loads(socket_.recv(20)))
    return frames
