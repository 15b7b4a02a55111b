"""Functions that are called very often: with the same arguments again, or with others each time."""

from __future__ import annotations

from headrace.profiling.diagnose.explained import Claim, Explained, duration, percent
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.view import is_users, place, spots, total_s, users
from headrace.profiling.record import Call, Record

MANY = 10_000
_REPEATED = 0.5
# A fifth of the time in the function, a tenth of it to be saved.
_SHARE = 0.2
_SAVED = 0.1
_NEARLY_ALL = 0.9


@once
def repeated(record: Record) -> list[Claim]:
    """Called 10,000 times or more, half of them or more with arguments that had been seen before."""
    found = []
    for call in record.calls:
        frame = record.frames[call.frame]
        if call.calls < MANY or call.repeated is None or call.repeated < _REPEATED or not is_users(frame):
            continue
        stacks = {number: 1.0 for number, stack in enumerate(record.cpu) if call.frame in stack.frames}
        share = _share(record, call, stacks)
        if share < _SHARE or share * call.repeated < _SAVED:
            continue
        finding = Explained(
            "cache_it",
            "warning",
            f"{frame.function} computes the same answers again and again",
            f"{call.calls:,} calls, {percent(call.repeated)} of them with arguments seen before; "
            f"{percent(share)} of the time, {duration(call.cumulative_s)} traced, {place(record, call.frame)}",
            "if it depends on nothing but its arguments, put `@functools.lru_cache` (with a `maxsize`) on it, or look "
            "the answer up once before the loop",
            frame.file,
            frame.line,
            share=share * call.repeated,
        )
        found.append(Claim(finding, stacks))
    found.sort(key=lambda claim: -claim.finding.share)
    return _nested(record, found)


def _share(record: Record, call: Call, stacks: dict[int, float]) -> float:
    """Of the time, with all that it calls: as sampled where it was, for a trace makes much of short calls."""
    if record.cpu:
        return sum(record.cpu[number].seconds for number in stacks) / total_s(record)
    return min(1.0, call.cumulative_s / record.wall_s) if record.wall_s else 0.0


def _nested(record: Record, claims: list[Claim]) -> list[Claim]:
    """Of functions that call each other one: where a cache saves most, of those alike the one that does the work."""
    found: list[Claim] = []
    taken: set[int] = set()
    for claim in claims:
        mine = set(claim.weights)
        inner = any(other is not claim and _stands_for(record, other, claim) for other in claims)
        seconds = sum(record.cpu[number].seconds for number in mine)
        if not inner and sum(record.cpu[number].seconds for number in mine - taken) >= seconds / 2:
            found.append(claim)
            taken |= mine
    return found


def _stands_for(record: Record, inner: Claim, outer: Claim) -> bool:
    """Whether a function's time is nearly all of another's, which only passes it on."""
    part = sum(record.cpu[number].seconds for number in inner.weights)
    whole = sum(record.cpu[number].seconds for number in outer.weights)
    if not inner.weights.keys() <= outer.weights.keys() or part < _NEARLY_ALL * whole:
        return False
    number = next(iter(inner.weights), None)
    if number is None:
        return False
    functions = [record.frames[frame] for frame in record.cpu[number].frames]
    lines = [(frame.file, frame.line) for frame in functions]
    return lines.index((inner.finding.file, inner.finding.line)) > lines.index((outer.finding.file, outer.finding.line))


@once
def differing(record: Record) -> list[Claim]:
    """Called 10,000 times or more, mostly with new arguments, and a fifth of the time is its own."""
    own = spots(record)
    found = []
    for call in record.calls:
        frame = record.frames[call.frame]
        if call.calls < MANY or call.repeated is None or call.repeated >= _REPEATED or not is_users(frame):
            continue
        share = own[call.frame].seconds / total_s(record) if call.frame in own else 0.0
        if share < _SHARE:
            continue
        finding = Explained(
            "called_often",
            "warning",
            f"{frame.function} is called {call.calls:,} times, for one item each",
            f"{percent(share)} of the time is its own, {duration(call.own_s / call.calls)} a call; only "
            f"{percent(call.repeated)} of the calls had arguments seen before, so a cache would not help; "
            f"{place(record, call.frame)}",
            "give it many items at once (a list, or an array with NumPy), so that the loop runs inside; or write the "
            "loop's body in the place of the call",
            frame.file,
            frame.line,
            share=share,
        )
        stacks = {n: 1.0 for n, stack in enumerate(record.cpu) if _ends_in(record, n, call.frame)}
        found.append(Claim(finding, stacks))
    return found


def _ends_in(record: Record, number: int, frame: int) -> bool:
    position = users(record, record.cpu[number])
    return position >= 0 and record.cpu[number].frames[position] == frame
