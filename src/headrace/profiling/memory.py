"""Where memory goes: what a block of code keeps by line, what the process has now, every allocation of a program.

    with memory_diff() as diff:
        load()
    print(diff)

Python's own allocations only have lines: what C libraries, torch among them, take for themselves is seen as a change of
the whole process. Whether something leaks is asked of `headrace.profiling.leak`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import linecache
import os
import signal
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from headrace.errors import ConfigError, RunnerError, Unavailable
from headrace.profiling.leaking.counts import resident_bytes
from headrace.profiling.leaking.lines import is_users

_OWN_FILES = (str(Path(__file__).parents[1]) + os.sep, tracemalloc.__file__)
_MORE_FRAMES = 8


class DeviceMemory(msgspec.Struct, frozen=True):
    """Of one GPU, by this process.

    Args:
        device: as torch writes it, ``cuda:0``.
        allocated_bytes: that tensors have; ``reserved_bytes``: that torch has from the driver.
    """

    device: str
    allocated_bytes: int
    reserved_bytes: int


class MemoryUsage(msgspec.Struct, frozen=True):
    """What this process has now.

    Args:
        rss_bytes: resident memory; ``anonymous_bytes``: the part that is no file's, which pages of libraries do not
            move.
        devices: GPUs that torch is using; empty where it is not imported, or has not touched one.
    """

    rss_bytes: int
    anonymous_bytes: int
    devices: list[DeviceMemory] = []


class Growth(msgspec.Struct, frozen=True):
    """A line, and what was allocated there that is still alive.

    Args:
        bytes, objects: more than before the block.
    """

    file: str
    line: int
    bytes: int
    objects: int
    source: str = ""


def memory_usage() -> MemoryUsage:
    """Resident memory of this process, and of its GPUs what torch has; torch is not imported for that."""
    return MemoryUsage(_rss_bytes(), resident_bytes(), _devices())


def _rss_bytes() -> int:
    try:  # psutil would leave a line of its own in the table of what has grown
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return int(psutil.Process().memory_info().rss)


def _devices() -> list[DeviceMemory]:
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return []
    return [
        DeviceMemory(f"cuda:{number}", torch.cuda.memory_allocated(number), torch.cuda.memory_reserved(number))
        for number in range(torch.cuda.device_count())
    ]


def memory_diff(top: int = 10, *, frames: int = 1) -> MemoryDiff:
    """See what a block of code leaves in Python's memory, by the line that allocated it; to be used with ``with``.

    Garbage is collected before and after, so that it is not counted. Blocks may be nested, also in several threads;
    what other threads allocate meanwhile is counted too.

    Tracing makes allocating slower: a program that does little else by four times, with 8 frames by twelve times; each
    living object costs about 45 bytes meanwhile, and the comparison at the end about four microseconds.

    Args:
        top: the most lines.
        frames: of the stack of each allocation. With 1 a line may be a library's; with more it is the innermost of the
            user's own among so many. Where the program traces already, it has decided.

    Raises:
        ConfigError: ``top`` or ``frames`` is less than one.
    """
    if top < 1 or frames < 1:
        raise ConfigError("there is nothing to show", field="top" if top < 1 else "frames", hint="at least 1")
    return MemoryDiff(top, frames)


class _Tracing:
    """tracemalloc, on for as long as somebody here needs it, and left on where the program has it on itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._ours = False

    def begin(self, frames: int) -> None:
        with self._lock:
            if not tracemalloc.is_tracing():
                tracemalloc.start(frames)
                self._ours = True
            self._users += 1

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._ours:
                self._ours = False
                tracemalloc.stop()


_TRACING = _Tracing()


