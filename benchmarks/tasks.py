"""Tasks beside arq on the same Valkey, in turns: latency of one, rate and CPU of many; a long queue.

    python benchmarks/tasks.py [--rounds 3] [--parts latency,rate,backlog] [--out FILE.json]

Two task worker processes on each side, clients on the same cores. What arq does not do: no journal of steps, no stream
of events, no fence against a second owner, no bound on the queue, and a job's state is asked for by polling.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

import peers
from headrace import stats
from headrace.loadgen import driver
from headrace.tasks import embedded
from serving import BIN, children, cpu_s, describe

HERE = Path(__file__).parent
ARQ = "arq==0.26.3"
BODY = b'{"agent":"one_step","message":"hello"}'
Note = Callable[[str, float], None]


@contextlib.contextmanager
def headrace(store: str, *arguments: str, verb: str = "up") -> Iterator[tuple[str, int]]:
    """URL and pid of a server with two task workers on a store."""
    port = peers.free_port()
    argv = [str(BIN / "headrace"), verb, "task_agents.py", "--redis", store, "--port", str(port), "--admin-port", "-1"]
    process = subprocess.Popen(
        [*argv, "--log-level", "warning", *arguments], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        while not (line := process.stdout.readline()).startswith("ready"):
            assert line, "the server did not start"
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def arq_workers(python: Path, socket: str) -> Iterator[list[int]]:
    argv = [str(python), "-m", "arq", "peer_arq.WorkerSettings"]
    env = {**os.environ, "ARQ_SOCKET": socket, "PYTHONPATH": str(HERE)}
    workers = [
        subprocess.Popen(argv, cwd=HERE, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    try:
        yield [worker.pid for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait(30)


def open_tasks(client: httpx.Client) -> float:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("headrace_tasks_open "):
            return float(line.split()[1])
    raise AssertionError("no such series")


def ended(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith('agent_requests_total{status="success"'))


def latency(url: str, note: Note, count: int = 150) -> None:
    """One after the other on an idle machine: submit, then the stream until the final event."""
    submits, finals = [], []
    with httpx.Client(base_url=url, timeout=30) as client:
        for _ in range(count):
            began = time.perf_counter()
            ident = client.post("/agent/submit", content=BODY, headers={"content-type": "application/json"}).json()
            submits.append(time.perf_counter() - began)
            with client.stream("GET", f"/agent/events/{ident['task_id']}") as stream:
                for line in stream.iter_lines():
                    if '"RUN_FINISHED"' in line:
                        break
            finals.append(time.perf_counter() - began)
    note("submit p50 ms", stats.percentile(sorted(submits), 0.5) * 1e3)
    note("submit p99 ms", stats.percentile(sorted(submits), 0.99) * 1e3)
    note("submit to final event p50 ms", stats.percentile(sorted(finals), 0.5) * 1e3)
    note("submit to final event p99 ms", stats.percentile(sorted(finals), 0.99) * 1e3)


def rate(url: str, pid: int, store_pid: int, note: Note, seconds: float = 6.0) -> None:
    """Eight clients submit as fast as they are answered; then until the last is done."""
    pids = [*children(pid), store_pid]
    with httpx.Client(base_url=url, timeout=30) as client:
        done_before, cpu_before = ended(client), cpu_s(pids)
        began = finished = time.perf_counter()
        plan = driver.Plan(url=url, path="/agent/submit", bodies=[BODY], duration_s=seconds, warmup_s=0.0)
        asyncio.run(driver.measure(plan, [driver.Level(concurrency=8)]))
        last = ended(client)
        while True:
            time.sleep(0.2)
            now = ended(client)
            if now == last and open_tasks(client) == 0:
                break
            last, finished = now, time.perf_counter()
        count = last - done_before
        note("one-step agents per s", count / (finished - began))
        note("CPU ms per agent, all server processes", (cpu_s(pids) - cpu_before) / count * 1e3)


def arq(python: Path, socket: str, store_pid: int, note: Note, count: int = 1500) -> None:
    env = {**os.environ, "ARQ_SOCKET": socket, "PYTHONPATH": str(HERE)}
    with arq_workers(python, socket) as pids:

        def drive(jobs: int, at_once: int) -> dict[str, float]:
            argv = [str(python), str(HERE / "peer_arq.py"), str(jobs), str(at_once)]
            found: dict[str, float] = json.loads(subprocess.run(argv, env=env, capture_output=True, check=True).stdout)
            return found

        drive(50, 8)
        one = drive(100, 1)
        note("arq, enqueue p50 ms", one["enqueue_p50_ms"])
        note("arq, enqueue to result, mean ms, one at a time", one["seconds"] / 100 * 1e3)
        before = cpu_s([*pids, store_pid])
        many = drive(count, 32)
        note("arq, jobs per s", count / many["seconds"])
        note("arq, CPU ms per job, workers and store", (cpu_s([*pids, store_pid]) - before) / count * 1e3)


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def backlog(store: str, store_pid: int, note: Note, count: int) -> None:
    """So many queued tasks, and one more."""
    with headrace(store, "--max-tasks", str(count), verb="gateway") as (url, _):
        before, began = resident_mib(store_pid), time.perf_counter()
        plan = driver.Plan(url=url, path="/agent/submit", bodies=[BODY], duration_s=5.0, warmup_s=0.0)
        latencies = []
        while True:
            (level,) = asyncio.run(driver.measure(plan, [driver.Level(concurrency=8)])).levels
            latencies.append(level.p99_ms)
            if level.errors:
                assert set(level.errors) == {"429"}, level.errors
                break
        note("queued tasks", count)
        note("until the bound, s", time.perf_counter() - began)
        note("submit p99 ms, 8 clients, the worst 5 s", max(latencies[:-1] or latencies))
        note("the store grew MiB", resident_mib(store_pid) - before)
        refused = httpx.post(f"{url}/agent/submit", content=BODY, headers={"content-type": "application/json"})
        note("status at the bound", refused.status_code)
        note("Retry-After at the bound, s", float(refused.headers["retry-after"]))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--parts", default="latency,rate,backlog")
    arguments.add_argument("--tasks", type=int, default=100_000, help="of the long queue")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    options.seconds = 6.0
    parts = options.parts.split(",")
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)
        print(f"  {name}: {value:.2f}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as directory:
        python = Path(directory) / "arq" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", ARQ], check=True)
        folder = Path(directory) / "store"
        store = embedded.ensure(folder)
        try:
            for _ in range(options.rounds):
                with headrace(store.url, "--task-workers", "2") as (url, pid):
                    if "latency" in parts:
                        latency(url, note)
                    if "rate" in parts:
                        rate(url, pid, store.pid, note)
                if "rate" in parts:
                    arq(python, store.url.removeprefix("unix://"), store.pid, note)
            if "backlog" in parts:
                backlog(store.url, store.pid, note, options.tasks)
        finally:
            embedded.stop(folder)
    print(f"\n{'median of ' + str(options.rounds) + ' rounds':60} {'median':>10} {'least':>10} {'most':>10}")
    for name, values in seen.items():
        print(f"{name:60} {stats.median(values):10.2f} {min(values):10.2f} {max(values):10.2f}")
    # Nothing of a model is measured here.
    about_models = ("torch", "transformers", "torch threads", "model", "load", "no-op load")
    conditions = {key: value for key, value in describe(options).items() if key not in about_models} | {
        "store": "valkey-server, everysec, Unix socket",
        "arq": ARQ,
        "task workers": 2,
    }
    print("\nconditions: " + ", ".join(f"{key} {value}" for key, value in conditions.items()))
    if options.out:
        medians = {name: stats.median(values) for name, values in seen.items()}
        options.out.write_text(
            json.dumps({"conditions": conditions, "medians": medians, "rounds": seen}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
