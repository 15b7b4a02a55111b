"""Threads as they are at one moment: which run, which wait, and for what.

A thread runs if its own processor clock says so; where that says little, because others hold the interpreter's lock or
because a call has just begun, what the line calls decides. Linux has such clocks; elsewhere only the calls are known.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from types import FrameType

from headrace import clock
from headrace.profiling.cpu import kernel, waits
from headrace.profiling.cpu.places import Places

# Of the time since the last look, on a processor: whoever sits in a call that waits may have worked before, and who was
# preempted right after a call seems to sit in it still.
_WORKED = 0.8
# Where only the library says that it waits, its own code may be what runs.
_WORKED_INSIDE = 0.3
# With less of it, whoever sits in a call of no known name may wait there.
_HARDLY = 0.05
# Nobody waits for the interpreter's lock for so long.
_TURN_S = 0.5
# Calls of these names wait for certain; the other names in `waits` are also those of quick methods.
_CERTAIN = {"sleep", "socket", "process", "thread", "loop", "idle"}


class Thread:
    """One thread, from look to look.

    Attributes:
        running: whether it has, or wants, a processor.
        called: it is in a call whose name says that it waits. quick: the name is also that of a method that never does.
        reason: what it waits for, if it waits.
        places: its stack, the outermost first. ``sits``: the same with the C function that it calls now, if any.
        frame: its innermost frame now; only during a look.
    """

    __slots__ = (
        "asked",
        "called",
        "cpu",
        "frame",
        "instruction",
        "kernel",
        "name",
        "native",
        "places",
        "quick",
        "reason",
        "running",
        "sits",
        "still_s",
        "used",
    )

    def __init__(self, name: str, native: int | None) -> None:
        self.name = name
        self.native = native
        self.cpu: float | None = None
        self.used: float | None = None
        self.frame: FrameType | None = None
        self.instruction = (0, 0)
        self.still_s = 0.0
        self.places: tuple[int, ...] = ()
        self.sits: tuple[int, ...] = ()
        self.reason = ""
        self.running = True
        self.asked = self.called = self.quick = False
        self.kernel: str | None = None


class Threads:
    """All threads of this process but those that look.

    Args:
        skipped: identifiers of threads that are not looked at.
    """

    def __init__(self, places: Places, skipped: set[int]) -> None:
        self._places = places
        self._skipped = skipped
        self._known: dict[int, Thread] = {}

    def look(self, gap: float) -> Mapping[int, Thread]:
        """Threads by identifier, as they are now.

        Args:
            gap: seconds since the last look.
        """
        frames = sys._current_frames()
        known = self._known
        for ident in known.keys() - frames.keys():
            del known[ident]
        worked = 0.0
        for ident, frame in frames.items():
            if ident not in self._skipped:
                thread = self._at(ident, gap)
                thread.frame = frame
                worked += thread.used or 0.0
        doubtful = [thread for thread in known.values() if self._see(thread, gap) is None]
        # Last, for it may let others run.
        for thread in doubtful:
            self._ask(thread, gap, worked)
        return known

    def let_go(self) -> None:
        """Keep nothing alive that the program does not keep."""
        for thread in self._known.values():
            thread.frame = None

    def _at(self, ident: int, gap: float) -> Thread:
        """A thread with its clock read; that of one that has ended, and whose identifier was given again, fails."""
        thread = self._known.get(ident)
        if thread is None:
            thread = self._known[ident] = self._new(ident)
        if thread.native is None:
            return thread
        try:
            cpu = clock.thread_cpu(thread.native)
        except OSError:
            thread = self._known[ident] = self._new(ident)
            return thread
        thread.used = None if thread.cpu is None else min(cpu - thread.cpu, gap)
        thread.cpu = cpu
        return thread

    def _new(self, ident: int) -> Thread:
        for each in threading.enumerate():
            if each.ident == ident:
                return Thread(each.name, each.native_id)
        return Thread(f"thread {ident}", None)

    def _see(self, thread: Thread, gap: float) -> bool | None:
        """Find out where a thread is, and whether it waits there; `None` if that is not known yet."""
        frame = thread.frame
        if frame is None:
            return False
        instruction = (id(frame), frame.f_lasti)
        # What has not run has not moved, and its stack need not be walked again.
        unmoved = thread.used == 0.0 and instruction == thread.instruction and bool(thread.places)
        thread.still_s = thread.still_s + gap if unmoved else 0.0
        thread.instruction = instruction
        if not unmoved:
            found = self._places.of_stack(frame)
            place = self._places.places
            calls = self._places.called_by(frame) if found else ""
            thread.reason = waits.reason(calls, ((place[n].tells, place[n].library) for n in reversed(found)))
            thread.called = waits.is_known(calls)
            thread.quick = waits.is_quick(calls, place[found[-1]].tells if found else "")
            thread.places = tuple(found)
            thread.sits = (*found, self._places.place_of_builtin(calls)) if calls else thread.places
            thread.asked = False
        waits_ = _waits(thread, gap)
        thread.running = not waits_
        return waits_

    def _ask(self, thread: Thread, gap: float, worked: float) -> None:
        """Of a thread that hardly runs, in a call of no known name: what the kernel says, until it moves."""
        if not thread.asked and thread.native is not None:
            thread.kernel = kernel.waits_in(thread.native)
            # Asking has let others run; if this one did, the answer is not of the place where it was seen.
            thread.asked = _has_not_run(thread)
            if not thread.asked:
                thread.kernel = None
        if thread.kernel == kernel.RUNS:
            thread.running = True  # others have the processor, on a busy machine
        elif thread.quick and thread.kernel == kernel.LOCK:
            thread.running = False  # had it wanted the interpreter's lock, asking would have let it run
        elif thread.kernel not in (None, kernel.LOCK):
            thread.reason, thread.running = thread.kernel or "", False
        elif thread.still_s > 0.0:
            # It may want the interpreter's lock: unless that was free, or it would have had it by now.
            others = worked - (thread.used or 0.0)
            thread.running = others >= _HARDLY * gap and thread.still_s < _TURN_S


def _has_not_run(thread: Thread) -> bool:
    try:
        return thread.native is not None and clock.thread_cpu(thread.native) == thread.cpu
    except OSError:
        return False


def _waits(thread: Thread, gap: float) -> bool | None:
    """Whether a thread waits; `None` if its stack does not tell."""
    used = thread.used
    if used is None:
        return thread.reason in _CERTAIN and not thread.quick
    if thread.reason and thread.called:
        return False if used > _WORKED * gap else None if thread.quick else True
    if thread.reason and used <= _WORKED_INSIDE * gap:
        return True
    return False if used > _HARDLY * gap else None
