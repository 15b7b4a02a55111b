"""Time in which nothing of the program runs: for sockets, in sleeps, for another process, for children.

A wait is looked for where the program itself waits: in its main thread or main task, and only where these wait for
others, in those. A server that waits for somebody to call is no finding.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from headrace.profiling.diagnose.explained import Claim, Explained, duration, percent
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.threads import for_room, locks
from headrace.profiling.diagnose.view import chain, is_users, on_loop, place, spots, users
from headrace.profiling.record import Child, Record, Stack

IDLE = 0.4
# Of the idle time: what stands for less is not what the program waits for.
_PART = 0.3
_LEAST_S = 0.1
_CONCURRENT = 4.0
# A child that waits uses a hundredth of its time; on a busy machine one that computes gets a part of it.
_COMPUTES = 0.1
_MAIN = {"MainThread", "Task-1"}
_SERVES = re.compile(r"(^|\.)(serve|serve_forever|main_loop|_serve|accept|sock_accept|run_app|run_forever)$")
_TURN = re.compile(r"waits for its turn")
_CLIENTS = re.compile(
    r"[/\\](httpx|httpcore|aiohttp|requests|urllib3?|asyncpg|psycopg\w*|redis|pymongo|motor|grpc|botocore|openai|"
    r"aiomysql|sqlalchemy)[/\\]"
)
# A step of an agent's own: that it is written down is not what the agent waits for, and nothing it could ask otherwise.
_STEPS = re.compile(r"[/\\]headrace[/\\]tasks[/\\]")
_WHY = {
    "socket": (
        "io_wait",
        "the program waits for answers over sockets",
        "ask for several answers at a time (asyncio.gather or a TaskGroup, a thread pool for blocking clients), keep "
        "connections open, ask for many things in one request",
    ),
    "sleep": (
        "sleep_wait",
        "the program sleeps",
        "wait for the event itself instead of looking again and again (Event, Condition, a queue, a callback), or make "
        "the pause shorter; sleeps that must be can overlap (asyncio.gather)",
    ),
    "lock": (
        "lock_wait",
        "the program waits for a lock",
        "do less while the lock is held, above all no I/O; see which thread holds it at the line named",
    ),
    "process": (
        "process_wait",
        "the program waits for another process",
        "start it earlier and collect its result later, or several at a time; profile that process itself",
    ),
}


@dataclass
class _Wait:
    """Waiting at one line of the user's, for one reason."""

    seconds: float = 0.0
    longest: Stack | None = None


@once
def io(record: Record) -> list[Claim]:
    """40 % of the run or more is idle, and it is known what for."""
    idle = idle_s(record)
    if record.wall_s <= 0 or idle / record.wall_s < IDLE or idle < _LEAST_S:
        return []
    stacks = waits(record)
    reasons: dict[str, dict[tuple[int, int], _Wait]] = defaultdict(lambda: defaultdict(_Wait))
    for stack in stacks:
        position = users(record, stack)
        wait = reasons[stack.waits_for][stack.frames[position], stack.lines[position]]
        wait.seconds += stack.seconds
        if wait.longest is None or stack.seconds > wait.longest.seconds:
            wait.longest = stack
    total = sum(stack.seconds for stack in stacks)
    # On a busy machine a program is also idle because others run: only what was seen to wait counts.
    if min(total, idle) < IDLE * record.wall_s:
        return []
    told = {"process"} if children(record) else set()
    told |= {"lock"} if locks(record) else set()
    found = []
    for reason, places in reasons.items():
        seconds = sum(wait.seconds for wait in places.values())
        if reason not in told and seconds >= _PART * total:
            share = min(1.0, seconds / max(total, idle) * idle / record.wall_s)
            found.append(Claim(_finding(record, reason, places, seconds, share)))
    return found


@once
def idle_s(record: Record) -> float:
    """Without the time in which an event loop was kept busy or blocked: then its tasks wait for their turn, whatever
    they say."""
    looping = sum(stack.seconds for stack in record.cpu if on_loop(record, stack))
    looping += sum(stack.seconds for stack in record.waiting if stack.waits_for in _WHY and on_loop(record, stack))
    blocked = sum(block.seconds for block in record.blocks)
    turns: dict[str, float] = defaultdict(float)
    for stack in record.waiting:
        if stack.frames and _TURN.search(record.frames[stack.frames[-1]].function):
            turns[stack.owner] += stack.seconds
    return max(0.0, record.wall_s - max(record.cpu_s, looping, blocked, *turns.values()))


