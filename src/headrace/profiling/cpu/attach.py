"""Another process, looked at from outside while it goes on: by py-spy, which needs nothing of it but to be let in.

It sees the threads of any Python process, also of one whose interpreter is stuck; it does not see which task awaits
what. Two recordings run side by side, one of threads that run and a rarer one of all: what is in the second only waits.
"""

from __future__ import annotations

import ast
import linecache
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from headrace import clock
from headrace.errors import ConfigError, RunnerError, Unavailable
from headrace.profiling import ledger
from headrace.profiling.cpu import waits
from headrace.profiling.cpu.places import kind_of
from headrace.profiling.record import Frame, Record, Stack

_HZ = 100
_IDLE_HZ = 20
_GRACE_S = 20.0
_FRAME = re.compile(r"(?P<function>.*) \((?P<file>.*?)(?::(?P<line>\d+))?\)$")
_THREAD = re.compile(r"thread \((?P<number>\w+)\)(?:: (?P<name>.*))?$")
_NO_AWAITS = "seen from outside by py-spy: of tasks it is not known what they await, and calls are not counted"
_CAPABILITY_PTRACE = 1 << 19

# Owner and frames (function, file, line), the outermost first.
_Way = tuple[str, tuple[tuple[str, str, int], ...]]


def attach(pid: int, seconds: float) -> Record:
    """Look at a process for a while.

    Args:
        seconds: how long.

    Raises:
        ConfigError: there is no such process, or it runs no Python.
        Unavailable: py-spy is missing, or the system does not let it in; the hint says what to do.
        RunnerError: the process ended meanwhile, or py-spy failed for another reason.
    """
    if not seconds > 0:
        raise ConfigError("no time is left to look", field="seconds")
    program = find_py_spy()
    try:
        process = psutil.Process(pid)
        before = process.cpu_times()
        command = process.cmdline()
        directory = ""
        with suppress(psutil.Error):
            directory = process.cwd()
    except psutil.NoSuchProcess:
        raise ConfigError(f"there is no process {pid}", field="pid") from None
    except psutil.AccessDenied:
        raise _refused(pid) from None
    started, began = clock.wall(), clock.perf_counter()
    with tempfile.TemporaryDirectory(prefix="headrace-attach-") as folder:
        running, all_ = _record(program, pid, seconds, Path(folder))
    wall_s = min(clock.perf_counter() - began, seconds)
    after = before
    with suppress(psutil.Error):
        after = process.cpu_times()
    return _Reader(directory).record(
        running,
        all_,
        Record(
            command=" ".join(command),
            directory=directory,
            started=started,
            pid=pid,
            machine=ledger.machine(),
            attached=True,
            wall_s=wall_s,
            cpu_s=after.user + after.system - before.user - before.system,
            children_cpu_s=0.0,
            rate_hz=float(_HZ),
            notes=[_NO_AWAITS],
        ),
    )


def find_py_spy() -> str:
    """Its path: of this environment, or of the system. Raises `Unavailable`."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise Unavailable("looking into another process needs py-spy", field="pid", hint="pip install py-spy")
    return found


def _record(program: str, pid: int, seconds: float, folder: Path) -> tuple[dict[_Way, float], dict[_Way, float]]:
    """Seconds of running stacks, and of all of them."""
    base = [program, "record", "--pid", str(pid), "--format", "raw", "--threads", "--full-filenames"]
    # Without stopping it: two that stop it by turns take its threads for running ones, and it is somebody's server.
    base += ["--duration", str(max(1, round(seconds))), "--nonblocking"]
    wanted = [("running", ["--rate", str(_HZ)]), ("all", ["--rate", str(_IDLE_HZ), "--idle"])]
    started = [
        subprocess.Popen(
            [*base, *more, "--output", str(folder / name)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is told to it below, once
        )
        for name, more in wanted
    ]
    told = [_end_of(process, seconds + _GRACE_S) for process in started]
    if any(process.returncode for process in started):
        raise _failure(pid, next(text for text, process in zip(told, started, strict=True) if process.returncode))
    paths = [folder / name for name, _ in wanted]
    return _read(paths[0], _HZ), _read(paths[1], _IDLE_HZ)


def _end_of(process: subprocess.Popen[bytes], limit_s: float) -> str:
    try:
        return process.communicate(timeout=limit_s)[1].decode(errors="replace")
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # it writes what it has
        return process.communicate(timeout=_GRACE_S)[1].decode(errors="replace")
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[1].decode(errors="replace")


def _failure(pid: int, told: str) -> Exception:
    """What py-spy's words mean here."""
    if not psutil.pid_exists(pid):
        return RunnerError(f"process {pid} has ended", hint="look again at one that runs")
    if re.search(r"permission denied|operation not permitted|os error (1|13)\b", told, re.IGNORECASE):
        return _refused(pid)
    lines = [line for line in told.splitlines() if line.startswith("Error:")]
    text = lines[0].removeprefix("Error:").strip() if lines else told.strip().splitlines()[-1:] or "it said nothing"
    if "python version" in told.lower() or "python interpreter" in told.lower():
        return ConfigError(
            f"process {pid} seems to run no Python that py-spy knows: {text}",
            field="pid",
            hint="a newer py-spy knows newer Pythons: pip install -U py-spy",
        )
    return RunnerError(f"py-spy cannot look into process {pid}: {text}")


