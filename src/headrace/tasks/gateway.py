"""What clients can ask of tasks, whatever the protocol: accept, show, watch, end, retry, answer.

Knows what agents take from what task workers have said of them, and never imports their code. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import AsyncGenerator
from typing import Any

import jsonschema_rs
import msgspec

from headrace import metrics
from headrace.clock import monotonic
from headrace.config import Config
from headrace.errors import (
    HeadraceError,
    InvalidInput,
    NotReady,
    Overloaded,
    StoreDown,
    TaskConflict,
    TaskNotFound,
    Unavailable,
)
from headrace.metrics import LANES
from headrace.tasks.delivery import RedisError
from headrace.tasks.hub import Hub
from headrace.tasks.service import Service, store_errors
from headrace.tasks.store import STATES, AgentSpec, Ended, Event, Submission, Task, from_json, to_json

_log = logging.getLogger(__name__)

_FRESH_S = 2.0
_AGAIN_S = 2.0
_USABLE_KEY = re.compile(r"^[\x21-\x7e]{1,255}$")
_STREAM_ID = re.compile(r"^\d{1,15}(-\d{1,10})?$")
_CURSOR = re.compile(r"^\d{1,15}-[0-9a-f]{1,64}$")
_MOST_LISTED = 500
_FIELDS = ("agent", "message", "input", "priority", "timeout_s", "model")


class Gateway:
    """One front end's view of the tasks.

    Args:
        row: where metrics go.

    It starts with `start` and answers `StoreDown` until the store is there.
    """

    def __init__(self, config: Config, row: metrics.Row) -> None:
        self._config = config
        self._row = row
        self._service = Service(config, row)
        self._specs: dict[str, AgentSpec] = {}
        self._checks: dict[str, tuple[bytes, Any]] = {}
        self._looked = -_FRESH_S
        self._watching = row.gauge(metrics.TASK_WATCHERS)
        self._opened = False
        self._running: list[asyncio.Task[None]] = []
        self.failure: HeadraceError | None = None

    async def start(self) -> None:
        """Begin to open the store, in the background."""
        self._running.append(asyncio.ensure_future(self._run()))

    async def stop(self) -> None:
        """Close the store."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._serve()
                except Unavailable as error:  # it may pass: a store that loads much data, a full disk
                    self.failure = error
                    _log.error("no tasks can be taken for now: %s", error.message)
                    await asyncio.sleep(_AGAIN_S)
        except HeadraceError as error:
            self.failure = error
            _log.error("no tasks can be taken: %s%s", error.message, f" ({error.hint})" if error.hint else "")
        except Exception as error:
            _log.exception("the gateway's part of the task store has failed")
            self.failure = StoreDown(f"the task store cannot be used: {type(error).__name__}")

    async def _serve(self) -> None:
        try:
            async with self._service as service:
                self._hub = Hub(service.connection, service.store)
                self.failure, self._opened = None, True
                await self._hub.run()
        finally:
            self._opened = False

    def drain(self) -> None:
        """End the streams: their clients go on with another gateway, from where they are."""
        if self._opened:
            self._hub.close()

    @property
    def ready(self) -> bool:
        """Whether the store has been opened. It may be away just now, which submissions are told."""
        return self._opened

    @property
    def state(self) -> str:
        """For health reports: ready, starting, store_unavailable or failed."""
        if self.failure:
            return "failed"
        if not self._opened:
            return "starting"
        return "ready" if self._service.is_up else "store_unavailable"

    def retry_after_s(self) -> float:
        """When a place is likely to be free for one more task."""
        return self._service.retry_after_s()

    async def specs(self) -> dict[str, AgentSpec]:
        """The agents there are, at most a moment old."""
        self._require_open()
        if monotonic() - self._looked > _FRESH_S:
            async with store_errors():
                await self._look()
        return self._specs

    async def submit(self, body: Any, *, owner: str, idempotency_key: str = "") -> tuple[str, str]:
        """Accept a task.

        Args:
            body: decoded JSON: ``agent``, ``message`` or ``input``, ``priority``, ``timeout_s``, ``model``.
            owner: digest of the key of whoever asks.

        Returns:
            Id and state: that of the task which the same `Idempotency-Key` has made before, if any.

        Raises:
            InvalidInput: something is wrong with the body; names the field.
            NotReady: no worker has said yet which agents there are.
            Overloaded, TaskConflict, StoreDown
        """
        wanted = await self._read(body, owner, idempotency_key)
        async with store_errors():
            try:
                queued, ident, state = await self._service.store.submit(wanted)
            except Overloaded as full:
                full.retry_after_s = self.retry_after_s()
                raise
            if queued is not None:
                # It is accepted: were the queue to fail now, whoever tidies up would hand it over.
                with contextlib.suppress(RedisError):
                    await self._service.queue(queued)
        self._row.counter(metrics.TASKS_SUBMITTED, model=wanted.agent).inc()
        return ident, state

    async def get(self, ident: str, owner: str) -> Task:
        """Raises `TaskNotFound`, also for the tasks of another key."""
        self._require_open()
        async with store_errors():
            task = await self._service.store.get(ident)
        if task.owner != owner:
            raise TaskNotFound(f"there is no task {ident!r}", field="id")
        return task

    async def events(self, ident: str, owner: str, after: str) -> AsyncGenerator[Event | None, None]:
        """Events of a task past a stream id until its final one; ``None`` now and then while there are none.

        Raises:
            TaskNotFound, StoreDown, InvalidInput: before the first event.
        """
        if after and not _STREAM_ID.match(after):
            raise InvalidInput(
                f"{after!r} is not the id of an event", field="after", hint="use the id of the last one seen"
            )
        task = await self.get(ident, owner)
        return self._follow(task, after or "0-0")

    async def _follow(self, task: Task, after: str) -> AsyncGenerator[Event | None, None]:
        self._watching.inc()
        try:
            if task.ended:
                while page := await self._service.store.events(task.id, after):
                    for event in page:
                        yield event
                        after = event.id
                return
            async with contextlib.aclosing(self._hub.watch(task.id, after)) as events:
                async for news in events:
                    yield news
                    # It may have ended before the client's own last event: nothing more will come.
                    if news is None and (await self._service.store.get(task.id)).ended:
                        break
        except TaskNotFound:
            return
        finally:
            self._watching.inc(-1)

    async def cancel(self, ident: str, owner: str) -> Task:
        """End a task. Raises `TaskNotFound`, `TaskConflict` (it has ended otherwise), `StoreDown`."""
        await self.get(ident, owner)
        async with store_errors():
            ended = await self._service.store.end(ident, "cancelled", "cancelled", "it was cancelled")
        if isinstance(ended, Ended):
            self._service.metrics.ended(ended)
        elif ended != "cancelled":
            raise TaskConflict(f"the task is {ended} already")
        return await self.get(ident, owner)

    async def retry(self, ident: str, owner: str, *, fresh: bool) -> Task:
        """Run a failed or cancelled task once more.

        Raises:
            TaskNotFound, TaskConflict, Overloaded, StoreDown
        """
        await self.get(ident, owner)
        async with store_errors():
            queued = await self._service.store.retry(ident, fresh=fresh)
            with contextlib.suppress(RedisError):
                await self._service.queue(queued)
        return await self.get(ident, owner)

    async def answer(self, ident: str, owner: str, value: Any) -> Task:
        """Give a task what it asked for.

        Raises:
            InvalidInput: not what it asked for; names the place.
            TaskNotFound, TaskConflict, StoreDown
        """
        task = await self.get(ident, owner)
        if task.ask is None:
            raise TaskConflict(f"the task is {task.state}", hint="it waits for no input")
        ask = from_json(task.ask)
        if ask["schema"] is not None:
            _check(jsonschema_rs.validator_for(ask["schema"]), value, "input")
        async with store_errors():
            queued = await self._service.store.answer(task, ask["field"], to_json(value))
            with contextlib.suppress(RedisError):
                await self._service.queue(queued)
        return await self.get(ident, owner)

    async def tasks(
        self, owner: str, *, status: str = "", agent: str = "", after: str = "", limit: int = 50
    ) -> tuple[list[Task], str | None]:
        """Tasks from the newest on.

        Args:
            after: what the last page gave to go on from.

        Returns:
            Up to ``limit`` of them, and what to go on from, ``None`` at the end.

        Raises:
            InvalidInput, StoreDown
        """
        if status and status not in STATES:
            raise InvalidInput(f"{status!r} is no state", field="status", hint=", ".join(STATES))
        if not 1 <= limit <= _MOST_LISTED:
            raise InvalidInput(f"must be from 1 to {_MOST_LISTED}", field="limit")
        if after and not _CURSOR.match(after):
            raise InvalidInput("is not what a page gave to go on from", field="after", hint="use its next")
        at, _, ident = after.partition("-")
        last = (int(at), ident) if after else None
        self._require_open()
        found: list[Task] = []
        async with store_errors():
            while len(found) < limit:
                page, last = await self._service.store.tasks(last, limit)
                found += [
                    task
                    for task in page
                    if task.owner == owner and status in ("", task.state) and agent in ("", task.agent)
                ]
                if last is None:
                    break
        if len(found) > limit:
            found = found[:limit]
            last = (found[-1].created_at, found[-1].id)
        return found, None if last is None else f"{last[0]}-{last[1]}"

    async def _read(self, body: Any, owner: str, key: str) -> Submission:
        if not isinstance(body, dict):
            raise InvalidInput("must be an object", field="body", hint='for example {"message": "…"}')
        for name in body:
            if name not in _FIELDS:
                raise InvalidInput("is not known here", field=str(name), hint=f"known are {', '.join(_FIELDS)}")
        if key and not _USABLE_KEY.match(key):
            raise InvalidInput("must be 1 to 255 printable characters without spaces", field="Idempotency-Key")
        spec = await self._spec(body.get("agent"))
        given, field = self._input(spec, body)
        priority = body.get("priority", spec.priority)
        if priority not in LANES:
            raise InvalidInput(f"{priority!r} is no priority", field="priority", hint=", ".join(LANES))
        timeout_s = body.get("timeout_s", spec.timeout_s or self._config.task_timeout_s)
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= 31_536_000:
            raise InvalidInput("must be a number of seconds above 0, at most a year", field="timeout_s")
        model = body.get("model") or ""
        if not isinstance(model, str) or len(model) > 200:
            raise InvalidInput("must be a text of at most 200 characters", field="model")
        encoded = b"" if field is None else to_json(given)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() if key else ""
        return Submission(spec.name, encoded, priority, model, owner, float(timeout_s), key, digest)

    def _input(self, spec: AgentSpec, body: dict[str, Any]) -> tuple[Any, str | None]:
        """The agent's input and the field that it came in, ``None`` if there is none."""
        if "message" in body and "input" in body:
            raise InvalidInput("give either message or input", field="message")
        if "message" in body:
            if spec.message_parameter is None:
                raise InvalidInput(f"agent {spec.name} takes no message", field="message", hint="send input")
            value, field = body["message"], "message"
            if spec.message_parameter:
                value = {spec.message_parameter: value}
        elif "input" in body:
            value, field = body["input"], "input"
        else:
            if spec.optional:
                return None, None
            raise InvalidInput("is missing", field="input", hint="send input, or message")
        _check(self._validator(spec), value, field)
        return value, field

    async def _spec(self, name: Any) -> AgentSpec:
        specs = await self.specs()
        if not specs or (name is not None and name not in specs):
            async with store_errors():  # a worker may have come this moment
                await self._look()
            specs = self._specs
        if not specs:
            raise NotReady("no task worker has been here yet", hint="headrace task worker APP", retry_after_s=1.0)
        known = ", ".join(sorted(specs))
        if name is None:
            if len(specs) > 1:
                raise InvalidInput("is missing, and there are several agents", field="agent", hint=f"one of {known}")
            return next(iter(specs.values()))
        if not isinstance(name, str) or name not in specs:
            raise InvalidInput(f"there is no agent {name!r}", field="agent", hint=f"agents here: {known}")
        return specs[name]

    def _validator(self, spec: AgentSpec) -> Any:
        text = bytes(spec.schema)
        known = self._checks.get(spec.name)
        if known is None or known[0] != text:
            known = self._checks[spec.name] = (text, jsonschema_rs.validator_for(msgspec.json.decode(text)))
        return known[1]

    async def _look(self) -> None:
        self._specs = await self._service.store.agents()
        self._looked = monotonic()
        self._service.metrics.know(self._specs)

    def _require_open(self) -> None:
        if self.failure:
            raise StoreDown(self.failure.message, hint=self.failure.hint)
        if not self._opened:
            raise StoreDown("the task store is not open yet", retry_after_s=1.0)


def _check(validator: Any, value: Any, field: str) -> None:
    """Raises `InvalidInput` that names the first place which does not fit."""
    try:
        if not validator.is_valid(value):
            problem = next(iter(validator.iter_errors(value)))
            place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem.instance_path)
            raise InvalidInput(problem.message, field=field + place)
    except RecursionError:
        raise InvalidInput("is nested too deeply", field=field) from None
