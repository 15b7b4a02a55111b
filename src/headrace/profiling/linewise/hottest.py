"""The second of two passes: the functions that the first one found hot, followed line by line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from headrace.profiling.linewise.following import Following
from headrace.profiling.linewise.rows import name_of_frame
from headrace.profiling.record import Frame, Line, Record

_LEAST_SHARE = 0.01  # of all time that is somebody's; a function below tells nothing


def hottest(record: Record, most: int = 5) -> list[Frame]:
    """Functions of the user's own code in which most time goes, by a first pass; the hottest first.

    A function's own time includes what libraries do for it, up to where they call the user's code again: what can be
    changed is the line that calls them. By the samples of running stacks where there are any, else by the trace.

    Args:
        most: no more than these; none with less than a hundredth of the time.
    """
    seconds = _by_samples(record) or _by_trace(record)
    total = sum(seconds.values())
    ordered = sorted((number for number in seconds if seconds[number] > 0), key=lambda number: -seconds[number])
    return [record.frames[number] for number in ordered[:most] if seconds[number] >= _LEAST_SHARE * total]


def _by_samples(record: Record) -> dict[int, float]:
    found: dict[int, float] = defaultdict(float)
    for stack in record.cpu:
        innermost = next((number for number in reversed(stack.frames) if record.frames[number].kind == "user"), None)
        if innermost is not None:
            found[innermost] += stack.seconds
    return found


def _by_trace(record: Record) -> dict[int, float]:
    """Own time, and that of what is called from there and is not the user's. (What that calls in turn is not known to
    be on the same account.)"""
    found: dict[int, float] = defaultdict(float)
    for call in record.calls:
        if record.frames[call.frame].kind == "user":
            found[call.frame] += call.own_s
            continue
        for caller, (_, _, own_s, _) in call.callers.items():
            if record.frames[caller].kind == "user":
                found[caller] += own_s
    return found


def follow(frames: Iterable[Frame], run: Callable[[], Any]) -> list[Line]:
    """Run a program with these functions followed, wherever and whenever they are defined, and give their lines.

    An exception of the program's passes through, and the lines with it: where it may end by one, use `following`.

    Args:
        frames: functions by file, first line and name; methods and functions within functions too.
        run: the program.
    """
    with following(frames) as found:
        run()
    return found.lines()


def following(frames: Iterable[Frame]) -> Following:
    """The same as a block, whose ``lines()`` are there however it ends."""
    return Following(names=map(name_of_frame, frames))
