"""What metrics cost: an increment, an observation, a scrape of many processes and models, beside prometheus_client.

    python benchmarks/metrics.py [--workers 16] [--models 50] [--scrapes 1000] [--out FILE.json]

Both sides in turns, on one core. prometheus_client counts in its own multi-process mode, since one process is not what
a server is. Bound: a Python call with a lock around an addition, the least that exactness across threads costs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from headrace import metrics

CALLS = 200_000


def per_call_us(call: Callable[[], object], calls: int = CALLS) -> float:
    """Processor time of one call, the loop around it taken out."""
    began = time.process_time()
    for _ in range(calls):
        call()
    took = time.process_time() - began
    began = time.process_time()
    for _ in range(calls):
        pass
    return (took - (time.process_time() - began)) / calls * 1e6


def fill(row: metrics.Row, models: int) -> None:
    """The series of a server of so many models, as a front end and a worker make them."""
    for number in range(models):
        name = f"model-{number}"
        for endpoint in metrics.ENDPOINTS:
            for status in metrics.STATUSES:
                row.counter(metrics.REQUESTS, model=name, endpoint=endpoint, status=status).inc()
            row.histogram(metrics.REQUEST_DURATION, model=name, endpoint=endpoint).observe(0.01, f"request-{number}")
        for family in (metrics.QUEUE_WAIT, metrics.BATCH_SIZE, metrics.BATCH_DURATION, metrics.PADDING):
            row.histogram(family, model=name).observe(0.01)
        row.counter(metrics.ITEMS, model=name).inc()
        row.gauge(metrics.QUEUE_SIZE, model=name).set(1)


def increments() -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        row = metrics.Row(Path(folder) / "row")
        counter = row.counter(metrics.ITEMS, model="m")
        histogram = row.histogram(metrics.REQUEST_DURATION, model="m", endpoint="predict")
        lock, cell = threading.Lock(), [0.0]

        def bound() -> None:
            with lock:
                cell[0] += 1.0

        theirs = json.loads(subprocess.check_output([sys.executable, __file__, "--peer", folder], text=True))
        found: dict[str, list[float]] = {
            name: [] for name in ("bound", "inc", "observe", "observe_with_exemplar", "labels_inc")
        }
        for _ in range(5):
            found["bound"].append(per_call_us(bound))
            found["inc"].append(per_call_us(counter.inc))
            found["observe"].append(per_call_us(lambda: histogram.observe(0.02)))
            found["observe_with_exemplar"].append(per_call_us(lambda: histogram.observe(0.02, "request-1")))
            found["labels_inc"].append(per_call_us(lambda: row.counter(metrics.ITEMS, model="m").inc(), CALLS // 4))
        return found | theirs


def peer(folder: str) -> None:
    """prometheus_client, multi-process mode, in a process of its own: the mode is chosen when it is imported."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    import prometheus_client as prometheus

    counter = prometheus.Counter("c", "c", ["model"])
    histogram = prometheus.Histogram("h", "h", ["model"], buckets=metrics.REQUEST_DURATION.buckets)
    one, other = counter.labels("m"), histogram.labels("m")
    found: dict[str, list[float]] = {"peer_inc": [], "peer_observe": [], "peer_labels_inc": []}
    for _ in range(5):
        found["peer_inc"].append(per_call_us(one.inc, CALLS // 4))
        found["peer_observe"].append(per_call_us(lambda: other.observe(0.02), CALLS // 4))
        found["peer_labels_inc"].append(per_call_us(lambda: counter.labels("m").inc(), CALLS // 4))
    print(json.dumps(found))


def scrapes(workers: int, models: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rows = [metrics.Row(Path(folder) / f"worker.{number}") for number in range(workers)]
        for row in rows:
            fill(row, models)
        reader = metrics.Reader(Path(folder))
        began = time.perf_counter()
        text = reader.exposition()
        first_ms = (time.perf_counter() - began) * 1e3
        process, times, memory = psutil.Process(), [], []
        for number in range(count):
            began = time.perf_counter()
            text = reader.exposition()
            times.append((time.perf_counter() - began) * 1e3)
            if number % 100 == 99:
                memory.append(process.memory_info().rss / 2**20)
        began = time.perf_counter()
        marked = reader.openmetrics()
        return {
            "workers": workers,
            "models": models,
            "lines": text.count(b"\n"),
            "bytes": len(text),
            "first_ms": first_ms,
            "p50_ms": statistics.median(times),
            "p99_ms": sorted(times)[int(len(times) * 0.99)],
            "openmetrics_ms": (time.perf_counter() - began) * 1e3,
            "openmetrics_bytes": len(marked),
            "rss_mib_every_100": [round(each, 1) for each in memory],
        }


def conditions() -> dict[str, Any]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu.split(": ")[1],
        "python": platform.python_version(),
        "prometheus_client": importlib.metadata.version("prometheus-client"),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--models", type=int, default=50)
    parser.add_argument("--scrapes", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.peer)
        return
    found = {name: round(statistics.median(values), 3) for name, values in increments().items()}
    result = {
        "conditions": conditions(),
        "us_per_call": found,
        "scrape": scrapes(arguments.workers, arguments.models, arguments.scrapes),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
