"""How close to the model's own limit does the server come, and what does it cost by itself?

    python benchmarks/serving.py [--rounds 5] [--out FILE.json]

Everything in one run, in turns (A B A B …), medians over the rounds:

* the offline limit: the same model in this process, batches of 32 in order of arrival, and windows of 64 waiting
  sentences sorted by length in batches of 16 (what a server could do that looks at lengths);
* headrace at 1, 16 and 64 clients, every answer checked against the direct result;
* a plain FastAPI + asyncio batcher (`plain_batcher.py`), at 64 clients;
* one client: the same sentence in process and over HTTP, in pairs;
* a model that does nothing: CPU time per request over all our processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from headrace import stats
from headrace.config import load
from headrace.loadgen import driver
from headrace.loadgen.client import Address, Connection
from headrace.runners import open_target
from headrace.runners.devices import limit_threads
from headrace.runners.text import TextPreparer
from headrace.up import demo_model

HERE = Path(__file__).parent
THREADS = 2
BIN = Path(sys.executable).parent


def sentences(count: int = 200, seed: int = 7) -> list[str]:
    """Real English of 5 to 60 words: cuts of this project's licence."""
    import random

    words = (HERE.parent / "LICENSE").read_text().split()
    pick = random.Random(seed)
    lengths = [pick.randint(5, 60) for _ in range(count)]
    starts = [pick.randrange(len(words) - length) for length in lengths]
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


class InProcess:
    """The same model without a server."""

    def __init__(self) -> None:
        config = load(targets={"m": str(demo_model())}, environment={}).models["m"]
        self.loaded = open_target(config, "cpu")
        limit_threads(THREADS)
        assert self.loaded.info.text
        self.tokenizer = TextPreparer(self.loaded.info.text)

    def embed(self, texts: list[str]) -> list[Any]:
        return self.loaded.runner.run([self.tokenizer.text(text) for text in texts])

    def arrival_rate(self, texts: list[str], size: int = 32) -> float:
        start = time.perf_counter()
        for at in range(0, len(texts), size):
            self.embed(texts[at : at + size])
        return len(texts) / (time.perf_counter() - start)

    def window_rate(self, texts: list[str], window: int = 64, size: int = 16) -> float:
        start = time.perf_counter()
        for at in range(0, len(texts), window):
            near = sorted(texts[at : at + window], key=len)
            for low in range(0, len(near), size):
                self.embed(near[low : low + size])
        return len(texts) / (time.perf_counter() - start)


@contextlib.contextmanager
def server(argv: list[str], port: int, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server as its own process, given back when it is ready, ended by its pid."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
    process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **env}, cwd=HERE)
    try:
        until = time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=2)
                break
            if process.poll() is not None or time.monotonic() > until:
                log.seek(0)
                raise SystemExit(f"{argv[0]} did not start:\n{log.read().decode()}")
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(40)


def level(port: int, bodies: list[bytes], clients: int, seconds: float, check: Any, seed: int) -> driver.LevelResult:
    plan = driver.Plan(
        url=f"http://127.0.0.1:{port}",
        bodies=bodies,
        duration_s=seconds,
        warmup_s=1.5 if clients > 1 else 0.5,
        seed=seed,
        check=check,
    )
    return driver.run(plan, [driver.Level(concurrency=clients)]).levels[0]


def paired(model: InProcess, texts: list[str], port: int) -> list[float]:
    """Milliseconds that the way over HTTP takes longer, sentence by sentence, in turns."""
    address = Address.parse(f"http://127.0.0.1:{port}")
    requests = [address.request("/predict", orjson.dumps({"input": text})) for text in texts]

    async def run() -> list[float]:
        connection = await Connection.open(address)
        more = []
        for text, request in zip(texts, requests, strict=True):
            start = time.perf_counter()
            model.embed([text])
            alone = time.perf_counter() - start
            # OpenMP threads spin for a moment after a run: without the pause one side would slow the other.
            await asyncio.sleep(0.03)
            start = time.perf_counter()
            await connection.exchange(request)
            more.append((time.perf_counter() - start - alone) * 1e3)
            await asyncio.sleep(0.03)
        connection.close()
        return more

    return asyncio.run(run())


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid, *(each for child in found for each in children(int(child)))]


def cpu_s(pids: list[int]) -> float:
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / ticks


def noop_load(port: int, clients: int, seconds: float) -> tuple[int, float, float]:
    """Requests, rate and p50 in ms; by wrk where it is installed, since our own driver takes a core for itself."""
    if shutil.which("wrk"):
        with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
            script.write('wrk.method="POST"; wrk.body=\'{"input":"hello world"}\'\n')
            script.write('wrk.headers["Content-Type"]="application/json"\n')
            script.flush()
            argv = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "--latency", "-s", script.name]
            text = subprocess.run([*argv, f"http://127.0.0.1:{port}/predict"], capture_output=True, text=True).stdout
        assert "Non-2xx" not in text, text
        count = int(re.search(r"(\d+) requests in", text)[1])  # type: ignore[index]
        value, unit = re.search(r"50% +([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
        return count, count / seconds, float(value) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]
    result = level(port, [b'{"input":"hello world"}'], clients, seconds, None, 0)
    return result.n, result.achieved_rate, result.p50_ms


