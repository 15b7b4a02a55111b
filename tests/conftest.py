"""What the tests share: real servers on free ports, the real model, and waiting instead of sleeping."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace.tasks import embedded

# A leftover of the machine's must not turn into a setting of the server under test.
for _name in [name for name in os.environ if name.startswith("HEADRACE_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "tests" / "models"
AGENTS = ROOT / "tests" / "agents"
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
            env={
                **os.environ,
                "XDG_RUNTIME_DIR": str(short),
                "HEADRACE_DATA_DIR": str(tmp_path / "data"),
                **(env or {}),
            },
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


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Id and payload of each server-sent event."""
    ident = ""
    for line in lines:
        if line.startswith("id: "):
            ident = line[4:]
        elif line.startswith("data: "):
            yield ident, json.loads(line[6:])


class Watcher:
    """A client that holds the events of a task, and comes back with `Last-Event-ID` whatever happens to its gateway.

    Args:
        urls: of the gateways, asked in turn.
    """

    def __init__(self, ident: str, *urls: str) -> None:
        self.ident = ident
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.connections = 0
        self.problem = ""
        self._urls = itertools.cycle(urls)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watcher of {ident}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _watch(self) -> None:
        while not self._over.is_set() and not self.done:
            try:
                self._connect(next(self._urls))
            except httpx.HTTPError:
                self._over.wait(0.1)
            except Exception as error:  # shown by whoever waits for it
                self.problem = repr(error)
                return

    def _connect(self, url: str) -> None:
        headers = {"Last-Event-ID": self.events[-1][0]} if self.events else {}
        with httpx.stream("GET", f"{url}/agent/events/{self.ident}", headers=headers, timeout=20) as answer:
            if answer.status_code >= 500:
                self._over.wait(0.1)
                return
            if answer.status_code != 200:
                raise AssertionError(f"{answer.status_code} {answer.read().decode()}")
            self.connections += 1
            for event in events_of(answer.iter_lines()):
                self.events.append(event)
                if self._over.is_set():
                    return
        if not self.done:
            self._over.wait(0.05)

    @property
    def done(self) -> bool:
        return bool(self.events) and self.events[-1][1]["type"] in ("RUN_FINISHED", "RUN_ERROR")

    def stop(self) -> None:
        self._over.set()

    def types(self) -> list[str]:
        return [payload["type"] for _, payload in self.events]

    def fault(self) -> str:
        """What is wrong with the stream as a whole; empty when it is gap-free and ends once."""
        ids = [tuple(map(int, ident.split("-"))) for ident, _ in self.events]
        if self.problem:
            return self.problem
        if any(later <= earlier for earlier, later in itertools.pairwise(ids)):
            return f"{self.ident}: the ids do not rise"
        finals = [kind for kind in self.types() if kind in ("RUN_FINISHED", "RUN_ERROR")]
        if len(finals) != 1 or not self.done:
            return f"{self.ident}: {len(finals)} final events"
        return ""


