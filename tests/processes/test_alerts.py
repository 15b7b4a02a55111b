"""Prometheus and Alertmanager, run with the rendered files, watch a real server: what is wrong is reported, and nothing
else. Windows are seconds instead of minutes."""

from __future__ import annotations

import contextlib
import http.server
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import Server, free_port, programs_of, serving, wait_until
from headrace.monitoring.alertmanager import Routing
from headrace.monitoring.prometheus import Scraping
from headrace.monitoring.render import render
from headrace.monitoring.thresholds import Thresholds

INTERVAL_S = 0.25
SHORT = Thresholds(
    window_s=4.0,
    min_requests=5,
    error_for_s=1.0,
    few_window_s=5.0,
    few_for_s=1.0,
    queue_size=20,
    queue_for_s=1.0,
    target_down_for_s=1.0,
)
# As long as it takes an alert to fire, and more: so long a server that is well must be silent.
CLEAN_S = 7.0


@pytest.fixture(scope="module")
def programs() -> dict[str, str]:
    """Where the programs are. Debian gives Alertmanager a longer name."""
    packages = "prometheus prometheus-alertmanager"
    found = programs_of(packages, "prometheus", "prometheus-alertmanager", "amtool")
    return dict(zip(("prometheus", "alertmanager", "amtool"), found, strict=True))


@dataclass
class Watch:
    """Prometheus and Alertmanager that run, and what they have said."""

    amtool: str
    prometheus_url: str
    alertmanager_url: str
    messages: list[dict[str, Any]] = field(default_factory=list)

    def firing(self) -> set[str]:
        """Names of the alerts that fire in Prometheus."""
        found = httpx.get(f"{self.prometheus_url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}

    def told(self, *options: str) -> list[dict[str, Any]]:
        """Alerts that Alertmanager tells, as its own tool shows them; those that it hushes with ``--inhibited``."""
        command = [self.amtool, "alert", "query", *options, f"--alertmanager.url={self.alertmanager_url}", "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return list(json.loads(done.stdout))

    def names(self, *options: str) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self.told(*options)}


@contextlib.contextmanager
def watching(programs: dict[str, str], folder: Path, server: Server) -> Iterator[Watch]:
    """Both programs with what is rendered for this server, and somebody who is told."""
    own, manager = free_port(), free_port()
    watch = Watch(programs["amtool"], f"http://127.0.0.1:{own}", f"http://127.0.0.1:{manager}")
    settings = folder / "watch"
    with contextlib.ExitStack() as stack:
        webhook = stack.enter_context(receiving(watch.messages))
        scraping = Scraping([f"127.0.0.1:{server.port}"], [f"127.0.0.1:{manager}"], interval_s=INTERVAL_S)
        render(settings, SHORT, scraping, Routing(webhook, group_wait_s=0.2, group_interval_s=1.0))
        commands = {
            "prometheus": [
                f"--config.file={settings / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{own}",
            ],
            "alertmanager": [
                f"--config.file={settings / 'alertmanager.yml'}",
                f"--storage.path={folder / 'alertmanager'}",
                f"--web.listen-address=127.0.0.1:{manager}",
                "--cluster.listen-address=",
            ],
        }
        for name, arguments in commands.items():
            stack.enter_context(running([programs[name], *arguments], folder / f"{name}.log"))
        for url in (watch.prometheus_url, watch.alertmanager_url):
            wait_until(lambda url=url: answers(f"{url}/-/ready"), 15, f"{url} is ready")
        yield watch


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=log.parent)
    try:
        yield
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == 200
    return False


@contextlib.contextmanager
def receiving(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Whoever is called at night: URL of a server that keeps what it is told."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,), name="webhook")
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_port}/"
        finally:
            made.shutdown()
            thread.join()


def ask_for(server: Server, text: str, seconds: float) -> set[int]:
    """Ask for the same again and again; the statuses that were answered."""
    until, statuses = time.monotonic() + seconds, set()
    while time.monotonic() < until:
        statuses.add(server.predict(text).status_code)
        time.sleep(0.05)  # a pace, not a wait
    return statuses


def test_a_model_that_fails_is_reported_once_and_one_that_works_is_not(
    tmp_path: Path, programs: dict[str, str]
) -> None:
    with serving(tmp_path, "models:Picky") as server, watching(programs, tmp_path, server) as watch:
        assert ask_for(server, "good", CLEAN_S) == {200}
        assert (watch.firing(), watch.names(), watch.messages) == (set(), set(), [])

        def reported() -> bool:
            assert ask_for(server, "bad", 0.3) == {500}
            return watch.names("--inhibited") == {"AllFailed"} and bool(watch.messages)

        wait_until(reported, 15, "all requests fail")
        assert watch.firing() == {"HighErrorRate", "AllFailed"}
        (alert,) = watch.told()
        assert alert["labels"]["alertname"] == "HighErrorRate"
        wanted = {"model": "Picky", "part": "serving", "severity": "critical", "job": "headrace"}
        assert wanted.items() <= alert["labels"].items()
        assert alert["annotations"]["summary"].endswith("% of the requests of Picky fail")
        assert alert["annotations"]["runbook_url"] == "docs/runbooks/HighErrorRate.md"
        assert {message["groupLabels"]["alertname"] for message in watch.messages} == {"HighErrorRate"}
        assert watch.messages[0]["groupLabels"]["model"] == "Picky"


@pytest.mark.long
def test_a_long_queue_and_then_a_dead_server_are_reported(tmp_path: Path, programs: dict[str, str]) -> None:
    arguments = ("models:Slow", "--max-batch-size", "1", "--max-queue", "1000")
    with (
        serving(tmp_path, *arguments, env={"SLOW_PAUSE_S": "0.3"}) as server,
        watching(programs, tmp_path, server) as watch,
    ):
        wait_until(lambda: server.metric('request_queue_size{model="Slow"}') == 0, 5, "nothing waits")

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):  # it is not answered: the server is killed meanwhile
                server.client.post("/predict", json={"inputs": ["x"] * 60})

        asking = threading.Thread(target=ask, name="client")
        asking.start()
        try:
            wait_until(lambda: watch.names() == {"QueueBacklog"}, 15, "the queue is reported")
            (alert,) = watch.told()
            assert alert["labels"]["severity"] == "warning"
            server.process.kill()
            server.process.wait()
            wait_until(lambda: "TargetDown" in watch.names(), 15, "the dead server is reported")
            down = next(alert for alert in watch.told() if alert["labels"]["alertname"] == "TargetDown")
            assert down["labels"]["instance"] == f"127.0.0.1:{server.port}"
            wait_until(
                lambda: {m["groupLabels"]["alertname"] for m in watch.messages} >= {"QueueBacklog", "TargetDown"}, 5
            )
        finally:
            asking.join(10)
