"""What the tests share: real servers on free ports, the real model, and waiting instead of sleeping."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

# A leftover of the machine's must not turn into a setting of the server under test.
for _name in [name for name in os.environ if name.startswith("HEADRACE_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "tests" / "models"
HEADRACE = str(Path(sys.executable).parent / "headrace")


def wait_until(condition: Callable[[], Any], timeout_s: float = 20.0, what: str = "") -> Any:
    """The first truthy value of a condition, or a failure that says what did not happen."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"did not happen within {timeout_s:g} s: {what or condition}")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def children(pid: int) -> list[int]:
    """Living descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *children(child)]
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@dataclass
class Server:
    """A running `headrace serve`, as its own processes."""

    process: subprocess.Popen[bytes]
    port: int
    admin_port: int
    log_file: Path
    run_parent: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def pid_of(self, slot: str) -> int:
        """The process in a slot, for example ``worker.NAME.0`` or ``http.0``."""
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):
                if slot in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    return pid
        return 0

    def predict(self, value: Any, path: str = "/predict", **options: Any) -> httpx.Response:
        return self.client.post(path, json={"input": value}, **options)

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self.client.get("/health/ready").status_code == 200
        return False

    def metric(self, line: str) -> float:
        """The value of one series, written as in the exposition."""
        for found in self.client.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.rpartition(" ")[2])
        raise AssertionError(f"no series {line}")


@contextlib.contextmanager
def serving(
    tmp_path: Path,
    *arguments: str,
    ready: bool = True,
    env: dict[str, str] | None = None,
    verb: str = "serve",
    cwd: Path = MODELS,
) -> Iterator[Server]:
    """A server of our own, which leaves neither process, socket nor directory behind."""
    port, admin = (free_port(), free_port())
    run_parent = tmp_path / "run"
    run_parent.mkdir(exist_ok=True)
    # pytest's own paths are longer than a socket's may be.
    short = Path(tempfile.mkdtemp(prefix="hr-")) / "r"
    short.symlink_to(run_parent)
    log = tmp_path / f"server-{port}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [HEADRACE, verb, *arguments, "--port", str(port), "--admin-port", str(admin)],
            stdout=out,
            stderr=out,
            cwd=cwd,
            env={**os.environ, "XDG_RUNTIME_DIR": str(short), **(env or {})},
        )
    server = Server(process, port, admin, log, run_parent)
    try:
        if ready:
            wait_until(lambda: process.poll() is not None or "\nready:" in "\n" + log.read_text(), 60, f"ready:\n{log}")
            assert process.poll() is None, log.read_text()
        yield server
    finally:
        server.client.close()
        known = [process.pid, *children(process.pid)]
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            sys.stderr.write(log.read_text())
            wait_until(lambda: not any(map(alive, known)), 10, "all processes of the server are gone")
        shutil.rmtree(short.parent)
        assert not list(run_parent.iterdir()), "the runtime directory is removed"


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of the real embedding model."""
    from headrace.up import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo: the real model, for tests that only ask."""
    with serving(tmp_path_factory.mktemp("demo"), verb="up") as server:
        yield server


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Small models of every kind behind one server, for tests that only ask."""
    directory = tmp_path_factory.mktemp("zoo")
    subprocess.run([sys.executable, str(MODELS / "make.py"), str(directory)], check=True, timeout=60)
    config = directory / "headrace.toml"
    config.write_text((MODELS / "zoo.toml").read_text().replace("@DIRECTORY@", str(directory)))
    with serving(directory, "--config", str(config)) as server:
        yield server


@pytest.fixture
def needs_proc() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs Linux's /proc")
