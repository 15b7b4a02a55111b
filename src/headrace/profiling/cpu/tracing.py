"""Exact counts of calls by `cProfile`, one profile for each thread, and what Python 3.12 changed about that.

Until 3.11 a profile belongs to a thread: it is switched on in the thread that begins, and in each that starts later.
From 3.12 on its events come from all threads at once, and one profile would take a thread's return for another one's:
there each thread's events are sent to a profile of its own, which costs several times as much. Threads that the tracer
is told to leave out are, and so is this package.
"""

from __future__ import annotations

import cProfile
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, NamedTuple

from headrace.errors import SetupError
from headrace.profiling.cpu.places import OURS, Places

_EVENTS = {
    "PY_START": "_pystart_callback",
    "PY_RESUME": "_pystart_callback",
    "PY_THROW": "_pystart_callback",
    "PY_RETURN": "_pyreturn_callback",
    "PY_YIELD": "_pyreturn_callback",
    "PY_UNWIND": "_pyreturn_callback",
    "CALL": "_ccall_callback",
    "C_RETURN": "_creturn_callback",
    "C_RAISE": "_creturn_callback",
}


# What switches tracing on and off is the first and the last that is traced.
_SWITCHES = ("<method 'disable' of '_lsprof", "<built-in method sys.monitoring.register_callback>")


class Edge(NamedTuple):
    """How a function was called, by everybody or by one caller; as `record.Call` has it."""

    calls: int = 0
    primitive: int = 0
    own_s: float = 0.0
    cumulative_s: float = 0.0

    def plus(self, other: Edge) -> Edge:
        return Edge(
            self.calls + other.calls,
            self.primitive + other.primitive,
            self.own_s + other.own_s,
            self.cumulative_s + other.cumulative_s,
        )

    def minus(self, other: Edge) -> Edge:
        return Edge(
            self.calls - other.calls,
            self.primitive - other.primitive,
            max(0.0, self.own_s - other.own_s),
            max(0.0, self.cumulative_s - other.cumulative_s),
        )


@dataclass
class Node:
    """A function: how it was called by everybody, and by each caller."""

    all: Edge = field(default_factory=Edge)
    callers: dict[int, Edge] = field(default_factory=dict)


Graph = dict[int, Node]


class Tracer:
    """Traces the calling thread, and threads that start while it does; from Python 3.12 on, all threads.

    Args:
        skipped: identifiers of threads that are not traced; it may grow meanwhile.
    """

    def __init__(self, skipped: Collection[int] = ()) -> None:
        self.notes: list[str] = []
        self._skipped = skipped
        self._profiles = [cProfile.Profile()]
        self._of_thread: dict[int, cProfile.Profile | None] = {}
        self._monitoring: Any = getattr(sys, "monitoring", None)

    def start(self) -> None:
        """Begin. Raises `SetupError` if another profiler is active."""
        if sys.getprofile() is not None:
            raise SetupError("another profiler is active in this thread", hint="end it first")
        if self._monitoring is None:
            threading.setprofile(self._in_new_thread)
        self._of_thread = {threading.get_ident(): self._profiles[0]}
        try:
            self._profiles[0].enable()
        except ValueError:
            raise SetupError("another profiler is active in this process", hint="end it first") from None
        if self._monitoring is not None:
            for event, receiver in _EVENTS.items():
                number = getattr(self._monitoring.events, event)
                self._monitoring.register_callback(self._monitoring.PROFILER_ID, number, self._sender(receiver))

    def stop(self) -> None:
        """End, on the thread that began."""
        active: object = sys.getprofile()
        if self._monitoring is None and active is not self._profiles[0]:
            self.notes.append("the program has used a profiler of its own: calls after that are not counted")
        self._profiles[0].disable()
        if self._monitoring is None and threading.getprofile() == self._in_new_thread:
            threading.setprofile(None)

    def own_s(self, name: str) -> float:
        """Own time of the functions whose name has this in it."""
        entries = [entry for profile in self._profiles for entry in profile.getstats()]
        named = [entry for entry in entries if name in _name(entry.code)]
        return sum(entry.inlinetime for entry in named)

    def graph(self, places: Places) -> Graph:
        """What was called, of all threads together. After the end; calls that have not returned are not in it."""
        found: Graph = {}
        for profile in list(self._profiles):
            entries = [entry for entry in profile.getstats() if entry.callcount > 0]
            for entry in entries:
                if not _is_ours(entry.code):
                    _add(found, entry, places)
            for entry in entries:
                if _is_ours(entry.code):
                    _take_away(found, entry, places)
        return {function: node for function, node in found.items() if node.all.calls > 0}

    def _in_new_thread(self, _frame: FrameType, _event: str, _arg: object) -> None:
        """The first thing that happens in a thread: from here on its own profile hears of it."""
        if threading.get_ident() in self._skipped:
            sys.setprofile(None)
            return
        profile = cProfile.Profile()
        self._profiles.append(profile)
        profile.enable()

    def _sender(self, receiver: str) -> Callable[..., None]:
        """What gives one kind of event to the profile of the thread that it happens in."""
        known: dict[int, Callable[..., None]] = {}
        ident = threading.get_ident

        def send(*event: object) -> None:
            receive = known.get(ident())
            if receive is None:
                profile = self._profile_of(ident())
                receive = known[ident()] = _nobody if profile is None else getattr(profile, receiver)
            receive(*event)

        return send

    def _profile_of(self, thread: int) -> cProfile.Profile | None:
        if thread not in self._of_thread:
            profile = None if thread in self._skipped else cProfile.Profile()
            self._of_thread[thread] = profile
            if profile is not None:
                self._profiles.append(profile)
        return self._of_thread[thread]


def _nobody(*_: object) -> None:
    return None


def _is_ours(code: CodeType | str) -> bool:
    return code.startswith(_SWITCHES) if isinstance(code, str) else code.co_filename in OURS


def _name(code: CodeType | str) -> str:
    return code if isinstance(code, str) else code.co_qualname


def _number(code: CodeType | str, places: Places) -> int:
    return places.of_builtin(code) if isinstance(code, str) else places.of_code(code)


def _edge(entry: Any) -> Edge:
    return Edge(entry.callcount, entry.callcount - entry.reccallcount, entry.inlinetime, entry.totaltime)


def _add(found: Graph, entry: Any, places: Places) -> None:
    """A function, and with those that it calls, that it does."""
    number = _number(entry.code, places)
    node = found.setdefault(number, Node())
    node.all = node.all.plus(_edge(entry))
    for called in entry.calls or ():
        if not _is_ours(called.code):
            callers = found.setdefault(_number(called.code, places), Node()).callers
            callers[number] = callers.get(number, Edge()).plus(_edge(called))


def _take_away(found: Graph, entry: Any, places: Places) -> None:
    """What this package called was no doing of the program's; that which it has run, as a script, is."""
    for called in entry.calls or ():
        node = None if isinstance(called.code, CodeType) else found.get(_number(called.code, places))
        if node is not None:
            node.all = node.all.minus(_edge(called))
