"""Folders that headrace writes to: what is below them, and whether it can work there."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
from pathlib import Path

import msgspec

from headrace import rundir
from headrace.rundir import RunDir
from headrace.tasks import embedded

# On Linux a Unix socket's path has at most 107 bytes, on macOS 103.
LONGEST_SOCKET = 107 if sys.platform == "linux" else 103
_TRIAL_BYTES = 1 << 20


class Folder(msgspec.Struct, frozen=True):
    """One folder, or the place where it would be made.

    Args:
        parent: the nearest folder that exists: the folder itself, or one above it.
        writable: whether this user may make files in ``parent``.
        open_to_all: whether everybody may.
        file_system: its kind, for example ``ext4``; empty when it is not known.
        free_files: how many more files there may be; ``None`` when there is no such limit.
        problem: why it is no folder.
    """

    path: str
    exists: bool = True
    parent: str = "/var/lib/headrace"
    writable: bool = True
    open_to_all: bool = False
    file_system: str = "ext4"
    total_bytes: int = 500 << 30
    free_bytes: int = 100 << 30
    free_files: int | None = None
    problem: str = ""


class Runtime(msgspec.Struct, frozen=True):
    """Where sockets and metrics of running processes are.

    Args:
        wanted: ``XDG_RUNTIME_DIR``.
        longest_socket: bytes in the longest path of a socket there.
        problem: what did not work in a trial: a socket, or a file in shared memory.
        store_socket: the embedded store's.
    """

    wanted: str = ""
    folder: Folder = Folder("/run/user/1000", file_system="tmpfs")
    longest_socket: int = 60
    problem: str = ""
    store_socket: str = "/run/user/1000/headrace-store-0123456789abcdef.sock"


def read_folder(path: Path) -> Folder:
    """Look at a folder."""
    real = Path(os.path.realpath(path))
    try:
        parent = next(each for each in (real, *real.parents) if os.path.lexists(each))
        status = parent.stat()
        if not stat.S_ISDIR(status.st_mode):
            return Folder(str(path), parent == real, str(parent), False, problem=f"{parent} is not a folder")
        usage, files = shutil.disk_usage(parent), os.statvfs(parent)
    except OSError as error:
        return Folder(str(path), False, str(real), False, problem=f"{error.strerror}: {error.filename}")
    return Folder(
        str(path),
        parent == real,
        str(parent),
        os.access(parent, os.W_OK | os.X_OK),
        # A folder like /tmp, where nobody can touch what is another's, is no place for data either.
        parent == real and bool(status.st_mode & stat.S_IWOTH),
        file_system_of(parent, _mounts()),
        usage.total,
        usage.free,
        files.f_favail if files.f_files else None,
    )


def read_runtime(data_dir: Path) -> Runtime:
    """Look at the folder that holds the runtime directories, and try what headrace does there."""
    parent = rundir.runtime_folder()
    longest = RunDir(parent / "headrace-app-0123456789ab").socket(9999)
    return Runtime(
        os.environ.get("XDG_RUNTIME_DIR", ""),
        read_folder(parent),
        len(os.fsencode(longest)),
        _try(parent),
        str(embedded.socket_path(data_dir)),
    )


def file_system_of(path: Path, mounts: str) -> str:
    """The kind of file system that a path is on.

    Args:
        path: without links.
        mounts: the text of ``/proc/self/mountinfo``; a later line lies over an earlier one.
    """
    best, kind = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4])
        if path.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), after.split(" ")[0]
    return kind


def _mounts() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return ""


def _try(parent: Path) -> str:
    """Why no socket or no shared file can be had in a folder; empty when both can."""
    try:
        with tempfile.TemporaryDirectory(prefix=".headrace-doctor-", dir=parent) as folder:
            # A name of the length that counts is judged by its length: this is about the file system.
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"{folder}/s")
            descriptor = os.open(f"{folder}/m", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                # To write past the end of a full disk would end this process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, _TRIAL_BYTES)
                else:
                    os.pwrite(descriptor, bytes(_TRIAL_BYTES), 0)
                with mmap.mmap(descriptor, _TRIAL_BYTES) as shared:
                    shared[0] = 1
            finally:
                os.close(descriptor)
    except OSError as error:
        return error.strerror or str(error)
    return ""
