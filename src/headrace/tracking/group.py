"""The processes of one program count together, whoever started them: each has a row, any of them shows the sum.

A server of ours gives its processes their rows. In a program of a user's own the first that is counted looks for the
directory of its group: the processes that ``uvicorn --workers``, gunicorn or `multiprocessing` started for the same
program. Where another manager starts them, ``HEADRACE_METRICS_DIR`` names one directory for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import psutil

from headrace import metrics
from headrace.metrics import current
from headrace.rundir import runtime_folder, try_exclusive

_VARIABLE = "HEADRACE_METRICS_DIR"
# Set for the children of a process that counts: they belong to its group.
_INHERITED = "HEADRACE_METRICS_GROUP"
_PREFIX = "headrace-metrics-"


class Group:
    """This process's place among those that count together.

    Args:
        row: what this process counts in.
        rows: the directory of everybody's rows.
        slots: locks by which the living are known; ``None`` where a supervisor looks after that.
    """

    def __init__(self, row: metrics.Row, rows: Path, slots: Path | None = None) -> None:
        self.row = row
        self._reader = metrics.Reader(rows)
        self._directory = rows.parent
        self._slots = slots
        self._reading = threading.Lock()

    def scrape(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics of all processes as text, and its type; see `metrics.Reader.answer`."""
        with self._reading:
            if self._slots is not None:
                _clear_vacant(self._slots)
            return self._reader.answer(accept)

    def member_file(self, name: str) -> int:
        """A descriptor of a file that all members see, to be locked as long as a member has what it is named after."""
        return os.open(self._directory / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)


_group: Group | None = None
_finding = threading.Lock()
_descriptors: list[int] = []


def group() -> Group:
    """The group of this process, which is a member from then on. Raises `OSError` if it has no place for its files."""
    if _group is None:
        with _finding:
            if _group is None:
                _enter()
    assert _group is not None
    return _group


def _enter() -> None:
    global _group
    adopted = current.adopted()
    if adopted is not None:
        row, directory = adopted
        _group = Group(row, directory)
        return
    directory = _directory()
    slots, rows = directory / "slots", directory / "metrics"
    _join(directory, slots, rows)
    os.environ[_INHERITED] = str(directory)
    row = metrics.Row(rows / _take_slot(slots))
    _group = Group(row, rows, slots)


def _directory() -> Path:
    named = os.environ.get(_VARIABLE)
    if named:
        return Path(named)
    inherited = os.environ.get(_INHERITED)
    if inherited and Path(inherited).is_dir():
        return Path(inherited)
    leader = _leader()
    # Numbers of processes come again; together with the time of the start they do not.
    began = round(psutil.Process(leader).create_time() * 1000)
    return runtime_folder() / f"{_PREFIX}{os.getuid()}-{leader}-{began}"


def _leader() -> int:
    """The process that started this one as a worker, or this one."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        return parent.pid
    if os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn/"):
        # Set in gunicorn's arbiter, so in the arbiter itself only when it loads the application for its workers.
        mine, above = psutil.Process(), psutil.Process(os.getppid())
        return above.pid if above.cmdline() == mine.cmdline() else mine.pid
    return os.getpid()


def _join(directory: Path, slots: Path, rows: Path) -> None:
    """Be a user of the directory: whoever sweeps leaves it alone until this process ends."""
    _sweep()
    while True:
        for folder in (slots, rows):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if directory.stat().st_uid != os.getuid():
            raise PermissionError(f"{directory} belongs to somebody else")
        users = os.open(directory / "users", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(users, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            if os.fstat(users).st_ino == (directory / "users").stat().st_ino and slots.is_dir() and rows.is_dir():
                _descriptors.append(users)
                return
        os.close(users)  # it was swept this moment


def _take_slot(slots: Path) -> str:
    """A place that no living process has; its counters go on where a dead one left them."""
    for number in itertools.count():
        descriptor = os.open(slots / f"process.{number}", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        if try_exclusive(descriptor):
            _descriptors.append(descriptor)
            return f"process.{number}"
        os.close(descriptor)
    raise AssertionError


def _clear_vacant(slots: Path) -> None:
    """Leave no stale figures of processes that were killed."""
    for slot in slots.iterdir():
        descriptor = os.open(slot, os.O_RDWR | os.O_CLOEXEC)
        if try_exclusive(descriptor):
            row = slots.parent / "metrics" / slot.name
            if row.exists():
                metrics.Row(row).close()
        os.close(descriptor)


def _sweep() -> None:
    """Remove what programs have left that were killed, or have ended."""
    for directory in runtime_folder().glob(f"{_PREFIX}{os.getuid()}-*"):
        with contextlib.suppress(OSError):
            users = os.open(directory / "users", os.O_RDWR | os.O_CLOEXEC)
            if try_exclusive(users):
                shutil.rmtree(directory, ignore_errors=True)
            os.close(users)


def _forget() -> None:
    """After a fork: the row is the parent's."""
    global _group, _finding
    _group, _finding = None, threading.Lock()
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_forget)
