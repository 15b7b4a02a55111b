"""A function that is followed whenever it runs, for Pythons where that has to be switched on in the thread.

Only while it runs: a coroutine or a generator that waits has left the thread to others. What it returns, is sent and is
thrown reaches it as if it were not wrapped.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractContextManager
from typing import Any


class Switch:
    """What is switched on around each stretch that runs: two functions of no arguments."""

    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self.enter, self.leave = enter, leave

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self.enter()
        try:
            return fn(*args, **kwargs)
        finally:
            self.leave()


class Stretches:
    """A generator, or what awaiting gives, with the switch on while it runs. Itself awaitable and iterable."""

    def __init__(self, switch: Switch, inner: Any) -> None:
        self._run, self._inner = switch.run, inner

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self)

    def __iter__(self) -> Stretches:
        return self

    def __next__(self) -> Any:
        return self._run(self._inner.__next__)

    def send(self, value: Any) -> Any:
        return self._run(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._run(self._inner.throw, *error)

    def close(self) -> None:
        self._run(self._inner.close)


def wrap(fn: Callable[..., Any], switch: Switch) -> Callable[..., Any]:
    """The same function, of the same kind, with the switch on while it runs."""
    if inspect.isasyncgenfunction(fn):
        return forward_async_generator(fn, step=lambda awaitable: Stretches(switch, awaitable.__await__()))
    if inspect.iscoroutinefunction(fn):

        @functools.wraps(fn)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return await Stretches(switch, fn(*args, **kwargs).__await__())

        return coroutine
    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            return (yield from Stretches(switch, fn(*args, **kwargs)))

        return generator

    @functools.wraps(fn)
    def function(*args: Any, **kwargs: Any) -> Any:
        return switch.run(fn, *args, **kwargs)

    return function


def forward_async_generator(
    fn: Callable[..., Any],
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    step: Callable[[Awaitable[Any]], Awaitable[Any]] = lambda step: step,
) -> Callable[..., AsyncGenerator[Any, Any]]:
    """The same async generator function, since there is no ``yield from`` for them.

    Args:
        around: what is entered before it begins, and left after it has ended.
        step: what is done to the awaitable of each of its steps.
    """

    @functools.wraps(fn)
    async def async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with around():
            inner = fn(*args, **kwargs)
            try:
                item = await step(inner.__anext__())
                while True:
                    try:
                        sent = yield item
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        item = await step(inner.athrow(error))
                    else:
                        item = await step(inner.asend(sent))
            except StopAsyncIteration:
                return
            finally:
                await step(inner.aclose())

    return async_generator