class Stage:
    """The processes of one task store: any number of `headrace` commands on one data directory, and what they start.

    Args:
        folder: an empty one.
        options: of every command.
        redis_url: a store that the test has started itself; otherwise there is an embedded one.
    """

    def __init__(self, folder: Path, *options: str, redis_url: str = "") -> None:
        self.folder = folder
        self.data = folder / "data"
        self.notes_file = folder / "notes"
        # pytest's own paths are longer than a socket's may be.
        self.short = Path(tempfile.mkdtemp(prefix="hr-"))
        self.servers: list[Server] = []
        self._options = [*options, *(["--redis", redis_url] if redis_url else []), "--data-dir", str(self.data)]

    def start(
        self,
        verb: str = "up",
        *options: str,
        app: str = "agents_app.py",
        ready: bool = True,
        env: dict[str, str] | None = None,
    ) -> Server:
        """Start `headrace VERB APP`: up, gateway or task worker."""
        port = free_port()
        ports = [] if verb == "task worker" else ["--port", str(port), "--admin-port", "-1"]
        log = self.folder / f"{len(self.servers)}-{verb.replace(' ', '-')}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [HEADRACE, *verb.split(), *([app] if app else []), *ports, *self._options, *options],
                stdout=out,
                stderr=out,
                cwd=AGENTS,
                env={**os.environ, "XDG_RUNTIME_DIR": str(self.short), "AGENT_NOTES": str(self.notes_file)}
                | (env or {}),
            )
        server = Server(process, port, -1, log, self.short)
        self.servers.append(server)
        if ready:
            self.await_ready(server)
        return server

    def await_ready(self, server: Server) -> None:
        wait_until(lambda: server.process.poll() is not None or "\nready:" in "\n" + server.log, 60, "ready")
        assert server.process.poll() is None, server.log

    def command(self, verb: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [HEADRACE, verb, "--data-dir", str(self.data)], capture_output=True, text=True, timeout=30, check=True
        )

    def kill(self, server: Server) -> None:
        """kill -9 of a command and of all its processes at once."""
        for pid in [server.process.pid, *children(server.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()

    def stop(self, server: Server, timeout_s: float = 30.0) -> None:
        """SIGTERM, and wait for the end."""
        known = [server.process.pid, *children(server.process.pid)]
        if server.process.poll() is None:
            for pid in known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            server.process.terminate()
            server.process.wait(timeout_s)
        wait_until(lambda: not any(map(alive, known)), 10, "all processes of the command are gone")

    def processes(self) -> list[int]:
        """Every living process that was started for this stage, the store and its keeper included."""
        mark, found = f"AGENT_NOTES={self.notes_file}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                pid = int(process.name)
                theirs = mark in (process / "environ").read_bytes().split(b"\0")
                # A Valkey server writes its title over its environment.
                theirs = theirs or os.readlink(process / "cwd").startswith(f"{self.data}")
                if theirs and pid != os.getpid() and alive(pid):
                    found.append(pid)
        return found

    def store_pid(self) -> int:
        """The embedded server, 0 while there is none."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/cwd") == str(self.data.resolve()):
                    return pid
        return 0

    def notes(self, *words: object) -> list[list[str]]:
        """The lines that agents have left, in words; those that begin with these words."""
        if not self.notes_file.exists():
            return []
        begin = [str(word) for word in words]
        lines = [line.split() for line in self.notes_file.read_text().splitlines()]
        return [line for line in lines if line[: len(begin)] == begin]

    def close(self) -> list[int]:
        """Stop everything; what had to be killed because it was left behind."""
        known = self.processes()
        late = []
        for server in self.servers:
            server.client.close()
            try:
                self.stop(server)
            except subprocess.TimeoutExpired:
                late.append(server.process.pid)
                self.kill(server)
            sys.stderr.write(f"\n--- {server.log_file.name}\n{server.log}")
        embedded.stop(self.data)
        known += self.processes()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not any(map(alive, known)), 10)
        late += [pid for pid in known if alive(pid)]
        for pid in late:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.short)
        return late


@contextlib.contextmanager
def stage(folder: Path, *options: str, redis_url: str = "") -> Iterator[Stage]:
    """A stage of our own; afterwards none of its processes is left."""
    made = Stage(folder, *options, redis_url=redis_url)
    late: list[int] = []
    try:
        yield made
    finally:
        late = made.close()
    assert not late, f"left behind: {late}"


def submit(server: Server, agent: str, options: dict[str, Any] | None = None, **input_: Any) -> str:
    """The id of a new task."""
    body = {"agent": agent, **({"input": input_} if input_ else {}), **(options or {})}
    answer = server.client.post("/agent/submit", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def task_status(server: Server, ident: str) -> dict[str, Any]:
    """A task as it is now; what goes wrong is that it is not known just now."""
    with contextlib.suppress(httpx.HTTPError):
        answer = server.client.get(f"/agent/status/{ident}")
        if answer.status_code == 200:
            return dict(answer.json())
        assert answer.status_code in (500, 502, 503), answer.text
    return {"status": "unknown"}


def wait_for_end(server: Server, ident: str, timeout_s: float = 25.0) -> dict[str, Any]:
    """The task once it has ended."""
    ended = ("completed", "failed", "cancelled")

    def look() -> dict[str, Any] | None:
        found = task_status(server, ident)
        return found if found["status"] in ended else None

    return dict(wait_until(look, timeout_s, f"the end of {ident}: {task_status(server, ident)}"))


def programs_of(packages: str, *names: str) -> list[str]:
    """Where programs of Debian packages are, installed if that is allowed here.

    Without them a test is skipped; in CI it fails.
    """
    install = f"apt-get install -y --no-install-recommends {packages}"
    if not all(map(shutil.which, names)) and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(f"apt-get update -qq; {install}", shell=True, capture_output=True, timeout=300, check=False)
    # Not resolved: some are links to a program that looks at the name it is called by.
    found = [path for name in names if (path := shutil.which(name))]
    if len(found) == len(names):
        return found
    message = f"needs {', '.join(names)}: {install}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def redis_server() -> str:
    """The program; with it comes `openssl`, for tests of TLS."""
    return programs_of("redis-server openssl", "redis-server", "openssl")[0]
