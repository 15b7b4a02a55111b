"""Tasks beside arq and Celery on the same Valkey: latency of one, rate and CPU of many, many watchers, a long queue.

    python benchmarks/tasks.py [--rounds 3] [--parts latency,rate,watchers,backlog] [--quick] [--out FILE.json]

Two processes that run tasks on each side, clients on the same cores, a new store for each part. A part that is not done
within its limit is given up, the others go on, and the exit status is 1. What the peers do not do: no journal of steps,
no stream of events, no fence against a second owner, no bound on the queue. A peer's jobs come from a program with its
own client of the store, headrace's over HTTP; arq's client asks again and again for the result, Celery's is told.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import redis

import task_watchers
from headrace import stats
from headrace.loadgen import driver
from headrace.tasks import embedded
from serving import children, cpu_s, describe
from task_servers import PEERS, Note, OutOfTime, Peer, headrace, limit, new_store

JSON = {"content-type": "application/json"}
BODY = b'{"agent":"one_step","message":"hello"}'
# Seconds for each part, in one round.
LIMITS_S = {"latency": 120.0, "rate": 180.0, "watchers": 150.0, "backlog": 600.0}
# What takes long is measured in one round only.
ONCE = {"backlog"}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much: tasks one after the other, seconds of submitting, jobs of a peer, watchers, tasks of the long queue."""

    one: int
    seconds: float
    jobs: int
    watchers: task_watchers.Size
    queue: int


FULL = Size(300, 6.0, 1500, task_watchers.Size(1000, 50, 30), 100_000)
QUICK = Size(40, 2.0, 200, task_watchers.Size(100, 10, 12), 2000)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the parts share."""

    size: Size
    note: Note
    pythons: dict[Peer, Path]

    def latency(self, store: embedded.Embedded) -> None:
        """One after the other on an idle machine, from submitting to the final event."""
        with headrace(store.url, "--task-workers", "2") as (url, _), httpx.Client(base_url=url, timeout=30) as client:
            self.note("first task of a new server, ms", _one(client)[1] * 1e3)
            for _ in range(20):
                _one(client)
            with _no_collections():
                seen = [_one(client) for _ in range(self.size.one)]
                http_s = _median_s(lambda: client.get("/health/live"))
        submits, finals = (sorted(each) for each in zip(*seen, strict=True))
        self._percentiles("submit", submits)
        self._percentiles("submit to final event", finals)
        with redis.Redis(unix_socket_path=store.url.removeprefix("unix://")) as probe:
            store_s = _median_s(probe.ping)
        # Submit and watch; accept, take, claim, say that a step begins, keep what it gave, end.
        self.note("submit to final event, bound: 2 HTTP and 6 store round trips, ms", (2 * http_s + 6 * store_s) * 1e3)
        for peer, python in self.pythons.items():
            with peer.running(python, store.url) as (drive, _):
                found = drive(self.size.one, 1)
            self._percentiles(f"{peer.name}, enqueue", sorted(found["enqueue_s"]))
            self._percentiles(f"{peer.name}, enqueue to result", sorted(found["done_s"]))

    def _percentiles(self, name: str, seconds: list[float]) -> None:
        for share in (0.5, 0.99):
            self.note(f"{name} p{share * 100:g} ms", stats.percentile(seconds, share) * 1e3)

    def rate(self, store: embedded.Embedded) -> None:
        """Eight clients submit as fast as they are answered; then until the last is done."""
        with headrace(store.url, "--task-workers", "2") as (url, pid), httpx.Client(base_url=url, timeout=30) as client:
            pids = [*children(pid), store.pid]
            done_before, cpu_before, own_before = _ended(client), cpu_s(pids), time.process_time()
            began = finished = time.perf_counter()
            _submit(url, self.size.seconds)
            last = _ended(client)
            while True:
                time.sleep(0.2)
                now = _ended(client)
                if now == last and _open_tasks(client) == 0:
                    break
                last, finished = now, time.perf_counter()
            count, seconds, cpu = last - done_before, finished - began, cpu_s(pids) - cpu_before
            own = time.process_time() - own_before
        self.note("one-step agents per s", count / seconds)
        self.note("CPU ms per agent, all server processes", cpu / count * 1e3)
        self.note("all cores in use by server and clients, % (bound: 100)", (cpu + own) / seconds / _cores() * 100)
        for peer, python in self.pythons.items():
            with peer.running(python, store.url) as (drive, workers):
                pids = [store.pid, *(each for worker in workers for each in children(worker))]
                before = cpu_s(pids)
                found = drive(self.size.jobs, 32)
                self.note(f"{peer.name}, jobs per s", self.size.jobs / found["seconds"])
                cpu = cpu_s(pids) - before
                self.note(f"{peer.name}, CPU ms per job, workers and store", cpu / found["jobs"] * 1e3)

    def watchers(self, store: embedded.Embedded) -> None:
        task_watchers.measure(store, self.size.watchers, self.note)

    def backlog(self, store: embedded.Embedded) -> None:
        """So many queued tasks, and one more."""
        count = self.size.queue
        with headrace(store.url, "--max-tasks", str(count), verb="gateway") as (url, _):
            before, began = _resident_mib(store.pid), time.perf_counter()
            latencies = []
            while True:
                level = _submit(url, min(5.0, self.size.seconds))
                latencies.append(level.p99_ms)
                if level.errors:
                    assert set(level.errors) == {"429"}, level.errors
                    break
            grown = _resident_mib(store.pid) - before
            self.note("queued tasks", count)
            self.note("until the bound, s", time.perf_counter() - began)
            self.note("submit p99 ms, 8 clients, the worst 5 s", max(latencies[:-1] or latencies))
            self.note("the store grew MiB", grown)
            self.note("the store grew per queued task, KiB", grown / count * 1024)
            refused = httpx.post(f"{url}/agent/submit", content=BODY, headers=JSON)
            self.note("status at the bound", refused.status_code)
            self.note("Retry-After at the bound, s", float(refused.headers["retry-after"]))


def _one(client: httpx.Client) -> tuple[float, float]:
    """Seconds until a task is accepted, and until its final event is here."""
    began = time.perf_counter()
    ident = client.post("/agent/submit", content=BODY, headers=JSON).json()["task_id"]
    accepted = time.perf_counter()
    with client.stream("GET", f"/agent/events/{ident}") as stream:
        for line in stream.iter_lines():
            if '"RUN_FINISHED"' in line:
                return accepted - began, time.perf_counter() - began
    raise AssertionError("the stream ended without a final event")


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """One collection of everything that is imported here takes 40 ms, which would be the slowest task."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _median_s(call: Callable[[], object], count: int = 200) -> float:
    seen = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        seen.append(time.perf_counter() - began)
    return stats.median(seen)


