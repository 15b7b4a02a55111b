"""How long something takes: `timed` for what runs anyway, `timeit` for what is run again and again to know it well.

@timed
async def fetch(url): ...

with timed("load") as load:
    model = read()
print(load.seconds)

print(timeit(parse, text))
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, overload

import msgspec

from headrace.clock import perf_counter
from headrace.stats import median, percentile

_log = logging.getLogger("headrace.timing")

P = ParamSpec("P")
R = TypeVar("R")

_LEAST_RUN_S = 200e-6  # a shorter one is mostly the clock's own
_WARM_UP_S = 0.5
_WARM_UPS = 10
_SETTLED = 0.1
_LEAST_RUNS = 5
_MOST_RUNS = 1000
_MOST_CALLS = 1_000_000


class Timed:
    """What `timed` returns: a block's time, or a decorator."""

    def __init__(self, name: str, level: int) -> None:
        self._name = name
        self._level = level
        self._began: float | None = None
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of the block: so far, and of the whole after it."""
        return self._seconds if self._began is None else perf_counter() - self._began

    def __enter__(self) -> Timed:
        self._began = perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds, self._began = self.seconds, None
        _say(self._level, self._name or "block", self._seconds, kind)

    async def __aenter__(self) -> Timed:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        decorated: Callable[P, R] = _decorate(fn, self._name or getattr(fn, "__qualname__", repr(fn)), self._level)
        return decorated


@overload
def timed(fn: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def timed(name: str = "", /, *, level: int = logging.INFO) -> Timed: ...
def timed(what: Any = "", /, *, level: int = logging.INFO) -> Any:
    """Log the wall time of each call of a function, or of a block, to the logger ``headrace.timing``.

    ``@timed`` and ``@timed("name")`` decorate functions, coroutines, generators and async generators, which go on
    returning and yielding their own values; a generator's time is what it ran itself, without its consumer's.
    ``with timed("name") as t`` has the block's ``t.seconds``.

    Args:
        what: a function, or the name that is logged [default: the function's own].
        level: of logging.
    """
    if callable(what):
        return _decorate(what, getattr(what, "__qualname__", repr(what)), level)
    return Timed(what, level)


def _say(level: int, name: str, seconds: float, kind: type[BaseException] | None, more: str = "") -> None:
    if _log.isEnabledFor(level):
        end = f", raised {kind.__name__}" if kind is not None else ""
        _log.log(level, "%s took %s%s%s", name, _duration(seconds), more, end, extra={"seconds": seconds})


def _decorate(fn: Any, name: str, level: int) -> Any:
    if isinstance(fn, (staticmethod, classmethod)):
        return type(fn)(_decorate(fn.__func__, name, level))
    if inspect.isasyncgenfunction(fn):
        return _async_generator(fn, name, level)
    if inspect.isgeneratorfunction(fn):
        return _generator(fn, name, level)
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def timed_coroutine(*args: Any, **kwargs: Any) -> Any:
            with Timed(name, level):
                return await fn(*args, **kwargs)

        return timed_coroutine

    @functools.wraps(fn)
    def timed_function(*args: Any, **kwargs: Any) -> Any:
        with Timed(name, level):
            return fn(*args, **kwargs)

    return timed_function


class _Own:
    """Time of a generator itself, added up over its steps; logged at its end."""

    def __init__(self, name: str, level: int) -> None:
        self._name, self._level = name, level
        self._seconds = 0.0
        self._items = 0
        self._created = self._began = perf_counter()

    def go_on(self) -> None:
        self._began = perf_counter()

    def pause(self) -> None:
        self._seconds += perf_counter() - self._began

    def count(self) -> None:
        self._items += 1

    def end(self, kind: type[BaseException] | None) -> None:
        whole = perf_counter() - self._created
        items = f"{self._items} item" + ("" if self._items == 1 else "s")
        kind = None if kind in (GeneratorExit, StopIteration, StopAsyncIteration) else kind
        _say(self._level, self._name, self._seconds, kind, f" for {items}, {_duration(whole)} with its consumer")


def _generator(fn: Any, name: str, level: int) -> Any:
    @functools.wraps(fn)
    def timed_generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        own, kind = _Own(name, level), None
        inner = fn(*args, **kwargs)
        step: Callable[[], Any] = functools.partial(next, inner)
        try:
            while True:
                own.go_on()
                try:
                    item = step()
                except StopIteration as end:
                    return end.value
                finally:
                    own.pause()
                own.count()
                try:
                    sent = yield item
                except GeneratorExit:
                    inner.close()
                    raise
                except BaseException as error:
                    step = functools.partial(inner.throw, error)
                else:
                    step = functools.partial(inner.send, sent)
        except BaseException as error:
            kind = type(error)
            raise
        finally:
            own.end(kind)

    return timed_generator


def _async_generator(fn: Any, name: str, level: int) -> Any:
    @functools.wraps(fn)
    async def timed_async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        own, kind = _Own(name, level), None
        inner = fn(*args, **kwargs)
        step: Callable[[], Any] = inner.__anext__
        try:
            while True:
                own.go_on()
                try:
                    item = await step()
                except StopAsyncIteration:
                    return
                finally:
                    own.pause()
                own.count()
                try:
                    sent = yield item
                except GeneratorExit:
                    await inner.aclose()
                    raise
                except BaseException as error:
                    step = functools.partial(inner.athrow, error)
                else:
                    step = functools.partial(inner.asend, sent)
        except BaseException as error:
            kind = type(error)
            raise
        finally:
            own.end(kind)

    return timed_async_generator


class Timing(msgspec.Struct, frozen=True):
    """What `timeit` has measured. All times are wall seconds of one call.

    Args:
        median_s, p95_s: of the runs; ``least_s``: of the quickest, which nothing disturbed.
        spread_s: between the quarter points of the runs: half of them lie within it.
        runs: measured after ``warm_up`` that were not.
        calls_per_run: more than one where a single call is too short for the clock; a run is then their mean.
        result: what the last call returned.
    """

    median_s: float
    p95_s: float
    least_s: float
    spread_s: float
    runs: int
    warm_up: int
    calls_per_run: int
    result: Any = None

    def __str__(self) -> str:
        runs = f"{self.runs} runs" + (f" of {self.calls_per_run:,} calls" if self.calls_per_run > 1 else "")
        return (
            f"median {_duration(self.median_s)}, p95 {_duration(self.p95_s)}, "
            f"spread {_duration(self.spread_s)}; {runs} after {self.warm_up} to warm up"
        )


def timeit(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Timing:
    """Measure how long a call takes, sync or async, by calling it again and again for about three seconds.

    It is warmed up until two runs in a row differ by less than a tenth, for half a second at most; then measured for
    three seconds or a thousand runs, and at least five runs unless these take longer than three times that. All calls
    of an async function run on one event loop, made for it. What it raises passes through.

    Args:
        fn: what is called, with ``args`` and ``kwargs``.

    Returns:
        A `Timing`, in seconds per call.
    """
    return repeat(fn, args, kwargs)


def repeat(fn: Callable[..., Any], args: Any, kwargs: Any, *, most_s: float = 3.0) -> Timing:
    """What `timeit` does, for so many seconds after the warm-up."""
    if not inspect.iscoroutinefunction(fn):
        return _measure(_Calls(fn, args, kwargs), most_s)
    import asyncio

    with asyncio.Runner() as runner:
        return _measure(_Calls(fn, args, kwargs, runner.run), most_s)


class _Calls:
    """A call that is made again and again."""

    def __init__(self, fn: Callable[..., Any], args: Any, kwargs: Any, run: Callable[[Any], Any] | None = None) -> None:
        self._fn, self._args, self._kwargs, self._run = fn, args, kwargs, run
        self.result: Any = None

    def seconds(self, calls: int) -> float:
        """Mean of so many calls in a row."""
        if self._run is not None:
            spent: float = self._run(self._awaited(calls))
            return spent / calls
        fn, args, kwargs = self._fn, self._args, self._kwargs
        result = None
        began = perf_counter()
        for _ in range(calls):
            result = fn(*args, **kwargs)
        spent = perf_counter() - began
        self.result = result
        return spent / calls

    async def _awaited(self, calls: int) -> float:
        fn, args, kwargs = self._fn, self._args, self._kwargs
        began = perf_counter()
        for _ in range(calls):
            self.result = await fn(*args, **kwargs)
        return perf_counter() - began


def _measure(calls: _Calls, most_s: float) -> Timing:
    number, warm_up = _warm_up(calls)
    seconds: list[float] = []
    began = perf_counter()
    while len(seconds) < _MOST_RUNS:
        spent = perf_counter() - began
        if spent > most_s * (1 if len(seconds) >= _LEAST_RUNS else 3) and seconds:
            break
        seconds.append(calls.seconds(number))
    ordered = sorted(seconds)
    return Timing(
        median_s=median(ordered),
        p95_s=percentile(ordered, 0.95),
        least_s=ordered[0],
        spread_s=percentile(ordered, 0.75) - percentile(ordered, 0.25),
        runs=len(ordered),
        warm_up=warm_up,
        calls_per_run=number,
        result=calls.result,
    )


def _warm_up(calls: _Calls) -> tuple[int, int]:
    """Calls that make a run long enough for the clock, and how many runs it took to warm up."""
    number, runs, last = 1, 0, 0.0
    began = perf_counter()
    while True:
        now = calls.seconds(number)
        runs += 1
        if now * number < _LEAST_RUN_S and number < _MOST_CALLS:
            wanted = _LEAST_RUN_S / max(now, 1e-9)
            number = int(min(_MOST_CALLS, 10 * number, max(number + 1, wanted * 1.2)))
            continue
        if runs >= _WARM_UPS or perf_counter() - began > _WARM_UP_S or abs(now - last) <= _SETTLED * now:
            return number, runs
        last = now


def _duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            value = seconds / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"
