"""How often the verdict on leaks is wrong: seeded programs of random sizes, each trial in a process of its own.

    python tests/leaks/soak.py --out soak.json [--seeds 6] [--harmless-seeds 12] [--iterations 40,100]
        [--first-seed 0] [--only NAME,…]

A trial is one search in one process; `headrace leak` asks a second process to agree, so its false alarms are fewer.
JSON: for each program its kind, the trials and the verdicts; in all, the leaks that were found with their kind, and the
false alarms among the harmless ones with the upper end of their 95 % interval (Clopper and Pearson, one-sided).
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import functools
import json
import math
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headrace.profiling.leak import find_leak

Make = Callable[[random.Random], Callable[[], Any]]
torch.set_num_threads(1)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def block(size: int) -> Any:
    found = libc.malloc(size)
    libc.memset(found, 1, size)
    return found


# Programs that leak.


def kept_list(draw: random.Random) -> Callable[[], Any]:
    kept: list[bytes] = []
    size = draw.randrange(50, 5000)
    return lambda: kept.append(draw.randbytes(size))


def every_nth(draw: random.Random) -> Callable[[], Any]:
    kept: list[bytes] = []
    calls, every = [0], draw.randrange(2, 6)

    def call() -> None:
        calls[0] += 1
        if calls[0] % every == 0:
            kept.append(draw.randbytes(1000))

    return call


def by_chance(draw: random.Random) -> Callable[[], Any]:
    kept: list[bytes] = []

    def call() -> None:
        if draw.random() < 0.5:
            kept.append(draw.randbytes(draw.randrange(2000)))

    return call


def under_jitter(draw: random.Random) -> Callable[[], Any]:
    kept: list[bytes] = []
    last = [b""]

    def call() -> None:
        last[0] = draw.randbytes(draw.randrange(20_000))
        kept.append(draw.randbytes(500))

    return call


def unbounded_lru(draw: random.Random) -> Callable[[], Any]:
    @functools.cache
    def answer(key: int) -> bytes:
        return draw.randbytes(300)

    return lambda: answer(draw.getrandbits(60))


def listeners(draw: random.Random) -> Callable[[], Any]:
    listening: dict[int, Any] = {}

    def call() -> None:
        text = draw.randbytes(draw.randrange(100, 400))
        listening[len(listening)] = lambda: text

    return call


def waiting_threads(draw: random.Random) -> Callable[[], Any]:
    pause = threading.Event()
    return lambda: threading.Thread(target=pause.wait, daemon=True).start()


def open_files(draw: random.Random) -> Callable[[], Any]:
    return lambda: os.open("/dev/null", os.O_RDONLY) if draw.random() < 0.7 else None


def endless_tasks(draw: random.Random) -> Callable[[], Any]:
    polls: set[Any] = set()

    async def call() -> None:
        polls.add(asyncio.create_task(asyncio.Event().wait()))

    return call


def native(draw: random.Random) -> Callable[[], Any]:
    size = draw.randrange(200, 20_000)

    def call() -> None:
        block(size)
        for each in [block(draw.randrange(100, 5000)) for _ in range(10)]:
            libc.free(each)

    return call


def _model(draw: random.Random) -> Any:
    width = draw.randrange(4, 64)
    torch.manual_seed(draw.randrange(1000))
    return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))


def loss_list(draw: random.Random) -> Callable[[], Any]:
    losses: list[Any] = []
    model = _model(draw)
    return lambda: losses.append(model(torch.randn(4, 8)).mean())


def loss_sum(draw: random.Random) -> Callable[[], Any]:
    total: list[Any] = [torch.zeros(())]
    model = _model(draw)

    def call() -> None:
        total[0] = total[0] + model(torch.randn(4, 8)).mean()

    return call


def kept_tensors(draw: random.Random) -> Callable[[], Any]:
    outputs: list[Any] = []
    size = draw.randrange(10, 5000)
    return lambda: outputs.append(torch.ones(size))


LEAKS: dict[str, tuple[str, Make]] = {
    "kept_list": ("python", kept_list),
    "every_nth": ("python", every_nth),
    "by_chance": ("python", by_chance),
    "under_jitter": ("python", under_jitter),
    "unbounded_lru": ("python", unbounded_lru),
    "listeners": ("python", listeners),
    "endless_tasks": ("python", endless_tasks),
    "waiting_threads": ("threads", waiting_threads),
    "open_files": ("fds", open_files),
    "native": ("native", native),
    "loss_list": ("graph", loss_list),
    "loss_sum": ("graph", loss_sum),
    "kept_tensors": ("tensors", kept_tensors),
}


# Programs that do not.


def nothing(draw: random.Random) -> Callable[[], Any]:
    return lambda: None


def allocates_much(draw: random.Random) -> Callable[[], Any]:
    return lambda: json.dumps([{"number": n, "text": "x" * draw.randrange(50)} for n in range(500)])


def jitter(draw: random.Random) -> Callable[[], Any]:
    last: list[bytes] = [b""]
    most = draw.randrange(1000, 200_000)

    def call() -> None:
        last[0] = draw.randbytes(draw.randrange(most))

    return call


def full_window(draw: random.Random) -> Callable[[], Any]:
    length = draw.randrange(3, 60)
    window: deque[bytes] = deque([b""] * length, maxlen=length)
    return lambda: window.append(draw.randbytes(draw.randrange(3000)))


def evicting(draw: random.Random) -> Callable[[], Any]:
    entries: OrderedDict[int, bytes] = OrderedDict()
    most = draw.randrange(5, 150)

    def call() -> None:
        entries[draw.getrandbits(40)] = draw.randbytes(draw.randrange(2000))
        if len(entries) > most:
            entries.popitem(last=False)

    return call


def few_keys(draw: random.Random) -> Callable[[], Any]:
    known: dict[int, bytes] = {}
    keys = draw.randrange(5, 60)

    def call() -> None:
        known.setdefault(draw.randrange(keys), draw.randbytes(700))

    return call


def late_warm_up(draw: random.Random) -> Callable[[], Any]:
    pool: list[bytearray] = []
    calls, most, every = [0], draw.randrange(3, 12), draw.randrange(1, 8)

    def call() -> None:
        calls[0] += 1
        if len(pool) < most and calls[0] % every == 0:
            pool.append(bytearray(draw.randrange(100, 20_000)))

    return call


def saw_tooth(draw: random.Random) -> Callable[[], Any]:
    batch: list[bytes] = []
    period = draw.randrange(5, 70)

    def call() -> None:
        batch.append(draw.randbytes(800))
        if len(batch) >= period:
            batch.clear()

    return call


def temporary_native(draw: random.Random) -> Callable[[], Any]:
    def call() -> None:
        for each in [block(draw.randrange(50, 30_000)) for _ in range(20)]:
            libc.free(each)

    return call


def replaced_native(draw: random.Random) -> Callable[[], Any]:
    """Blocks of all sizes, always as many, replaced in random order: malloc's free rooms wander."""
    blocks = [block(draw.randrange(50, 30_000)) for _ in range(draw.randrange(20, 200))]

    def call() -> None:
        at = draw.randrange(len(blocks))
        libc.free(blocks[at])
        blocks[at] = block(draw.randrange(50, 30_000))

    return call


