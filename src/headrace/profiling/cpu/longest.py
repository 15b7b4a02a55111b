"""The longest call of each function, as far as the sampler saw it: from the first to the last look at one frame.

A frame that was seen is marked, for its number may be that of the next call's frame a moment later. The mark is a trace
function of the frame that does nothing; the interpreter asks for it only where a debugger runs, and then a debugger's
own takes its place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import CodeType, FrameType

from headrace.profiling.cpu.places import OURS
from headrace.profiling.cpu.threads import Thread


class _Mark:
    """When a frame was first seen."""

    __slots__ = ("since",)

    def __init__(self, since: float) -> None:
        self.since = since

    def __call__(self, _frame: FrameType, _event: str, _arg: object) -> None:
        return None


class Longest:
    """What is seen of all threads, look by look."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._codes: dict[int, CodeType] = {}

    def look(self, threads: Mapping[int, Thread], now: float) -> None:
        for thread in threads.values():
            frame = thread.frame
            while frame is not None:
                mark: object = frame.f_trace
                if type(mark) is _Mark:
                    self._see(frame.f_code, now - mark.since)
                elif mark is None:
                    frame.f_trace = _Mark(now)
                frame = frame.f_back

    def _see(self, code: CodeType, seconds: float) -> None:
        if seconds > self._seconds.get(id(code), 0.0):
            self._seconds[id(code)] = seconds
            self._codes[id(code)] = code

    def seconds(self) -> list[tuple[CodeType, float]]:
        """By function. Less than the true time by up to the pause between two looks at either end."""
        found = [(self._codes[number], seconds) for number, seconds in list(self._seconds.items())]
        return [(code, seconds) for code, seconds in found if code.co_filename not in OURS]


def unmark() -> None:
    """Take the marks off everything that runs."""
    for frame in sys._current_frames().values():
        each: FrameType | None = frame
        while each is not None:
            if type(each.f_trace) is _Mark:
                each.f_trace = None
            each = each.f_back
