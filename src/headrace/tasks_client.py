"""A client of headrace's tasks, for plain and for asyncio programs: submit, wait, watch, end.

The course of each call is written once, in `_Core`; `headrace.http_client` knows how to send and when to try again.
Knows the server by its HTTP interface alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import math
import random
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from typing import Any

import httpx
import msgspec

from headrace.clock import SYSTEM, Clock, sleep
from headrace.errors import DeadlineExceeded, HeadraceError, ServiceError, TaskCancelled, TaskFailed
from headrace.http_client import (
    LOST,
    Answer,
    Ask,
    AsyncHttp,
    Core,
    Progress,
    Steps,
    SyncHttp,
    T,
    Try,
    checked_timeout,
    to_json,
)

__all__ = ["AsyncTasks", "Task", "TaskEvent", "Tasks"]

URL = "http://localhost:8000"
_ENDS = ("completed", "failed", "cancelled")
_FINAL = ("RUN_FINISHED", "RUN_ERROR")
_FIRST_POLL_S, _GROWTH = 0.05, 1.5
# Time for the last look at a task, also where none is left.
_LOOK_S = 0.5
# A gateway says something at least every 15 s: after three times as much nobody is there.
_SILENCE_S = 45.0
_CONNECT_S = 10.0
_MOST_PAUSE_S = 2.0
# What a proxy says while there is nobody behind it, besides what the server itself says.
_AWAY = (429, 502, 503, 504)
_PAGE = 100


class TaskProblem(msgspec.Struct, frozen=True):
    """What a task failed with. ``field`` is the part of the input that was wrong, ``hint`` what to do about it."""

    code: str
    message: str
    field: str | None = None
    hint: str | None = None


class Question(msgspec.Struct, frozen=True):
    """What a task waits to be told. ``schema`` is a JSON Schema, ``None`` where anything will do."""

    prompt: str
    schema: Any = None


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it was when the server was asked. What `Tasks.submit` gives has ``task_id`` and ``status`` alone.

    Args:
        status: pending, running, input_required, completed, failed or cancelled.
        result: what the agent returned, once completed.
        error: why it failed.
        attempt: how often a worker has taken it up.
        steps: how many are done.
        deadline: it fails then if it is not done.
        ttl_ms: how long it is kept after its end.
        input_required: what it asks for; `Tasks.answer` tells it.
    """

    task_id: str
    status: str
    agent: str = ""
    result: Any = None
    error: TaskProblem | None = None
    attempt: int = 0
    steps: int = 0
    priority: str = "default"
    model: str | None = None
    created_at: datetime.datetime | None = None
    updated_at: datetime.datetime | None = None
    deadline: datetime.datetime | None = None
    ttl_ms: int = 0
    poll_interval_ms: int = 1000
    input_required: Question | None = None

    @property
    def ended(self) -> bool:
        """Whether it is completed, failed or cancelled."""
        return self.status in _ENDS


class TaskEvent(msgspec.Struct, frozen=True):
    """Something that a task has said. ``data`` is the whole AG-UI event; ``id`` is what to go on from."""

    id: str
    type: str
    data: dict[str, Any]

    @property
    def final(self) -> bool:
        """Whether it is the last one: the task has ended."""
        return self.type in _FINAL


