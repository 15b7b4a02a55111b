"""Two commands measured in turns, A B A B, each in a process of its own and without a profiler.

A machine that others use changes its speed from second to second; two neighbours in time see nearly the same. So each
pair is a comparison of its own.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from headrace.clock import monotonic, perf_counter
from headrace.errors import ConfigError, LoadError
from headrace.profiling.record import Record

_SHOWN = 500
# Wall seconds and CPU seconds, a pair (before, after) for each turn.
Pairs = tuple[list[tuple[float, float]], list[tuple[float, float]]]


class Command(msgspec.Struct, frozen=True):
    """A program as it is started again; ``status`` is how it ended when it was profiled, if that is known."""

    arguments: list[str]
    directory: str
    status: int | None


def command_of(record: Record, name: str) -> Command:
    """What a record says of its program.

    Args:
        name: of the record, for errors.

    Raises:
        ConfigError: it keeps no command, or its directory is gone.
    """
    if not record.arguments:
        raise ConfigError(
            f"{name} keeps no command that could be run again", field="rerun", hint="compare without --rerun"
        )
    directory = record.directory or os.getcwd()
    if not Path(directory).is_dir():
        raise ConfigError(f"the directory of {name} is gone: {directory}", field="rerun")
    first = record.arguments[0]
    python = [sys.executable] if first in ("-m", "-c") or _is_script(Path(directory, first)) else []
    return Command([*python, *record.arguments], directory, record.exit_status)


def _is_script(path: Path) -> bool:
    """Whether a file is one for Python: called ``*.py``, or a text that begins with no other program's name."""
    if path.suffix in (".py", ".pyw"):
        return True
    try:
        with path.open("rb") as file:
            first = file.readline(256)
    except OSError:
        return False
    return b"python" in first if first.startswith(b"#!") else b"\0" not in first


def measure(
    before: Command,
    after: Command,
    pairs: int,
    *,
    time_limit_s: float = 600.0,
    tell: Callable[[str], None] = lambda _: None,
) -> Pairs:
    """Run both once to warm up, then in turns.

    Args:
        pairs: how many; fewer are measured if the time does not suffice for more.
        time_limit_s: for all of it.
        tell: is told of each pair.

    Raises:
        ConfigError: the time limit did not suffice for a single pair.
        LoadError: a command cannot be started, or does not end as it did when it was profiled.
    """
    until = monotonic() + time_limit_s
    walls: list[tuple[float, float]] = []
    cpus: list[tuple[float, float]] = []
    try:
        for command in (before, after):
            _run(command, until)
        for number in range(pairs):
            (wall_before, cpu_before), (wall_after, cpu_after) = _run(before, until), _run(after, until)
            walls.append((wall_before, wall_after))
            cpus.append((cpu_before, cpu_after))
            tell(f"pair {number + 1} of {pairs}: {wall_before:.3f} s, {wall_after:.3f} s")
    except TimeoutError:
        if not walls:
            raise ConfigError(
                f"no pair of runs within {time_limit_s:g} s", field="time_limit", hint="raise --time-limit"
            ) from None
        tell(f"time is over after {len(walls)} of {pairs} pairs")
    return walls, cpus


def _run(command: Command, until: float) -> tuple[float, float]:
    """Wall and CPU seconds of one run, with all processes that it waited for. Raises `TimeoutError`."""
    with tempfile.TemporaryFile() as errors:
        started, used = perf_counter(), _children_s()
        process = _start(command, errors)
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(process)

        # Not wait(timeout), which looks every 50 ms whether the process has ended: too coarse a clock.
        timer = threading.Timer(max(0.0, until - monotonic()), end)
        timer.start()
        try:
            status = process.wait()
        finally:
            timer.cancel()
            if process.returncode is None:  # interrupted from the keyboard
                _kill(process)
                process.wait()
        wall_s, cpu_s = perf_counter() - started, _children_s() - used
        if late.is_set():
            raise TimeoutError
        if status != (command.status or 0):
            errors.seek(0)
            told = errors.read().decode(errors="replace").strip()[-_SHOWN:]
            raise LoadError(
                f"{shlex.join(command.arguments)} ended with {status}, not {command.status or 0}",
                field="rerun",
                hint=told or "it printed nothing to standard error",
            )
    return wall_s, cpu_s


def _start(command: Command, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command.arguments,
            cwd=command.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            process_group=0,
        )
    except OSError as error:
        raise LoadError(f"cannot run {shlex.join(command.arguments)}: {error.strerror}", field="rerun") from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
