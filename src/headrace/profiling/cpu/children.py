"""Processes that a program starts: each Python among them samples itself and leaves a record in a folder.

A hook in ``PYTHONPATH`` starts it in processes that are executed, one of `os.register_at_fork` in those that are
forked. Not seen: children that ignore ``PYTHONPATH`` (``python -I`` and ``-E``), and any Python without headrace.
As some end without a word, a child writes down what it knows again and again.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from headrace.profiling.cpu.partial import Partial, finish_at_sigterm, write
from headrace.profiling.cpu.recording import Recording
from headrace.profiling.record import Child, Record

VARIABLE = "HEADRACE_PROFILE_CHILDREN"
_FOLDER, _HOOK = "children", "hook"
_BUDGET = 0.02
_FIRST_PARTIAL_S = 0.1
_LONGEST_NAME = 120
# Python's own helpers: they do nothing by themselves.
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def watch(folder: Path, command: str, in_child: Callable[[], None]) -> None:
    """Have every child of this process from now on leave a record.

    Args:
        folder: of the run.
        command: what forked ones are called after.
        in_child: called first in each forked one.
    """
    (folder / _FOLDER).mkdir(exist_ok=True)
    (folder / _HOOK).mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("hook.py"), folder / _HOOK / "sitecustomize.py")
    os.environ[VARIABLE] = str(folder / _FOLDER)
    paths = [str(folder / _HOOK), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)

    def after_fork() -> None:
        in_child()
        _Self(folder / _FOLDER, command).start()

    os.register_at_fork(after_in_child=after_fork)


def begin() -> None:
    """Look at this process, which a watched one has started."""
    folder = os.environ.get(VARIABLE, "")
    if not folder or not os.path.isdir(folder):
        return
    mine: list[_Self] = []
    command = " ".join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]])

    def after_fork() -> None:
        for each in mine:
            each.drop()
        mine[:] = [_Self(Path(folder), command)]
        mine[0].start()

    os.register_at_fork(after_in_child=after_fork)
    if not any(helper in " ".join(sys.orig_argv) for helper in _HELPERS):
        mine.append(_Self(Path(folder), command))
        mine[0].start()


def collect(folder: Path) -> list[Child]:
    """What the children of a run have left, the busiest first."""
    found = []
    for path in (folder / _FOLDER).glob("*.json"):
        with suppress(OSError, msgspec.MsgspecError):
            record = msgspec.json.decode(path.read_bytes(), type=Record)
            found.append(Child(record.command, record.pid, record.cpu_s, record))
    return sorted(found, key=lambda child: -child.cpu_s)


class _Self:
    """This process, sampled until its end."""

    def __init__(self, folder: Path, command: str) -> None:
        self._command = command
        self._pid = os.getpid()
        # A number may be given twice in a long run.
        self._path = folder / f"{self._pid}-{os.urandom(4).hex()}.json"
        partial = Partial(self._save, _FIRST_PARTIAL_S)
        self._recording = Recording(trace=False, budget=_BUDGET, on_look=partial.look)

    def start(self) -> None:
        self._recording.start()
        atexit.register(self._finish)
        finish_at_sigterm(self._finish)
        # A process of multiprocessing ends without `atexit`, and forgets what its parent wanted done at the end.
        util = sys.modules.get("multiprocessing.util")
        if util is not None:
            util.register_after_fork(self, _Self._finish_with_multiprocessing)

    def drop(self) -> None:
        """In a forked child: it is not this process any more."""
        atexit.unregister(self._finish)

    def _finish_with_multiprocessing(self) -> None:
        if os.getpid() == self._pid:
            sys.modules["multiprocessing.util"].Finalize(None, self._finish, exitpriority=-100)

    def _finish(self) -> None:
        if os.getpid() == self._pid:
            self._pid = -1
            self._recording.stop()
            self._save()

    def _save(self) -> None:
        write(self._recording.record(_name(self._command)), self._path)


def _name(command: str) -> str:
    """What this process is called: its command in one line, and of a worker its own name."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    name = multiprocessing.current_process().name if multiprocessing is not None else "MainProcess"
    command = " ".join(command.split())
    command = command if len(command) <= _LONGEST_NAME else command[: _LONGEST_NAME - 1] + "…"
    return command if name == "MainProcess" else f"{name} of {command}"
