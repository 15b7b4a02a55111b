"""Where the processor's time goes, if no rule says why: hot spots, the way to them, single slow calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.profiling.diagnose.claiming import left
from headrace.profiling.diagnose.explained import Explained, duration, percent, times
from headrace.profiling.diagnose.kinds import IMPORTS, MODELS, import_weights, weighted_spots, weights
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.view import (
    LEAST_S,
    SURELY,
    Spot,
    chain,
    enough,
    is_users,
    of_task,
    outside_s,
    own_s,
    place,
    spots,
    surely,
    total_s,
    traced_s,
    users,
    waits,
)
from headrace.profiling.record import Record, Stack

HOT = 0.2
# The two ways of measuring must agree this well.
_AGREE = 2.0
_WAY = 0.3
_OWN_OF_WAY = 0.1
_FEW = 10
_SLOW_S = 0.1
_OUTLIER = 10
_REST = 0.25


@dataclass(frozen=True)
class Hot:
    """A function whose own time is a fifth of all or more.

    Args:
        sampled: share by the sampler; ``None`` without one.
        traced: share by the trace; ``None`` if it was not traced.
        seconds: of running stacks.
    """

    spot: Spot
    sampled: float | None
    traced: float | None

    @property
    def share(self) -> float:
        return self.sampled if self.sampled is not None else self.traced or 0.0


@once
def hot(record: Record) -> list[Hot]:
    """By the sampler or by the trace, most first."""
    if record.wall_s < LEAST_S or (record.cpu and not enough(record)):
        return []
    mine = {spot.frame: spot for spot in weighted_spots(record, dict(enumerate(_unexplained(record))))}
    traced = _traced_shares(record, mine)
    found = []
    for frame in mine.keys() | traced.keys():
        spot = mine.get(frame) or Spot(frame, 0.0, 0, {record.frames[frame].line: 0.0})
        sampled = spot.seconds / total_s(record) if record.cpu else None
        if _is_hot(record, sampled, *traced.get(frame, (None, 0.0))):
            found.append(Hot(spot, sampled, traced.get(frame, (None, 0.0))[0]))
    return sorted(found, key=lambda each: -each.share)


def _traced_shares(record: Record, mine: Mapping[int, Spot]) -> dict[int, tuple[float, float]]:
    """By function of the user's: with the libraries below it, and with only the built-in functions that it calls."""
    whole = max(record.wall_s, sum(call.own_s for call in record.calls if not waits(record, call.frame)))
    seen, direct = spots(record), dict(own_s(record))
    for call in record.calls:
        if record.frames[call.frame].kind == "builtin" and not waits(record, call.frame):
            for caller, numbers in call.callers.items():
                direct[caller] = direct.get(caller, 0.0) + numbers[2]
    found = {}
    for frame, seconds in traced_s(record).items():
        # Of what was sampled there, as much is explained by other rules.
        part = mine[frame].seconds / seen[frame].seconds if frame in mine else 0.0 if frame in seen else 1.0
        found[frame] = (seconds * part / whole, direct.get(frame, 0.0) * part / whole)
    return found


def _is_hot(record: Record, sampled: float | None, traced: float | None, direct: float) -> bool:
    """A trace has exact times of what it followed, but makes much of short calls; a sampler does not, but has chance in
    it. Where they agree the trace decides; else each must be sure of itself."""
    if traced is None or (sampled is not None and sampled > _AGREE * traced):
        sure = surely(record, sampled or 0.0)
        return sampled is not None and sampled >= HOT and sure >= max(SURELY * HOT, _AGREE * (traced or 0.0))
    if sampled is not None and sampled < traced / _AGREE:
        return direct >= HOT
    return traced >= HOT


@once
def _unexplained(record: Record) -> list[float]:
    parts = left(record)
    for known in (import_weights(record), weights(record, MODELS)):
        for number, weight in known.items():
            parts[number] = min(parts[number], 1.0 - weight)
    return parts


def hot_spots(record: Record) -> list[Explained]:
    """A fifth of the time or more is a function's own, counting the built-in functions that it calls."""
    told = {frame for _, frame in (*_slow(record), *_outliers(record), *_into_libraries(record))}
    return [_hot_finding(record, each) for each in hot(record) if each.spot.frame not in told]


