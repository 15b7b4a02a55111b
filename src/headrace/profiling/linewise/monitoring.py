"""Following lines from Python 3.12 on: `sys.monitoring`, set on the followed functions alone.

Nothing else gets slower, in no thread, and nothing has to be switched on around a call.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any

from headrace.clock import perf_counter
from headrace.errors import SetupError
from headrace.profiling.linewise.rows import Rows, Wanted

_TOOLS = (3, 4, 1)  # the two that belong to nobody, then coverage's
_GENERATOR = inspect.CO_GENERATOR
_ASYNC_GENERATOR = inspect.CO_ASYNC_GENERATOR
_TO_CONSUMER = "async_generator_wrapped_value"


class Monitoring:
    """One for the process.

    A frame is known by its number, which it keeps while it lives: holding on to the frame would keep alive what it
    holds, and what has begun anew under an old number says so.
    """

    needs_switching = False

    def __init__(self, rows: Rows, wanted: Wanted) -> None:
        self._monitoring: Any = getattr(sys, "monitoring", None)
        self._rows, self._wanted = rows, wanted
        self._codes: dict[int, types.CodeType] = {}
        self._frames: dict[int, list[Any]] = {}  # → [cell, since when, whether it is away, cells]
        self._tool: int | None = None
        self._everywhere = 0
        self._lock = threading.RLock()

    def enter(self) -> None:
        """Nothing has to be switched on."""

    def leave(self) -> None:
        """Nor off."""

    def take(self, codes: Iterable[types.CodeType]) -> None:
        """Follow these, which are wanted."""
        with self._lock:
            self._open()
            events = self._monitoring.events
            local = events.LINE | events.PY_START | events.PY_RESUME | events.PY_YIELD | events.PY_RETURN
            for code in codes:
                if id(code) not in self._codes:
                    self._codes[id(code)] = code
                    self._monitoring.set_local_events(self._tool, code, local)

    def give_back(self) -> None:
        """Follow no longer what is not wanted any more."""
        with self._lock:
            for number, code in list(self._codes.items()):
                if not self._wanted.has(code):
                    del self._codes[number]
                    self._monitoring.set_local_events(self._tool, code, 0)
            if not self._codes and not self._everywhere and self._tool is not None:
                self._monitoring.set_events(self._tool, 0)
                for event in self._callbacks():
                    self._monitoring.register_callback(self._tool, event, None)
                self._monitoring.free_tool_id(self._tool)
                self._tool = None
                self._frames.clear()

    def start(self) -> None:
        """Follow every wanted function as soon as it is called, until `stop`."""
        with self._lock:
            self._open()
            self._everywhere += 1
            self._set_global()
            self._monitoring.restart_events()  # functions that were called before said that they were not wanted

    def stop(self) -> None:
        with self._lock:
            self._everywhere -= 1
            self._set_global()

    def _set_global(self) -> None:
        events = self._monitoring.events
        # Only for all functions at once can one hear of those that end by an exception.
        wanted = events.PY_UNWIND | events.PY_THROW | (events.PY_START if self._everywhere else 0)
        self._monitoring.set_events(self._tool, wanted)

    def _open(self) -> None:
        if self._tool is not None:
            return
        free = [tool for tool in _TOOLS if self._monitoring.get_tool(tool) is None]
        if not free:
            raise SetupError("other tools watch this program already", hint="profile lines without them")
        self._tool = free[0]
        self._monitoring.use_tool_id(self._tool, "headrace")
        for event, callback in self._callbacks().items():
            self._monitoring.register_callback(self._tool, event, callback)
        self._set_global()

    def _callbacks(self) -> dict[int, Any]:
        events = self._monitoring.events
        return {
            events.PY_START: self._on_start,
            events.LINE: _make_on_line(self._frames, self._begin),
            events.PY_YIELD: self._on_yield,
            events.PY_RESUME: self._on_resume,
            events.PY_THROW: self._on_throw,
            events.PY_RETURN: self._on_end,
            events.PY_UNWIND: self._on_end,
        }

    def _begin(self, code: types.CodeType, number: int) -> list[Any]:
        state = self._frames[number] = [[0, 0.0], perf_counter(), False, self._rows.of(code)]
        return state

    def _on_start(self, code: types.CodeType, offset: int) -> Any:
        if id(code) not in self._codes:
            if code.co_firstlineno not in self._wanted.first_lines or not self._wanted.has(code):
                return self._monitoring.DISABLE
            self.take([code])
        self._begin(code, id(sys._getframe(1)))
        return None

    def _on_yield(self, code: types.CodeType, offset: int, value: Any) -> None:
        now = perf_counter()
        state = self._frames.get(id(sys._getframe(1)))
        if state is not None:
            state[0][1] += now - state[1]
            consumer = code.co_flags & _ASYNC_GENERATOR and type(value).__name__ == _TO_CONSUMER
            state[2] = bool(code.co_flags & _GENERATOR or consumer)
            state[1] = now

    def _on_resume(self, code: types.CodeType, offset: int) -> None:
        state = self._frames.get(id(sys._getframe(1)))
        if state is not None and state[2]:
            state[2], state[1] = False, perf_counter()

    def _on_throw(self, code: types.CodeType, offset: int, error: BaseException) -> None:
        if id(code) in self._codes:
            state = self._frames.get(id(sys._getframe(1)))
            if state is not None and state[2]:
                state[2], state[1] = False, perf_counter()

    def _on_end(self, code: types.CodeType, offset: int, value: Any) -> None:
        now = perf_counter()
        if id(code) in self._codes:
            state = self._frames.pop(id(sys._getframe(1)), None)
            if state is not None:
                state[0][1] += now - state[1]


def _make_on_line(
    frames: dict[int, list[Any]], begin: Callable[[types.CodeType, int], list[Any]]
) -> Callable[[types.CodeType, int], None]:
    """What is called for every line, and so has at hand all that it needs. It reads the clock first and last."""
    clock, frame_at = perf_counter, sys._getframe

    def on_line(code: types.CodeType, line: int) -> None:
        now = clock()
        number = id(frame_at(1))
        state = frames.get(number)
        if state is None:
            state = begin(code, number)
        state[0][1] += now - state[1]
        cells = state[3]
        cell = cells.get(line)
        if cell is None:
            cell = cells.setdefault(line, [0, 0.0])
        cell[0] += 1
        state[0] = cell
        state[1] = clock()

    return on_line
