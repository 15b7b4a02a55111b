"""Processes of the ladder from outside: started, watched, ended in time. What goes wrong in one becomes a row."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil

from headrace import cgroups
from headrace.clock import perf_counter, sleep
from headrace.optimizing.orphan import PARENT

# Exit status for an error that is the last line of the log, as a `Fault` in JSON.
SAID = 3
_LOOK_S = 0.1
_SHARE_OF_MEMORY = 0.8
_KEPT_BYTES = 1 << 16
_MOST_REASON = 500
_NO_MEMORY = ("MemoryError", "out of memory", "can't allocate memory", "not enough memory")
# What a traceback ends with.
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Exit|Interrupt|Iteration|Unavailable|Unsupported)\b")


class Failed(Exception):
    """A process did not do what it was to do.

    Args:
        status: of the row.
        said: the error that the process gave, as the fields of a `Fault`.
    """

    def __init__(self, status: str, reason: str, said: list[Any] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.said = said


class Work(Protocol):
    """What a process has to do: a `msgspec.Struct`, which it finds in the file that it is told."""

    @property
    def threads(self) -> int: ...


def memory_bytes() -> int:
    """What there is for all processes: the machine's memory, or less where a container may use less."""
    total = psutil.virtual_memory().total
    return min(total, cgroups.read_limits().memory_bytes or total)


def usual_cap() -> int:
    """Memory that a process may use where nobody says how much, in bytes."""
    return int(memory_bytes() * _SHARE_OF_MEMORY)


class Process:
    """One child, with a caches' folder of its own.

    Args:
        role: first word of the program's arguments; the second is the file with the job.
        cap_s: of all that is waited for: an end, or an answer.
        most_bytes: memory of the process and those that it starts.
        program: module to run.
    """

    def __init__(
        self,
        role: str,
        job: Work,
        folder: Path,
        *,
        cap_s: float,
        most_bytes: int,
        program: str = "headrace.optimizing.child",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._cap_s = cap_s
        self._most_bytes = most_bytes
        (folder / f"{role}.json").write_bytes(msgspec.json.encode(job))
        # A compiler that is killed leaves half a file in its cache: nobody else may find it.
        caches = {name: str(folder / "cache") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1", "TQDM_DISABLE": "1"}
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self._log = folder / f"{role}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", program, role, str(folder / f"{role}.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **caches, **threads, **quiet, PARENT: str(os.getpid())},
                start_new_session=True,
            )
        self._pending = b""
        self.ended = False

    def finish(self) -> None:
        """Wait until it has ended well. Raises `Failed`."""
        until = perf_counter() + self._cap_s
        try:
            while self._process.poll() is None:
                self._check(until)
                sleep(_LOOK_S)
        finally:
            self.end()
        if self._process.returncode:
            raise self._failure()

    def ask(self, command: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a command and wait for its answer; without one, for the first answer. Raises `Failed`."""
        assert self._process.stdin
        assert self._process.stdout
        if self.ended:
            raise Failed("crashed", "it has ended already")
        if command is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                self._process.stdin.flush()
        until = perf_counter() + self._cap_s
        watch = select.poll()
        watch.register(self._process.stdout, select.POLLIN)
        while b"\n" not in self._pending:
            # One that has ended may have left others behind, which hold the pipe open.
            gone = self._process.poll() is not None
            ready = watch.poll(0 if gone else _LOOK_S * 1e3)
            chunk = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            if not chunk and (ready or gone):
                self._process.wait()
                self.end()
                raise self._failure()
            self._pending += chunk
            self._check(until)
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """End it and everything it has started."""
        if self.ended:  # its number may be another one's by now
            return
        self.ended = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _check(self, until: float) -> None:
        if perf_counter() > until:
            self.end()
            raise Failed("timeout", f"not done within {self._cap_s:g} s")
        used = _memory(self._process.pid)
        if used > self._most_bytes:
            self.end()
            raise Failed("out_of_memory", f"used {used >> 20} MiB, more than the cap of {self._most_bytes >> 20} MiB")

    def _failure(self) -> Failed:
        code = self._process.returncode
        lines = _last_lines(self._log)
        last = lines[-1] if lines else ""
        if code == SAID and last.startswith("["):
            kind, message, field, hint, _ = said = json.loads(last)
            if kind in ("unavailable", "not_faster"):
                return Failed(kind, f"{message}: {hint}" if hint else message, said)
            return Failed("build_failed", f"{field}: {message}" if field else message, said)
        if code < 0:
            perhaps = ", perhaps by the system for want of memory" if code == -signal.SIGKILL else ""
            return Failed("crashed", f"killed by {_signal(-code)}{perhaps}; the end of its log: {_end(lines)}")
        if any(word in line for line in lines for word in _NO_MEMORY):
            return Failed("out_of_memory", _end(lines))
        return Failed("build_failed", _end(lines))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _KEPT_BYTES))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def _end(lines: list[str]) -> str:
    """What an operator wants to see of a log: the error itself."""
    first = next((at for at in range(len(lines) - 1, -1, -1) if _ERROR.match(lines[at])), len(lines) - 2)
    return " ".join(lines[max(0, first) :])[:_MOST_REASON] or "it said nothing"


def _memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += each.memory_info().rss
    return total