def _hot_finding(record: Record, each: Hot) -> Explained:
    frame, spot = record.frames[each.spot.frame], each.spot
    calls = next((call.calls for call in record.calls if call.frame == spot.frame), 0)
    counted = f", called {times(calls)}" if calls else ""
    seen = (
        f"{percent(each.sampled)} of the time in {spot.samples} samples" if each.sampled is not None else "not sampled"
    )
    by_trace = f", {percent(each.traced)} of the traced time" if each.traced is not None else ""
    doubt = _doubt(each)
    return Explained(
        "cpu_hot_spot",
        "info" if doubt else "warning",
        f"{frame.function} takes {percent(each.share)} of the time itself",
        f"{seen}{by_trace}, most of it in {place(record, spot.frame, spot.line)}{counted}{doubt}",
        "see which of its lines cost most (`headrace profile --lines auto`), then a better algorithm, less work in the "
        "inner loop, or the loop in NumPy; if these are tensor operations already, `headrace optimize`",
        frame.file,
        spot.line,
        share=each.share,
    )


def _doubt(each: Hot) -> str:
    if each.sampled is None:
        return "; the run was not sampled, so this is not confirmed: a trace makes much of short calls"
    if each.traced is None:
        return ""
    if each.sampled < each.traced / _AGREE:
        return "; the sampler does not confirm it: tracing makes much of short calls"
    return ""


@once
def _slow(record: Record) -> list[tuple[Explained, int]]:
    """Calls out of a hot function into a library, ten at most and 100 ms each or more, that are most of what is hot."""
    outside = outside_s(record)
    found = []
    for each in hot(record):
        caller = each.spot.frame
        whole = (each.traced or 0.0) and sum(outside.get(caller, {}).values())
        for call in record.calls:
            calls = call.callers.get(caller, (0, 0, 0.0, 0.0))[0]
            seconds = outside.get(caller, {}).get(call.frame, 0.0)
            called = record.frames[call.frame]
            if (
                not 0 < calls <= _FEW
                or called.kind == "user"
                or IMPORTS.has(called)
                or seconds < _SLOW_S * calls
                or seconds < whole / 2
            ):
                continue
            if seconds / record.wall_s >= HOT and each.sampled is not None and each.sampled >= HOT:
                found.append((_slow_finding(record, each, call.frame, calls, seconds), caller))
    return found


def _slow_finding(record: Record, each: Hot, frame: int, calls: int, seconds: float) -> Explained:
    name = record.frames[frame].function
    return Explained(
        "slow_call",
        "warning",
        f"{name} is called {times(calls)} and takes {duration(seconds / calls)} a call",
        f"{percent(each.share)} of the time, {each.spot.samples} samples, called from "
        f"{place(record, each.spot.frame, each.spot.line)}, {duration(seconds)} traced",
        "if it belongs to the start, do it once and keep the result on disk, or not until it is needed; otherwise give "
        "it less to do, or let it run beside the rest",
        record.frames[each.spot.frame].file,
        each.spot.line,
        share=each.share,
    )


def slow_calls(record: Record) -> list[Explained]:
    """Few calls that take long each, or one among many that took much longer than the others."""
    return [finding for finding, _ in (*_slow(record), *_outliers(record))]


@once
def _outliers(record: Record) -> list[tuple[Explained, int]]:
    # Of a coroutine or generator a call is one step and the longest is its life. Coroutines are seen in tasks that
    # wait; of a generator's life little is left for other calls, no more than was missed of its beginning and end.
    tasks = {frame for stack in record.waiting if of_task(record, stack) for frame in stack.frames}
    found = []
    for call in record.calls:
        frame, longest = record.frames[call.frame], call.longest_s or 0.0
        if not is_users(frame) or call.primitive <= _FEW or longest < max(_SLOW_S, HOT * record.wall_s):
            continue
        rest = call.cumulative_s - longest
        others = rest / (call.primitive - 1)
        if call.frame in tasks or rest < _REST * longest or longest < _OUTLIER * others:
            continue
        finding = Explained(
            "slow_call",
            "warning",
            f"one call of {frame.function} took {duration(longest)}, the others {duration(others)}",
            f"{call.primitive:,} calls, {percent(longest / record.wall_s)} of the run in one of them; "
            f"{place(record, call.frame)}",
            "if it is the first, it is a warm-up (a cache, a compiler, a connection): do it at the start, before "
            "anybody waits; otherwise see what that one was given",
            frame.file,
            frame.line,
            share=min(1.0, longest / record.wall_s),
        )
        found.append((finding, call.frame))
    return found


