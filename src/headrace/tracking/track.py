"""Counts what happens in users' own code: `track_request`, `track_llm_call`, `track_tool`.

Each call is counted once, at its end, and a stream ends with its last element. Nothing here changes what a function
returns or raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from headrace import metrics
from headrace.clock import SYSTEM
from headrace.metrics.current import Meter, meter, status_of
from headrace.tracking.group import group

_Function = TypeVar("_Function", bound=Callable[..., Any])


class track_request:  # noqa: N801 - it is used like a function, in `with` and in `async with`
    """Count a request: its end, how long it took, its tokens.

        with hr.track_request(model="claude-sonnet") as request:
            …

    Args:
        model: the label of its metrics; beyond 2,000 different ones they are counted as ``other``.

    ``tokens`` is the sum of what `track_llm_call` saw meanwhile, and may be added to. ``status`` may be set to success,
    error, timeout, rejected or cancelled where no exception tells.
    """

    def __init__(self, model: str = "default") -> None:
        self.model = model
        self.tokens = 0
        self.status: str | None = None
        self._began = 0.0
        self._before: contextvars.Token[Meter | None] | None = None

    def __enter__(self) -> track_request:
        row = group().row
        row.by_status(metrics.AGENT_REQUESTS, model=self.model)
        row.gauge(metrics.AGENT_ACTIVE).inc()
        self._began = SYSTEM.monotonic()
        self._before = meter.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            # A generator that is closed from elsewhere ends in another context than it began in.
            with contextlib.suppress(ValueError):
                meter.reset(self._before)
        row, took_s = group().row, SYSTEM.monotonic() - self._began
        status = self.status or (status_of(error) if error is not None else "success")
        row.by_status(metrics.AGENT_REQUESTS, model=self.model)[status].inc()
        row.histogram(metrics.AGENT_DURATION, model=self.model).observe(took_s)
        if self.tokens:
            row.histogram(metrics.AGENT_TOKENS, model=self.model).observe(self.tokens)
        row.gauge(metrics.AGENT_ACTIVE).inc(-1)

    async def __aenter__(self) -> track_request:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


def track_llm_call(model: str, provider: str = "anthropic") -> Callable[[_Function], _Function]:
    """Count the calls of a function that asks a language model.

        @hr.track_llm_call("claude-sonnet", provider="anthropic")
        async def ask(question: str) -> Message: …

    The function may be an ordinary one, async, or a generator of either kind; what it returns may be a stream, which
    ends with its last element, when it is closed, or when nobody holds it any more. The tokens that an answer or a
    chunk says it used (``usage``, as OpenAI and Anthropic write it) are added to the request or task around it.
    """

    def ended(status: str, took_s: float, tokens: int) -> None:
        row = group().row
        row.by_status(metrics.LLM_CALLS, provider=provider, model=model)[status].inc()
        row.histogram(metrics.LLM_DURATION, model=model).observe(took_s)
        around = meter.get()
        if around is not None:
            around.tokens += tokens

    def begun() -> None:
        group().row.by_status(metrics.LLM_CALLS, provider=provider, model=model)

    return _decorator(begun, ended)


def track_tool(name: str) -> Callable[[_Function], _Function]:
    """Count the calls of a tool, by how they ended: ``@hr.track_tool("search")``, on any kind of function."""

    def ended(status: str, took_s: float, tokens: int) -> None:
        group().row.by_status(metrics.TOOL_CALLS, tool_name=name)[status].inc()

    def begun() -> None:
        group().row.by_status(metrics.TOOL_CALLS, tool_name=name)

    return _decorator(begun, ended)


_Ended = Callable[[str, float, int], None]


class _Call:
    """One call, counted at its end and only once."""

    def __init__(self, begun: Callable[[], None], ended: _Ended) -> None:
        begun()
        self._ended: _Ended | None = ended
        self._began = SYSTEM.monotonic()
        self._tokens = 0

    def note(self, answer: Any) -> None:
        """Take the tokens from an answer, or from a chunk of one: the last one that tells has the sum."""
        self._tokens = tokens_of(answer) or self._tokens

    def end(self, status: str) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(status, SYSTEM.monotonic() - self._began, self._tokens)

    def pass_on(self, result: Any) -> Any:
        """What the caller gets: the result itself, or a stream that is counted at its end."""
        if hasattr(result, "__anext__"):
            return _AsyncStream(result, self)
        if hasattr(result, "__next__"):
            return _Stream(result, self)
        self.note(result)
        self.end("success")
        return result

    def __enter__(self) -> _Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end("success" if error is None else status_of(error))


def _decorator(begun: Callable[[], None], ended: _Ended) -> Callable[[_Function], _Function]:
    def decorate(function: _Function) -> _Function:
        wrapped: Any
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def wrapped(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
                with _Call(begun, ended) as call:
                    async with contextlib.aclosing(function(*args, **kwargs)) as stream:
                        async for each in stream:
                            call.note(each)
                            yield each

        elif inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def wrapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
                with _Call(begun, ended) as call, contextlib.closing(function(*args, **kwargs)) as stream:
                    for each in stream:
                        call.note(each)
                        yield each

        elif inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def wrapped(*args: Any, **kwargs: Any) -> Any:
                call = _Call(begun, ended)
                try:
                    return call.pass_on(await function(*args, **kwargs))
                except BaseException as error:
                    call.end(status_of(error))
                    raise

        else:

            @functools.wraps(function)
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                call = _Call(begun, ended)
                try:
                    return call.pass_on(function(*args, **kwargs))
                except BaseException as error:
                    call.end(status_of(error))
                    raise

        return wrapped  # type: ignore[no-any-return]

    return decorate


class _Proxy:
    """A stream of somebody else's, with all that it can do; its end is counted."""

    def __init__(self, stream: Any, call: _Call) -> None:
        self._stream = stream
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __del__(self) -> None:
        self._call.end("cancelled")


class _Stream(_Proxy):
    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        try:
            chunk = next(self._stream)
        except StopIteration:
            self._call.end("success")
            raise
        except BaseException as error:
            self._call.end(status_of(error))
            raise
        self._call.note(chunk)
        return chunk

    def __enter__(self) -> _Stream:
        self._stream.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Any:
        self._call.end("cancelled" if error is None else status_of(error))
        return self._stream.__exit__(kind, error, trace)

    def close(self) -> None:
        self._call.end("cancelled")
        self._stream.close()


class _AsyncStream(_Proxy):
    def __aiter__(self) -> _AsyncStream:
        return self

    async def __anext__(self) -> Any:
        try:
            chunk = await self._stream.__anext__()
        except StopAsyncIteration:
            self._call.end("success")
            raise
        except BaseException as error:
            self._call.end(status_of(error))
            raise
        self._call.note(chunk)
        return chunk

    async def __aenter__(self) -> _AsyncStream:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> Any:
        self._call.end("cancelled" if error is None else status_of(error))
        return await self._stream.__aexit__(kind, error, trace)

    async def close(self) -> None:
        self._call.end("cancelled")
        await self._stream.close()

    async def aclose(self) -> None:
        self._call.end("cancelled")
        await self._stream.aclose()


def tokens_of(answer: Any) -> int:
    """Tokens that an answer says it used: ``usage.total_tokens``, or input and output together; 0 if it does not."""
    usage = _field(answer, "usage")
    total = _field(usage, "total_tokens")
    if total is None:
        total = (_field(usage, "input_tokens") or 0) + (_field(usage, "output_tokens") or 0)
    return total if isinstance(total, int) else 0


def _field(thing: Any, name: str) -> Any:
    return thing.get(name) if isinstance(thing, dict) else getattr(thing, name, None)
