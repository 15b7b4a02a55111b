"""What profiling costs: every mode of ours beside cProfile, py-spy, pyinstrument; the live sampler at 1,000 tasks.

    python benchmarks/profiled_overhead.py [--rounds 5] [--parts calls,lines,compute,waiting,live]
                                           [--modes plain,control,…] [--out benchmarks/results/profile-DATE.json]

pyinstrument is no dependency of this project: `pip install pyinstrument` beside it, or below a folder on PYTHONPATH;
what is not installed is left out and that is said. py-spy must be let into processes (root, or `ptrace_scope` 0).
Five rounds take about six minutes, `--rounds 1` is for trying.

Programs, each of a fixed amount of work and one thread: `calls`, where nearly everything is a small call, the worst
that a tracer can meet; `lines`, less of the same, for what follows lines; `compute`, products of matrices in C;
`waiting`, 1,000 tasks that mostly wait. All modes take turns in each round, in an order that is turned by one every
round; a ratio is to the plain run of the same round, then the median is taken. `control` is plain once more: what lies
within its spread is no difference.

A program takes the time of its own work, whose columns these are: time and processor time (the sampler's thread is in
it, py-spy's process is not) as a multiple of plain, and what was added to the processor time, as a share of a core.
Beside it stands all else that a command took above plain: start, report, py-spy, with --lines the first of two runs.

Bounds: 1.00 for who samples; cProfile for who counts calls; 1 % of a core for the live sampler, as it reports itself
and as windows with and without a look tell. Ours has no tracer without a sampler: tracing costs what the default does
above `--no-trace`. kernprof follows all functions of the script, ours the hottest.

The file is not named `profile.py`: cProfile, and with it torch, would import it as the module of that name.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from headrace import stats
from headrace.profiling.cpu.attach import find_py_spy
from headrace.profiling.live import look

TASKS = 1000
WINDOW_S = 5.0
BUDGET = 0.01
SETTLE_S = 0.5
MISSING = "not installed"

# The end of each program: how it is looked at from inside, if it is, and what its work took without that.
MEASURED = """
def measured():
    import contextlib, json, os, sys, threading, time

    inside = contextlib.ExitStack()
    look_s = []
    if os.environ.get("BENCH_GO"):
        print("ready", flush=True)
        sys.stdin.readline()
    if os.environ.get("BENCH_INSIDE") == "block":
        import headrace as hr

        inside.enter_context(hr.profiling(top_n=-1))
    if os.environ.get("BENCH_INSIDE") == "live":
        from headrace.profiling.live import look

        end = threading.Event()
        looking = threading.Thread(target=lambda: look_s.append(look(60.0, end).sampling_cpu_s))
        looking.start()
        inside.callback(looking.join)
        inside.callback(end.set)
    with inside:
        began, cpu = time.perf_counter(), time.process_time()
        answer = work()
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    with open(os.environ["BENCH_OUT"], "a") as file:
        row = {"wall_s": wall_s, "cpu_s": cpu_s, "answer": answer}
        file.write(json.dumps(row | {"sampling_cpu_s": sum(look_s)}) + "\\n")


if __name__ == "__main__":
    measured()
"""

CALLS = """
def is_word(part):
    return len(part) > 2 and part.isalpha()


def weigh(word, known):
    key = word.strip(",.;").lower()
    known[key] = known.get(key, 0) + 1
    return sum(key.encode()) * 31 % 1021 + known[key]


def read(text):
    known, total = {}, 0
    for part in text.split(" "):
        if is_word(part):
            total += weigh(part, known)
    return total


def work():
    text = "the quick, brown fox jumps over the lazy dog; " * 100
    return sum(read(text) for _ in range(REPEATS))
"""

COMPUTE = """
import numpy


def multiply(left, right):
    return left @ right


def work():
    random = numpy.random.default_rng(7)
    left = random.standard_normal((600, 600), dtype=numpy.float32)
    right = left / 100
    for _ in range(250):
        left = numpy.clip(multiply(left, right), -1, 1)
    return round(float(numpy.abs(left).mean()), 3)
"""

WAITING = """
import asyncio
import random


async def call(seconds):
    await asyncio.sleep(seconds)
    return 1


async def step(seconds):
    return await call(seconds)


