"""Functions followed for a while, in all threads: `Following`, and what it takes to find out what is to be followed.

There is one way of watching per Python version and one set of counts per process: two that follow the same function
each take the difference over their own time.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from headrace.clock import perf_counter
from headrace.errors import ConfigError
from headrace.profiling.leaking.lines import is_users
from headrace.profiling.linewise.monitoring import Monitoring
from headrace.profiling.linewise.rows import Counts, Name, Rows, Wanted, lines_between, name_of
from headrace.profiling.linewise.tracing import Tracing
from headrace.profiling.record import Line

ROWS, WANTED = Rows(), Wanted()
WATCH = Monitoring(ROWS, WANTED) if hasattr(sys, "monitoring") else Tracing(ROWS, WANTED)
_ROUNDS = 5
_MISSING = object()


class Following:
    """Count lines of some functions, in this thread and in those that begin meanwhile, until the end of the block.

    What is marked by line_profiler's ``@profile`` meanwhile is followed too: as a builtin, or imported from it.

    Args:
        names: functions that need not exist yet, see `rows.name_of_frame`.
        codes: of functions that exist.
    """

    def __init__(self, names: Iterable[Name] = (), codes: Iterable[types.CodeType] = ()) -> None:
        self._codes = list(codes)
        self._names = [*names, *map(name_of, self._codes)]
        self._before: Counts = {}
        self._counted: list[Line] = []
        self._active = False
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Following:
        self._before = ROWS.counts()
        with contextlib.ExitStack() as undo:
            undo.callback(WATCH.give_back)
            undo.callback(lambda: WANTED.drop(self._names))
            WANTED.add(self._names)
            WATCH.take(self._codes)
            WATCH.start()
            undo.callback(WATCH.stop)
            undo.callback(_Marks(self._mark).remove)
            self._undo = undo.pop_all()
        self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False
        self._undo.close()
        self._counted = self._between()

    def _mark(self, fn: Any) -> Any:
        code = code_of(fn, or_none=True)
        if code is not None and self._active:
            name = name_of(code)
            self._names.append(name)
            WANTED.add([name])
            WATCH.take([code])
        return fn

    def lines(self) -> list[Line]:
        """So far; after the end, of the whole. A line that is still running is not in it."""
        return self._between() if self._active else self._counted

    def _between(self) -> list[Line]:
        return lines_between(ROWS, self._before, set(self._names), cost_of_a_hit())


class _Marks:
    """line_profiler's ``@profile`` in its two forms, which means `Following` for as long as this stands."""

    def __init__(self, mark: Callable[[Any], Any]) -> None:
        self._put: list[tuple[Any, Any, Any]] = []
        owners: list[Any] = [builtins]
        if importlib.util.find_spec("line_profiler") is not None:
            import line_profiler

            owners += [line_profiler, line_profiler.explicit_profiler]
        for owner in owners:
            self._put.append((owner, vars(owner).get("profile", _MISSING), mark))
            owner.profile = mark

    def remove(self) -> None:
        for owner, before, ours in reversed(self._put):
            if vars(owner).get("profile") is ours:
                if before is _MISSING:
                    del owner.profile
                else:
                    owner.profile = before


def code_of(fn: Any, *, or_none: bool = False) -> Any:
    """The code that is meant by a callable: behind decorators, partial arguments, and a module's ``__call__``.

    Raises:
        ConfigError: nothing in it is written in Python; not if ``or_none``.
    """
    given, fn = fn, innermost(fn)
    if not isinstance(fn, types.FunctionType) and not isinstance(fn, type) and callable(fn):
        method: Any = type(fn).__call__
        if isinstance(method, types.FunctionType) and not is_users(method.__code__.co_filename):
            method = getattr(type(fn), "forward", method)  # a module of torch
        fn = innermost(method)
    if isinstance(fn, types.FunctionType):
        return fn.__code__
    if or_none:
        return None
    raise ConfigError(f"{given!r} has no lines in Python", field="fn", hint="give a function or a method")


def innermost(fn: Any) -> Any:
    """What is left without binding, arguments and decorators."""
    while True:
        if isinstance(fn, (types.MethodType, classmethod, staticmethod)):
            fn = fn.__func__
        elif isinstance(fn, (functools.partial, functools.partialmethod)):
            fn = fn.func
        elif hasattr(fn, "__wrapped__") and not isinstance(fn, type):
            fn = inspect.unwrap(fn)
        else:
            return fn


@functools.cache
def cost_of_a_hit() -> float:
    """Seconds that watching adds to each line, at the least: measured once, on a line that does next to nothing."""
    name = name_of(_idle.__code__)
    least = float("inf")
    WANTED.add([name])
    try:
        for _ in range(_ROUNDS):
            started = perf_counter()
            _idle()
            plain = perf_counter() - started
            before = ROWS.counts()
            WATCH.take([_idle.__code__])
            WATCH.enter()
            try:
                _idle()
            finally:
                WATCH.leave()
            seen = lines_between(ROWS, before, {name}, 0.0)
            hits = sum(line.hits for line in seen)
            least = min(least, (sum(line.seconds for line in seen) - plain) / hits)
    finally:
        WANTED.drop([name])
        WATCH.give_back()
    return max(0.0, least)


def _idle() -> None:
    count = 0
    while count < 100:
        count += 1
        count += 0