def children(record: Record) -> list[Explained]:
    """A function passes nearly all of its time on, over others, to a hot one, or to a library: the way down."""
    inclusive, own = _inclusive(record), spots(record)
    slow = {frame for _, frame in (*_slow(record), *_outliers(record))}
    libraries = {frame: finding for finding, frame in _into_libraries(record) if frame not in slow}
    found: dict[int, Explained] = {}
    for each in hot(record):
        stacks = [stack for stack in record.cpu if _inner(record, stack) == each.spot.frame]
        if not stacks or each.sampled is None or each.spot.frame in slow | libraries.keys():
            continue
        top = max(stacks, key=lambda stack: stack.seconds)
        end = users(record, top)
        way = [n for n in range(end) if is_users(record.frames[top.frames[n]])]
        way = [n for n in way if _passes_on(top.frames[n], inclusive, own) and not _is_module(record, top.frames[n])]
        if len(way) >= 2 and inclusive[top.frames[way[0]]] >= _WAY * total_s(record):
            found.setdefault(top.frames[way[0]], _way_finding(record, top, way[0], end, each.share))
    return [*libraries.values(), *found.values()]


@once
def _into_libraries(record: Record) -> list[tuple[Explained, int]]:
    """Hot functions of the user's whose time is spent in a library's Python code, and where in it."""
    parts, found = _unexplained(record), []
    for each in hot(record):
        below: dict[int, float] = {}
        for number, stack in enumerate(record.cpu):
            if _inner(record, stack) == each.spot.frame and record.frames[stack.frames[-1]].kind == "library":
                below[number] = stack.seconds * parts[number]
        if each.share < HOT or sum(below.values()) < (1 - _OWN_OF_WAY) * each.spot.seconds or not below:
            continue
        ends: dict[int, float] = {}
        for number, seconds in below.items():
            ends[record.cpu[number].frames[-1]] = ends.get(record.cpu[number].frames[-1], 0.0) + seconds
        last = max(ends, key=lambda frame: ends[frame])
        top = max((n for n in below if record.cpu[n].frames[-1] == last), key=lambda n: below[n])
        found.append((_library_finding(record, each, record.cpu[top], ends[last] / total_s(record)), each.spot.frame))
    return found


def _library_finding(record: Record, each: Hot, top: Stack, share: float) -> Explained:
    frame, last = record.frames[each.spot.frame], record.frames[top.frames[-1]]
    way = " > ".join(record.frames[number].function for number in top.frames[users(record, top) :])
    return Explained(
        "look_into_children",
        "warning",
        f"{frame.function} passes its time on to a library: look into {last.function}",
        f"{percent(each.share)} of the time is below {place(record, each.spot.frame, each.spot.line)}, "
        f"{each.spot.samples} samples; {percent(share)} is {last.function}'s own: {way}",
        "call it less often or with less, look for a quicker way to the same answer in the library's documentation, or "
        "take another library; its code is not yours to improve",
        frame.file,
        each.spot.line,
        share=each.share,
    )


def _way_finding(record: Record, top: Stack, start: int, end: int, share: float) -> Explained:
    frame, last = top.frames[start], top.frames[end]
    inclusive, own = _inclusive(record), spots(record)
    mine = own[frame].seconds if frame in own else 0.0
    way = chain(record, top.frames[start : end + 1], top.lines[start : end + 1])
    return Explained(
        "look_into_children",
        "info",
        f"{record.frames[frame].function} passes its time on: look into {record.frames[last].function}",
        f"{percent(inclusive[frame] / total_s(record))} of the time is below it, "
        f"{percent(mine / total_s(record))} its own; {percent(own[last].seconds / total_s(record))} is "
        f"{place(record, last, top.lines[end])}'s own: {way}",
        f"read {record.frames[last].function}, not {record.frames[frame].function}; if it cannot be made quicker, call "
        f"{record.frames[frame].function} less often",
        record.frames[frame].file,
        top.lines[start],
        share=share,
    )


def _inner(record: Record, stack: Stack) -> int:
    position = users(record, stack)
    return stack.frames[position] if position >= 0 else -1


def _is_module(record: Record, frame: int) -> bool:
    return record.frames[frame].function == "<module>"


@once
def _inclusive(record: Record) -> dict[int, float]:
    found: dict[int, float] = {}
    for stack in record.cpu:
        for frame in set(stack.frames):
            if is_users(record.frames[frame]):
                found[frame] = found.get(frame, 0.0) + stack.seconds
    return found


def _passes_on(frame: int, inclusive: dict[int, float], own: dict[int, Spot]) -> bool:
    return (own[frame].seconds if frame in own else 0.0) < _OWN_OF_WAY * inclusive[frame]
