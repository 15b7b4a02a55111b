"""On a machine with a GPU: what a wait costs, whether idle time is told by its cause, and what watching costs.

    python tests/gpu/check_profile.py [--out FILE.json] [--traces FOLDER]

Under 100 seconds. A script of its own, since time on a GPU is dear: one call checks everything, and what goes wrong in
one part is written down and does not end the others.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from headrace.profiling.device import Timeline, as_text, record_gpu
from headrace.profiling.memory import memory_usage

LIMIT_S = 90.0  # no part is begun after that
STARTED = time.perf_counter()
TRACES: Path | None = None


def spin(seconds: float) -> None:
    """Keep the host busy without a word to the GPU."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def square(size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(size, size, device="cuda", dtype=dtype) / size


# What a wait costs.


def sync_cost() -> dict[str, Any]:
    """Microseconds a step, waiting after each and only at the end, in turns."""
    found = {}
    for name, size, products, steps in (("small", 256, 2, 500), ("large", 4096, 4, 100)):
        a = square(size)

        def loop(wait: bool, a: torch.Tensor = a, products: int = products, steps: int = steps) -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(steps):
                y = a
                for _ in range(products):
                    y = a @ y
                if wait:
                    y[0, 0].item()
            torch.cuda.synchronize()
            return 1e6 * (time.perf_counter() - began) / steps

        loop(True)
        pairs = [(loop(False), loop(True)) for _ in range(7)]
        plain, waiting = (statistics.median(values) for values in zip(*pairs, strict=True))
        found[name] = {"plain_us": plain, "item_us": waiting, "cost_us": waiting - plain, "ratio": waiting / plain}
    return found


# Loops whose idle time has one cause.


def host_bound() -> None:
    a = square(4096)
    for _ in range(15):
        a @ a
        spin(0.004)


def sync_bound() -> None:
    a = square(4096)
    for _ in range(60):
        (a @ a)[0, 0].item()


def copy_bound() -> None:
    host, a = torch.ones(16 << 20), square(1024)
    for _ in range(8):
        host.to("cuda").add_(1)
        a @ a


def fetch_bound() -> None:
    a = torch.ones(16 << 20, device="cuda")
    for _ in range(8):
        (a + 1).cpu()


def launch_bound() -> None:
    x = torch.ones(64, device="cuda")
    for _ in range(1500):
        x.add_(1)


def small_training() -> None:
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)]).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, foreach=False)
    x = torch.ones(8, 64, device="cuda")
    for _ in range(30):
        optimizer.zero_grad()
        net(x).pow(2).mean().backward()
        optimizer.step()


class Slow(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, number: int) -> torch.Tensor:
        spin(0.001)
        return torch.full((64,), float(number))


def input_bound() -> None:
    a = square(1024, torch.float32)
    for batch in DataLoader(Slow(), batch_size=4):
        a[:4, :64] = batch.cuda()
        a @ a


def busy() -> None:
    a = square(8192)
    for _ in range(40):
        a @ a


def in_a_graph() -> Callable[[], None]:
    x = torch.ones(64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        for _ in range(100):
            x.add_(1)

    def run() -> None:
        for _ in range(20):
            graph.replay()

    return run


def timeline_of(run: Callable[[], None], name: str) -> Timeline:
    trace = TRACES / f"{name}.json" if TRACES is not None else None
    return record_gpu(run, warm_up=1, repeat=1, trace_file=trace)


def planted(run: Callable[[], None], cause: str) -> Callable[[], dict[str, Any]]:
    def part() -> dict[str, Any]:
        timeline = timeline_of(run, run.__name__)
        print(as_text(timeline))
        first = timeline.gaps[0].cause if timeline.gaps else ""
        covered = timeline.busy_s + sum(gap.seconds for gap in timeline.gaps)
        right = first == cause and abs(covered - timeline.window_s) < 1e-3 * timeline.window_s
        return {"right": right, "expected": cause, "first": first, **said(timeline)}

    return part


def busy_part() -> dict[str, Any]:
    """The busy loop, and the same time by CUDA's own events."""
    timeline = timeline_of(busy, "busy")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    busy()
    end.record()
    torch.cuda.synchronize()
    events_s = start.elapsed_time(end) / 1e3
    print(as_text(timeline))
    product = max(timeline.kernels, key=lambda kernel: kernel.seconds)
    right = timeline.busy_share > 0.9 and product.bound == "compute" and product.by == "estimate"
    return {"right": right, "expected": "busy, compute", "events_s": events_s, **said(timeline)}


def graph_part() -> dict[str, Any]:
    timeline = timeline_of(in_a_graph(), "in_a_graph")
    print(as_text(timeline))
    right = timeline.launches < 100 and timeline.calls >= 2000
    return {"right": right, "expected": "2000 kernels of few launches", **said(timeline)}


def said(timeline: Timeline) -> dict[str, Any]:
    return dict(msgspec.to_builtins(timeline))


# The allocator.


def fragmentation() -> dict[str, Any]:
    """Holes between living tensors that are too small for the next one, within a limit."""
    mib = 1 << 20
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    kept: list[torch.Tensor] = []

    def run() -> None:
        blocks = [torch.zeros(8 * mib, dtype=torch.uint8, device="cuda") for _ in range(128)]
        spare = torch.zeros(600 * mib, dtype=torch.uint8, device="cuda")
        kept.extend(blocks[::2])
        del blocks, spare  # half of each piece of the pool stays in use; the spare one can be given back
        kept.append(torch.zeros(1200 * mib, dtype=torch.uint8, device="cuda"))

    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(held + 2700 * mib, free) / total)
    try:
        timeline = record_gpu(run)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    memory = timeline.memory
    assert memory is not None
    usage = memory_usage().devices[0]
    right = memory.retries >= 1 and memory.split_bytes >= 64 * 8 * mib and usage.allocated_bytes >= 64 * 8 * mib
    return {
        "right": right,
        "expected": "a retry, and at least 512 MiB between tensors",
        "memory": msgspec.to_builtins(memory),
        "fragmentation": memory.fragmentation,
        "usage": msgspec.to_builtins(usage),
    }