class _Core(Core):
    """The course of each call."""

    url_field = "url"

    def submit(
        self,
        agent: str | None,
        message: str | None,
        value: Any,
        priority: str | None,
        timeout_s: float | None,
        model: str | None,
        key: str | None,
    ) -> Steps[Task]:
        given = {"agent": agent, "message": message, "priority": priority, "timeout_s": timeout_s, "model": model}
        body = {name: each for name, each in given.items() if each is not None}
        if value is not msgspec.UNSET:
            body["input"] = value
        headers = {"idempotency-key": key or uuid.uuid4().hex}
        ask = Ask("POST", "/agent/submit", to_json(body, "input"), headers=headers, again_when_broken=True)
        return (yield from self.exchange(ask, None)).decode(Task)

    def get(self, ident: str) -> Steps[Task]:
        return (yield from self._look(ident, self._timeout_s)).decode(Task)

    def _look(self, ident: str, left_s: float) -> Steps[Answer]:
        timeout_s = min(self._timeout_s, max(left_s, _LOOK_S))
        ask = Ask("GET", _path("status", ident), again_when_broken=True)
        return (yield from self.exchange(ask, timeout_s))

    def cancel(self, ident: str) -> Steps[Task]:
        ask = Ask("POST", _path("cancel", ident), again_when_broken=True)
        return (yield from self.exchange(ask, None)).decode(Task)

    def retry(self, ident: str, fresh: bool) -> Steps[Task]:
        ask = Ask("POST", _path("retry", ident) + ("?fresh=1" if fresh else ""))
        return (yield from self.exchange(ask, None)).decode(Task)

    def answer(self, ident: str, value: Any) -> Steps[Task]:
        ask = Ask("POST", _path("input", ident), to_json({"input": value}, "input"))
        return (yield from self.exchange(ask, None)).decode(Task)

    def page(self, status: str, agent: str, after: str, limit: int) -> Steps[_Page]:
        wanted = {"status": status, "agent": agent, "after": after, "limit": str(limit)}
        query = urllib.parse.urlencode({name: value for name, value in wanted.items() if value})
        ask = Ask("GET", f"/agent/tasks?{query}", again_when_broken=True)
        return (yield from self.exchange(ask, None)).decode(_Page)

    def wait(self, ident: str, timeout_s: float | None) -> Steps[Task]:
        until = self._until(timeout_s)
        outage, pause_s = _Outage(self), _FIRST_POLL_S
        while True:
            try:
                answer = yield from self._look(ident, until - self._clock.monotonic())
            except HeadraceError as error:
                if until - self._clock.monotonic() > 0:
                    outage.bear(error)
                    pause_s = max(pause_s, outage.pause_s())
            else:
                outage.over()
                task = answer.decode(Task)
                if task.ended:
                    return task
                pause_s = min(pause_s * _GROWTH, task.poll_interval_ms / 1000)
            left_s = until - self._clock.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(
                    f"task {ident} is not done after {timeout_s:g} s; it goes on", hint="wait again, or cancel it"
                )
            yield min(pause_s, left_s)

    def result(self, ident: str, timeout_s: float | None) -> Steps[Any]:
        task = yield from self.wait(ident, timeout_s)
        if task.status == "completed":
            return task.result
        if task.status == "cancelled":
            raise TaskCancelled(f"task {ident} was cancelled", hint="retry runs it once more, from where it was")
        problem = task.error or TaskProblem("", "it does not say why")
        again = "retry runs it once more: steps that are done are not repeated"
        raise TaskFailed(problem.message, reason=problem.code, field=problem.field, hint=problem.hint or again)

    def events(self, ident: str, after: str, timeout_s: float | None) -> Generator[Try | _Stream | float, None, None]:
        """A `_Stream` gives the events while it is taken. Streams follow one another until one has had the last."""
        until = self._until(timeout_s)
        outage = _Outage(self)
        was_ended = False
        while True:
            stream = _Stream(_path("events", ident), after, until, self._clock)
            try:
                stream.check()
                yield stream
                error = stream.refusal()
            except (httpx.TimeoutException, TimeoutError):
                error = ServiceError(f"no word from {self.base_url}", hint="is the server running?")
            except httpx.HTTPError as lost:
                error = self.lost_error(stream, lost)
                if not isinstance(lost, LOST):
                    raise error from lost
            after = stream.last
            if stream.had_final:
                return
            if stream.heard:
                self.reached = True
                outage.over()
            if until - self._clock.monotonic() <= 0:
                raise DeadlineExceeded(
                    f"task {ident} is not done after {timeout_s:g} s; it goes on", hint=f"go on after {after or 0}"
                )
            if error is None and was_ended and not stream.told_to_come_back:
                return  # it was asked for what comes after the last one
            try:
                if error is not None:
                    raise error
                # A gateway that stops says good-bye like a task that has ended.
                answer = yield from self._look(ident, until - self._clock.monotonic())
            except HeadraceError as reason:
                outage.bear(reason)
            else:
                was_ended = answer.decode(Task).ended
                if was_ended and not stream.told_to_come_back:
                    continue
                if not stream.heard:
                    outage.count()
            yield min(max(outage.pause_s(), stream.retry_s), max(0.0, until - self._clock.monotonic()))

    def _until(self, timeout_s: float | None) -> float:
        return math.inf if timeout_s is None else self._clock.monotonic() + checked_timeout(timeout_s)

    def bears(self, failures: int, for_s: float) -> bool:
        """Whether to try on after so many failures in a row, in so long. Where nobody has ever answered: not long."""
        return failures <= self._retries or (self.reached and for_s < self._timeout_s)

    def now(self) -> float:
        return self._clock.monotonic()


