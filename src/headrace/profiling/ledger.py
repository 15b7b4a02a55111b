"""Runs kept under names, so that the one after a change can be compared with the one before it.

A folder, ``.headrace/profiles`` below the current directory, holds each run as a record of its own, and an index with
one line for each run and each measurement of two of them in turns. Lines are only ever added, under a lock, and a
record is there before its line: any number of processes may store at once. Knows nothing of what a comparison says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec

from headrace import clock
from headrace.errors import ConfigError
from headrace.profiling import record as records
from headrace.profiling.record import Machine, Record

FOLDER = Path(".headrace") / "profiles"
_INDEX = "index.jsonl"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,79}")
# Their versions decide how fast the same code computes.
_PACKAGES = ("numpy", "torch", "transformers", "onnxruntime", "openvino")
_GIT_S = 5.0


class Run(msgspec.Struct, frozen=True, tag="run"):
    """A line of the index: one run.

    Args:
        ident: its own, whatever else has its name.
        stored: seconds since 1970.
        command_hash: of arguments and directory, or of the command as it was given where there are no arguments.
        code: file of the program's own → hash of what was in it when the run was stored.
        file: of the record, below the folder.
    """

    ident: str
    name: str
    stored: float
    command: str
    command_hash: str
    commit: str
    fingerprint: str
    wall_s: float
    cpu_s: float
    code: dict[str, str]
    file: str


class Turns(msgspec.Struct, frozen=True, tag="turns"):
    """A line of the index: the commands of two runs, measured in turns without a profiler.

    Args:
        before, after: idents of the runs.
        wall_s, cpu_s: a pair (before, after) for each turn.
        notes: what must be known of them.
    """

    before: str
    after: str
    stored: float
    wall_s: list[tuple[float, float]]
    cpu_s: list[tuple[float, float]]
    notes: list[str] = []


def store(record: Record, name: str, root: Path | None = None) -> Run:
    """Keep a run under a name. A name may be used again: the latest run has it, the others count as its repeats.

    Args:
        root: the folder that has, or gets, ``.headrace`` [default: the current directory].

    Raises:
        ConfigError: no such name can be given, or the folder cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a run",
            field="name",
            hint="letters, digits and _ . @ + - in between, 80 at most",
        )
    ident = uuid.uuid4().hex[:12]
    run = Run(
        ident=ident,
        name=name,
        stored=clock.wall(),
        command=record.command,
        command_hash=command_hash(record),
        commit=record.commit,
        fingerprint=record.machine.fingerprint,
        wall_s=record.wall_s,
        cpu_s=record.cpu_s,
        code=_code(record),
        file=f"{name}-{ident}.json",
    )
    folder = (root or Path.cwd()) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (ignored := folder / ".gitignore").exists():  # times of this machine mean nothing on another one
            ignored.write_text("*\n")
        _write_whole(folder / run.file, msgspec.json.encode(record))
        _append(folder, run)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or folder}: {error.strerror}", field="store") from None
    return run


def note_turns(turns: Turns, root: Path | None = None) -> None:
    """Keep what was measured in turns. Raises `OSError`."""
    _append((root or Path.cwd()) / FOLDER, turns)


def runs(root: Path | None = None) -> list[Run]:
    """All that is in the index, the oldest first."""
    return [line for line in _lines(root) if isinstance(line, Run)]


def named(name: str, root: Path | None = None) -> list[Run]:
    """The latest run of a name, and before it, the oldest first, those that repeat it: same command, machine and code.

    Raises:
        ConfigError: nothing is stored under this name.
    """
    known = runs(root)
    same = [run for run in known if run.name == name]
    if not same:
        names = list(dict.fromkeys(run.name for run in reversed(known)))
        told = f"known are {', '.join(names[:8])}" if names else "headrace profile --name NAME keeps a run"
        raise ConfigError(f"no run is stored as {name!r} in {(root or Path.cwd()) / FOLDER}", field="name", hint=told)
    return [run for run in same if _repeats(run, same[-1])]


