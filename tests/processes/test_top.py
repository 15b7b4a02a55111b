"""`headrace top` beside a real server: once as a document, once as text, again and again, and beside none."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import HEADRACE, Server, free_port, serving, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("top"), "models:Picky") as found:
        yield found


def top(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [HEADRACE, "top", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


def test_a_look_tells_rates_workers_and_processes(server: Server) -> None:
    process = top(server.admin, "--once", "--format", "json")
    sent = 0
    while process.poll() is None:
        assert server.predict("a").status_code == 200
        sent += 1
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    found = json.loads(out)
    (model,) = found["models"]
    assert (model["model"], model["ready"], model["workers"]) == ("Picky", 1, 1)
    assert 0 < model["requests"] * found["seconds"] <= sent + 0.5
    assert model["requests"] == pytest.approx(model["items"], abs=2), "one may be on its way"
    assert 0 < model["p50_ms"] <= model["p99_ms"]
    processes = {each["process"]: each for each in found["processes"]}
    assert set(processes) == {"supervisor", "http.0", "worker.Picky.0"}
    assert processes["worker.Picky.0"]["pid"] == server.pid_of("worker.Picky.0")
    assert processes["http.0"]["memory_bytes"] > 2**20


def test_it_goes_on_until_it_is_interrupted(server: Server) -> None:
    process = top(server.admin, "--interval", "0.2")
    assert process.stdout
    heads: list[str] = []

    def again() -> bool:
        line = process.stdout.readline()  # type: ignore[union-attr]
        if line.startswith("model "):
            heads.append(line)
        return len(heads) == 3

    wait_until(again, 20, "three views")
    process.send_signal(2)
    out, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")
    assert "\x1b" not in out, "no terminal, no control sequences"


def test_where_no_admin_port_is_that_is_said(server: Server) -> None:
    for url, told in (
        (f"http://127.0.0.1:{free_port()}", "no answer from"),
        (server.url, "is no admin port of headrace"),
        ("localhost:1", "is not the URL of an admin port"),
    ):
        process = top(url, "--once")
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 2
        assert told in errors
        assert "Traceback" not in errors


def test_a_key_comes_from_the_environment(tmp_path: Path) -> None:
    with serving(tmp_path, "models:Picky", env={"HEADRACE_API_KEYS": "secret"}) as keyed:
        command = [HEADRACE, "top", keyed.admin, "--once"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 2
        assert "the server wants a key" in done.stderr
        env = {**os.environ, "HEADRACE_API_KEY": "secret"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=env)
        assert done.returncode == 0, done.stderr
        assert "Picky" in done.stdout