class Tasks(SyncHttp[_Core]):
    """Asks a headrace server for work that takes long. May be shared between threads; close it, or use ``with``.

    Every method raises the error that the server names (`headrace.errors`), `DeadlineExceeded` when its time is up, and
    `ServiceError` when there is no connection. `wait`, `result` and `events` outlive restarts of the server: they try
    on for ``timeout_s`` after it has fallen silent.

    Args:
        url: where the server is.
        api_key: sent as ``Authorization: Bearer``; never shown.
        timeout_s: time for a call, its retries included; not for what `wait`, `result` and `events` wait for.
        retries: how often a call is repeated after 429, 503 or a broken connection.
        clock: what the deadline is measured with.
        sleep: how to wait between two tries.
        jitter: source of the spread of waits.
    """

    _core_type = _Core

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        clock: Clock = SYSTEM,
        sleep: Callable[[float], None] = sleep,
        jitter: random.Random | None = None,
    ) -> None:
        super().__init__(
            url, api_key=api_key, timeout_s=timeout_s, retries=retries, clock=clock, sleep=sleep, jitter=jitter
        )

    def submit(
        self,
        agent: str | None = None,
        *,
        message: str | None = None,
        input: Any = msgspec.UNSET,  # noqa: A002
        priority: str | None = None,
        timeout_s: float | None = None,
        model: str | None = None,
        idempotency_key: str | None = None,
    ) -> Task:
        """Start a task and return at once. The task survives whatever happens to this program from here on.

        Args:
            agent: its name; may be left out where there is one.
            message: a text for it; or ``input``, all that it takes.
            priority: interactive, default or batch.
            timeout_s: the task fails if it is not done by then, however often it is begun.
            model: for agents that let the client choose.
            idempotency_key: two submits with one key make one task. Made up for this call if you name none, so that
                its own retries make one task; name one to be safe across restarts of your program too.
        """
        return self._run(self._core.submit(agent, message, input, priority, timeout_s, model, idempotency_key))

    def get(self, task_id: str) -> Task:
        """A task as it is now. Raises `TaskNotFound`, also for the tasks of other keys."""
        return self._run(self._core.get(task_id))

    def wait(self, task_id: str, timeout_s: float | None = None) -> Task:
        """The task at its end, whatever end that is.

        Args:
            timeout_s: as long as the task's own deadline allows if ``None``.

        Raises:
            DeadlineExceeded: it is not done within that time; it goes on.
        """
        return self._run(self._core.wait(task_id, timeout_s))

    def result(self, task_id: str, timeout_s: float | None = None) -> Any:
        """What the task gives, once it is done.

        Raises:
            TaskFailed: with the task's message, and the code as ``reason``.
            TaskCancelled
            DeadlineExceeded: it is not done within ``timeout_s``; it goes on.
        """
        return self._run(self._core.result(task_id, timeout_s))

    def events(self, task_id: str, after: str = "", timeout_s: float | None = None) -> Iterator[TaskEvent]:
        """Events of a task as they happen, up to the final one, each once, through lost connections and restarts.

        Args:
            after: the id of the last event that you have; from the first one on without it.
            timeout_s: raises `DeadlineExceeded` then; looked at when something comes, at the latest after 15 s.
        """
        progress = Progress(self._core.events(task_id, after, timeout_s))
        while (step := progress.next()) is not None:
            with progress:
                if not isinstance(step, _Stream):
                    self._do(step)
                    continue
                with self._http.stream(**step.request) as response:
                    step.begin(response)
                    for chunk in response.iter_bytes():
                        yield from step.take(chunk)
                        if step.had_final:
                            break

    def cancel(self, task_id: str) -> Task:
        """End a task; its code is interrupted. Raises `TaskConflict` if it has ended otherwise."""
        return self._run(self._core.cancel(task_id))

    def retry(self, task_id: str, *, fresh: bool = False) -> Task:
        """Run a failed or cancelled task once more: from where it was, or, ``fresh``, from its beginning.

        Raises:
            TaskConflict: it is in another state.
        """
        return self._run(self._core.retry(task_id, fresh))

    def answer(self, task_id: str, value: Any) -> Task:
        """Tell a task what it asks for.

        Raises:
            InvalidInput: not what it asked for; names the place.
            TaskConflict: it asks for nothing.
        """
        return self._run(self._core.answer(task_id, value))

    def list(self, *, status: str = "", agent: str = "") -> Iterator[Task]:
        """Tasks, the newest first. They are fetched page by page, as far as you go."""
        after: str | None = ""
        while after is not None:
            page = self._run(self._core.page(status, agent, after, _PAGE))
            yield from page.tasks
            after = page.next