def turns_of(before: Run, after: Run, root: Path | None = None) -> Turns | None:
    """The last time that these two were measured in turns."""
    wanted = (before.ident, after.ident)
    found = [line for line in _lines(root) if isinstance(line, Turns) and (line.before, line.after) == wanted]
    return found[-1] if found else None


def read(run: Run, root: Path | None = None) -> Record:
    """A run's record. Raises `ConfigError` if it is gone."""
    return records.read((root or Path.cwd()) / FOLDER / run.file)


def changed(before: Run, after: Run) -> list[str]:
    """Files of the program that were seen in both runs, and were not the same."""
    return sorted(file for file, seen in before.code.items() if after.code.get(file, seen) != seen)


def outdated(run: Run, record: Record) -> list[str]:
    """Files of the program that are no longer what they were when the run was stored."""
    now = _code(record)
    return sorted(file for file, seen in run.code.items() if now.get(file) != seen)


def command_hash(record: Record) -> str:
    words = [record.directory, *record.arguments] if record.arguments else [record.command]
    return hashlib.sha256(shlex.join(words).encode()).hexdigest()[:16]


def machine() -> Machine:
    """This machine and this Python, as far as they decide what times mean."""
    facts = {
        "processor": ", ".join([_processor(), *_gpus()]),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": _packages(),
    }
    return msgspec.convert({"fingerprint": fingerprint(facts), **facts}, Machine)


def fingerprint(facts: dict[str, object]) -> str:
    """The same for the same facts."""
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()[:16]


def commit(directory: Path) -> str:
    """What git calls the state of a directory, ``-dirty`` behind it if files that it knows were changed; else empty."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, stdin=subprocess.DEVNULL)
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""


def unlike(one: Machine, other: Machine) -> list[str]:
    """What differs between two machines, in words; empty if times can be compared."""
    if one.fingerprint == other.fingerprint:
        return []
    told = [
        f"{name} {getattr(one, name)} and {getattr(other, name)}"
        for name in ("processor", "cores", "system", "python")
        if getattr(one, name) != getattr(other, name)
    ]
    for name in sorted({*one.packages, *other.packages}):
        versions = [each.packages.get(name, "none") for each in (one, other)]
        if versions[0] != versions[1]:
            told.append(f"{name} {versions[0]} and {versions[1]}")
    return told or [f"fingerprint {one.fingerprint} and {other.fingerprint}"]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """By name, from the driver's own files: no library is loaded for it."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()
            found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return found


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _code(record: Record) -> dict[str, str]:
    """Hashes of the program's own files that were seen in it."""
    found = {}
    for file in sorted({frame.file for frame in record.frames if frame.kind == "user"}):
        path = Path(record.directory) / file
        with contextlib.suppress(OSError, ValueError):
            found[file] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def _repeats(run: Run, last: Run) -> bool:
    same = (run.command_hash, run.fingerprint, run.commit) == (last.command_hash, last.fingerprint, last.commit)
    return same and not changed(run, last)


def _lines(root: Path | None) -> Sequence[Run | Turns]:
    try:
        content = ((root or Path.cwd()) / FOLDER / _INDEX).read_bytes()
    except OSError:
        return []
    found = []
    for line in content.splitlines():
        # What was being written when the disk was full, or by a later version.
        with contextlib.suppress(msgspec.MsgspecError):
            found.append(msgspec.json.decode(line, type=Run | Turns))
    return found


def _append(folder: Path, line: Run | Turns) -> None:
    """One line more, whole or not at all for who reads."""
    descriptor = os.open(folder / _INDEX, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        end = os.fstat(descriptor).st_size
        # After a line that was cut off a new one begins.
        torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
        content = b"\n" * torn + msgspec.json.encode(line) + b"\n"
        while content:
            content = content[os.write(descriptor, content) :]
    finally:
        os.close(descriptor)


def _write_whole(path: Path, content: bytes) -> None:
    """A file that is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
