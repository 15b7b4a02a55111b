"""What an agent's code holds of its task: steps that are not repeated, events, questions, sleep.

Every step has a number, taken in the order of the calls, and a name; within the body of step 3 they are 3.1, 3.2 and so
on. What it gave is in the journal before anybody hears of it; an attempt after a crash takes it from there. Knows the
store only through the one write that its owner allows it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import itertools
import logging
import random
import typing
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
import pydantic
import pydantic_core

from headrace import metrics
from headrace.clock import wall
from headrace.errors import CodeChanged, InvalidInput, StepFailed, ValueTooLarge
from headrace.tasks.store import Change, Claim

_log = logging.getLogger(__name__)

# A shorter sleep is slept where the task runs; for a longer one its place is given to others.
_SHORT_SLEEP_S = 2.0
_LONGEST_PAUSE_S = 30.0
_current_step: contextvars.ContextVar[str] = contextvars.ContextVar("headrace_step", default="")
_adapter = functools.lru_cache(maxsize=1024)(pydantic.TypeAdapter)


class Writer(Protocol):
    """Writes one change as the task's owner. Raises `LeaseLost` when that is somebody else now."""

    async def __call__(self, field: str = "", value: bytes = b"", events: typing.Sequence[bytes] = ()) -> None: ...


class Suspended(BaseException):
    """The task goes on later, in another run of its code. Not an `Exception`: user code must not catch it."""

    def __init__(self, change: Change) -> None:
        super().__init__(change.what)
        self.change = change