class AsyncTasks(AsyncHttp[_Core]):
    """`Tasks` for asyncio: the same arguments, methods and errors. Belongs to one event loop."""

    _core_type = _Core

    def __init__(
        self,
        url: str = URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 3,
        clock: Clock = SYSTEM,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: random.Random | None = None,
    ) -> None:
        super().__init__(
            url, api_key=api_key, timeout_s=timeout_s, retries=retries, clock=clock, sleep=sleep, jitter=jitter
        )

    async def submit(
        self,
        agent: str | None = None,
        *,
        message: str | None = None,
        input: Any = msgspec.UNSET,  # noqa: A002
        priority: str | None = None,
        timeout_s: float | None = None,
        model: str | None = None,
        idempotency_key: str | None = None,
    ) -> Task:
        """As `Tasks.submit`."""
        return await self._run(self._core.submit(agent, message, input, priority, timeout_s, model, idempotency_key))

    async def get(self, task_id: str) -> Task:
        """As `Tasks.get`."""
        return await self._run(self._core.get(task_id))

    async def wait(self, task_id: str, timeout_s: float | None = None) -> Task:
        """As `Tasks.wait`."""
        return await self._run(self._core.wait(task_id, timeout_s))

    async def result(self, task_id: str, timeout_s: float | None = None) -> Any:
        """As `Tasks.result`."""
        return await self._run(self._core.result(task_id, timeout_s))

    async def events(self, task_id: str, after: str = "", timeout_s: float | None = None) -> AsyncIterator[TaskEvent]:
        """As `Tasks.events`, and ``timeout_s`` is kept to exactly. Leave it early inside `contextlib.aclosing`."""
        progress = Progress(self._core.events(task_id, after, timeout_s))
        while (step := progress.next()) is not None:
            with progress:
                if not isinstance(step, _Stream):
                    await self._do(step)
                    continue
                async with contextlib.AsyncExitStack() as stack:
                    # No time-out reaches around a `yield`: it would interrupt whoever reads.
                    opened = stack.enter_async_context(self._http.stream(**step.request))
                    response = await _within(step.opening_s, opened)
                    step.begin(response)
                    chunks = response.aiter_bytes()
                    while (chunk := await _within(step.limit_s, anext(chunks, None))) is not None:
                        for event in step.take(chunk):
                            yield event
                        if step.had_final:
                            break

    async def cancel(self, task_id: str) -> Task:
        """As `Tasks.cancel`."""
        return await self._run(self._core.cancel(task_id))

    async def retry(self, task_id: str, *, fresh: bool = False) -> Task:
        """As `Tasks.retry`."""
        return await self._run(self._core.retry(task_id, fresh))

    async def answer(self, task_id: str, value: Any) -> Task:
        """As `Tasks.answer`."""
        return await self._run(self._core.answer(task_id, value))

    async def list(self, *, status: str = "", agent: str = "") -> AsyncIterator[Task]:
        """As `Tasks.list`."""
        after: str | None = ""
        while after is not None:
            page = await self._run(self._core.page(status, agent, after, _PAGE))
            for task in page.tasks:
                yield task
            after = page.next


async def _within(limit_s: float | None, awaited: Awaitable[T]) -> T:
    async with asyncio.timeout(limit_s):
        return await awaited


# No input or output from here on.


class _Outage:
    """Failures in a row, and whether to bear one more."""

    def __init__(self, core: _Core) -> None:
        self._core = core
        self._failures = 0
        self._since = 0.0
        self._asked_s = 0.0

    def over(self) -> None:
        self._failures = 0

    def bear(self, error: HeadraceError) -> None:
        """Raises the error if it will not pass, or has not for too long."""
        self.count()
        self._asked_s = error.retry_after_s or 0.0
        if not error.retryable or not self._core.bears(self._failures, self._core.now() - self._since):
            raise error

    def count(self) -> None:
        """Nothing came."""
        if not self._failures:
            self._since = self._core.now()
        self._failures += 1

    def pause_s(self) -> float:
        """How long to wait before the next try."""
        return self._asked_s if self._failures and self._asked_s else self._core.pause_s(self._failures, _MOST_PAUSE_S)