def arrays(draw: random.Random) -> Callable[[], Any]:
    size = draw.randrange(10, 200)
    return lambda: float(np.ones((size, size)).dot(np.ones(size)).sum())


def short_threads(draw: random.Random) -> Callable[[], Any]:
    def call() -> None:
        threads = [threading.Thread(target=nothing(draw)) for _ in range(draw.randrange(1, 4))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return call


def thread_pool(draw: random.Random) -> Callable[[], Any]:
    pool = ThreadPoolExecutor(draw.randrange(2, 12))
    return lambda: list(pool.map(str, range(draw.randrange(20))))


def awaits(draw: random.Random) -> Callable[[], Any]:
    async def call() -> None:
        await asyncio.gather(*(asyncio.sleep(0) for _ in range(draw.randrange(5))))

    return call


def training(draw: random.Random) -> Callable[[], Any]:
    model = _model(draw)
    optimizer = torch.optim.Adam(model.parameters())

    def call() -> None:
        loss = model(torch.randn(draw.randrange(1, 20), 8)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return call


def inference(draw: random.Random) -> Callable[[], Any]:
    model = _model(draw).eval()

    def call() -> None:
        with torch.inference_mode():
            model(torch.randn(draw.randrange(1, 50), 8)).tolist()

    return call


def filling(draw: random.Random) -> Callable[[], Any]:
    recent: deque[bytes] = deque(maxlen=draw.randrange(2000, 20_000))
    return lambda: recent.append(draw.randbytes(300))


def in_cycles(draw: random.Random) -> Callable[[], Any]:
    def call() -> None:
        part: dict[str, Any] = {"payload": draw.randbytes(draw.randrange(200, 3000))}
        part["whole"] = part

    return call


HARMLESS: dict[str, Make] = {
    make.__name__: make
    for make in (
        nothing, allocates_much, jitter, full_window, evicting, few_keys, late_warm_up, saw_tooth, temporary_native,
        replaced_native, arrays, short_threads, thread_pool, awaits, training, inference, filling, in_cycles,
    )
}  # fmt: skip


def trial(make: Make, seed: int, iterations: int) -> dict[str, Any]:
    """One search in a fork of this process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        begun = time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                report = find_leak(make(random.Random(seed)), iterations=iterations, time_limit_s=60)
                file.write_text(json.dumps({"verdict": report.verdict, "kind": report.kind, "reason": report.reason}))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"verdict": "crashed", "kind": None}
        return {**found, "seed": seed, "iterations": iterations, "seconds": round(time.monotonic() - begun, 2)}


def upper_bound(wrong: int, trials: int, confidence: float = 0.95) -> float:
    """The largest rate at which so few would still be wrong with a chance of 5 %."""
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        chance = sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(wrong + 1))
        low, high = (rate, high) if chance > 1 - confidence else (low, rate)
    return high


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--harmless-seeds", type=int, default=12)
    parser.add_argument("--iterations", default="40,100")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    lengths = [int(each) for each in options.iterations.split(",")]
    first = options.first_seed
    only = set(filter(None, options.only.split(",")))
    rows: list[dict[str, Any]] = []
    jobs = [(name, kind, make, options.seeds) for name, (kind, make) in LEAKS.items()]
    jobs += [(name, None, make, options.harmless_seeds) for name, make in HARMLESS.items()]
    for name, kind, make, seeds in jobs:
        if only and name not in only:
            continue
        trials = [trial(make, seed, lengths[seed % len(lengths)]) for seed in range(first, first + seeds)]
        verdicts = Counter(f"{each['verdict']}{f' ({found})' if (found := each['kind']) else ''}" for each in trials)
        rows.append({"program": name, "leaks": kind, "verdicts": dict(verdicts), "trials": trials})
        print(f"{name:18} {kind or '-':8} {dict(verdicts)}", file=sys.stderr)
    planted = [each for row in rows if row["leaks"] for each in row["trials"]]
    found = sum(each["kind"] == row["leaks"] for row in rows if row["leaks"] for each in row["trials"])
    harmless = [each for row in rows if not row["leaks"] for each in row["trials"]]
    alarms = sum(each["verdict"] == "leak" for each in harmless)
    summary = {
        "conditions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "iterations": lengths,
            "first_seed": first,
        },
        "leaks": {"trials": len(planted), "found_with_their_kind": found},
        "harmless": {
            "trials": len(harmless),
            "false_alarms": alarms,
            "upper_95": round(upper_bound(alarms, len(harmless)), 4) if harmless else None,
            "inconclusive": sum(each["verdict"] == "inconclusive" for each in harmless),
        },
        "programs": rows,
    }
    options.out.write_text(json.dumps(summary, indent=1))
    print(json.dumps({key: summary[key] for key in ("leaks", "harmless")}))


if __name__ == "__main__":
    main()
