"""Where time goes, line by line: `profile_lines`, `run_lines`, and the hottest functions of a first pass.

    @profile_lines
    def answer(question): ...

    result = run_lines(answer, "why?", also=[search])

Functions, coroutines, generators and async generators, methods, functions within functions, in all threads. It counts
wall time; it does not know what else the processor did meanwhile, and it makes what it follows slower: of the times the
share is what counts. line_profiler's ``@profile`` is honoured while something is followed, and its viewer reads what
`write_lprof` writes. The counting is not its own, because line_profiler (5.1) loses what a line does after an ``await``
or a ``yield``, drops what a generator returns, and cannot follow what does not exist yet.
"""

from __future__ import annotations

import atexit
import inspect
import sys
import types
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from headrace.errors import ConfigError
from headrace.profiling.linewise.following import ROWS, WANTED, WATCH, Following, code_of, cost_of_a_hit
from headrace.profiling.linewise.hottest import follow, hottest
from headrace.profiling.linewise.rows import lines_between, name_of
from headrace.profiling.linewise.table import as_text, write_lprof
from headrace.profiling.linewise.wrapping import Switch, forward_async_generator, wrap
from headrace.profiling.record import Line

__all__ = ["Following", "as_text", "follow", "hottest", "profile_lines", "run_lines", "write_lprof"]

P = ParamSpec("P")
R = TypeVar("R", covariant=True)
_REPORTED: list[types.CodeType] = []


class Followed(Protocol[P, R]):
    """A decorated function: itself, and what was counted of it."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def __get__(self, instance: Any, owner: Any = None) -> Callable[..., R]: ...
    def lines(self) -> list[Line]:
        """What was counted so far, of all calls in all threads."""
        ...


@overload
def profile_lines(fn: Callable[P, R], /) -> Followed[P, R]: ...
@overload
def profile_lines(*, report: bool = True) -> Callable[[Callable[P, R]], Followed[P, R]]: ...
def profile_lines(fn: Any = None, /, *, report: bool = True) -> Any:
    """Count, whenever this function runs, how often each of its lines does and how long it takes.

    What is decorated behaves as before, and has a method ``lines()`` that gives `record.Line` for each line.

    Args:
        fn: a function of any kind; a method, also below ``@property``, and of a class or static.
        report: print a table to standard error when the program ends.

    Raises:
        ConfigError: it is not written in Python.
        SetupError: two other tools watch the program's lines already.
    """
    if fn is None:
        return lambda fn: profile_lines(fn) if report else _decorate(fn)
    decorated = _decorate(fn)
    if not _REPORTED:
        atexit.register(_report)
    _REPORTED.append(code_of(decorated))
    return decorated


def _decorate(fn: Any) -> Any:
    if isinstance(fn, (classmethod, staticmethod)):
        return type(fn)(_decorate(fn.__func__))
    if not isinstance(fn, types.FunctionType):
        raise ConfigError(f"{fn!r} is not a function", field="fn", hint="decorate functions, or give it to run_lines")
    code = code_of(fn)
    WANTED.add([name_of(code)])
    WATCH.take([code])
    decorated = wrap(fn, Switch(WATCH.enter, WATCH.leave)) if WATCH.needs_switching else fn
    cast(Any, decorated).lines = lambda: _counted([code])
    return decorated


def _counted(codes: Iterable[types.CodeType]) -> list[Line]:
    return lines_between(ROWS, {}, set(map(name_of, codes)), cost_of_a_hit())


def _report() -> None:
    lines = _counted(_REPORTED)
    if lines:
        print(as_text(lines), file=sys.stderr)


def run_lines(fn: Callable[..., Any], /, *args: Any, also: Iterable[Callable[..., Any]] = (), **kwargs: Any) -> Any:
    """Call a function, count its lines meanwhile, and print the table to standard error, also if it raises.

    Args:
        fn: what is called, and followed. A module of torch: its ``forward``.
        also: functions that are followed when they are called meanwhile.
        args, kwargs: for ``fn``.

    Returns:
        What ``fn`` returns. A coroutine or a generator is followed until it ends, and the table comes then.

    Raises:
        ConfigError: one of them is not written in Python.
    """
    following = Following(codes=[code_of(each) for each in (fn, *also)])
    if hasattr(fn, "__line_profiler_id__"):  # line_profiler would follow it in its own way
        fn = inspect.unwrap(fn)
    if inspect.isasyncgenfunction(fn):
        return forward_async_generator(fn, around=lambda: _Printing(following))(*args, **kwargs)
    if inspect.iscoroutinefunction(fn):
        return _run_coroutine(following, fn(*args, **kwargs))
    if inspect.isgeneratorfunction(fn):
        return _run_generator(following, fn(*args, **kwargs))
    with _Printing(following):
        return fn(*args, **kwargs)


class _Printing(AbstractContextManager[None]):
    """Following, with the table at the end."""

    def __init__(self, following: Following) -> None:
        self._following = following

    def __enter__(self) -> None:
        self._following.__enter__()

    def __exit__(self, *_: object) -> None:
        self._following.__exit__()
        print(as_text(self._following.lines()), file=sys.stderr)


async def _run_coroutine(following: Following, inner: Any) -> Any:
    with _Printing(following):
        return await inner


def _run_generator(following: Following, inner: Any) -> Any:
    with _Printing(following):
        return (yield from inner)