def checker(expected: list[Any]) -> Callable[[int, int, bytes], None]:
    def check(index: int, status: int, body: bytes) -> None:
        vector = np.array(orjson.loads(body)["prediction"], dtype=np.float32)
        cosine = float(vector @ expected[index])
        assert cosine > 0.9999, f"sentence {index}: cosine {cosine}"

    return check


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--seconds", type=float, default=6.0)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()

    texts = sentences()
    bodies = [orjson.dumps({"input": text}) for text in texts]
    model = InProcess()
    expected = [model.embed([text])[0] for text in texts]
    check = checker(expected)
    ours, plain, noop = 18081, 18082, 18083
    threads = {"OMP_NUM_THREADS": str(THREADS)}
    # The words are those that the table shows.
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)
        print(f"  {name}: {value:.2f}", file=sys.stderr)

    headrace = str(BIN / "headrace")
    with (
        server(
            [
                headrace,
                "serve",
                str(demo_model()),
                "--admin-port",
                "-1",
                "--port",
                str(ours),
                "--threads",
                str(THREADS),
            ],
            ours,
            {},
        ),
        server(
            [sys.executable, "-m", "uvicorn", "plain_batcher:app", "--port", str(plain), "--log-level", "error"],
            plain,
            {"MODEL": str(demo_model()), "THREADS": str(THREADS), **threads},
        ),
        server([headrace, "serve", "noop:echo", "--admin-port", "-1", "--port", str(noop)], noop, {}) as noop_server,
    ):
        noop_pids = children(noop_server.pid)
        for round_ in range(options.rounds):
            print(f"round {round_ + 1} of {options.rounds}", file=sys.stderr)
            note("offline, arrival order, req/s", model.arrival_rate(texts))
            for clients in (64, 16):
                result = level(ours, bodies, clients, options.seconds, check, round_)
                assert not result.errors, result.errors
                note(f"headrace, {clients} clients, req/s", result.achieved_rate)
                note(f"headrace, {clients} clients, p50 ms", result.p50_ms)
                note(f"headrace, {clients} clients, p99 ms", result.p99_ms)
                if clients == 64:
                    other = level(plain, bodies, 64, options.seconds, check, round_)
                    assert not other.errors, other.errors
                    note("plain batcher, 64 clients, req/s", other.achieved_rate)
                    note("plain batcher, 64 clients, p50 ms", other.p50_ms)
                    note("plain batcher, 64 clients, p99 ms", other.p99_ms)
                    note("offline, windows of 64, req/s", model.window_rate(texts))
            note("one client, over HTTP minus in process, ms", stats.median(paired(model, texts[:60], ours)))
            note("one client, headrace p50 ms", level(ours, bodies, 1, 3.0, check, round_).p50_ms)
            note("one client, plain batcher p50 ms", level(plain, bodies, 1, 3.0, check, round_).p50_ms)
            before = cpu_s(noop_pids)
            count, rate, _ = noop_load(noop, 64, 4.0)
            note("no-op, 64 clients, CPU us per request", (cpu_s(noop_pids) - before) / count * 1e6)
            note("no-op, 64 clients, req/s", rate)
            note("no-op, one client, p50 ms", noop_load(noop, 1, 2.0)[2])

    middle = {name: stats.median(values) for name, values in seen.items()}

    def ratio(above: str, below: str) -> float:
        return stats.median([a / b for a, b in zip(seen[above], seen[below], strict=True)])

    at64 = "headrace, 64 clients, req/s"
    goals = {
        "64 clients / offline arrival order (target >= 1.10)": ratio(at64, "offline, arrival order, req/s"),
        "64 clients / windows of 64": ratio(at64, "offline, windows of 64, req/s"),
        "64 clients / plain batcher (target >= 1.4)": ratio(at64, "plain batcher, 64 clients, req/s"),
        "64 clients p99 / p50 (target <= 3)": ratio("headrace, 64 clients, p99 ms", "headrace, 64 clients, p50 ms"),
        "one client over in process, ms (target <= 3)": middle["one client, over HTTP minus in process, ms"],
        "no-op CPU us per request (target <= 120)": middle["no-op, 64 clients, CPU us per request"],
        "no-op one client p50 ms (target <= 3)": middle["no-op, one client, p50 ms"],
    }
    print(f"\n{'median of ' + str(options.rounds) + ' rounds':58} {'median':>9} {'least':>9} {'most':>9}")
    for name, values in seen.items():
        print(f"{name:58} {middle[name]:9.2f} {min(values):9.2f} {max(values):9.2f}")
    print("\nmedian of the paired ratios")
    for name, value in goals.items():
        print(f"{name:58} {value:9.2f}")
    conditions = describe(options)
    print("\nconditions: " + ", ".join(f"{key} {value}" for key, value in conditions.items()))
    if options.out:
        options.out.write_text(
            json.dumps({"conditions": conditions, "goals": goals, "medians": middle, "rounds": seen}, indent=1) + "\n"
        )


def describe(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu.split(": ")[1],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch threads": THREADS,
        "model": "all-MiniLM-L6-v2, FP32",
        "load": "200 English sentences of 5 to 60 words",
        "rounds": options.rounds,
        "seconds per level": options.seconds,
        "no-op load by": "wrk" if shutil.which("wrk") else "headrace bench",
        "clients": "on the same cores as the server",
    }


if __name__ == "__main__":
    main()
