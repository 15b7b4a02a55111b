"""A record in the formats of other tools: pstats and SnakeViz, collapsed stacks, speedscope."""

from __future__ import annotations

import itertools
import marshal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from headrace.errors import ConfigError
from headrace.profiling.record import Call, Frame, Record, Stack
from headrace.profiling.render.totals import place, plain
from headrace.version import __version__

# Of pstats: file, line and name; primitive calls, calls, own and cumulative seconds, callers.
_Key = tuple[str, int, str]
_Numbers = tuple[int, int, float, float]
_Entry = tuple[int, int, float, float, dict[_Key, _Numbers]]

_SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def write_prof(record: Record, path: Path) -> None:
    """Write what `pstats` and SnakeViz open.

    Of a run that was only sampled, "calls" are samples of running stacks. Waiting has no place in this format.

    Raises:
        OSError: the file cannot be written.
    """
    calls = record.calls or _calls_of(record.cpu)
    found: dict[_Key, _Entry] = {}
    for call in calls:
        key = _key(record.frames[call.frame])
        callers: dict[_Key, _Numbers] = {}
        for number, numbers in call.callers.items():
            caller = _key(record.frames[number])
            callers[caller] = _sum(callers[caller], numbers) if caller in callers else numbers
        entry = (call.primitive, call.calls, call.own_s, call.cumulative_s, callers)
        found[key] = _added(found.get(key), entry)
    for each in list(found.values()):
        for caller in each[4]:  # a viewer looks for each of them
            found.setdefault(caller, (0, 0, 0.0, 0.0, {}))
    # What holds nothing is refused by `pstats`.
    path.write_bytes(marshal.dumps(found or {("~", 0, "<nothing was seen>"): (0, 0, 0.0, 0.0, {})}))


def _key(frame: Frame) -> _Key:
    return frame.file, frame.line, frame.function


def _added(one: _Entry | None, other: _Entry) -> _Entry:
    """Two functions that only a viewer takes for one."""
    if one is None:
        return other
    callers = dict(one[4])
    for key, numbers in other[4].items():
        callers[key] = _sum(callers[key], numbers) if key in callers else numbers
    return (*_sum(one[:4], other[:4]), callers)


def _sum(one: _Numbers, other: _Numbers) -> _Numbers:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2], one[3] + other[3]


def _calls_of(stacks: Sequence[Stack]) -> list[Call]:
    """Samples in the form of calls; a function, or a pair of them, counts once for each stack."""
    own: dict[int, float] = defaultdict(float)
    all_: dict[int, list[float]] = defaultdict(lambda: [0, 0.0])
    pairs: dict[int, dict[int, list[float]]] = defaultdict(dict)
    for stack in stacks:
        frames = stack.frames
        for number in set(frames):
            all_[number][0] += stack.samples
            all_[number][1] += stack.seconds
        edges = set(itertools.pairwise(frames))
        for caller, callee in edges:
            pair = pairs[callee].setdefault(caller, [0, 0.0, 0.0])
            pair[0] += stack.samples
            pair[2] += stack.seconds
        if frames:
            own[frames[-1]] += stack.seconds
        if len(frames) > 1:
            pairs[frames[-1]][frames[-2]][1] += stack.seconds
    return [
        Call(
            number,
            int(samples),
            int(samples),
            own[number],
            seconds_,
            {caller: (int(n), int(n), own_s, total_s) for caller, (n, own_s, total_s) in pairs[number].items()},
        )
        for number, (samples, seconds_) in all_.items()
    ]


def as_collapsed(record: Record, kind: Literal["cpu", "waiting"] = "cpu") -> str:
    """One line for each way through the program, its frames separated by ``;``, with its microseconds.

    Threads come first where there are several; a chain that waits ends in what it waits for. Flame graph scripts,
    speedscope and inferno read it.

    Raises:
        ConfigError: ``kind`` is neither ``cpu`` nor ``waiting``.
    """
    if kind not in ("cpu", "waiting"):
        raise ConfigError(f"there are no {kind!r} stacks", field="kind", hint="cpu or waiting")
    labels = [_label(frame, record.directory) for frame in record.frames]
    stacks = record.cpu if kind == "cpu" else record.waiting
    several = kind == "cpu" and len({stack.owner for stack in stacks}) > 1
    lines: dict[str, float] = defaultdict(float)
    for stack in stacks:
        words = [_word(f"thread {stack.owner}")] if several else []
        words += [labels[number] for number in stack.frames]
        if stack.waits_for:
            words.append(f"waits for: {_word(stack.waits_for)}")
        if words:
            lines[";".join(words)] += stack.seconds
    return "".join(f"{line} {count}\n" for line, each in sorted(lines.items()) if (count := round(each * 1e6)))


def _label(frame: Frame, directory: str) -> str:
    where = place(frame, directory)
    return _word(frame.function if where == "built-in" else f"{frame.function} ({where})")


def _word(text: str) -> str:
    """A frame must hold no separator, and not end in what could be a number of its own."""
    return plain(text).replace(";", ",")


def as_speedscope(record: Record) -> bytes:
    """A file for https://www.speedscope.app: a profile for each thread's CPU time, and one of all waiting.

    Processes that it started follow with theirs.
    """
    frames: dict[tuple[str, str, int], int] = {}
    profiles = []
    for process, each in processes(record):
        suffix = f" of {process}" if process else ""
        profiles += [_profile(name + suffix, stacks, each, frames) for name, stacks in _groups(each)]
    document = {
        "$schema": _SCHEMA,
        "name": plain(record.command),
        "exporter": f"headrace {__version__}",
        "activeProfileIndex": 0,
        "shared": {"frames": [_speedscope_frame(*key) for key in frames]},
        "profiles": profiles,
    }
    return msgspec.json.encode(document)


def _groups(record: Record) -> Iterator[tuple[str, list[Stack]]]:
    owners = list(dict.fromkeys(stack.owner for stack in record.cpu))
    for owner in owners or [""]:
        name = "CPU" if len(owners) < 2 else f"CPU: {plain(owner)}"
        yield name, [stack for stack in record.cpu if stack.owner == owner]
    if record.waiting:
        yield "Waiting", record.waiting


def _profile(
    name: str, stacks: Sequence[Stack], record: Record, frames: dict[tuple[str, str, int], int]
) -> dict[str, object]:
    """Frames that are new are added; a record has no order in time, so that viewers show one of no meaning."""
    known = [frames.setdefault((each.function, each.file, each.line), len(frames)) for each in record.frames]
    samples = []
    for stack in stacks:
        sample = [known[number] for number in stack.frames]
        if stack.waits_for:
            sample.append(frames.setdefault((f"waits for: {stack.waits_for}", "", 0), len(frames)))
        samples.append(sample)
    return {
        "type": "sampled",
        "name": name,
        "unit": "seconds",
        "startValue": 0,
        "endValue": sum(stack.seconds for stack in stacks),
        "samples": samples,
        "weights": [stack.seconds for stack in stacks],
    }


def _speedscope_frame(function: str, file: str, line: int) -> dict[str, object]:
    found: dict[str, object] = {"name": function}
    if file not in ("", "~"):
        found["file"] = file
        if line:
            found["line"] = line
    return found


def processes(record: Record) -> Iterator[tuple[str, Record]]:
    """A record, with an empty name, and those of the processes below it."""
    yield "", record
    for child in record.children:
        if child.record is not None:
            for name, each in processes(child.record):
                yield name or f"{plain(child.command)} ({child.pid})", each