async def task(pauses):
    return sum([await step(seconds) for seconds in pauses])


async def all_tasks():
    draw = random.Random(7)
    plans = [[draw.uniform(0.2, 0.5) for _ in range(3)] for _ in range(1000)]
    return sum(await asyncio.gather(*(task(plan) for plan in plans)))


def work():
    return asyncio.run(all_tasks())
"""

PROGRAMS = {
    "calls": "REPEATS = 1500" + CALLS,
    "lines": "REPEATS = 500" + CALLS,
    "compute": COMPUTE,
    "waiting": WAITING,
}

Row = dict[str, float]
Argv = Callable[[str, Path], list[str]]


def headrace(*options: str) -> Argv:
    return lambda script, _: [sys.executable, "-m", "headrace", "profile", *options, script]


PID = "headrace --pid"
# Lines are followed many times slower than anything else, by ours in a second run: a program with less work.
LINES, KERNPROF = "headrace --lines auto", "kernprof -l"
OF_LINES, BOTH = (LINES, KERNPROF), ("plain", "control")

# Mode → what runs a script; the folder is for what it writes.
MODES: dict[str, Argv] = {
    "plain": lambda script, _: [sys.executable, script],
    "control": lambda script, _: [sys.executable, script],
    "headrace": headrace(),
    "headrace --no-trace": headrace("--no-trace"),
    LINES: headrace("--lines", "auto"),
    PID: lambda script, _: [sys.executable, script],
    "hr.profiling": lambda script, _: [sys.executable, script],
    "live": lambda script, _: [sys.executable, script],
    "cProfile": lambda script, folder: [sys.executable, "-m", "cProfile", "-o", str(folder / "profile"), script],
    "py-spy": lambda script, folder: [
        *(find_py_spy(), "record", "--format", "raw", "--output", str(folder / "profile"), "--"),
        *(sys.executable, script),
    ],
    "pyinstrument": lambda script, folder: [
        *(sys.executable, "-m", "pyinstrument", "-o", str(folder / "profile")),
        script,
    ],
    KERNPROF: lambda script, folder: [
        *(sys.executable, "-m", "kernprof", "-l", "-p", script, "-o", str(folder / "profile")),
        script,
    ],
}
# Package that a mode needs.
NEEDED = {"pyinstrument": "pyinstrument", "py-spy": "py-spy", PID: "py-spy", KERNPROF: "line-profiler"}
INSIDE = {"hr.profiling": "block", "live": "live"}


def run(mode: str, script: str, folder: Path) -> tuple[Row, object]:
    """One run: what its work took, what it took all in all, and its answer."""
    out = folder / "out"
    out.unlink(missing_ok=True)
    (folder / "profile").unlink(missing_ok=True)
    environment = os.environ | {"BENCH_OUT": str(out), "BENCH_INSIDE": INSIDE.get(mode, "")}
    attached = mode == PID
    if attached:
        environment["BENCH_GO"] = "1"
    began = time.perf_counter()
    process = subprocess.Popen(
        MODES[mode](script, folder),
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE if attached else subprocess.DEVNULL,
        stdout=subprocess.PIPE if attached else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    look_cpu_s = attach(process) if attached else 0.0
    assert process.stderr
    told = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    whole_s = time.perf_counter() - began - (SETTLE_S if attached else 0.0)
    if process.returncode or not out.exists():
        sys.exit(f"{mode}, {Path(script).name}: status {process.returncode}\n{told}")
    if mode in ("cProfile", "py-spy", "pyinstrument", KERNPROF):
        assert (folder / "profile").stat().st_size, mode
    # Of two runs, as with --lines, the last is the one that followed lines.
    row = json.loads(out.read_text().splitlines()[-1])
    answer = row.pop("answer")
    return row | {"whole_s": whole_s, "whole_cpu_s": used.ru_utime + used.ru_stime + look_cpu_s}, answer


def attach(process: subprocess.Popen[str]) -> float:
    """Look at a program from outside from before its work begins until it ends; processor time of who looks."""
    assert process.stdin
    assert process.stdout
    process.stdout.readline()
    argv = [sys.executable, "-m", "headrace", "profile", "--pid", str(process.pid), "--seconds", "60"]
    looking = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.perf_counter() + 20
    while len(psutil.Process(looking.pid).children()) < 2:
        if looking.poll() is not None or time.perf_counter() > until:
            process.kill()
            sys.exit(f"headrace --pid: {looking.communicate()[1] if looking.poll() is not None else 'no py-spy came'}")
        time.sleep(0.02)
    time.sleep(SETTLE_S)  # py-spy reads the program's memory map first
    process.stdin.write("\n")
    process.stdin.close()
    assert looking.stderr
    told = looking.stderr.read()
    _, status, used = os.wait4(looking.pid, 0)
    looking.returncode = os.waitstatus_to_exitcode(status)
    if looking.returncode:
        sys.exit(f"headrace --pid: {told}")
    return used.ru_utime + used.ru_stime


def programs(names: list[str], modes: list[str], rounds: int, folder: Path) -> dict[str, dict[str, list[Row]]]:
    """Rows by program and mode."""
    found: dict[str, dict[str, list[Row]]] = {}
    scripts = {}
    for name in names:
        scripts[name] = folder / f"{name}.py"
        scripts[name].write_text(PROGRAMS[name] + "\n" + MEASURED)
        found[name] = {mode: [] for mode in modes if mode in BOTH or (mode in OF_LINES) == (name == "lines")}
        run("plain", str(scripts[name]), folder)  # files into memory
    for number in range(rounds):
        for name in names:
            order = list(found[name])
            order = order[number % len(order) :] + order[: number % len(order)]
            answers = set()
            for mode in order:
                row, answer = run(mode, str(scripts[name]), folder)
                found[name][mode].append(row)
                answers.add(answer)
                print(f"  {number + 1}/{rounds} {name}, {mode}: {row['wall_s']:.2f} s", file=sys.stderr)
            assert len(answers) == 1, (name, answers)
    return found


def summary(rows: dict[str, list[Row]]) -> dict[str, Row]:
    """By mode: its cost beside the plain run of the same round, medians; the ratios' spread."""
    found = {}
    for mode, own in rows.items():
        pairs = list(zip(own, rows["plain"], strict=True))
        ratios = [row["wall_s"] / plain["wall_s"] for row, plain in pairs]
        cpu = [row["cpu_s"] / plain["cpu_s"] for row, plain in pairs]
        found[mode] = {
            "wall_ratio": stats.median(ratios),
            "wall_ratio_least": min(ratios),
            "wall_ratio_most": max(ratios),
            "cpu_ratio": stats.median(cpu),
            "cpu_ratio_least": min(cpu),
            "cpu_ratio_most": max(cpu),
            "share_of_core": stats.median([(row["cpu_s"] - plain["cpu_s"]) / row["wall_s"] for row, plain in pairs]),
            "beside_s": stats.median([_beside(row, "") - _beside(plain, "") for row, plain in pairs]),
            "beside_cpu_s": stats.median([_beside(row, "cpu_") - _beside(plain, "cpu_") for row, plain in pairs]),
        }
    return found


