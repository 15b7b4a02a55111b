"""Metrics of a user's own program, in real processes of uvicorn and gunicorn."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from conftest import free_port, wait_until

HERE = Path(__file__).parent
ITEMS = 'headrace_requests_total{model="shop",endpoint="/items/{item}",status="success"}'


@contextlib.contextmanager
def serving(tmp_path: Path, *argv: str, **env: str) -> Iterator[httpx.Client]:
    port = free_port()
    command = [sys.executable, "-m", *(each.replace("PORT", str(port)) for each in argv)]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=HERE, env={**variables, "TMPDIR": str(tmp_path), **env}, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            wait_until(lambda: answers(client), 25, "the application answers")
            yield client
    finally:
        process.terminate()
        process.wait(20)


def answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return client.get("/items/0").status_code == 200
    return False


def metric(text: str, line: str) -> float:
    return next((float(each.rpartition(" ")[2]) for each in text.splitlines() if each.startswith(line + " ")), 0.0)


def counted(client: httpx.Client) -> float:
    """What is counted once nothing more comes: a request is counted when it has been answered."""
    seen: list[float] = []

    def is_still() -> bool:
        seen.append(metric(client.get("/metrics/").text, ITEMS))
        return len(seen) > 4 and len(set(seen[-4:])) == 1

    wait_until(is_still, 10, "all is counted")
    return seen[-1]


GUNICORN = ["-w", "2", "-b", "127.0.0.1:PORT", "-k", "uvicorn_worker.UvicornWorker", "tracked_app:app"]
MANAGERS = {
    "uvicorn": ["uvicorn", "--workers", "2", "--port", "PORT", "tracked_app:app"],
    "gunicorn": ["gunicorn", *GUNICORN],
    "gunicorn --preload": ["gunicorn", "--preload", *GUNICORN],
}


def url(client: httpx.Client, path: str) -> str:
    return str(client.base_url).rstrip("/") + path


def ask(client: httpx.Client, path: str) -> int:
    """The process that answered; on a connection of its own, so that each may be another."""
    return int(httpx.get(url(client, path), timeout=10).json())


@pytest.mark.usefixtures("needs_proc")
@pytest.mark.parametrize("manager", MANAGERS)
def test_any_process_shows_the_sum_and_a_killed_one_leaves_nothing_stale(tmp_path: Path, manager: str) -> None:
    with serving(tmp_path, *MANAGERS[manager]) as client:
        wait_until(lambda: len({ask(client, "/items/1") for _ in range(10)}) == 2, 20, "both processes answer")
        before = counted(client)
        for _ in range(40):
            ask(client, "/items/1")
        assert counted(client) == before + 40
        assert {metric(httpx.get(url(client, "/metrics/")).text, ITEMS) for _ in range(8)} == {before + 40}

        holder = ask(client, "/hold")
        assert metric(client.get("/metrics/").text, "agent_active_requests") == 1
        os.kill(holder, signal.SIGKILL)
        wait_until(lambda: answers(client) and ask(client, "/items/1") != holder, 20, "somebody else answers")
        wait_until(lambda: metric(client.get("/metrics/").text, "agent_active_requests") == 0, 20, "nothing stale")
        assert metric(client.get("/metrics/").text, ITEMS) > before + 40, "what the dead one counted is still there"


def test_processes_share_the_port_of_their_metrics(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, *MANAGERS["uvicorn"], METRICS_PORT=str(port)) as client:
        wait_until(lambda: len({ask(client, "/items/1") for _ in range(10)}) == 2, 20, "both processes answer")
        wanted = counted(client)
        for _ in range(8):
            text = httpx.get(
                f"http://127.0.0.1:{port}/metrics", headers={"Accept": "application/openmetrics-text"}
            ).text
            assert metric(text, ITEMS) == wanted
            assert text.endswith("# EOF\n")


SCRIPT = """
import sys, headrace as hr
try:
    server = hr.start_metrics_server(int(sys.argv[1]))
except hr.ConfigError as error:
    print(error.field, error.message)
else:
    with hr.track_request(model="alone"):
        pass
    print(server.port, flush=True)
    input()
    server.stop()
"""


def test_another_program_s_port_is_not_shared(tmp_path: Path) -> None:
    argv, env = [sys.executable, "-c", SCRIPT], {**os.environ, "TMPDIR": str(tmp_path)}
    env.pop("HEADRACE_METRICS_GROUP", None)
    first = subprocess.Popen([*argv, "0"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout
    port = int(first.stdout.readline())
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert metric(text, 'agent_requests_total{status="success",model="alone"}') == 1
    second = subprocess.run([*argv, str(port)], env=env, capture_output=True, text=True, timeout=20, check=True)
    assert second.stdout.startswith("port cannot listen")
    first.communicate("\n", timeout=10)
    # What the ended program has left is swept by the next.
    third = subprocess.Popen([*argv, "0"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert third.stdout
    third.stdout.readline()
    assert len(list(tmp_path.glob("headrace-metrics-*"))) == 1
    third.communicate("\n", timeout=10)
