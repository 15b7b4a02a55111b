"""Ways to look at a record that several rules share: whose code a stack is in, what is below it, what a name costs.

Time of libraries and of built-in functions belongs to the line of the user's code that called them. Nothing here
judges.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from headrace.profiling.diagnose.once import once
from headrace.profiling.record import Block, Call, Frame, Record, Stack

# Fewer samples say nothing of a share: at twenty, an interval of a fifth of the time is already a tenth to two fifths.
LEAST_SAMPLES = 20
# Where a trace has exact times beside: what holds the interpreter's lock for long keeps the sampler away too.
LEAST_BESIDE_TRACE = 5
# A share that was sampled must be this part of its bound for sure.
SURELY = 0.75
# Shorter runs are mostly the interpreter's own start.
LEAST_S = 0.15

_LOOP = re.compile(r"(^|[/\\])(asyncio[/\\](base_events|events|runners)\.py|uvloop[/\\])")
# Calls of the interpreter that wait: their traced time is nobody's computation.
_WAITS = re.compile(
    r"time\.sleep|_thread\.R?[lL]ock|select\.\w|_socket\.socket|_ssl\.|_queue\.SimpleQueue|posix\.(wait|read)|"
    r"_io\.(BufferedReader|FileIO)|_winapi\.Wait"
)


# Until Python 3.12 these are functions of their own; they belong to the one that they stand in.
_PARTS = re.compile(r"<(listcomp|genexpr|dictcomp|setcomp)>$")


@dataclass
class Spot:
    """A function of the user's, and the running time that belongs to it."""

    frame: int
    seconds: float
    samples: int
    lines: dict[int, float]

    @property
    def line(self) -> int:
        """Where most of the time was seen; 0 if no line was known."""
        known = {line: seconds for line, seconds in self.lines.items() if line}
        return max(known, key=lambda line: (known[line], -line), default=0)


@once
def total_s(record: Record) -> float:
    """What a share of running time is a share of: of all threads together where several ran, else of the run."""
    return max(record.wall_s, sum(stack.seconds for stack in record.cpu), 1e-9)


@once
def enough(record: Record) -> bool:
    """Whether shares of the running stacks mean anything."""
    least = LEAST_BESIDE_TRACE if record.calls else LEAST_SAMPLES
    return record.wall_s >= LEAST_S and sum(stack.samples for stack in record.cpu) >= least


def is_users(frame: Frame) -> bool:
    """Whether it is a function of the user's; a comprehension is a part of one."""
    return frame.kind == "user" and _PARTS.search(frame.function) is None


@once
def pace(record: Record) -> float:
    """Processor time of a second of running stacks, 1 at most: on a busy machine who runs also waits for a turn."""
    running = sum(stack.seconds for stack in record.cpu)
    return min(1.0, record.cpu_s / running) if running else 1.0


@once
def weight_of_samples(record: Record) -> float:
    """How many samples of one length say as much as these of different ones."""
    seconds = sum(stack.seconds for stack in record.cpu)
    squares = sum(stack.seconds**2 / stack.samples for stack in record.cpu if stack.samples)
    return seconds * seconds / squares if squares else 0.0


def surely(record: Record, share: float) -> float:
    """The lower end of a sampled share's interval (Wilson's, 97.5 %): what is there even if chance was kind to it."""
    samples = weight_of_samples(record)
    if samples <= 0:
        return 0.0
    z = 1.96
    middle = share + z * z / (2 * samples)
    spread = z * math.sqrt(max(0.0, share * (1 - share)) / samples + z * z / (4 * samples * samples))
    return (middle - spread) / (1 + z * z / samples)


def users(record: Record, stack: Stack | Block) -> int:
    """Position in the stack of the innermost function of the user's; -1 without one.

    Whoever started an event loop has nothing to do with what the loop itself does.
    """
    for position in range(len(stack.frames) - 1, -1, -1):
        frame = record.frames[stack.frames[position]]
        if is_users(frame):
            return position
        if is_loop(frame):
            return -1
    return -1


def place(record: Record, frame: int, line: int = 0) -> str:
    """As it is told: ``name (file.py:12)``."""
    found = record.frames[frame]
    file = re.split(r"[/\\]", found.file)[-1]
    return f"{found.function} ({file}:{line or found.line})"


def chain(record: Record, frames: Iterable[int], lines: Iterable[int]) -> str:
    """The user's part of a stack, the outermost first."""
    steps = [
        f"{record.frames[frame].function}:{line}"
        for frame, line in zip(frames, lines, strict=True)
        if is_users(record.frames[frame])
    ]
    return " > ".join(steps if len(steps) <= 8 else [*steps[:3], "…", *steps[-4:]])


