"""A program run in a fresh process that records itself, from outside: started, waited for, its record completed.

Ctrl-C reaches the program as if nobody watched; the report comes after it. Runs lie below ``.headrace/runs`` of the
current directory, the last twenty of them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import msgspec

from headrace import clock
from headrace.errors import ConfigError
from headrace.profiling import ledger
from headrace.profiling.cpu import children, program
from headrace.profiling.cpu.partial import write
from headrace.profiling.cpu.program import Job
from headrace.profiling.record import Frame, Line, Record

RUNS = Path(".headrace") / "runs"
_KEPT = 20
_T = TypeVar("_T")


def new_folder() -> Path:
    """A folder for a run; the oldest ones go. Where the current directory cannot be written, a temporary one."""
    try:
        RUNS.mkdir(parents=True, exist_ok=True)
        ignored = RUNS / ".gitignore"
        if not ignored.exists():
            ignored.write_text("*\n")
        for old in sorted(path for path in RUNS.iterdir() if path.is_dir())[: -_KEPT + 1]:
            shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"{int(clock.wall())}-", dir=RUNS)).absolute()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="headrace-run-"))


def check(job: Job) -> None:
    """Raise `ConfigError` for what Python would not start."""
    if not job.is_module and not Path(job.target).is_file():
        hint = "python -m NAME is headrace profile -m NAME" if "/" not in job.target else None
        raise ConfigError(f"there is no script {job.target}", field="script", hint=hint)


def run(job: Job, *, quiet_output: bool = False) -> Record:
    """Run a program to its end, and complete its record: how it ended, where it ran, what its children did.

    Args:
        quiet_output: its standard output goes to standard error, for a caller that has its own to say there.
    """
    folder = Path(job.folder)
    began, wall = clock.perf_counter(), clock.wall()
    before = _used_s()
    pid, status = _start_and_wait(job, stdout=2 if quiet_output else None)
    record = _found(folder)
    if record is None:
        record = Record(
            command=" ".join(job.command()),
            started=wall,
            pid=pid,
            machine=ledger.machine(),
            wall_s=clock.perf_counter() - began,
            cpu_s=_used_s() - before,
            notes=[f"the program {_how(status)} before anything was seen of it"],
        )
    elif not (folder / program.RECORD).exists():
        note = f"the program {_how(status)} at once: this is what had been seen {record.wall_s:.3g} s after its start"
        record = msgspec.structs.replace(record, notes=[*record.notes, f"{note}, calls are not counted"])
    record = msgspec.structs.replace(
        record,
        arguments=job.command(),
        directory=os.getcwd(),
        machine=ledger.machine(),
        commit=ledger.commit(Path.cwd()),
        exit_status=status,
        children=children.collect(folder),
    )
    write(record, folder / program.RECORD)
    return record


def complete(job: Job, record: Record, more: dict[str, Any]) -> Record:
    """The record with more fields, saved in the place of the one before."""
    record = msgspec.structs.replace(record, **more)
    write(record, Path(job.folder) / program.RECORD)
    return record


def follow_lines(job: Job, frames: list[Frame]) -> list[Line]:
    """Run it again, silent, with these functions followed line by line."""
    job = msgspec.structs.replace(job, lines=frames, children=False)
    _start_and_wait(job, stdout=subprocess.DEVNULL, silent=True)
    return _read(Path(job.folder) / program.LINES, list[Line]) or []


def follow_device(job: Job) -> dict[str, object] | None:
    """Run it again, silent, below torch's profiler."""
    job = msgspec.structs.replace(job, gpu=True, children=False)
    _start_and_wait(job, stdout=subprocess.DEVNULL, silent=True)
    return _read(Path(job.folder) / program.DEVICE, dict[str, object])


def _start_and_wait(job: Job, *, stdout: int | None, silent: bool = False) -> tuple[int, int]:
    """Its process id and exit status; negative: the signal that ended it."""
    file = Path(job.folder) / "job.json"
    file.write_bytes(msgspec.json.encode(job))
    with _signals_are_the_programs() as forward:
        process = subprocess.Popen(
            [sys.executable, "-c", program.CODE, str(file)],
            stdin=subprocess.DEVNULL if silent else None,
            stdout=stdout,
            stderr=subprocess.DEVNULL if silent else None,
        )
        forward.append(process)
        return process.pid, process.wait()


@contextlib.contextmanager
def _signals_are_the_programs() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Ctrl-C the terminal gives to both: it ends the program, not the report. SIGTERM is passed on."""
    processes: list[subprocess.Popen[bytes]] = []
    if threading.current_thread() is not threading.main_thread():
        yield processes
        return

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for each in processes:
            each.send_signal(number)

    # Not SIG_IGN, which the program would inherit.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield processes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _found(folder: Path) -> Record | None:
    return _read(folder / program.RECORD, Record) or _read(folder / program.PARTIAL, Record)


def _read(path: Path, kind: type[_T]) -> _T | None:
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode(path.read_bytes(), type=kind)
    return None


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def _used_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