def _beside(row: Row, kind: str) -> float:
    return row[f"whole_{kind}s"] - row["cpu_s" if kind else "wall_s"]


def show(name: str, rows: dict[str, list[Row]], found: dict[str, Row]) -> None:
    plain = [stats.median([row[key] for row in rows["plain"]]) for key in ("wall_s", "cpu_s")]
    print(f"\n{name}: plain {plain[0]:.2f} s, {plain[1]:.2f} s of processor time")
    print(f"{'':24}{'time x':>8} {'(least, most)':>14} {'CPU x':>8} {'(least, most)':>14} {'% of a core':>12}", end="")
    print(f" {'+ beside, s':>12} {'its CPU, s':>11}")
    for mode, row in found.items():
        print(f"{mode:24}", end="")
        for key in ("wall_ratio", "cpu_ratio"):
            spread = f"({row[key + '_least']:.2f}, {row[key + '_most']:.2f})"
            print(f"{row[key]:8.2f} {spread:>14} ", end="")
        print(f"{row['share_of_core'] * 100:12.1f} {row['beside_s']:12.2f} {row['beside_cpu_s']:11.2f}")


def live(rounds: int) -> dict[str, Any]:
    """1,000 tasks that wait, in this process: windows with a look and without in turns."""
    return asyncio.run(_live(rounds))