def _submit(url: str, seconds: float) -> driver.LevelResult:
    """Eight clients, as fast as they are answered."""
    plan = driver.Plan(url=url, path="/agent/submit", bodies=[BODY], duration_s=seconds, warmup_s=0.0)
    return asyncio.run(driver.measure(plan, [driver.Level(concurrency=8)])).levels[0]


def _open_tasks(client: httpx.Client) -> float:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("headrace_tasks_open "):
            return float(line.split()[1])
    raise AssertionError("no such series")


def _ended(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    series = [line for line in lines if line.startswith("agent_requests_total{") and 'status="success"' in line]
    return sum(float(line.split()[-1]) for line in series)


def _resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _read() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, help="3, with --quick 1")
    arguments.add_argument("--parts", default=",".join(LIMITS_S))
    arguments.add_argument("--tasks", type=int, help="of the long queue")
    arguments.add_argument("--quick", action="store_true", help="small counts, to see that it works")
    arguments.add_argument("--directory", type=Path, help="where the peers' venvs are kept; else made and removed")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(LIMITS_S):
        arguments.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS_S)}")
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.size = QUICK if options.quick else FULL
    if options.tasks:
        options.size = dataclasses.replace(options.size, queue=options.tasks)
    options.seconds = options.size.seconds
    return options


def _conditions(options: argparse.Namespace) -> dict[str, object]:
    size = options.size
    # Nothing of a model is measured here.
    about_models = ("torch", "transformers", "torch threads", "model", "load", "no-op load")
    return {key: value for key, value in describe(options).items() if key not in about_models} | {
        "parts": " ".join(options.parts),
        "store": "valkey-server, everysec, Unix socket; the gateway of the watchers reaches it over TCP",
        "peers": " ".join(peer.requirement for peer in PEERS),
        "processes that run tasks": 2,
        "latency": f"{size.one} tasks one after the other, after 20 others or more",
        "rate": f"headrace 8 clients for {size.seconds:g} s, peers {size.jobs} jobs, 32 at once",
        "watchers": f"{size.watchers.watchers} at once on one gateway process, {size.watchers.tasks} tasks, each with "
        f"one event per second and {size.watchers.events} in all",
    }


def _print(seen: dict[str, list[float]], conditions: dict[str, object]) -> None:
    print(f"\n{'':76} {'rounds':>6} {'median':>10} {'least':>10} {'most':>10}")
    for name, values in seen.items():
        print(f"{name:76} {len(values):6} {stats.median(values):10.2f} {min(values):10.2f} {max(values):10.2f}")
    print("\nconditions: " + ", ".join(f"{key} {value}" for key, value in conditions.items()))


def main() -> None:
    options = _read()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what has been started is ended on the way out
    seen: dict[str, list[float]] = {}
    unfinished: list[str] = []

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)
        print(f"  {name}: {value:.2f}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as directory:
        asked = PEERS if {"latency", "rate"} & set(options.parts) else ()
        bench = Bench(options.size, note, {peer: peer.install(options.directory or Path(directory)) for peer in asked})
        for round_ in range(options.rounds):
            for part in options.parts:
                if round_ and part in ONCE:
                    continue
                print(f"{part}, round {round_ + 1} of {options.rounds}", file=sys.stderr)
                try:
                    with new_store() as store, limit(part, LIMITS_S[part]):
                        getattr(bench, part)(store)
                except OutOfTime as late:
                    unfinished.append(str(late))
                    print(late, file=sys.stderr)
    conditions = _conditions(options)
    _print(seen, conditions)
    if options.out:
        medians = {name: stats.median(values) for name, values in seen.items()}
        found = {"conditions": conditions, "medians": medians, "rounds": seen, "unfinished": unfinished}
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if unfinished:
        sys.exit("\n".join(unfinished))


if __name__ == "__main__":
    main()