class MemoryDiff:
    """What a block of code left in Python's memory; made by `memory_diff`.

    Attributes:
        lines: those that have grown most; complete once the block has ended, also by an exception.
        grown_bytes: of Python's memory in all: less than the lines together where others have shrunk.
        before, after: of the whole process.
        traced: false if the block itself has stopped the tracing, so that nothing is known.
        tracing_bytes: that tracing itself had taken.
    """

    def __init__(self, top: int, frames: int) -> None:
        self.lines: list[Growth] = []
        self.grown_bytes = self.tracing_bytes = 0
        self.traced = True
        self._top, self._frames = top, frames

    def __enter__(self) -> MemoryDiff:
        _TRACING.begin(self._frames)
        gc.collect()
        self.before = self.after = memory_usage()
        self._snapshot = tracemalloc.take_snapshot()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            gc.collect()
            self.after = memory_usage()
            self.traced = tracemalloc.is_tracing()
            if self.traced:
                self.tracing_bytes = tracemalloc.get_tracemalloc_memory()
                self._compare(tracemalloc.take_snapshot())
        finally:
            del self._snapshot
            _TRACING.end()

    def _compare(self, after: tracemalloc.Snapshot) -> None:
        many = tracemalloc.get_traceback_limit() > 1
        found: dict[tuple[str, int], list[int]] = {}
        for each in after.compare_to(self._snapshot, "traceback" if many else "lineno"):
            place = _place([(frame.filename, frame.lineno) for frame in each.traceback])
            if place is not None:
                sums = found.setdefault(place, [0, 0])
                sums[0] += each.size_diff
                sums[1] += each.count_diff
        self.grown_bytes = sum(grown for grown, _ in found.values())
        ordered = sorted(found.items(), key=lambda item: -item[1][0])[: self._top]
        self.lines = [
            Growth(file, line, grown, objects, linecache.getline(file, line).strip())
            for (file, line), (grown, objects) in ordered
            if grown > 0
        ]

    def __str__(self) -> str:
        if not self.traced:
            return "Tracing was stopped within the block: nothing is known."
        head = [f"Python's memory grew by {_size(self.grown_bytes)}; {_of_process(self.before, self.after)}"]
        rows = [
            f"{_size(each.bytes):>12} {each.objects:>+9} objects  {each.file}:{each.line}  {each.source}".rstrip()
            for each in self.lines
        ]
        foot = [f"(tracing itself took {_size(self.tracing_bytes).lstrip('+')})"]
        if self._frames == 1 and any(not is_users(each.file) for each in self.lines):
            foot.append(f"(memory_diff(frames={_MORE_FRAMES}) names the line of yours that called a library's)")
        return "\n".join([*head, *rows, *foot])


def _place(frames: list[tuple[str, int]]) -> tuple[str, int] | None:
    """The innermost of the user's, else the innermost, of frames that begin with the oldest; ``None`` for our own.

    Any of several frames may be this file's: what `memory_usage` keeps is allocated by Python's own library.
    """
    if not frames or frames[-1][0].startswith(_OWN_FILES) or any(file == __file__ for file, _ in frames):
        return None
    if len(frames) == 1:
        return frames[0]
    return next((place for place in reversed(frames) if is_users(place[0])), frames[-1])


def _of_process(before: MemoryUsage, after: MemoryUsage) -> str:
    parts = [f"anonymous memory of the process {_size(after.anonymous_bytes - before.anonymous_bytes)}"]
    had = {each.device: each.allocated_bytes for each in before.devices}
    parts += [f"{each.device} {_size(each.allocated_bytes - had.get(each.device, 0))}" for each in after.devices]
    return ", ".join(parts)


def _size(amount: float) -> str:
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:+.0f} B" if unit == "B" else f"{amount:+.1f} {unit}"


class AllocationFlame(msgspec.Struct, frozen=True):
    """A flame graph of every allocation of a program.

    Args:
        path: the HTML file.
        exit_status: the program's own; negative for a signal.
        peak_bytes: the most it had at once; ``allocations``: how many it made.
    """

    path: Path
    exit_status: int
    peak_bytes: int
    allocations: int


def allocation_flame(
    command: Sequence[str], out: Path, *, native: bool = False, time_limit_s: float | None = None
) -> AllocationFlame:
    """Run a Python program under memray, and draw what it had at the moment it had most.

    It runs about twice as long as it would. Its input and output are this process's.

    Args:
        command: what follows ``python``: a script and its arguments, or ``-m module …``, or ``-c code``.
        out: HTML file, written over.
        native: also the frames of C and C++.
        time_limit_s: seconds after which it is ended, with what it has started [default: never].

    Raises:
        Unavailable: memray is not installed.
        ConfigError: there is no command, or no folder for the file.
        RunnerError: the time is over, or the program left nothing to draw.
    """
    if importlib.util.find_spec("memray") is None:
        raise Unavailable("a flame graph of allocations needs memray", hint="pip install 'headrace[profile]'")
    if not command:
        raise ConfigError("there is nothing to run", field="command")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}", field="out")
    with tempfile.TemporaryDirectory(prefix="headrace-memory-") as folder:
        raw = Path(folder) / "allocations.bin"
        options = ["--native"] if native else []
        status = _run([*_memray("run"), "--quiet", "--output", str(raw), *options, *command], time_limit_s)
        drawn = subprocess.run(
            [*_memray("flamegraph"), "--force", "--output", str(out), str(raw)], capture_output=True, text=True
        )
        if drawn.returncode != 0:
            reason = (drawn.stderr or drawn.stdout).strip().splitlines()[-1:] or ["no reason given"]
            raise RunnerError(f"the program ended with {status} and left nothing to draw: {reason[0]}")
        from memray import FileReader

        found = FileReader(str(raw)).metadata
    return AllocationFlame(out, status, found.peak_memory, found.total_allocations)


def _memray(verb: str) -> list[str]:
    return [sys.executable, "-m", "memray", verb]


def _run(command: list[str], time_limit_s: float | None) -> int:
    """Its exit status. Nothing of it is left, however this ends."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(time_limit_s)
    except subprocess.TimeoutExpired:
        raise RunnerError(f"the program had not ended after {time_limit_s:g} s", hint="a longer time limit") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