class Context:
    """An attempt at a task.

    Args:
        claim: the task.
        write: the way to the store.
        max_value_bytes: largest value of a step, an event or a result, as JSON.
        row: where metrics go.

    ``task_id``, ``attempt`` (from 1), ``agent`` and ``model`` (what the client asked for, or ``None``) can be read.
    """

    def __init__(self, claim: Claim, write: Writer, *, max_value_bytes: int, row: metrics.Row) -> None:
        self.task_id = claim.id
        self.attempt = claim.fence
        self.agent = claim.agent
        self.model = claim.model or None
        self.row = row
        self.tokens = 0
        self._claim = claim
        self._write = write
        self._max_value_bytes = max_value_bytes
        self._taken: dict[str, int] = {}
        self._recorded = {key.partition(":")[0]: key for key in claim.journal}
        self._steps = {
            status: row.counter(metrics.TASK_STEPS, model=claim.agent, status=status)
            for status in metrics.STEP_STATUSES
        }

    @property
    def idempotency_key(self) -> str:
        """For services that are asked to do something once: the same in every attempt at this step, and no other's."""
        return f"{self.task_id}:{_current_step.get() or self._taken.get('', 0) + 1}"

    def step(
        self,
        name: str,
        function: Callable[..., Any],
        *args: Any,
        retries: int = 0,
        retry_on: type[Exception] | tuple[type[Exception], ...] = Exception,
        timeout_s: float | None = None,
        **kwargs: Any,
    ) -> Awaitable[Any]:
        """Call a function, once its value is journalled never again. To be awaited.

        Args:
            name: with its place in the order of calls it identifies the step.
            function: async, or an ordinary one, which runs in a thread. Its return annotation says how the value is
                read back (`Any` without one).
            retries: how often it is called again after one of the exceptions ``retry_on``, with growing pauses.
            timeout_s: after which a call counts as failed with `TimeoutError`.

        Returns:
            The value as it is read back from JSON, also the first time: a repeated run never sees another type.

        Raises:
            StepFailed: the value cannot be written as JSON, or the journal's does not fit the annotation.
            ValueTooLarge: it has more than ``max_value_bytes``.
            CodeChanged: an earlier attempt had another step in this place.
        """
        number = self._take_number()
        call = functools.partial(function, *args, **kwargs)
        kinds = retry_on if isinstance(retry_on, tuple) else (retry_on,)
        return self._step(number, name, function, call, retries, kinds, timeout_s)

    async def emit(self, type: str, **fields: Any) -> None:  # noqa: A002 - the word of AG-UI
        """Send an AG-UI event to everybody who watches, for example ``emit("CUSTOM", name="progress", value=0.8)``.

        Raises:
            InvalidInput: not an event of AG-UI, or one that is sent for you (runs and steps); names the field.
            ValueTooLarge
        """
        if type.startswith(("RUN_", "STEP_")):
            raise InvalidInput(f"{type} is sent by headrace", field="type", hint="use CUSTOM for your own news")
        await self._write(events=[self._event(type, fields)])

    async def ask(self, prompt: str, schema: Any = None) -> Any:
        """Wait for a person or a client, as long as the task's deadline allows; no worker is held meanwhile.

        Args:
            schema: what the answer must be: a type, or a JSON Schema; anything without one.

        Returns:
            The answer, of the type asked for.
        """
        number = self._take_number()
        key = f"{number}:ask"
        adapter = None if schema is None or isinstance(schema, dict) else _adapter_of(schema, "an answer")
        recorded = self._lookup(number, key)
        if recorded is not None:
            return adapter.validate_json(recorded) if adapter else msgspec.json.decode(recorded)
        wanted = adapter.json_schema() if adapter else schema
        question = {"prompt": prompt, "schema": wanted}
        argument = msgspec.json.encode({"field": key, **question})
        self._check_size(argument, "ask")
        raise Suspended(Change("", what="ask", argument=argument, events=[_custom("input_required", question)]))

    async def sleep(self, seconds: float) -> None:
        """Sleep, counted from the first call: a crash makes it no longer. A long sleep holds no worker."""
        number = self._take_number()
        key = f"{number}:sleep"
        recorded = self._lookup(number, key)
        now_ms = int(wall() * 1000)
        until_ms = int(recorded) if recorded is not None else now_ms + int(seconds * 1000)
        left_s = (until_ms - now_ms) / 1000
        if left_s > _SHORT_SLEEP_S:
            argument = str(until_ms).encode()
            raise Suspended(Change("", key, argument, "sleep", argument))
        if recorded is None:
            await self._keep(number, key, str(until_ms).encode())
        await asyncio.sleep(max(0.0, left_s))

    async def _step(
        self,
        number: str,
        name: str,
        function: Callable[..., Any],
        call: Callable[[], Any],
        retries: int,
        retry_on: tuple[type[Exception], ...],
        timeout_s: float | None,
    ) -> Any:
        key = f"{number}:{name}"
        adapter = _adapter_of(_return_type(function), f"the value of step {name!r}")
        recorded = self._lookup(number, key)
        if recorded is not None:
            self._steps["replayed"].inc()
            try:
                return adapter.validate_json(recorded)
            except pydantic.ValidationError as error:
                raise StepFailed(
                    f"the journal's value of step {name!r} does not fit its type any more: {error.errors()[0]['msg']}",
                    hint="retry with fresh=1 runs all steps anew",
                ) from None
        await self._write(events=[self._event("STEP_STARTED", {"step_name": name})])
        value = await self._call(number, call, retries, retry_on, timeout_s)
        try:
            encoded = adapter.dump_json(value, warnings="none")
            decoded = adapter.validate_json(encoded)
        except (pydantic_core.PydanticSerializationError, pydantic.ValidationError, ValueError) as error:
            self._steps["error"].inc()
            raise StepFailed(
                f"the value of step {name!r} cannot be kept as JSON: {error}",
                hint="return plain values, dataclasses or pydantic models, and annotate the function",
            ) from None
        self._check_size(encoded, f"step {name!r}")
        await self._keep(number, key, encoded, [self._event("STEP_FINISHED", {"step_name": name})])
        self._steps["success"].inc()
        return decoded

    async def _call(
        self,
        number: str,
        call: Callable[[], Any],
        retries: int,
        retry_on: tuple[type[Exception], ...],
        timeout_s: float | None,
    ) -> Any:
        token = _current_step.set(number)
        try:
            for attempt in itertools.count():
                self._taken[number] = 0
                try:
                    async with asyncio.timeout(timeout_s):
                        return await _await(call)
                except retry_on as error:
                    if attempt >= retries:
                        raise
                    pause_s = min(_LONGEST_PAUSE_S, 2.0**attempt) * random.uniform(0.5, 1.0)
                    _log.warning("a step failed (%s); trying it again in %.1f s", type(error).__name__, pause_s)
                    await asyncio.sleep(pause_s)
        except Exception:
            self._steps["error"].inc()
            raise
        finally:
            _current_step.reset(token)

    def _take_number(self) -> str:
        # What a step does of its own has numbers of its own: they are not taken again once it is journalled itself.
        outer = _current_step.get()
        taken = self._taken[outer] = self._taken.get(outer, 0) + 1
        return f"{outer}.{taken}" if outer else str(taken)

    async def _keep(self, number: str, key: str, value: bytes, events: typing.Sequence[bytes] = ()) -> None:
        await self._write(key, value, events)
        self._recorded[number] = key
        self._claim.journal[key] = value

    def _lookup(self, number: str, key: str) -> bytes | None:
        recorded = self._recorded.get(number)
        if recorded is None:
            return None
        if recorded != key:
            raise CodeChanged(
                f"step {number} is {key.partition(':')[2]!r} now and was {recorded.partition(':')[2]!r} in an earlier "
                "attempt: the code has changed under the task",
                hint="retry with fresh=1 runs all steps anew",
            )
        return self._claim.journal[recorded]

    def _event(self, type_: str, fields: dict[str, Any]) -> bytes:
        payload = event_json(type_, fields)
        self._check_size(payload, "event")
        return payload

    def _check_size(self, encoded: bytes, what: str) -> None:
        if len(encoded) > self._max_value_bytes:
            raise ValueTooLarge(
                f"{what} has {len(encoded)} bytes as JSON, at most {self._max_value_bytes} may be kept",
                field=what,
                hint="keep it in a file or an object store and return its name, or raise max_value_bytes",
            )


