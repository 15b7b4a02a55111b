"""Times of a record added up by function, and how a function is called where people read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import msgspec

from headrace.profiling.record import Frame, Record, Stack

# Where installed and standard modules lie: what comes after it says enough, and is the same in every environment.
_LIBRARY = re.compile(r".*[/\\](?:site-packages|dist-packages|lib[/\\]python\d+\.\d+[a-z]?)[/\\]")


class Total(msgspec.Struct):
    """A function over a whole run.

    Args:
        own_s, cumulative_s: without and with what it called.
        calls, primitive: exact where it was traced, else how often it was sampled.
    """

    frame: Frame
    own_s: float = 0.0
    cumulative_s: float = 0.0
    calls: int = 0
    primitive: int = 0


def totals(record: Record) -> list[Total]:
    """Of what was traced; where nothing was, of the running stacks that were sampled."""
    return traced(record) if record.calls else sampled(record, record.cpu)


def traced(record: Record) -> list[Total]:
    return [
        Total(record.frames[call.frame], call.own_s, call.cumulative_s, call.calls, call.primitive)
        for call in record.calls
    ]


def sampled(record: Record, stacks: Sequence[Stack]) -> list[Total]:
    """A function that called itself is counted once for each stack."""
    own, all_, samples = ([0.0] * len(record.frames) for _ in range(3))
    for stack in stacks:
        seconds_, count = stack.seconds, stack.samples
        for number in set(stack.frames):
            all_[number] += seconds_
            samples[number] += count
        if stack.frames:
            own[stack.frames[-1]] += seconds_
    return [
        Total(frame, own[number], all_[number], int(samples[number]), int(samples[number]))
        for number, frame in enumerate(record.frames)
        if samples[number]
    ]


def short(file: str, directory: str = "") -> str:
    """A path as people know it: below the program's directory from there, of a library from its package.

    Args:
        directory: of the program [default: this process's].
    """
    if match := _LIBRARY.match(file):
        return file[match.end() :]
    here = os.path.join(directory or os.getcwd(), "")
    return file.removeprefix(here)


def script(record: Record) -> str:
    """The file that was run, where the command names one: in another run it may have another name."""
    if not record.arguments or record.arguments[0] in ("-m", "-c"):
        return ""
    return os.path.normpath(os.path.join(record.directory, record.arguments[0]))


def place(frame: Frame, directory: str = "") -> str:
    """``file:line``, or that there is none."""
    if frame.file == "~" or not frame.file:
        return "built-in"
    file = short(frame.file, directory)
    return f"{file}:{frame.line}" if frame.line else file


def plain(text: str) -> str:
    """One line without anything that a terminal would take for a command."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def seconds(value: float) -> str:
    """Three digits that mean something, with a unit."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f} s"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if size * factor >= 0.9995:
            # Not :g, which writes what rounds up to 1000 as 1e+03.
            digits = 2 if size * factor < 9.995 else 1 if size * factor < 99.95 else 0
            return f"{value * factor:.{digits}f} {unit}"
    return "0 s" if size < 5e-10 else f"{value * 1e9:.0f} ns"


def percent(share: float) -> str:
    """Of 1: 0.123 is 12 %, below ten per cent with a decimal."""
    value = share * 100
    return f"{value:.0f} %" if abs(value) >= 9.95 or value == 0 else f"{value:.1f} %"
