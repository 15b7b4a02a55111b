"""The runtime directory of one running server: its configuration, sockets and metric files.

It is the registry by which processes find each other: a worker that is ready has a socket in ``workers/``. It lies in
``$XDG_RUNTIME_DIR`` or the temporary folder, readable by its owner only, and goes with the server: the supervisor
removes it, or, when that was killed, its children do, or else the next server that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

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
        self._config = path / "config.json"
        self._held: int | None = None

    @classmethod
    def create(cls, config: Config) -> RunDir:
        """Make a new one, holding its lock for the life of this process, and sweep those whose server was killed."""
        parent = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        if len(os.fsencode(parent)) > _LONGEST_PARENT or not os.access(parent, os.W_OK | os.X_OK):
            parent = Path(tempfile.gettempdir())
        _sweep(parent)
        # Until it is whole and locked it has a name that no other server's sweep looks at.
        directory = cls(Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent)))
        directory._held = _lock(directory.path)
        directory.workers.mkdir()
        directory.metrics.mkdir()
        directory._pids.mkdir()
        directory._circuits.mkdir()
        directory.write_config(config)
        final = parent / directory.path.name.removeprefix(".")
        directory.path.rename(final)
        held, directory = directory._held, cls(final)
        directory._held = held
        return directory

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


def _write(path: Path, content: bytes) -> None:
    """Replace a file at once: a reader sees the old content or the new."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_bytes(content)
    temporary.rename(path)


def _lock(path: Path) -> int | None:
    """Take the directory's lock while the descriptor given back is open; ``None`` if another process has it."""
    descriptor = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


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
