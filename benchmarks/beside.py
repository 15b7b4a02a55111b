"""headrace beside LitServe and mosec, under overload, with large bodies, many models and several front ends.

    python benchmarks/beside.py [--rounds 3] [--out FILE.json] [--parts peers,overload,payload,models,front_ends]

Each part takes its servers in turns (A B C A B C …) on the same load, cores and threads; medians over the rounds. The
model is that of `serving.py` where there is one, with every answer checked against the direct result. Clients run on
the same cores as the servers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

import peers
from headrace import stats
from headrace.loadgen import driver
from headrace.up import demo_model
from serving import BIN, THREADS, InProcess, checker, children, cpu_s, describe, noop_load, sentences, server

HEADRACE = str(BIN / "headrace")
Note = Callable[[str, float], None]


def ours(target: str, port: int, *arguments: str) -> contextlib.AbstractContextManager[Any]:
    argv = [HEADRACE, "serve", *([target] if target else []), "--port", str(port), "--admin-port", "-1", *arguments]
    return server(argv, port, {})


def load(
    url: str, bodies: list[bytes], clients: int, seconds: float, *, check: Any = None, seed: int = 0, **plan: Any
) -> driver.LevelResult:
    wanted = driver.Plan(
        url=url, bodies=bodies, duration_s=seconds, warmup_s=1.5, seed=seed, check=check, timeout_s=60.0, **plan
    )
    return driver.run(wanted, [driver.Level(concurrency=clients)]).levels[0]


@contextlib.contextmanager
def all_three(workload: peers.Workload, python: Path, ours_: Any, port: int) -> Iterator[dict[str, Any]]:
    """URL and processes of each server of a workload."""
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(ours_)
        found: dict[str, Any] = {"headrace": (f"http://127.0.0.1:{port}", lambda: children(process.pid))}
        for kind in ("litserve", "mosec"):
            peer = stack.enter_context(peers.start(kind, workload, peers.free_port(), THREADS, python=python))
            found[kind] = (peer.url, peer.pids)
        yield found


def beside_peers(python: Path, rounds: int, note: Note) -> None:
    texts = sentences()
    bodies = [orjson.dumps({"input": text}) for text in texts]
    model = InProcess()
    check = checker([model.embed([text])[0] for text in texts])
    port = peers.free_port()
    threads = ("--threads", str(THREADS))
    with all_three("minilm", python, ours(str(demo_model()), port, *threads), port) as servers:
        for number in range(rounds):
            note("offline, arrival order, req/s", model.arrival_rate(texts))
            for name, (url, _) in servers.items():
                for clients, seconds in ((64, 6.0), (1, 3.0)):
                    result = load(url, bodies, clients, seconds, check=check, seed=number)
                    assert not result.errors, (name, result.errors)
                    note(f"MiniLM, {clients} clients, {name}, req/s", result.achieved_rate)
                    note(f"MiniLM, {clients} clients, {name}, p50 ms", result.p50_ms)
                    note(f"MiniLM, {clients} clients, {name}, p99 ms", result.p99_ms)
    port = peers.free_port()
    with all_three("noop", python, ours("noop:echo", port), port) as servers:
        for _ in range(rounds):
            for name, (url, pids) in servers.items():
                at = int(url.rpartition(":")[2])
                before = cpu_s(pids())
                count, rate, _ = noop_load(at, 64, 4.0)
                note(f"no-op, 64 clients, {name}, CPU us per request", (cpu_s(pids()) - before) / count * 1e6)
                note(f"no-op, 64 clients, {name}, req/s", rate)
                note(f"no-op, one client, {name}, p50 ms", noop_load(at, 1, 2.0)[2])


def overload(python: Path, note: Note, seconds: float = 30.0, room: int = 200) -> None:
    """512 clients in closed loops, those who are refused come back at once; the peers for a third of the time."""
    bodies = [orjson.dumps({"input": text}) for text in sentences()]
    port = peers.free_port()
    arguments = ("--max-queue", str(room), "--threads", str(THREADS))
    with all_three("minilm", python, ours(str(demo_model()), port, *arguments), port) as servers:
        for name, (url, pids) in servers.items():
            before = _resident_mib(pids())
            result = load(url, bodies, 512, seconds if name == "headrace" else seconds / 3)
            note(f"512 clients, {name}, answered per s", result.achieved_rate)
            note(f"512 clients, {name}, p50 ms", result.p50_ms)
            note(f"512 clients, {name}, p99 ms", result.p99_ms)
            note(f"512 clients, {name}, refused per s", result.errors.get("429", 0) / seconds)
            note(f"512 clients, {name}, other errors", sum(n for kind, n in result.errors.items() if kind != "429"))
            note(f"512 clients, {name}, memory grew MiB", _resident_mib(pids()) - before)
            if name == "headrace":
                note(
                    "512 clients, headrace, p99 over 2 x room / rate",
                    result.p99_ms / (2e3 * room / result.achieved_rate),
                )
                note("512 clients, headrace, a refusal's p99 as its client sees it, ms", result.refused_p99_ms or 0.0)
                note("512 clients, headrace, refusals decided within 10 ms, share", _in_time(url))


def payload(python: Path, rounds: int, note: Note) -> None:
    """A megabyte of raw bytes per request."""
    body = os.urandom(1 << 20)
    port = peers.free_port()
    with all_three("image", python, ours("noop:size", port), port) as servers:
        for _ in range(rounds):
            for name, (url, _) in servers.items():
                result = load(url, [body], 8, 4.0, content_type="application/octet-stream")
                assert not result.errors, (name, result.errors)
                note(f"1 MiB bodies, 8 clients, {name}, MiB/s", result.achieved_rate)
                note(f"1 MiB bodies, 8 clients, {name}, p99 ms", result.p99_ms)


def models(rounds: int, note: Note, count: int = 16) -> None:
    """The same no-op load on one model and spread over many, each in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        for number in (1, count):
            file = Path(directory) / f"{number}.toml"
            file.write_text("".join(f'[models.m{n}]\ntarget = "noop:echo"\n' for n in range(number)))
        for _ in range(rounds):
            for number in (1, count):
                port = peers.free_port()
                with ours("", port, "--config", str(Path(directory) / f"{number}.toml")) as process:
                    paths = [f"/models/m{n}/predict" for n in range(number)]
                    rate = sum(
                        load(f"http://127.0.0.1:{port}", [b'{"input":"x"}'], 16, 4.0 / number, path=path).achieved_rate
                        for path in paths
                    ) / len(paths)
                    note(f"no-op, 16 clients, {number} models one after the other, req/s", rate)
                    note(f"{number} models, MiB in all processes", _resident_mib(children(process.pid)))


