"""Break a running server at random, by seed, while clients check every answer.

As a program it is the long form: ``python tests/chaos/chaos.py --seconds 600 --seed 1 --out result.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import Server, children, serving, wait_until

DEADLINE_S = 9.0
# The clients' own scheduling on a busy machine.
SLACK_S = 2.0
# A request has its deadline from when a front end reads it. Until then it waits in the system's queue for a front end
# that is alive: a stopped one is replaced after five seconds, and each can be hurt again as soon as it is back.
UNREAD_S = 8.0
CLIENTS = 16
ARGUMENTS = ("models:Slow", "--workers", "2", "--http-workers", "2", "--max-batch-size", "4", "--step-timeout-s", "4")
# What a server under attack may say: an answer, come back later, too late.
ALLOWED = {200, 429, 503, 504}


@dataclass
class Report:
    """What happened. ``cut`` counts connections that went with a front end that was killed: no answer could come."""

    seed: int
    seconds: float
    statuses: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    recovered_in_s: float = 0.0
    descriptors: dict[str, list[int]] = field(default_factory=dict)
    resident_mib: dict[str, list[float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class Chaos:
    """One run against one server; something is broken every ``pause_s`` seconds on average."""

    def __init__(self, server: Server, seed: int, seconds: float, pause_s: float = 0.5) -> None:
        self.server = server
        self._pause_s = pause_s
        self.random = random.Random(seed)
        self.report = Report(seed, seconds)
        self._stop = threading.Event()
        self._front_end_hurt = -100.0
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def run(self) -> Report:
        self._measure()
        clients = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        until = time.monotonic() + self.report.seconds
        actions: list[tuple[Callable[[], None], int]] = [
            (self._kill_worker, 3),
            (self._stop_worker, 2),
            (self._kill_front_end, 1),
            (self._stop_front_end, 1),
            (self._half_a_body, 4),
            (self._vanish, 4),
            (self._half_a_frame, 3),
            (self._rubbish, 2),
        ]
        choices, weights = zip(*actions, strict=True)
        while time.monotonic() < until:
            (action,) = self.random.choices(choices, weights)
            with contextlib.suppress(OSError):  # of something that had just died by itself
                action()
                self.report.actions[action.__name__.strip("_")] += 1
            self._stop.wait(self.random.uniform(0.2, 1.8) * self._pause_s)
        self._stop.set()
        for client in clients:
            client.join(60)
            assert not client.is_alive(), "a client waits for ever"
        self._recover()
        return self.report

    def _client(self, number: int) -> None:
        step = 0
        while not self._stop.is_set():
            with httpx.Client(base_url=self.server.url, timeout=DEADLINE_S + 20) as client:
                for _ in range(20):
                    step += 1
                    self._ask(client, f"{number}-{step}")

    def _ask(self, client: httpx.Client, item: str) -> None:
        start = time.monotonic()
        headers = {"X-Request-Deadline-Ms": str(int(DEADLINE_S * 1000)), "X-Request-Id": item}
        status, problem = "", ""
        try:
            answer = client.post("/predict", json={"input": item}, headers=headers)
        except httpx.TimeoutException:
            status, problem = "hung", f"{item}: no answer at all"
        except httpx.HTTPError as error:
            status = "cut"
            recent = time.monotonic() - self._front_end_hurt < DEADLINE_S + SLACK_S
            problem = "" if recent else f"{item}: {error!r} although no front end was hurt"
        else:
            status = str(answer.status_code)
            problem = _problem_of(answer, item)
        seconds = time.monotonic() - start
        hurt = time.monotonic() - self._front_end_hurt < seconds + SLACK_S
        if seconds > DEADLINE_S + SLACK_S + (UNREAD_S if hurt else 0.0):
            problem = problem or f"{item}: {status} after {seconds:.1f} s"
        with self._lock:
            self.report.statuses[status] += 1
            self.report.slowest_s = max(self.report.slowest_s, seconds)
            if problem:
                self.report.wrong.append(f"at {time.monotonic() - self._began:.0f} s, {problem}")

    def _kill_worker(self) -> None:
        self._hurt("worker.Slow", signal.SIGKILL)

    def _stop_worker(self) -> None:
        self._hurt("worker.Slow", signal.SIGSTOP)

    def _kill_front_end(self) -> None:
        self._front_end_hurt = time.monotonic()
        self._hurt("http", signal.SIGKILL)

    def _stop_front_end(self) -> None:
        self._front_end_hurt = time.monotonic() + 6  # it is killed later, when it has been found
        self._hurt("http", signal.SIGSTOP)

    def _hurt(self, kind: str, number: signal.Signals) -> None:
        pid = self.server.pid_of(f"{kind}.{self.random.randrange(2)}")
        if pid:
            os.kill(pid, number)

    def _half_a_body(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=2) as sock:
            sock.sendall(_request(b'{"input": "half', length=100))
            time.sleep(self.random.uniform(0, 0.1))

    def _vanish(self) -> None:
        """Ask, and be gone before the answer."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=2) as sock:
            sock.sendall(_request(b'{"input": "vanished"}'))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # a reset, not a farewell

    def _half_a_frame(self) -> None:
        self._to_worker(b"\x40\0\0\0\x93")

    def _rubbish(self) -> None:
        self._to_worker(self.random.randbytes(64))

    def _to_worker(self, content: bytes) -> None:
        paths = sorted(self.server.run_parent.glob("headrace-*/workers/*.sock"))
        if not paths:
            return
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2)
            # The real path is too long for a socket's address.
            with _directory(paths[0].parent):
                sock.connect(self.random.choice(paths).name)
            sock.sendall(content)

    def _recover(self) -> None:
        """Everything is as it was: processes, readiness, right answers, nothing in flight, no descriptor or memory."""
        start = time.monotonic()
        expected = {"http.0", "http.1", "worker.Slow.0", "worker.Slow.1"}
        wait_until(lambda: all(map(self.server.pid_of, expected)) and self.server.ready(), 40, "ready again")
        wait_until(lambda: self.server.metric('headrace_workers{model="Slow",state="ready"}') == 2, 40, "both workers")
        self.report.recovered_in_s = round(time.monotonic() - start, 2)
        for number in range(50):
            assert self.server.predict(f"after {number}").json()["prediction"] == f"after {number}"
        wait_until(lambda: self.server.metric('headrace_requests_in_flight{model="Slow"}') == 0, 10, "none in flight")
        wait_until(lambda: self.server.metric('request_queue_size{model="Slow"}') == 0, 10, "none waiting")
        assert len(children(self.server.process.pid)) == 4, "no more and no fewer processes than there should be"
        self._measure()

    def _measure(self) -> None:
        for name, pid in {"supervisor": self.server.process.pid, "http": self.server.pid_of("http.0")}.items():
            self.report.descriptors.setdefault(name, []).append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
            self.report.resident_mib.setdefault(name, []).append(round(resident / 2**20, 1))

    def check(self) -> None:
        report = self.report
        assert not report.wrong, report.wrong[:10]
        assert set(report.statuses) <= {*map(str, ALLOWED), "cut"}
        assert report.statuses["200"] > report.seconds * 20, "it went on working"
        for name, (before, after) in report.descriptors.items():
            assert after <= before + 12, f"{name}: {before} descriptors before, {after} after"
        for name, (first, last) in report.resident_mib.items():
            assert last <= first * 1.5 + 20, f"{name}: {first} MiB before, {last} MiB after"


def _problem_of(answer: httpx.Response, item: str) -> str:
    if answer.headers.get("x-request-id") != item:
        return f"{item}: got the answer of {answer.headers.get('x-request-id')}"
    if answer.status_code == 200:
        found = answer.json()["prediction"]
        return "" if found == item else f"{item}: got {found}"
    if answer.status_code not in ALLOWED:
        return f"{item}: {answer.status_code} {answer.text}"
    return "" if answer.json()["error"]["retryable"] else f"{item}: {answer.text} is not retryable"


def _request(body: bytes, length: int | None = None) -> bytes:
    head = (
        "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length or len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.contextmanager
def _directory(path: Path) -> Any:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=1.5, help="seconds between two actions, on average")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory), *ARGUMENTS) as server:
        chaos = Chaos(server, options.seed, options.seconds, options.pause)
        report = chaos.run()
        print(json.dumps(report.as_dict()), file=sys.stderr)
        chaos.check()
    result = {
        "conditions": f"{os.cpu_count()} CPUs, Python {platform.python_version()}, {CLIENTS} clients",
        "arguments": " ".join(ARGUMENTS),
        **report.as_dict(),
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
