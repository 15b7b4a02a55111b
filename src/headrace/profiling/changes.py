"""What each function of a program takes in two runs of it, and whether sampling alone explains the difference.

How often a function is sampled varies by chance, as the square root of the count: that much is known from one run each.
How fast the machine was is not: it changes all seconds and no share.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from headrace.profiling.record import Frame, Record, Stack
from headrace.profiling.render.totals import place, plain, script, short

# Standard deviations of sampling: many functions are looked at, and one in twenty would pass two of them by chance.
_DEVIATIONS = 3.0


class Change(msgspec.Struct, frozen=True):
    """A function's own time with that of what it calls in libraries, before and after.

    Args:
        kind: ``cpu`` or ``waiting``; the latter in task-seconds.
        where: file and line, as after.
        share_before, share_after: of all of its kind, 0 to 1.
        of_run: the change as a share of all of its kind before; negative is less.
        noise_s: what sampling alone makes of it, three standard deviations; ``None`` where nothing was sampled.
        outside: whether seconds and share both changed by more than sampling explains; ``None`` where nothing was
            sampled, or where only the seconds did, as on a machine that has become slower as a whole.
    """

    function: str
    where: str
    kind: Literal["cpu", "waiting"]
    before_s: float
    after_s: float
    share_before: float
    share_after: float
    of_run: float
    noise_s: float | None
    outside: bool | None


class _Sum(msgspec.Struct):
    """Of one function: seconds, and the variance that sampling gives them; ``where`` it is."""

    seconds: float = 0.0
    variance: float = 0.0
    where: str = ""


def changes(before: Record, after: Record) -> list[Change]:
    """What takes more or less time, most first: running code, then waiting."""
    window = after.wall_s / before.wall_s if (before.attached or after.attached) and before.wall_s > 0 else 1.0
    if before.cpu and after.cpu:
        found = _changes("cpu", before, after, window, _sampled(before, before.cpu), _sampled(after, after.cpu))
    else:
        found = _changes("cpu", before, after, window, _traced(before), _traced(after))
    waits = _sampled(before, before.waiting), _sampled(after, after.waiting)
    return [*found, *_changes("waiting", before, after, window, *waits)]


_Sums = dict[tuple[str, str], _Sum]


def _sampled(record: Record, stacks: Iterable[Stack]) -> _Sums:
    """By the innermost function of the program's own: what it calls in libraries is on its account."""
    sums: _Sums = defaultdict(_Sum)
    for stack in stacks:
        if not stack.frames:
            continue
        frames = [record.frames[number] for number in stack.frames]
        frame = next((each for each in reversed(frames) if each.kind == "user"), frames[-1])
        name = f"{frame.function}, waits for: {stack.waits_for}" if stack.waits_for else frame.function
        _add(sums, name, frame, record, stack.seconds, stack.seconds**2 / max(1, stack.samples))
    return sums


def _traced(record: Record) -> _Sums:
    sums: _Sums = defaultdict(_Sum)
    for call in record.calls:
        frame = record.frames[call.frame]
        _add(sums, frame.function, frame, record, call.own_s, 0.0)
    return sums


def _add(sums: _Sums, name: str, frame: Frame, record: Record, seconds_: float, variance: float) -> None:
    # What was run may have been a copy by another name.
    file = "" if frame.file == script(record) else short(frame.file, record.directory)
    each = sums[name, file]
    each.seconds += seconds_
    each.variance += variance
    each.where = place(frame, record.directory)


def _changes(
    kind: Literal["cpu", "waiting"], before: Record, after: Record, window: float, old: _Sums, new: _Sums
) -> list[Change]:
    samples = [sum(each.samples for each in getattr(record, kind)) for record in (before, after)]
    whole = [sum(each.seconds for each in sums.values()) for sums in (old, new)]
    found = []
    for key in {**old, **new}:
        one, other = old.get(key, _Sum()), new.get(key, _Sum())
        share, share_after = (
            each.seconds / all_ if all_ > 0 else 0.0 for each, all_ in ((one, whole[0]), (other, whole[1]))
        )
        one_s = one.seconds * window
        noise_s = _DEVIATIONS * math.sqrt(one.variance * window**2 + other.variance) or None
        found.append(
            Change(
                function=plain(key[0]),
                where=plain(other.where or one.where),
                kind=kind,
                before_s=one_s,
                after_s=other.seconds,
                share_before=share,
                share_after=share_after,
                of_run=(other.seconds - one_s) / (whole[0] * window) if whole[0] > 0 else 0.0,
                noise_s=noise_s,
                outside=_outside(other.seconds - one_s, noise_s, (share, share_after), samples),
            )
        )
    return sorted(found, key=lambda each: (-abs(each.after_s - each.before_s), each.function))


def _outside(
    change_s: float, noise_s: float | None, shares: tuple[float, float], samples: Sequence[int]
) -> bool | None:
    """Whether sampling does not explain a change; ``None`` if a machine of another speed would."""
    if noise_s is None:
        return None
    if abs(change_s) <= noise_s:
        return False
    spread = math.sqrt(sum(share * (1 - share) / max(1, n) for share, n in zip(shares, samples, strict=True)))
    moved = shares[1] - shares[0]
    return True if abs(moved) > _DEVIATIONS * spread and moved * change_s > 0 else None
