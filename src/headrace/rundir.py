"""The runtime directory of one running server: its configuration, sockets and metric files.

It is the registry by which processes find each other: a worker that is ready has a socket in ``workers/``. It lies in
``$XDG_RUNTIME_DIR`` or the temporary folder, readable by its owner only, and goes with the server: the supervisor
removes it, or, when that was killed, its children do, or else the next server that starts.

The processes of an application under another server (`serving/embedded.py`) share one, named after what they have in
common; it goes with the last of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from headrace import metrics
from headrace.config import Config

_PREFIX = "headrace-"
# A Unix socket's path has at most 107 bytes on Linux, 103 on macOS; ours adds 40 to its parent.
_LONGEST_PARENT = 60


class RunDir:
    """Paths inside a runtime directory; nothing is read or made until it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workers = path / "workers"
        self.metrics = path / "metrics"
        self._pids = path / "pids"
        self._circuits = path / "circuits"
        self._slots = path / "slots"
        self._config = path / "config.json"
        self._held: int | None = None
        self._mine: list[int] = []

    @classmethod
    def create(cls, config: Config) -> RunDir:
        """Make a new one, holding its lock for the life of this process, and sweep those whose server was killed."""
        parent = runtime_folder()
        _sweep(parent)
        # Until it is whole and locked it has a name that no other server's sweep looks at.
        directory = cls(Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent)))
        directory._held = _lock(directory.path)
        directory._make_folders()
        directory.write_config(config)
        final = parent / directory.path.name.removeprefix(".")
        directory.path.rename(final)
        held, directory = directory._held, cls(final)
        directory._held = held
        return directory

    @classmethod
    async def join(cls, config: Config) -> RunDir:
        """The directory that all processes of one application share: same configuration, same place, same user.

        This process counts as one of its users until `leave`, or its end.
        """
        key = msgspec.json.encode((config, os.getcwd(), os.getuid()))
        parent = runtime_folder()
        directory = cls(parent / f"{_PREFIX}app-{hashlib.sha256(key).hexdigest()[:12]}")
        while True:
            directory.path.mkdir(mode=0o700, exist_ok=True)
            if directory.path.stat().st_uid != os.getuid():
                raise PermissionError(f"{directory.path} belongs to somebody else")
            with contextlib.suppress(OSError):  # of a directory that goes this moment, or is held by who removes it
                users = os.open(directory.path / "users", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    if os.fstat(users).st_ino == (directory.path / "users").stat().st_ino:
                        directory._mine.append(users)
                        directory._make_folders()
                        return directory
                except OSError:
                    pass
                os.close(users)
            await asyncio.sleep(0.1)

    def leave(self) -> None:
        """Be no user of a shared directory any more."""
        for descriptor in self._mine:
            os.close(descriptor)
        self._mine.clear()

    def try_lock(self) -> int | None:
        """The directory's lock as an inheritable descriptor, if nobody has it."""
        descriptor = _lock(self.path)
        if descriptor is not None:
            os.set_inheritable(descriptor, True)
        return descriptor

    def prepare(self, config: Config) -> None:
        """Forget workers that are gone, for those that are about to start."""
        for path in (*self.workers.iterdir(), *self._circuits.iterdir()):
            path.unlink(missing_ok=True)
        self.write_config(config)

    def take_slot(self) -> tuple[str, Path]:
        """A front end's name that no living process has, and its file of metrics."""
        for number in itertools.count():
            path = self._slots / f"http.{number}"
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            if try_exclusive(descriptor):
                self._mine.append(descriptor)
                return path.name, self.metrics_file(path.name)
            os.close(descriptor)
        raise AssertionError

    def slots_taken(self) -> int:
        """How many front ends there are."""
        return max(1, len(list(self._slots.iterdir())))

    def clear_vacant_slots(self) -> None:
        """Leave no stale figures of front ends that have ended without a word."""
        for path in self._slots.iterdir():
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if try_exclusive(descriptor):
                if (file := self.metrics_file(path.name)).exists():
                    metrics.Row(file).close()
                path.unlink()
            os.close(descriptor)

    def _make_folders(self) -> None:
        for folder in (self.workers, self.metrics, self._pids, self._circuits, self._slots):
            folder.mkdir(exist_ok=True)

    def write_config(self, config: Config) -> None:
        """Tell every process, those to come and the front ends that look for it, the configuration of now."""
        _write(self._config, msgspec.json.encode(config))

    def config(self) -> Config:
        return msgspec.json.decode(self._config.read_bytes(), type=Config)

    def config_version(self) -> tuple[int, int]:
        """Changes whenever the configuration is written anew."""
        with contextlib.suppress(OSError):
            status = self._config.stat()
            return status.st_ino, status.st_mtime_ns
        return 0, 0

    def socket(self, number: int) -> Path:
        """Where a worker listens. Short, whatever its model is called; the worker's hello says what it serves."""
        return self.workers / f"{number}.sock"

    def sockets(self) -> list[Path]:
        """Sockets of the workers that are ready."""
        # Gone with the server, or no descriptor free just now: the next look will tell.
        with contextlib.suppress(OSError):
            return [path for path in self.workers.iterdir() if path.suffix == ".sock"]
        return []

    def set_circuit(self, model: str, open_: bool) -> None:
        """Say that the workers of a model fail again and again, or no longer."""
        path = self._circuits / model
        path.touch() if open_ else path.unlink(missing_ok=True)

    def open_circuits(self) -> set[str]:
        """Models whose workers fail again and again."""
        with contextlib.suppress(OSError):
            return {path.name for path in self._circuits.iterdir()}
        return set()

    def note_pid(self, slot: str, pid: int) -> None:
        _write(self._pids / slot, str(pid).encode())

    def forget_pid(self, slot: str) -> None:
        (self._pids / slot).unlink(missing_ok=True)

    def pids(self) -> list[int]:
        """Processes of this server, each the leader of its group."""
        found = []
        with contextlib.suppress(OSError):
            for path in self._pids.iterdir():
                with contextlib.suppress(OSError, ValueError):
                    found.append(int(path.read_text()))
        return found

    def metrics_file(self, slot: str) -> Path:
        return self.metrics / slot

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None


def runtime_folder() -> Path:
    """Where directories of running programs lie: short enough a path for sockets, and writable."""
    parent = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    if len(os.fsencode(parent)) > _LONGEST_PARENT or not os.access(parent, os.W_OK | os.X_OK):
        return Path(tempfile.gettempdir())
    return parent


def _write(path: Path, content: bytes) -> None:
    """Replace a file at once: a reader sees the old content or the new."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(content)
    temporary.rename(path)


def _lock(path: Path) -> int | None:
    """Take the directory's lock while the descriptor given back is open; ``None`` if another process has it."""
    descriptor = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    if try_exclusive(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def try_exclusive(descriptor: int) -> bool:
    """Lock a file for this process alone, if nobody has it locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(parent: Path) -> None:
    for path in _own_directories(parent):
        with contextlib.suppress(OSError):
            # A directory without a lock file is being removed this very moment.
            if (path / "lock").exists() and (held := _lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(held)


def _own_directories(parent: Path) -> Iterator[Path]:
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.is_dir() and path.stat().st_uid == os.getuid():
                yield path