def event_json(type_: str, fields: dict[str, Any]) -> bytes:
    """An AG-UI event, checked by the protocol's own models.

    Raises:
        InvalidInput: no such event, or a field of it is wrong.
    """
    from ag_ui.core import EventType

    kind = _event_models().get(type_)
    if kind is None:
        raise InvalidInput(
            f"there is no event {type_!r}", field="type", hint=", ".join(each.value for each in EventType)
        )
    try:
        event = kind(**{"timestamp": int(wall() * 1000), **fields})
        payload: str = event.model_dump_json(by_alias=True, exclude_none=True)
        return payload.encode()
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidInput(f"{type_}: {first['msg']}", field=".".join(map(str, first["loc"]))) from None
    except pydantic_core.PydanticSerializationError as error:
        raise InvalidInput(f"{type_} cannot be written as JSON: {error}", field="value") from None


@functools.cache
def _event_models() -> dict[str, Any]:
    import ag_ui.core
    from ag_ui.core import EventType

    def model(event: EventType) -> Any:
        return getattr(ag_ui.core, "".join(part.capitalize() for part in event.value.split("_")) + "Event", None)

    return {event.value: found for event in EventType if (found := model(event))}


def _custom(name: str, value: Any) -> bytes:
    return event_json("CUSTOM", {"name": name, "value": value})


def _adapter_of(kind: Any, what: str) -> pydantic.TypeAdapter[Any]:
    try:
        return _adapter(kind)
    except pydantic.PydanticUserError as error:
        raise StepFailed(
            f"{what} cannot be kept as JSON: {str(error).splitlines()[0]}",
            hint="annotate it with a plain type, a dataclass or a pydantic model",
        ) from None


def _return_type(function: Callable[..., Any]) -> Any:
    target = function.func if isinstance(function, functools.partial) else function
    try:
        found = typing.get_type_hints(target, include_extras=True).get("return", Any)
    except (NameError, TypeError, AttributeError):  # an annotation that is defined nowhere, a callable without any
        return Any
    try:
        hash(found)
    except TypeError:
        return Any
    return found


async def _await(call: Callable[[], Any]) -> Any:
    """The value of a function, async or not; one that is not runs in a thread, with this task's context."""
    target = call.func if isinstance(call, functools.partial) else call
    if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None)):  # noqa: B004
        return await call()
    value = await asyncio.to_thread(call)
    return await value if inspect.isawaitable(value) else value
