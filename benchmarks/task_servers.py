"""What the parts of `benchmarks/tasks.py` run against: servers, stores, peers. Nothing of them is left afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
from headrace.tasks import embedded
from serving import BIN

HERE = Path(__file__).parent
Note = Callable[[str, float], None]
_PATIENCE_S = 30.0


class OutOfTime(SystemExit):
    """A part is not done in time. Not an `Exception`: nothing on the way may catch it."""


@contextlib.contextmanager
def limit(what: str, seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` inside, wherever that is, once so much time is over."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"{what} did not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def process(argv: Sequence[str], *, ready: str = "", env: dict[str, str] | None = None) -> Iterator[int]:
    """Pid of a program, once it has said a line that begins with ``ready``. It is ended with all of its group."""
    started = subprocess.Popen(
        argv,
        cwd=HERE,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE if ready else subprocess.DEVNULL,
        stderr=None if ready else subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        while ready and started.stdout and not (line := started.stdout.readline()).startswith(ready):
            if not line:
                raise RuntimeError(f"{' '.join(argv)} did not start")
        yield started.pid
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(_PATIENCE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        if started.stdout:
            started.stdout.close()


@contextlib.contextmanager
def headrace(store: str, *arguments: str, verb: str = "up") -> Iterator[tuple[str, int]]:
    """URL and pid of a server on a store; of task workers alone the URL means nothing."""
    port = peers.free_port()
    argv = [str(BIN / "headrace"), *verb.split(), "task_agents.py", "--redis", store, "--log-level", "warning"]
    http = [] if verb == "task worker" else ["--port", str(port), "--admin-port", "-1"]
    with process([*argv, *http, *arguments], ready="ready") as pid:
        yield f"http://127.0.0.1:{port}", pid


@contextlib.contextmanager
def new_store() -> Iterator[embedded.Embedded]:
    """An empty store."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "store"
        try:
            yield embedded.ensure(folder)
        finally:
            embedded.stop(folder)


@dataclass(frozen=True)
class Peer:
    """Another task queue.

    Args:
        requirement: what is installed.
        script: asks for jobs: its file beside this one.
        worker: what python is given to be a worker.
        workers: how many of them make two processes that run jobs.
    """

    name: str
    requirement: str
    script: str
    worker: tuple[str, ...]
    workers: int

    def install(self, directory: Path) -> Path:
        """Its python, of a venv of its own in ``directory``; one that is there already is used again."""
        venv = directory.absolute() / self.requirement
        python, stamp = venv / "bin" / "python", venv / "complete"
        if not stamp.exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
            pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            subprocess.run([*pip, self.requirement], check=True)
            stamp.touch()
        return python

    @contextlib.contextmanager
    def running(self, python: Path, store: str) -> Iterator[tuple[Callable[[int, int], dict[str, Any]], list[int]]]:
        """What asks for so many jobs, so many at once, and the pids of the workers, which have done some already."""
        env = {"PEER_SOCKET": store.removeprefix("unix://"), "PYTHONPATH": str(HERE)}

        def drive(jobs: int, at_once: int) -> dict[str, Any]:
            argv = [str(python), str(HERE / self.script), str(jobs), str(at_once)]
            done = subprocess.run(argv, env={**os.environ, **env}, stdout=subprocess.PIPE, check=True)
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        with contextlib.ExitStack() as stack:
            argv = [str(python), *self.worker]
            pids = [stack.enter_context(process(argv, env=env)) for _ in range(self.workers)]
            drive(50, 8)
            yield drive, pids


PEERS = (
    Peer("arq", "arq==0.28.0", "peer_arq.py", ("-m", "arq", "peer_arq.WorkerSettings"), 2),
    Peer("celery", "celery[redis]==5.7.0", "peer_celery.py", ("-m", "celery", "-A", "peer_celery", "worker"), 1),
)
