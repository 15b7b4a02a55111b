"""Traced calls with the time that coroutines were awaited: what a trace alone puts into the loop's `select`.

A view for people and for viewers of calls. The record keeps the two apart, for one is counted and the other sampled.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import msgspec

from headrace.profiling.record import Call, Frame, Record, Stack

# What an idle loop waits in.
_SELECT = re.compile(r"(poll|select|control)' of 'select\.\w+' objects|built-in method select\.select")
_ON_LOOP = re.compile(r"[/\\](asyncio[/\\]\w+|selectors)\.py$")


@dataclass
class _Sum:
    calls: int
    primitive: int
    own_s: float
    cumulative_s: float
    callers: dict[int, tuple[int, int, float, float]]


def with_awaits(record: Record) -> Record:
    """The record whose calls have the time of awaits: each coroutine of a chain in its cumulative time, the last one in
    its own. It is no longer in the loop's own waiting. Without traced coroutines it is the same record."""
    chains = [stack for stack in record.waiting if stack.frames and _is_chain(record, stack)]
    if not record.calls or not chains:
        return record
    sums = {
        call.frame: _Sum(call.calls, call.primitive, call.own_s, call.cumulative_s, dict(call.callers))
        for call in record.calls
    }
    for chain in chains:
        _add(sums, chain, record.frames)
    for call in record.calls:
        if _SELECT.search(record.frames[call.frame].function) and _called_by_loop(record, call):
            sums[call.frame].own_s = sums[call.frame].cumulative_s = 0.0
    longest = {call.frame: call for call in record.calls}
    calls = [_call(frame, each, longest.get(frame)) for frame, each in sums.items()]
    return msgspec.structs.replace(record, calls=sorted(calls, key=lambda call: -call.cumulative_s))


def _is_chain(record: Record, stack: Stack) -> bool:
    """Whether it is of a task. A thread's stack begins with its start or with a module, and calls no coroutine."""
    first = record.frames[stack.frames[0]].function
    return first not in ("<module>", "Thread._bootstrap") and record.frames[stack.frames[-1]].function != "<module>"


def _add(sums: dict[int, _Sum], chain: Stack, frames: list[Frame]) -> None:
    way = [number for number in chain.frames if frames[number].kind != "builtin"]
    if not way:
        return
    for number in dict.fromkeys(way):
        sums.setdefault(number, _Sum(0, 0, 0.0, 0.0, {})).cumulative_s += chain.seconds
    sums[way[-1]].own_s += chain.seconds
    for caller, called in dict.fromkeys(itertools.pairwise(way)):
        if caller != called:
            calls, primitive, own_s, cumulative_s = sums[called].callers.get(caller, (0, 0, 0.0, 0.0))
            own_s += chain.seconds if called == way[-1] else 0.0
            sums[called].callers[caller] = (calls, primitive, own_s, cumulative_s + chain.seconds)


def _called_by_loop(record: Record, call: Call) -> bool:
    return all(_ON_LOOP.search(record.frames[caller].file) for caller in call.callers)


def _call(frame: int, each: _Sum, call: Call | None) -> Call:
    return Call(
        frame,
        each.calls,
        each.primitive,
        each.own_s,
        each.cumulative_s,
        each.callers,
        call.repeated if call else None,
        call.longest_s if call else None,
    )
