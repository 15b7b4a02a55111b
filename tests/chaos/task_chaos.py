"""Kill task workers, gateways and the store at random, by seed, while agents work and clients watch them.

``python tests/chaos/task_chaos.py --agents 60 --steps 10 --seed 3 --kill-every 2 --out result.json``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import redis

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import Stage, Watcher, children, stage, wait_until
from headrace.tasks import embedded

LEASE_S = 2.0
WORKERS, PLACES = 2, 8
ARGUMENTS = (
    *("--lease-s", str(LEASE_S), "--concurrency", str(PLACES), "--task-workers", str(WORKERS)),
    *("--http-workers", "2", "--log-level", "warning"),
)
# How often each kind is hit, as far as chance allows.
WEIGHTS = {"task": 5, "http": 3, "store": 2}
LANES = ("interactive", "default", "batch")


@dataclass
class Report:
    agents: int
    steps: int
    step_s: float
    seed: int
    kill_every_s: float
    lease_s: float = LEASE_S
    seconds: float = 0.0
    ideal_seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    completed: int = 0
    submissions_repeated: int = 0
    bodies_begun: int = 0
    bodies_ended: int = 0
    steps_journalled: int = 0
    attempts_most: int = 0
    tasks_resumed: int = 0
    connections: int = 0
    events: int = 0
    clients_of_the_store: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    left_in_the_queues: dict[str, int] = field(default_factory=dict)
    keys_left: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}


class TaskChaos:
    """One run.

    Args:
        play: an empty stage with `ARGUMENTS`.
    """

    def __init__(
        self, play: Stage, *, agents: int, steps: int, seed: int, kill_every_s: float = 2.0, step_s: float = 0.2
    ) -> None:
        self.play = play
        self.report = Report(agents, steps, step_s, seed, kill_every_s)
        self.random = random.Random(seed)
        self._lock = threading.Lock()
        self._calm = threading.Event()
        self.server = play.start("up")
        # One more gateway of another command, so that clients go from machine to machine, so to speak.
        self.other = play.start("gateway", "--http-workers", "1")

    def run(self, limit_s: float = 180.0) -> Report:
        report = self.report
        self._measure()
        began = time.monotonic()
        monkey = threading.Thread(target=self._kill_now_and_then, name="monkey")
        monkey.start()
        try:
            with ThreadPoolExecutor(report.agents) as clients:
                watchers = list(clients.map(self._submit_and_watch, range(report.agents)))
            for watcher in watchers:
                watcher.join(max(0.1, began + limit_s - time.monotonic()))
            report.seconds = round(time.monotonic() - began, 1)
        finally:
            self._calm.set()
            monkey.join()
        waves = -(-report.agents // (WORKERS * PLACES))
        report.ideal_seconds = round(waves * report.steps * report.step_s, 1)
        self._recover()
        self._judge(watchers)
        self._measure()
        return report

    def _submit_and_watch(self, number: int) -> Watcher:
        urls = [self.server.url, self.other.url]
        self_first = urls if number % 2 else urls[::-1]
        body = {"agent": "squares", "input": {"steps": self.report.steps, "pause_s": self.report.step_s}}
        until, turn = time.monotonic() + 60, 0
        while True:
            url = self_first[turn % 2]
            turn += 1
            with contextlib.suppress(httpx.TransportError):
                headers = {"Idempotency-Key": f"agent-{number}"}
                answer = httpx.post(f"{url}/agent/submit", json=body, headers=headers, timeout=15)
                if answer.status_code == 202:
                    return Watcher(answer.json()["task_id"], *self_first)
                assert answer.status_code == 503, answer.text
            assert time.monotonic() < until, "a task is not accepted within a minute"
            with self._lock:
                self.report.submissions_repeated += 1
            time.sleep(0.2)

    def _kill_now_and_then(self) -> None:
        while not self._calm.wait(self.report.kill_every_s):
            kind = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            choice = self.random.randrange(2)
            if kind == "store":
                pid = self.play.store_pid()
            elif kind == "task":
                pid = self.server.pid_of(f"task.{choice}")
            else:
                pid = (
                    self.other.pid_of("http.0") if self.random.random() < 0.4 else self.server.pid_of(f"http.{choice}")
                )
            if pid:
                with contextlib.suppress(ProcessLookupError):  # it had just died by itself
                    os.kill(pid, signal.SIGKILL)
                    self.report.kills[kind] += 1

    def _recover(self) -> None:
        """Every process is there again, and ready."""
        slots = {f"task.{index}" for index in range(WORKERS)} | {"http.0", "http.1"}
        wait_until(lambda: all(map(self.server.pid_of, slots)) and self.server.ready(), 40, "ready again")
        wait_until(lambda: self.other.pid_of("http.0") and self.other.ready(), 40, "ready again")
        for server, expected in ((self.server, 4), (self.other, 1)):
            assert len(children(server.process.pid)) == expected, "no more and no fewer processes than there should be"

    def _judge(self, watchers: list[Watcher]) -> None:
        with self._store() as store:
            for watcher in watchers:
                self._judge_task(watcher, store)
            if len({watcher.ident for watcher in watchers}) != self.report.agents:
                self._wrong("two keys have one task")
            if store.zcard("{hr}:all") != self.report.agents:
                self._wrong(f"{store.zcard('{hr}:all')} tasks of {self.report.agents} keys")
            self._judge_queues(store)

    def _judge_task(self, watcher: Watcher, store: Any) -> None:
        report, ident = self.report, watcher.ident
        steps = [f"square {number}" for number in range(report.steps)]
        row = store.hgetall(f"{{hr}}:task:{ident}")
        journal = store.hkeys(f"{{hr}}:journal:{ident}")
        stream = [json.loads(fields["e"]) for _, fields in store.xrange(f"{{hr}}:events:{ident}")]
        attempts = int(row["fence"])
        report.completed += row["state"] == "completed"
        report.attempts_most = max(report.attempts_most, attempts)
        report.tasks_resumed += attempts > 1
        report.steps_journalled += len(journal)
        report.connections += watcher.connections
        report.events += len(watcher.events)
        if row["state"] != "completed" or row.get("result") != str(sum(n * n for n in range(report.steps))):
            self._wrong(f"{ident}: {row}")
        if sorted(journal) != sorted(f"{number + 1}:{step}" for number, step in enumerate(steps)):
            self._wrong(f"{ident}: its journal has {journal}")
        if watcher.fault():
            self._wrong(watcher.fault())
        if [payload for _, payload in watcher.events] != stream:
            self._wrong(f"{ident}: its client has seen {len(watcher.events)} of {len(stream)} events")
        finished = [event["stepName"] for event in stream if event["type"] == "STEP_FINISHED"]
        if finished != steps:
            self._wrong(f"{ident}: finished were {finished}")
        self._judge_bodies(ident, attempts)

    def _judge_bodies(self, ident: str, attempts: int) -> None:
        """Each attempt that is cut off costs the one step that it had in flight, and no other."""
        begun, ended = self.play.notes("begin", ident), self.play.notes("end", ident)
        self.report.bodies_begun += len(begun)
        self.report.bodies_ended += len(ended)
        if len(begun) - self.report.steps > attempts - 1:
            self._wrong(f"{ident}: {len(begun)} bodies in {attempts} attempts at {self.report.steps} steps")
        if len({tuple(line) for line in begun}) != len(begun):
            self._wrong(f"{ident}: a body began twice in one attempt: {begun}")
        last: dict[str, int] = {}
        for _, _, number, attempt in begun:
            if int(attempt) <= last.get(number, 0):
                self._wrong(f"{ident}: an older attempt began step {number} after a newer one")
            last[number] = int(attempt)

    def _judge_queues(self, store: Any) -> None:
        """Nothing is left lying anywhere, a moment after the end."""
        names = ["{hr}:open", "{hr}:unsent", *(f"{{hr}}:queue:{lane}" for lane in LANES)]

        def left() -> dict[str, int]:
            found = {name: store.zcard(name) for name in names}
            for lane in LANES:
                found[f"stream of {lane}"] = store.xlen(f"hr-{lane}:stream")
                found[f"later in {lane}"] = store.zcard(f"hr-{lane}:queue")
            return {name: count for name, count in found.items() if count}

        with contextlib.suppress(AssertionError):
            wait_until(lambda: not left(), 3 * LEASE_S + 10)
        self.report.left_in_the_queues = left()
        if left():
            self._wrong(f"left in the queues: {left()}")
        kinds = Counter(":".join(key.split(":")[:2]) for key in store.scan_iter(count=1000))
        self.report.keys_left = dict(kinds)

    def _measure(self) -> None:
        with self._store() as store:
            self.report.clients_of_the_store.append(store.info("clients")["connected_clients"])
        pid = self.server.process.pid
        self.report.descriptors.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))

    def _store(self) -> Any:
        return redis.Redis.from_url(embedded.ensure(self.play.data).url, decode_responses=True)

    def _wrong(self, what: str) -> None:
        self.report.wrong.append(what[:2000])

    def check(self) -> None:
        report = self.report
        assert not report.wrong, report.wrong[:10]
        assert report.completed == report.agents
        assert report.steps_journalled == report.agents * report.steps
        assert report.kills["task"], "somebody was hurt"
        # A pool has as many connections as were ever in use at once, which is more than before anybody worked.
        for name, factor in (("clients_of_the_store", 1.5), ("descriptors", 1.0)):
            before, after = getattr(report, name)
            assert after <= before * factor + 12, f"{name}: {before} before, {after} after"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-every", type=float, default=2.0, help="seconds between two kills")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds until it counts as stuck")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, stage(Path(directory), *ARGUMENTS) as play:
        chaos = TaskChaos(
            play, agents=options.agents, steps=options.steps, seed=options.seed, kill_every_s=options.kill_every
        )
        report = chaos.run(options.limit)
        result = {
            "conditions": f"{os.cpu_count()} CPUs, Python {platform.python_version()}, embedded store, everysec, "
            f"{WORKERS} task workers × {PLACES} places, 3 front ends, every client on server-sent events",
            "arguments": " ".join(ARGUMENTS),
            **report.as_dict(),
        }
        text = json.dumps(result, indent=2)
        print(text)
        if options.out:
            options.out.write_text(text + "\n")
        chaos.check()


if __name__ == "__main__":
    main()