class _Stream(Try):
    """One connection that events come through.

    Args:
        path: of the task's events.
        after: id of the last event that is known.
    """

    def __init__(self, path: str, after: str, until: float, clock: Clock) -> None:
        headers = {"accept": "text/event-stream", **({"last-event-id": after} if after else {})}
        super().__init__(Ask("GET", path, headers=headers), until, clock)
        self.last = after
        self.heard = False
        self.had_final = False
        self._parser = EventParser()

    @property
    def limit_s(self) -> float | None:
        """For `asyncio.timeout`."""
        return self.left_s if math.isfinite(self.left_s) else None

    @property
    def opening_s(self) -> float:
        """For a name that nobody resolves, which httpx does not bound, a connection and the head of the answer."""
        return min(self.left_s, _CONNECT_S + _SILENCE_S)

    @property
    def retry_s(self) -> float:
        """When the server wants to be asked again, 0 where it does not say."""
        return (self._parser.retry_ms or 0) / 1000

    @property
    def told_to_come_back(self) -> bool:
        """Whether the server has ended it for a reason of its own."""
        return self._parser.retry_ms is not None

    def patience_s(self, phase: str) -> float:
        return min(self.left_s, _SILENCE_S if phase == "read" else _CONNECT_S)

    def take(self, chunk: bytes) -> Iterator[TaskEvent]:
        """The events that are complete with one more piece. Raises `TimeoutError` if it comes too late."""
        assert self.answer
        if self.answer.status != 200 or not self.answer.is_kind("text/event-stream"):
            self.add(chunk)
            return
        self.heard = True
        for ident, data in self._parser.feed(chunk):
            event = self._event(ident, data)
            self.last = ident or self.last
            self.had_final = event.final
            yield event
            if self.had_final:
                return
        self.check()

    def refusal(self) -> HeadraceError | None:
        """What the server has answered instead of events."""
        assert self.answer
        if self.answer.status in _AWAY:
            error = self.answer.error()
            return error if error.retryable else ServiceError(error.message, retry_after_s=error.retry_after_s)
        if not 200 <= self.answer.status < 300:
            return self.answer.error()
        if not self.answer.is_kind("text/event-stream"):
            raise self.answer.unexpected("no events")
        return None

    def _event(self, ident: str, data: str) -> TaskEvent:
        assert self.answer
        try:
            told = msgspec.json.decode(data, type=dict[str, Any])
            return TaskEvent(ident, told["type"], told)
        except (msgspec.DecodeError, KeyError) as error:
            raise self.answer.unexpected(f"{error} in an event") from error


class EventParser:
    """Server-sent events out of the pieces that they come in (the WHATWG's rules, as far as ids and data go).

    An event counts once the empty line behind it has come: half of one that breaks off is not seen.
    """

    def __init__(self) -> None:
        self.retry_ms: int | None = None
        self._pieces: list[bytes] = []
        self._begun = False
        self._data: list[str] = []
        self._id = ""

    def feed(self, piece: bytes) -> Iterator[tuple[str, str]]:
        """Id and data of each event that is complete now."""
        self._pieces.append(piece)
        # A long line is put together once, when its end has come; an event ends in a line feed or a carriage return.
        if b"\n" not in piece and b"\r" not in piece:
            return
        text = b"".join(self._pieces)
        # Half of a line end cannot be told from a whole one.
        held = b"\r" if text.endswith(b"\r") else b""
        *lines, rest = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._pieces = [rest + held]
        for line in lines:
            if not self._begun:
                self._begun, line = True, line.removeprefix(b"\xef\xbb\xbf")
            if line:
                self._take(line.decode("utf-8", "replace"))
            elif self._data:
                data, self._data = "\n".join(self._data), []
                yield self._id, data

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")  # a comment has no name
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value)


class _Page(msgspec.Struct):
    tasks: list[Task]
    next: str | None = None


def _path(verb: str, ident: str) -> str:
    return f"/agent/{verb}/{urllib.parse.quote(ident, safe='')}"
