"""Threads in each other's way: for the interpreter's lock, and for locks of the program."""

from __future__ import annotations

import re
from collections import defaultdict

from headrace.profiling.diagnose.explained import Claim, Explained, duration, percent
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.view import enough, place, spots, users
from headrace.profiling.record import Record, Stack

# Of the switch interval. Whoever wakes must wait as long for whoever computes in Python. Where threads compute outside
# the interpreter it wakes at once, so this tells the two apart; how many want to run, the threads' own clocks tell.
LATE = 0.8
# Any wake-up takes 0.1 ms.
_LEAST_LATE_S = 0.0003
_SHARE = 0.4
_RUNNABLE = 1.5
# More, and they run side by side outside the interpreter. It can be less than one: the machine may be busy, and that
# the interpreter's lock was not free is shown by the late wake-ups.
_CPU_OF_WALL = 1.35

_LOCKED = 0.3
_LEAST_LOCKED_S = 0.1
# Whoever waits for room waits for what those do who have it.
_ROOM = re.compile(r"Semaphore\.")


@once
def contention(record: Record) -> list[Claim]:
    """Several threads want to run Python and one processor's worth is done, with every wake-up late."""
    gil = record.gil
    if gil is None or not enough(record) or gil.shares < _SHARE or gil.runnable < _RUNNABLE:
        return []
    if gil.late_s < max(LATE * gil.switch_s, _LEAST_LATE_S):
        return []
    used = record.cpu_s / record.wall_s
    if used > _CPU_OF_WALL:
        return []
    own = sorted(spots(record).values(), key=lambda spot: -spot.seconds)
    if not own:
        return []
    top = own[0]
    share = min(1.0, gil.shares)
    finding = Explained(
        "gil_contention",
        "warning",
        "threads take turns at running Python: together they get one processor",
        f"{gil.runnable:.1f} threads could run on average, at least two for {percent(gil.shares)} of the time, yet "
        f"{used:.2f} processors were used; a sleeping thread woke {duration(gil.late_s)} late (one busy thread: "
        f"{duration(gil.switch_s)}); most of it in {place(record, top.frame, top.line)}",
        "run the computing part in processes (`ProcessPoolExecutor`), or in a library that lets go of the GIL "
        "(NumPy, torch, the Rust tokenizers); more threads make it slower",
        record.frames[top.frame].file,
        top.line,
        share=share,
    )
    return [Claim(finding, dict.fromkeys(range(len(record.cpu)), 1.0))]


@once
def locks(record: Record) -> list[Claim]:
    """Two threads or tasks or more spend a third of their time waiting for the same lock."""
    waited: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    of_all: dict[str, float] = defaultdict(float)
    for stack in (*record.cpu, *record.waiting):
        of_all[stack.owner] += stack.seconds
    for stack in record.waiting:
        position = users(record, stack)
        if stack.waits_for == "lock" and position >= 0 and not for_room(record, stack):
            waited[stack.frames[position], stack.lines[position]][stack.owner] += stack.seconds
    found = []
    for (frame, line), owners in waited.items():
        seconds = sum(owners.values())
        share = seconds / max(1e-9, sum(of_all[owner] for owner in owners))
        weight = min(1.0, seconds / len(owners) / record.wall_s) if record.wall_s else 0.0
        if len(owners) < 2 or share < _LOCKED or weight < _LOCKED or seconds < _LEAST_LOCKED_S:
            continue
        finding = Explained(
            "lock_contention",
            "warning",
            f"{len(owners)} threads or tasks stand in line for one lock",
            f"{duration(seconds)} of waiting, {percent(share)} of their time, at {place(record, frame, line)}",
            "do less while the lock is held: compute and talk to others before or after it, hold it only to change "
            "what is shared; or give each thread its own part and join them at the end",
            record.frames[frame].file,
            line,
            share=weight,
        )
        found.append(Claim(finding))
    return found


def for_room(record: Record, stack: Stack) -> bool:
    """Whether it is a semaphore that is waited for: a bound that somebody has set on purpose."""
    below = stack.frames[users(record, stack) + 1 :]
    return any(_ROOM.search(record.frames[frame].function) for frame in below)
