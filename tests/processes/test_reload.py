"""Replacing and scaling models while they are used."""

from __future__ import annotations

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import Server, serving, wait_until


class Users:
    """Clients in closed loops that keep every answer whole."""

    def __init__(self, server: Server, count: int = 12) -> None:
        self.answers: list[tuple[int, Any]] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(server, n)) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, server: Server, number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for step in range(1_000_000):
                if self._stop.is_set():
                    return
                item = f"{number}-{step}"
                answer = client.post("/predict", json={"input": item})
                body = answer.json()
                self.answers.append((answer.status_code, body))
                if answer.status_code == 200:
                    assert body["prediction"]["item"] == item

    def stop(self) -> list[tuple[int, Any]]:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        return self.answers


@pytest.fixture
def version(tmp_path: Path) -> Path:
    file = tmp_path / "version"
    file.write_text("old")
    return file


@pytest.fixture
def versioned(tmp_path: Path, version: Path) -> Iterator[Server]:
    arguments = ("models:Versioned", "--workers", "2", "--max-batch-size", "4")
    with serving(tmp_path, *arguments, env={"VERSION_FILE": str(version)}) as server:
        yield server


def workers(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{server.admin}/admin/workers").json()["workers"]
    return found


def test_a_reload_under_load_fails_no_request_and_mixes_no_batch(versioned: Server, version: Path) -> None:
    users = Users(versioned)
    wait_until(lambda: len(users.answers) > 200)
    version.write_text("new")
    done = httpx.post(f"{versioned.admin}/admin/reload", timeout=60)
    assert done.status_code == 200, done.text
    assert done.json()["models"]["Versioned"]["workers"] == 2
    seen = len(users.answers)
    wait_until(lambda: len(users.answers) > seen + 200)
    answers = users.stop()
    assert {status for status, _ in answers} == {200}
    assert answers[0][1]["prediction"]["version"] == "old"
    assert {body["prediction"]["version"] for _, body in answers[seen + 20 :]} == {"new"}
    batches = defaultdict(set)
    for _, body in answers:
        batches[body["prediction"]["batch"]].add(body["prediction"]["version"])
    assert all(len(versions) == 1 for versions in batches.values())
    assert versioned.metric('headrace_worker_restarts_total{model="Versioned"}') == 0, "a reload is no failure"


def test_sighup_reloads_too(versioned: Server, version: Path) -> None:
    version.write_text("new")
    os.kill(versioned.process.pid, signal.SIGHUP)
    wait_until(lambda: versioned.predict("x").json()["prediction"]["version"] == "new")


def test_a_version_that_cannot_be_loaded_changes_nothing(versioned: Server, version: Path) -> None:
    version.write_text("broken")
    done = httpx.post(f"{versioned.admin}/admin/reload", timeout=60)
    assert done.json()["error"]["code"] == "load_error"
    assert "this version cannot be loaded" in versioned.log
    assert versioned.predict("x").json()["prediction"]["version"] == "old"
    assert [worker["state"] for worker in workers(versioned)] == ["ready", "ready"]


def test_scaling_up_and_down_under_load_fails_no_request(versioned: Server) -> None:
    users = Users(versioned)
    for count in (4, 1, 2):
        answer = httpx.post(f"{versioned.admin}/admin/scale", json={"model": "Versioned", "workers": count}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert [worker["state"] for worker in workers(versioned)] == ["ready"] * count
        assert versioned.metric('headrace_workers{model="Versioned",state="ready"}') == count
        seen = len(users.answers)
        wait_until(lambda seen=seen: len(users.answers) > seen + 60)
    assert {status for status, _ in users.stop()} == {200}


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"model": "nope", "workers": 1}, 404, "model"),
        ({"model": "Versioned", "workers": 0}, 422, "workers"),
        ({"model": "Versioned"}, 422, "body"),
        ({"model": "Versioned", "workers": "many"}, 422, "body"),
    ],
)
def test_a_wrong_scale_is_refused_by_name(versioned: Server, body: Any, status: int, field: str) -> None:
    answer = httpx.post(f"{versioned.admin}/admin/scale", json=body)
    assert (answer.status_code, answer.json()["error"]["field"]) == (status, field)


def test_a_reload_reads_the_file_again(tmp_path: Path) -> None:
    file = tmp_path / "headrace.toml"
    file.write_text('[models.a]\ntarget = "models:echo"\n[models.b]\ntarget = "models:shout"\n')
    with serving(tmp_path, "--config", str(file)) as server:
        assert server.predict("x", "/models/b/predict").json()["prediction"] == "X"
        file.write_text(
            '[models.c]\ntarget = "models:shout"\n[models.a]\ntarget = "models:echo"\nmax_input_chars = 3\n'
        )
        assert httpx.post(f"{server.admin}/admin/reload", timeout=60).status_code == 200
        wait_until(lambda: server.predict("x", "/models/b/predict").status_code == 404)
        assert server.predict("x").json()["prediction"] == "X", "the first of the file is the default"
        assert server.predict("long", "/models/a/predict").status_code == 422
        file.write_text("[models.a]\ntargit = 3\n")
        refused = httpx.post(f"{server.admin}/admin/reload", timeout=60)
        assert refused.json()["error"]["code"] == "config_error"
        assert server.predict("x").status_code == 200
        assert server.ready()


def test_files_that_change_reload_during_development(tmp_path: Path) -> None:
    source = tmp_path / "mine.py"
    source.write_text("def answer(inputs: list[str]) -> list[str]:\n    return ['one'] * len(inputs)\n")
    with serving(tmp_path, "mine:answer", "--reload", cwd=tmp_path) as server:
        assert server.predict("x").json()["prediction"] == "one"
        source.write_text("def answer(inputs: list[str]) -> list[str]:\n    return ['two'] * len(inputs)\n")
        wait_until(lambda: server.predict("x").json().get("prediction") == "two")
        source.write_text("def answer(inputs")
        wait_until(lambda: "the reload failed" in server.log)
        assert server.predict("x").json()["prediction"] == "two"