# What the profiler costs.


def overhead() -> dict[str, Any]:
    """A small training, launch-bound: the worst case. Seconds within the run, not of reading the trace."""

    def seconds(shapes: bool | None) -> tuple[float, float]:
        within = []

        def run() -> None:
            torch.cuda.synchronize()
            began = time.perf_counter()
            small_training()
            torch.cuda.synchronize()
            within.append(time.perf_counter() - began)

        began = time.perf_counter()
        if shapes is None:
            run()
        else:
            record_gpu(run, shapes=shapes)
        return within[0], time.perf_counter() - began

    seconds(None)
    rounds = [(seconds(None), seconds(False), seconds(True)) for _ in range(5)]
    plain, without, with_shapes = (statistics.median(each[0] for each in kind) for kind in zip(*rounds, strict=True))
    whole = statistics.median(each[1] for each in (row[2] for row in rounds))
    return {
        "plain_s": plain,
        "ratio": without / plain,
        "ratio_with_shapes": with_shapes / plain,
        "whole_s": whole,
        "range_with_shapes": [
            min(row[2][0] / row[0][0] for row in rounds),
            max(row[2][0] / row[0][0] for row in rounds),
        ],
    }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "sync_cost": sync_cost,
    "host": planted(host_bound, "host"),
    "sync": planted(sync_bound, "sync"),
    "copy": planted(copy_bound, "copy"),
    "fetch": planted(fetch_bound, "copy"),
    "launch": planted(launch_bound, "launch"),
    "training": planted(small_training, "launch"),
    "input": planted(input_bound, "input"),
    "busy": busy_part,
    "graph": graph_part,
    "overhead": overhead,
    "fragmentation": fragmentation,  # last: it leaves the pool in pieces
}


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if time.perf_counter() - STARTED > LIMIT_S:
        return {"right": False, "error": "not begun: the time is over"}
    began = time.perf_counter()
    try:
        found = part()
    except Exception as error:
        traceback.print_exc()
        found = {"right": False, "error": f"{type(error).__name__}: {error}"}
    return {"right": True, **found, "took_s": time.perf_counter() - began}


def summary(name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"{name:<14} ERROR  {found['error']}"
    verdict = "right" if found["right"] else "WRONG"
    if "gaps" in found:
        gaps = ", ".join(f"{gap['cause']} {gap['share']:.1%}" for gap in found["gaps"])
        return f"{name:<14} {verdict}  busy {found['busy_share']:.1%}; {gaps or 'no gaps'}; wanted {found['expected']}"
    return f"{name:<14} {verdict}  " + json.dumps({key: value for key, value in found.items() if key != "right"})


def main() -> None:
    global TRACES
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--traces", type=Path, help="folder in which the traces are kept")
    given = parser.parse_args()
    TRACES = given.traces
    if TRACES is not None:
        TRACES.mkdir(parents=True, exist_ok=True)
    if not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "parts": {},
    }
    for name, part in PARTS.items():
        print(f"--- {name}", flush=True)
        report["parts"][name] = attempt(part)
        if given.out:
            given.out.write_text(json.dumps(report, indent=1))
    print("---", report["device"], "torch", report["torch"], "CUDA", report["cuda"], "Python", report["python"])
    print(*[summary(name, found) for name, found in report["parts"].items()], sep="\n")
    wrong = [name for name, found in report["parts"].items() if not found["right"]]
    sys.exit(f"not as expected: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
