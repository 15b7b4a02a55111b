"""Following lines before Python 3.12: a trace function, which Python calls for every call in a thread.

It has to be switched on in each thread, and makes every call there dearer, also of what is not followed. It takes the
place of a debugger's or a coverage tool's trace function while it is on.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

from headrace.clock import perf_counter
from headrace.profiling.linewise.rows import Cells, Rows, Wanted

_GENERATOR = inspect.CO_GENERATOR
_ASYNC_GENERATOR = inspect.CO_ASYNC_GENERATOR
_TO_CONSUMER = "async_generator_wrapped_value"  # what an async generator yields; all else is what it awaits


class Tracing:
    """One for the process."""

    needs_switching = True  # a decorated function has to call `enter` and `leave`

    def __init__(self, rows: Rows, wanted: Wanted) -> None:
        self._trace = _make_trace(rows, wanted)
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._everywhere = 0
        self._before_in_new_threads: Any = None

    def take(self, codes: Iterable[types.CodeType]) -> None:
        """Nothing has to be done to a code object to follow it."""

    def give_back(self) -> None:
        """Nor when it is not wanted any more."""

    def enter(self) -> None:
        """Follow in the calling thread, until as many times `leave`."""
        depth = getattr(self._thread, "depth", 0)
        if depth == 0:
            self._thread.before = sys.gettrace()
            sys.settrace(self._trace)
        self._thread.depth = depth + 1

    def leave(self) -> None:
        depth = getattr(self._thread, "depth", 0)  # a generator may be closed in another thread than it was begun in
        if depth == 1 and sys.gettrace() is self._trace:
            sys.settrace(self._thread.before)
        self._thread.depth = max(0, depth - 1)

    def start(self) -> None:
        """Follow in this thread, and in those that begin from now on, until `stop`."""
        with self._lock:
            if self._everywhere == 0:
                self._before_in_new_threads = threading.gettrace()
                threading.settrace(self._trace)
            self._everywhere += 1
        self.enter()

    def stop(self) -> None:
        self.leave()
        with self._lock:
            self._everywhere -= 1
            if self._everywhere == 0:
                threading.settrace(self._before_in_new_threads)


def _make_trace(rows: Rows, wanted: Wanted) -> Callable[..., Any]:
    """A function, since a bound method is another object each time it is asked for."""

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_firstlineno not in wanted.first_lines or not wanted.has(code):
            return None
        known: Any = frame.f_trace
        if getattr(known, "__code__", None) is _LOCAL:  # it was suspended, and goes on
            return known(frame, "resume", None)
        return _follow_frame(rows.of(code), code.co_flags)

    return trace


def _follow_frame(cells: Cells, flags: int) -> Callable[..., Any]:
    """A trace function for one frame. It reads the clock first thing and last thing: what lies between is not counted.

    An ``await`` counts until it goes on, a generator's ``yield`` does not: that time is its consumer's.
    """
    cell: list[float] = [0, 0.0]
    began, away = perf_counter(), False

    def local(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal cell, began, away
        now = perf_counter()
        if event == "line":
            cell[1] += now - began
            number = frame.f_lineno
            found = cells.get(number)
            cell = cells.setdefault(number, [0, 0.0]) if found is None else found
            cell[0] += 1
        elif event == "return":
            cell[1] += now - began
            if flags & _GENERATOR:
                away = True
            elif flags & _ASYNC_GENERATOR:
                away = type(argument).__name__ == _TO_CONSUMER
        elif event == "resume":
            if not away:
                cell[1] += now - began
            away = False
        else:
            return local
        began = perf_counter()
        return local

    return local


_LOCAL = _follow_frame({}, 0).__code__