async def _live(rounds: int) -> dict[str, Any]:
    async def call(seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def step(seconds: float) -> None:
        await call(seconds)

    async def task(draw: random.Random) -> None:
        while True:
            await step(draw.uniform(0, 5))

    draw = random.Random(7)
    tasks = [asyncio.create_task(task(draw)) for _ in range(TASKS)]
    await asyncio.sleep(2.0)
    windows = []
    for number in range(rounds * 2):
        # A B, B A, …: nothing that only rises with time is on the account of one of the two.
        with_look = number % 4 in (1, 2)
        windows.append((with_look, *await _window(with_look)))
        print(f"  live, {'with' if with_look else 'without'} a look: {windows[-1][1] * 100:.2f} %", file=sys.stderr)
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    measured, reported, looks = [], [], []
    for number in range(0, len(windows), 2):
        (_, without, _, _), (_, share, said, rate) = sorted(windows[number : number + 2])
        measured.append(share - without)
        reported.append(said)
        looks.append(rate)
    return {
        "tasks": TASKS,
        "window_s": WINDOW_S,
        "bound": BUDGET,
        "without": [share for with_look, share, _, _ in windows if not with_look],
        "with": [share for with_look, share, _, _ in windows if with_look],
        "reported": reported,
        "measured": measured,
        "looks_per_s": looks,
    }


async def _window(with_look: bool) -> tuple[float, float, float]:
    """Share of a core that the process took; what the sampler says that it took itself; its looks per second."""
    end = threading.Event()
    began, cpu = time.perf_counter(), time.process_time()
    if with_look:
        record = await asyncio.to_thread(look, WINDOW_S, end)
        said, rate = record.sampling_cpu_s / record.wall_s, record.rate_hz
    else:
        await asyncio.to_thread(end.wait, WINDOW_S)
        said = rate = 0.0
    return (time.process_time() - cpu) / (time.perf_counter() - began), said, rate


def show_live(found: dict[str, Any]) -> None:
    middle = {key: stats.median(found[key]) * 100 for key in ("without", "with", "reported", "measured")}
    print(f"\nlive sampler, {found['tasks']} tasks, windows of {found['window_s']:g} s, % of one core")
    print(f"process without {middle['without']:.2f}, with {middle['with']:.2f}; ", end="")
    print(f"{stats.median(found['looks_per_s']):.1f} looks a second")
    for key, words in (("reported", "what it reports"), ("measured", "with less without")):
        values = [value * 100 for value in found[key]]
        print(f"{words:20}{middle[key]:8.2f} ({min(values):.2f}, {max(values):.2f})   bound {found['bound'] * 100:g}")


def conditions(rounds: int) -> dict[str, Any]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    packages = ("headrace", "numpy", "py-spy", "pyinstrument", "line-profiler")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu.split(": ")[1],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "threads": 1,
        "rounds": rounds,
        "load": os.getloadavg()[0],
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", default=",".join([*PROGRAMS, "live"]))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    modes, parts = options.modes.split(","), options.parts.split(",")
    if unknown := [*(set(modes) - set(MODES)), *(set(parts) - {*PROGRAMS, "live"})]:
        parser.error(f"there is no {', '.join(unknown)}")
    for mode in [mode for mode in modes if mode in NEEDED and _version(NEEDED[mode]) == MISSING]:
        modes.remove(mode)
        print(f"{mode} is left out: pip install {NEEDED[mode]}", file=sys.stderr)
    modes = ["plain", *(mode for mode in modes if mode != "plain")]
    result: dict[str, Any] = {"conditions": conditions(options.rounds)}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        rows = programs([name for name in PROGRAMS if name in parts], modes, options.rounds, Path(directory))
    result["medians"] = {name: summary(each) for name, each in rows.items()}
    if "live" in parts:
        result["live"] = live(options.rounds)
    result["conditions"]["seconds"] = round(time.perf_counter() - began)
    for name, each in rows.items():
        show(name, each, result["medians"][name])
    if "live" in parts:
        show_live(result["live"])
    print("\nconditions: " + ", ".join(f"{key} {value}" for key, value in result["conditions"].items()))
    if options.out:
        options.out.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