def _finding(
    record: Record,
    reason: str,
    places: dict[tuple[int, int], _Wait],
    seconds: float,
    share: float,
) -> Explained:
    code, title, advice = _WHY[reason]
    frame, line = max(places, key=lambda where: places[where].seconds)
    wait = places[frame, line]
    assert wait.longest is not None
    at_once = _at_once(record, reason)
    many = f", about {at_once:.0f} at a time already" if at_once >= _CONCURRENT else ""
    way = chain(record, wait.longest.frames, wait.longest.lines)
    return Explained(
        code,
        "info" if many else "warning",
        f"{title}, {percent(share)} of the run",
        f"wall time {duration(record.wall_s)}, CPU time {duration(record.cpu_s)}; of {seconds:.3g} task-seconds "
        f"of this waiting {percent(wait.seconds / seconds)} in {place(record, frame, line)}: {way}{many}",
        advice,
        record.frames[frame].file,
        line,
        share=share,
    )


def _at_once(record: Record, reason: str) -> float:
    """How many waited for this reason at a time, on the mean. A main task that awaits others waits with them."""
    seconds = sum(each.seconds for each in _known(record) if each.waits_for == reason and each.owner not in _MAIN)
    return seconds / max(1e-9, idle_s(record))


def waits(record: Record) -> list[Stack]:
    """The waiting stacks that account for idle time, each with a line of the user's."""
    known = _known(record)
    main = [stack for stack in known if stack.owner in _MAIN]
    return main if sum(stack.seconds for stack in main) >= idle_s(record) / 2 else known


def _known(record: Record) -> list[Stack]:
    """Not those of an event loop's thread: its tasks say what they wait for, and a callback that waits blocks it."""
    serving = any(_serves(record, stack) for stack in record.waiting if stack.owner in _MAIN)
    return [
        stack
        for stack in record.waiting
        if stack.waits_for in _WHY and users(record, stack) >= 0 and not on_loop(record, stack)
        if not for_room(record, stack) and not _serves(record, stack) and not _journals(record, stack)
        if not (serving and _waits_for_callers(record, stack))
    ]


def _serves(record: Record, stack: Stack) -> bool:
    return any(
        _SERVES.search(record.frames[frame].function) for frame in stack.frames if record.frames[frame].kind != "user"
    )


def _journals(record: Record, stack: Stack) -> bool:
    """Whether it waits for the store of tasks, and not in a function of the user's that is a step."""
    inner = stack.frames[users(record, stack) + 1 :]
    return any(_STEPS.search(record.frames[frame].file) for frame in inner)


def _waits_for_callers(record: Record, stack: Stack) -> bool:
    """In a server: a task's own first function that waits is a connection without a request, or a clock that ticks."""
    mine = sum(is_users(record.frames[frame]) for frame in stack.frames)
    return mine < 2 and not any(_CLIENTS.search(record.frames[frame].file) for frame in stack.frames)


@once
def children(record: Record) -> list[Claim]:
    """Processes that the program started used more processor time than it did, and hold 40 % of the run or more."""
    seconds = max(record.children_cpu_s, sum(child.cpu_s for child in record.children))
    started = [stack for stack in record.waiting if stack.waits_for == "process" and users(record, stack) >= 0]
    waited = sum(stack.seconds for stack in started if stack.owner in _MAIN)
    # On a busy machine children get less than all of the time that is spent on them.
    share = max(seconds, waited if seconds >= _COMPUTES * waited else 0.0) / record.wall_s if record.wall_s else 0.0
    if share < IDLE or seconds <= record.cpu_s or seconds < _LEAST_S:
        return []
    top = max(started, key=lambda stack: stack.seconds, default=None)
    position = users(record, top) if top is not None else -1
    most = sorted(record.children, key=lambda child: -child.cpu_s)[:3]
    listed = ", ".join(f"{child.command} {duration(child.cpu_s)}{_inside(child)}" for child in most)
    finding = Explained(
        "child_processes",
        "warning",
        "the time is spent in processes that the program starts",
        f"{duration(seconds)} of CPU time in children, {duration(record.cpu_s)} of its own, in "
        f"{duration(record.wall_s)}" + (f": {listed}" if listed else ""),
        "profile the child (run its command under `headrace profile`); if there are many short ones, start a few that "
        "live on, or do the work in the program itself",
        record.frames[top.frames[position]].file if top is not None else "",
        top.lines[position] if top is not None else 0,
        share=min(1.0, share),
    )
    return [Claim(finding)]


def _inside(child: Child) -> str:
    """Where a child that was sampled too spent most of its time."""
    top = max(spots(child.record).values(), key=lambda spot: spot.seconds, default=None) if child.record else None
    return f", most of it in {place(child.record, top.frame, top.line)}" if child.record and top else ""