def _refused(pid: int) -> Unavailable:
    """Why this process may not look into another one, and what to do about it."""
    command = f"headrace profile --pid {pid}"
    as_root = f'sudo env "PATH=$PATH" {command}'
    if os.geteuid() == 0 and not _may_trace():
        hint = (
            "this container may not trace processes: start it with `docker run --cap-add SYS_PTRACE`, in Kubernetes "
            "with `securityContext: {capabilities: {add: [SYS_PTRACE]}}`"
        )
    elif _owner_of(pid) != os.geteuid():
        hint = f"it is another user's: {as_root}"
    elif _yama() not in ("", "0"):
        hint = (
            f"the kernel lets only parents look into processes (kernel.yama.ptrace_scope is {_yama()}): {as_root}, "
            "or once `sudo sysctl kernel.yama.ptrace_scope=0`"
        )
    else:
        hint = f"{as_root}; in a container, start it with `docker run --cap-add SYS_PTRACE`"
    return Unavailable(f"the system does not let this process look into process {pid}", field="pid", hint=hint)


def _may_trace() -> bool:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) & _CAPABILITY_PTRACE)
    return True


def _owner_of(pid: int) -> int:
    with suppress(OSError):
        return Path(f"/proc/{pid}").stat().st_uid
    return os.geteuid()


def _yama() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip()
    return ""


def _read(path: Path, hz: int) -> dict[_Way, float]:
    """Collapsed stacks with their seconds."""
    found: dict[_Way, float] = defaultdict(float)
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        way, _, count = line.rpartition(" ")
        thread, *frames = way.split(";")
        match = _THREAD.match(thread)
        owner = (match["name"] or f"thread {match['number']}") if match else thread
        steps = [match for each in frames if (match := _FRAME.match(each))]
        key = (owner, tuple((each["function"], each["file"], int(each["line"] or 0)) for each in steps))
        found[key] += int(count) / hz
    return found


class _Reader:
    """Makes frames of what py-spy names: it knows the line that runs, the source knows where its function begins."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._frames: dict[Frame, int] = {}
        self._functions: dict[str, list[tuple[int, int]]] = {}

    def record(self, running: dict[_Way, float], all_: dict[_Way, float], record: Record) -> Record:
        cpu = [self._stack(way, seconds, _HZ, "") for way, seconds in running.items()]
        waiting = []
        for way, seconds in all_.items():
            left = seconds - running.get(way, 0.0)
            reason = self._reason(way)
            if left > 1 / _IDLE_HZ and reason != "idle":
                waiting.append(self._stack(way, left, _IDLE_HZ, "socket" if reason == "loop" else reason))
        return msgspec.structs.replace(
            record,
            frames=list(self._frames),
            cpu=sorted(cpu, key=lambda stack: -stack.seconds),
            waiting=sorted(waiting, key=lambda stack: -stack.seconds),
        )

    def _stack(self, way: _Way, seconds: float, hz: int, reason: str) -> Stack:
        owner, steps = way
        frames = [self._number(*step) for step in steps]
        return Stack(frames, [line for _, _, line in steps], seconds, max(1, round(seconds * hz)), owner, reason)

    def _number(self, function: str, file: str, line: int) -> int:
        frame = Frame(function, file, self._begin(file, line), kind_of(file))
        return self._frames.setdefault(frame, len(self._frames))

    def _begin(self, file: str, line: int) -> int:
        """First line of the innermost function around a line; 0 if its source is not there."""
        if file not in self._functions:
            self._functions[file] = _functions_of(Path(self._directory) / file)
        around = [(first, last) for first, last in self._functions[file] if first <= line <= last]
        return max(around, default=(1 if self._functions[file] else 0, 0))[0]

    def _reason(self, way: _Way) -> str:
        """What a thread waits for, by the names of what its innermost line calls."""
        _, steps = way
        outwards = [
            (waits.told_by(file, function) if kind_of(file) == "library" else "", kind_of(file) == "library")
            for function, file, _ in reversed(steps)
        ]
        called = ""
        if steps:
            _, file, line = steps[-1]
            names = re.findall(r"(\w+)\s*\(", linecache.getline(str(Path(self._directory) / file), line))
            called = next((name for name in reversed(names) if waits.reason(name, ())), "")
        return waits.reason(called, outwards)


def _functions_of(path: Path) -> list[tuple[int, int]]:
    """First and last lines of all functions of a file, as far as it can be read; a file without any has one line."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found = [(1, 0)]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            found.append((first, node.end_lineno or node.lineno))
    return found
