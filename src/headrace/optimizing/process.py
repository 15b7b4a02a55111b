"""Processes of the ladder from outside: started, watched, ended in time. What goes wrong in one becomes a row."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil

from headrace.clock import perf_counter, sleep
from headrace.optimizing.child import SAID, Job

_LOOK_S = 0.1
_KEPT_LINES = 15


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


class Process:
    """One child, with a caches' folder of its own.

    Args:
        role: prepare, build or run.
        cap_s: of a build, or of each answer of a run.
        most_bytes: memory of the process and those that it starts.
    """

    def __init__(self, role: str, job: Job, folder: Path, *, cap_s: float, most_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
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
                [sys.executable, "-P", "-m", "headrace.optimizing.child", role, str(folder / f"{role}.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **caches, **threads, **quiet},
                start_new_session=True,
            )
        self._pending = b""

    def finish(self) -> None:
        """Wait until it has ended well. Raises `Failed`."""
        until = perf_counter() + self._cap_s
        while self._process.poll() is None:
            self._check(until)
            sleep(_LOOK_S)
        self.end()
        if self._process.returncode:
            raise self._failure()

    def ask(self, command: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a command and wait for its answer; without one, for the first answer. Raises `Failed`."""
        assert self._process.stdin
        assert self._process.stdout
        if command is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                self._process.stdin.flush()
        until = perf_counter() + self._cap_s
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._process.stdout], [], [], _LOOK_S)
            chunk = os.read(self._process.stdout.fileno(), 1 << 16) if ready else None
            if chunk == b"":
                self._process.wait()
                self.end()
                raise self._failure()
            self._pending += chunk or b""
            self._check(until)
        line, _, self._pending = self._pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """End it and everything it has started."""
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
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else ""
        if code == SAID and last.startswith("["):
            kind, message, field, hint, _ = said = json.loads(last)
            if kind == "unavailable":
                return Failed("unavailable", f"{message}: {hint}" if hint else message, said)
            return Failed("build_failed", f"{field}: {message}" if field else message, said)
        if code < 0:
            return Failed("crashed", f"killed by {signal.Signals(-code).name}; the end of its log: {_end(lines)}")
        if any("MemoryError" in line or "out of memory" in line for line in lines[-_KEPT_LINES:]):
            return Failed("out_of_memory", last)
        return Failed("build_failed", _end(lines))


def _end(lines: list[str]) -> str:
    """What an operator wants to see of a log: the error itself."""
    told = [line for line in lines if line.strip()]
    return " ".join(told[-2:])[-500:] or "it said nothing"


def _memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += each.memory_info().rss
    return total
