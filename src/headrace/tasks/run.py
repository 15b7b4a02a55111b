"""One run of a task's code by one worker: from the claim to whatever the code ends with.

The owner's rights end when its lease may have run out, when another worker has claimed the task, or when somebody has
ended it. Whichever is noticed first interrupts the code (`Run.interrupt`); what it still writes has no effect, because
the store checks the fence.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Sequence
from typing import Literal

import msgspec
import pydantic_core

from headrace import log, metrics
from headrace.clock import SYSTEM, Clock, wall
from headrace.errors import HeadraceError, LeaseLost, StepFailed, TaskConflict, ValueTooLarge
from headrace.metrics.current import meter
from headrace.tasks.context import Context, Suspended, event_json
from headrace.tasks.delivery import Message, Outcome, RedisError
from headrace.tasks.registry import Agent
from headrace.tasks.store import Change, Claim, Queued, Store, error_event, error_json

_log = logging.getLogger(__name__)

Reason = Literal["", "lost", "ended", "deadline", "hand_over"]
# The owner stops this early, so that nothing of it runs any more when another worker may begin.
_SHARE_OF_LEASE = 0.9
# Code that does not let itself be interrupted is left behind after this; it cannot write anything.
_STUBBORN_S = 5.0
_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 30.0
_LONGEST_MESSAGE = 2000


class Run:
    """A claimed task and the code that runs for it.

    Args:
        claim, message: the right to it, and the delivery behind it.
        lease_s: how long that right lasts without being renewed.
    """

    def __init__(
        self,
        claim: Claim,
        message: Message,
        agent: Agent,
        store: Store,
        *,
        lease_s: float,
        max_value_bytes: int,
        row: metrics.Row,
        clock: Clock = SYSTEM,
    ) -> None:
        self.claim = claim
        self.queued: Queued | None = None
        self.status = ""
        self._message = message
        self._agent = agent
        self._store = store
        self._lease_s = lease_s
        self._max_value_bytes = max_value_bytes
        self._row = row
        self._clock = clock
        self._renewed = clock.monotonic()
        self._numbers = itertools.count(1)
        self._writing = asyncio.Lock()
        self._reason: Reason = ""
        self._interrupted = asyncio.Event()
        self._context: Context | None = None

    @property
    def lost(self) -> bool:
        """Whether it ended because its lease was lost."""
        return self._reason == "lost"

    @property
    def tokens(self) -> int:
        """What its calls of language models used, as far as they said so."""
        return self._context.tokens if self._context else 0

    def interrupt(self, reason: Reason) -> None:
        """End the code; the first reason counts."""
        if not self._reason:
            self._reason = reason
            self._interrupted.set()

    async def watch(self) -> None:
        """One look at the lease: notice a take-over or an end from outside, renew it otherwise."""
        if self._expired():
            self.interrupt("lost")
            return
        try:
            async with asyncio.timeout(self._lease_s / 4):
                fence, state = await self._store.state_of(self.claim.id)
                if fence != self.claim.fence:
                    self.interrupt("lost")
                elif state != "running":
                    self.interrupt("ended")
                else:
                    began = self._clock.monotonic()
                    await self._message.renew()
                    self._renewed = began
        except (RedisError, TimeoutError) as error:
            _log.warning("cannot renew the lease of task %s: %s", self.claim.id, _reason(error))

    async def execute(self) -> Outcome:
        """Run the code and write what it ends with. ``status`` is set if this run brought the task to its end."""
        log.task_id.set(self.claim.id)
        code = asyncio.ensure_future(self._attempts())
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        # Both of the store's clock: the time that was left when the task was claimed.
        timer = asyncio.get_running_loop().call_later(
            (self.claim.deadline_ms - self.claim.claimed_ms) / 1000, self.interrupt, "deadline"
        )
        try:
            await asyncio.wait({code, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if not code.done():
                code.cancel()
                _, left = await asyncio.wait({code}, timeout=_STUBBORN_S)
                if left:
                    _log.error("task %s does not let itself be interrupted; it is left behind", self.claim.id)
            return await self._conclude(code)
        except LeaseLost:
            return self._let_go()
        finally:
            timer.cancel()
            interrupted.cancel()

    async def _attempts(self) -> bytes | Change:
        """The result as JSON, or the change that suspends the task."""
        for failures in itertools.count():
            context = self._context = Context(
                self.claim, self._write_for_code, max_value_bytes=self._max_value_bytes, row=self._row
            )
            meter.set(context)
            try:
                positional, named = self._agent.arguments(self.claim.input)
                value = await self._agent.function(context, *positional, **named)
                return self._encode(value)
            except Suspended as suspended:
                return suspended.change
            except HeadraceError:
                raise
            except self._agent.retry_on as error:
                if failures >= self._agent.retries:
                    raise
                pause_s = min(_LONGEST_PAUSE_S, 2.0**failures) * random.uniform(0.5, 1.0)
                _log.warning(
                    "task %s failed (%s); running it again in %.1f s", self.claim.id, type(error).__name__, pause_s
                )
                await asyncio.sleep(pause_s)
        raise AssertionError

    def _encode(self, value: object) -> bytes:
        try:
            encoded = self._agent.encode(value)
            msgspec.json.decode(encoded)  # NaN and the like are no JSON
        except (pydantic_core.PydanticSerializationError, msgspec.DecodeError, ValueError) as error:
            raise StepFailed(
                f"the result cannot be written as JSON: {error}",
                hint="return plain values, dataclasses or pydantic models",
            ) from None
        if len(encoded) > self._max_value_bytes:
            raise ValueTooLarge(
                f"the result has {len(encoded)} bytes as JSON, at most {self._max_value_bytes} may be kept",
                field="result",
                hint="keep it in a file or an object store and return its name, or raise max_value_bytes",
            )
        return encoded

    async def _conclude(self, code: asyncio.Future[bytes | Change]) -> Outcome:
        if code.done() and not code.cancelled() and not (error := code.exception()):
            # It was done before it could be interrupted.
            if self._reason in ("", "deadline", "hand_over"):
                ended = code.result()
                if isinstance(ended, Change):
                    return await self._suspend(ended)
                return await self._finish("complete", ended, self._finished(ended), "success")
        elif self._reason == "":
            error = asyncio.CancelledError("the code cancelled itself") if code.cancelled() else code.exception()
            return await self._fail(error)
        if self._reason == "deadline":
            return await self._finish_with_error("deadline_exceeded", "its deadline passed while it ran", "timeout")
        if self._reason == "hand_over":
            return await self._suspend(Change("", what="release"))
        return self._let_go()

    def _let_go(self) -> Outcome:
        """Ended from outside: nobody needs its message any more. Lost: it is the new owner's."""
        return Outcome.DONE if self._reason == "ended" else Outcome.LET_GO

    async def _suspend(self, change: Change) -> Outcome:
        self.queued = await self._write(change)
        return Outcome.DONE

    async def _fail(self, error: BaseException | None) -> Outcome:
        if isinstance(error, HeadraceError):
            more = {"field": error.field, "hint": error.hint}
            told = {key: value for key, value in more.items() if value}
            return await self._finish_with_error(error.code, error.message, "error", **told)
        _log.error("task %s failed", self.claim.id, exc_info=error)
        return await self._finish_with_error("agent_error", f"{type(error).__name__}: {error}", "error")

    async def _finish_with_error(self, code: str, message: str, status: str, **more: str) -> Outcome:
        text = _shown(message)
        problem = error_json(code, text, **{key: _shown(value) for key, value in more.items()})
        return await self._finish("fail", problem, error_event(code, text), status)

    async def _finish(self, what: str, argument: bytes, event: bytes, status: str) -> Outcome:
        await self._write(Change("", what=what, argument=argument, events=[event]))
        self.status = status
        return Outcome.DONE

    def _finished(self, result: bytes) -> bytes:
        ident = self.claim.id
        head = event_json("RUN_FINISHED", {"thread_id": ident, "run_id": ident})
        return head[:-1] + b',"result":' + result + b"}"

    async def _write_for_code(self, field: str = "", value: bytes = b"", events: Sequence[bytes] = ()) -> None:
        await self._write(Change("", field, value, events=events))

    async def _write(self, change: Change) -> Queued | None:
        """Write as the owner, through any outage that is shorter than the lease.

        Raises:
            LeaseLost: it was fenced out, the task has ended, or the lease may have run out.
        """
        async with self._writing:
            change.number = f"{self.claim.fence}.{next(self._numbers)}"
            while True:
                if self._reason in ("lost", "ended") or self._expired():
                    self.interrupt("lost")
                    raise LeaseLost("this task is another worker's now, or may be")
                try:
                    async with asyncio.timeout(self._lease_s / 4):
                        return await self._store.write(self.claim, change)
                except TaskConflict as error:
                    self.interrupt("ended")
                    raise LeaseLost(error.message) from None
                except LeaseLost:
                    self.interrupt("lost")
                    raise
                except (RedisError, TimeoutError) as error:
                    _log.warning("cannot write task %s: %s", self.claim.id, _reason(error))
                    await asyncio.sleep(_PAUSE_S)
                    continue

    def _expired(self) -> bool:
        return self._clock.monotonic() - self._renewed > self._lease_s * _SHARE_OF_LEASE

    @property
    def age_s(self) -> float:
        """Since the task was submitted."""
        return max(0.0, wall() - self.claim.created_ms / 1000)


def _shown(text: str) -> str:
    """A text as clients may see it."""
    return log.redact(text)[:_LONGEST_MESSAGE].encode("utf-8", "backslashreplace").decode()


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