def front_ends(rounds: int, note: Note) -> None:
    for _ in range(rounds):
        for number in (1, 2, 4):
            port = peers.free_port()
            with ours("noop:echo", port, "--http-workers", str(number)) as process:
                pids = children(process.pid)
                before = cpu_s(pids)
                count, rate, _ = noop_load(port, 64, 4.0)
                note(f"no-op, 64 clients, {number} front ends, req/s", rate)
                note(
                    f"no-op, 64 clients, {number} front ends, CPU us per request", (cpu_s(pids) - before) / count * 1e6
                )


def _resident_mib(pids: list[int]) -> float:
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def _in_time(url: str) -> float:
    """Share of the refusals that the server's own histogram has at 10 ms or less."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()

    def value(mark: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith("headrace_refusal_duration_seconds" + mark)]
        return sum(float(line.rpartition(" ")[2]) for line in lines if 'model="other"' not in line)

    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("headrace_refusal_duration_seconds_bucket") and 'le="0.01"' in line
    ) / max(1.0, value("_count"))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--parts", default="peers,overload,payload,models,front_ends")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    options.seconds = 6.0
    seen: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seen.setdefault(name, []).append(value)
        print(f"  {name}: {value:.2f}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as directory:
        python = peers.install(Path(directory) / "peers")
        parts: dict[str, Callable[[], None]] = {
            "peers": lambda: beside_peers(python, options.rounds, note),
            "overload": lambda: overload(python, note),
            "payload": lambda: payload(python, options.rounds, note),
            "models": lambda: models(options.rounds, note),
            "front_ends": lambda: front_ends(options.rounds, note),
        }
        for part in options.parts.split(","):
            print(part, file=sys.stderr)
            parts[part]()
    print(f"\n{'median of ' + str(options.rounds) + ' rounds':74} {'median':>10} {'least':>10} {'most':>10}")
    for name, values in seen.items():
        print(f"{name:74} {stats.median(values):10.2f} {min(values):10.2f} {max(values):10.2f}")
    conditions = describe(options) | {"peers": peers.VERSIONS}
    print("\nconditions: " + ", ".join(f"{key} {value}" for key, value in conditions.items()))
    if options.out:
        medians = {name: stats.median(values) for name, values in seen.items()}
        options.out.write_text(
            json.dumps({"conditions": conditions, "medians": medians, "rounds": seen}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