def on_loop(record: Record, stack: Stack) -> bool:
    """Whether a thread's stack runs below an event loop."""
    return any(is_loop(record.frames[frame]) for frame in stack.frames)


def of_task(record: Record, stack: Stack) -> bool:
    """Whether a waiting stack is a task's chain of awaits, which begins with its coroutine, and not a thread's."""
    if not stack.frames or stack.owner in ("", "MainThread") or on_loop(record, stack):
        return False
    return not record.frames[stack.frames[0]].function.endswith("_bootstrap")


def is_loop(frame: Frame) -> bool:
    return frame.kind != "user" and _LOOP.search(frame.file) is not None


def spots(record: Record) -> dict[int, Spot]:
    """Running time by the function of the user's whose own code, or a library called from there, was running."""
    found: dict[int, Spot] = {}
    for stack in record.cpu:
        position = users(record, stack)
        if position < 0:
            continue
        frame = stack.frames[position]
        spot = found.setdefault(frame, Spot(frame, 0.0, 0, defaultdict(float)))
        spot.seconds += stack.seconds
        spot.samples += stack.samples
        spot.lines[stack.lines[position]] += stack.seconds
    return found


@once
def by_frame(record: Record) -> dict[int, Call]:
    return {call.frame: call for call in record.calls}


def waits(record: Record, frame: int) -> bool:
    """Whether a function is one of the interpreter's that only wait."""
    found = record.frames[frame]
    return found.kind == "builtin" and _WAITS.search(found.function) is not None


@once
def outside_s(record: Record) -> dict[int, dict[int, float]]:
    """By calling function: the functions outside the user's code that it calls, and the traced time spent in them and
    in what they call, as far as it is neither the user's code again nor a wait.

    A trace knows only who called whom, so what a library function spends is divided among its callers as its
    cumulative time was.
    """
    outside = [call for call in record.calls if not is_users(record.frames[call.frame])]
    below: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for call in outside:
        if not waits(record, call.frame):
            for caller, numbers in call.callers.items():
                below[caller].append((call.frame, numbers[3]))
    part = {call.frame: 1.0 for call in outside}  # of its cumulative time, what is spent outside the user's code
    for _ in range(20):  # as deep as calls through libraries matter
        for call in outside:
            inside = call.own_s + sum(seconds * part[other] for other, seconds in below[call.frame])
            part[call.frame] = min(1.0, inside / call.cumulative_s) if call.cumulative_s > 0 else 1.0
    return {caller: {frame: seconds * part[frame] for frame, seconds in called} for caller, called in below.items()}


@once
def own_s(record: Record) -> dict[int, float]:
    """By function: traced time of its own. A ``with`` that waits for a lock is no call, and would be counted in it."""
    found = {call.frame: call.own_s for call in record.calls}
    for stack in record.waiting:
        position = users(record, stack)
        inner = [record.frames[frame].function for frame in stack.frames[position + 1 :]]
        if position >= 0 and inner in ([], ["__enter__"]) and stack.frames[position] in found:
            found[stack.frames[position]] = max(0.0, found[stack.frames[position]] - stack.seconds)
    return found


@once
def traced_s(record: Record) -> dict[int, float]:
    """By function of the user's: traced time of its own and of what it called outside, without waits."""
    outside, own = outside_s(record), own_s(record)
    return {
        call.frame: own[call.frame] + sum(outside.get(call.frame, {}).values())
        for call in record.calls
        if is_users(record.frames[call.frame])
    }


@once
def builtin_shares(record: Record, wanted: re.Pattern[str]) -> dict[int, float]:
    """By function of the user's: the share of its own running time that built-in functions of these names have.

    No sampler sees built-in functions, a trace does: it says how to divide what was sampled.
    """
    found: dict[int, float] = defaultdict(float)
    whole: dict[int, float] = defaultdict(float)
    for call in record.calls:
        frame = record.frames[call.frame]
        if is_users(frame):
            whole[call.frame] += call.own_s
        elif frame.kind == "user" or (frame.kind == "builtin" and not waits(record, call.frame)):
            for caller, numbers in call.callers.items():
                for owner in _owners(record, caller):
                    whole[owner] += numbers[2]
                    if frame.kind == "builtin" and wanted.search(frame.function):
                        found[owner] += numbers[2]
    return {caller: min(1.0, seconds / whole[caller]) for caller, seconds in found.items() if whole[caller] > 0}


def _owners(record: Record, frame: int) -> Iterable[int]:
    """The function itself, or those of the user's that a comprehension stands in."""
    if record.frames[frame].kind != "user" or is_users(record.frames[frame]):
        return [frame]
    call = by_frame(record).get(frame)
    return [caller for caller in call.callers if is_users(record.frames[caller])] if call is not None else []
