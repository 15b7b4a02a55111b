"""A task worker: places that take tasks from the lanes, and what watches over those that run.

It lives on one event loop. Agents' code runs there too, which is why blocking functions belong into steps: those run in
threads. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
from typing import Any

from headrace import metrics
from headrace.clock import wall
from headrace.errors import TaskError
from headrace.metrics import LANES
from headrace.tasks.context import event_json
from headrace.tasks.delivery import Delivery, Message, Outcome, RedisConnection, RedisError
from headrace.tasks.registry import Agent
from headrace.tasks.run import Run
from headrace.tasks.store import CONTROL, Change, Claim, Ended, Queued, Store

_log = logging.getLogger(__name__)

# How soon a task is offered again that this worker has no code for: another one may have it.
_UNKNOWN_AGENT_S = 5.0
_RECONNECT_S = 0.5


class AgentMetrics:
    """Figures per agent, there at 0 from the start."""

    def __init__(self, row: metrics.Row, agents: Iterable[str] = ()) -> None:
        self._row = row
        self.active = row.gauge(metrics.AGENT_ACTIVE)
        self.lease_losses = row.counter(metrics.LEASE_LOSSES)
        self.know([*agents, "other"])
        row.by_status(metrics.LLM_CALLS, provider="other", model="other")
        row.by_status(metrics.TOOL_CALLS, tool_name="other")
        row.histogram(metrics.LLM_DURATION, model="other")

    def know(self, agents: Iterable[str]) -> None:
        """Make the series of these agents."""
        for agent in agents:
            self._row.by_status(metrics.AGENT_REQUESTS, model=agent)
            self._row.histogram(metrics.AGENT_DURATION, model=agent)
            self._row.histogram(metrics.AGENT_TOKENS, model=agent)
            for lane in LANES:
                self._row.histogram(metrics.TASK_DURATION, model=agent, lane=lane)
            self._row.counter(metrics.TASK_ATTEMPTS, model=agent)
            self._row.counter(metrics.TASKS_SUBMITTED, model=agent)
            for status in metrics.STEP_STATUSES:
                self._row.counter(metrics.TASK_STEPS, model=agent, status=status)

    def ended(self, ended: Ended, tokens: int = 0) -> None:
        """Count a task at its end. Whoever brings it there does so, and there is one end."""
        self._row.by_status(metrics.AGENT_REQUESTS, model=ended.agent)[ended.status].inc()
        age_s = max(0.0, wall() - ended.created_ms / 1000)
        self._row.histogram(metrics.AGENT_DURATION, model=ended.agent).observe(age_s, ended.id)
        self._row.histogram(metrics.TASK_DURATION, model=ended.agent, lane=ended.lane).observe(age_s)
        if tokens:
            self._row.histogram(metrics.AGENT_TOKENS, model=ended.agent).observe(tokens)

    def attempt(self, agent: str) -> None:
        self._row.counter(metrics.TASK_ATTEMPTS, model=agent).inc()


class TaskWorker:
    """Runs tasks until it is told to stop.

    Args:
        agents: what it has code for, by name.
        name: tells this process from all others of the fleet.
        concurrency: places of the default lane; the other lanes have half as many each, at least one.
        max_attempts: a task whose worker died so often has failed.
    """

    def __init__(
        self,
        connection: RedisConnection,
        store: Store,
        delivery: Delivery,
        agents: Mapping[str, Agent],
        *,
        name: str,
        concurrency: int,
        lease_s: float,
        max_attempts: int,
        max_value_bytes: int,
        row: metrics.Row,
    ) -> None:
        self._connection = connection
        self._store = store
        self._delivery = delivery
        self._agents = agents
        self._name = name
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._max_value_bytes = max_value_bytes
        self._row = row
        self._metrics = AgentMetrics(row, agents)
        for agent in agents.values():
            if agent.declare is not None:
                agent.declare(row)
        self._runs: set[Run] = set()
        half = max(1, concurrency // 2)
        self._places = {lane: concurrency if lane == "default" else half for lane in LANES}

    async def run(self, stop: asyncio.Event, grace_s: float) -> None:
        """Take tasks until ``stop`` is set, wait for those that run, then hand over what is left after the grace."""
        # The protocol's models take 60 ms to import, for which the first task of this process would wait.
        event_json("CUSTOM", {"name": "ready", "value": None})
        async with contextlib.AsyncExitStack() as stack:
            for keep in (self._watch_leases, self._listen):
                stack.enter_context(_background(keep()))
            with contextlib.suppress(RedisError):
                await self._delivery.forget_dead_places()
            places = [
                await stack.enter_async_context(
                    self._delivery.place(lane, f"{self._name}.{lane}.{index}", self._take, keeps_time=index == 0)
                )
                for lane, count in self._places.items()
                for index in range(count)
            ]
            stopping = asyncio.ensure_future(stop.wait())
            done, _ = await asyncio.wait({stopping, *places}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            for place in done - {stopping}:
                place.result()  # a place ends by itself only by a defect: raise it
            _log.info("stopping: %d tasks run, they have %g s", len(self._runs), grace_s)
            for place in places:
                place.cancel()
            _, late = await asyncio.wait(places, timeout=grace_s)
            for run in self._runs if late else ():
                run.interrupt("hand_over")
            await asyncio.wait(places)

    @property
    def running(self) -> int:
        return len(self._runs)

    async def _take(self, reference: str, message: Message) -> Outcome:
        """Run the task of a delivery."""
        ident, _, turn = reference.rpartition(":")
        try:
            claim = await self._store.claim(ident, int(turn), message.id, self._max_attempts)
        except RedisError as error:
            _log.warning("cannot claim task %s: %s; it will be delivered again", ident, error)
            return Outcome.LET_GO
        if claim is None:
            return Outcome.DONE
        if isinstance(claim, Ended):
            self._metrics.ended(claim)
            return Outcome.DONE
        agent = self._agents.get(claim.agent)
        if agent is None:
            return await self._pass_on(claim)
        return await self._run(claim, message, agent)

    async def _run(self, claim: Claim, message: Message, agent: Agent) -> Outcome:
        run = Run(
            claim,
            message,
            agent,
            self._store,
            lease_s=self._lease_s,
            max_value_bytes=self._max_value_bytes,
            row=self._row,
        )
        self._metrics.attempt(claim.agent)
        self._runs.add(run)
        self._metrics.active.set(len(self._runs))
        try:
            outcome = await run.execute()
        finally:
            self._runs.discard(run)
            self._metrics.active.set(len(self._runs))
        if run.lost:
            self._metrics.lease_losses.inc()
            _log.warning("this worker has let go of task %s: its lease ran out, or another worker has it", claim.id)
        if run.status:
            self._metrics.ended(Ended(claim.id, claim.agent, claim.lane, claim.created_ms, run.status), run.tokens)
        if run.queued:
            await self._queue(run.queued)
        return outcome

    async def _pass_on(self, claim: Claim) -> Outcome:
        """Another worker may have the code: a newer version, or another application on the same store."""
        _log.warning("there is no agent %r here; task %s waits for a worker that has it", claim.agent, claim.id)
        until_ms = str(int((wall() + _UNKNOWN_AGENT_S) * 1000)).encode()
        try:
            queued = await self._store.write(claim, Change("pass", what="sleep", argument=until_ms))
        except (RedisError, TaskError) as error:
            _log.warning("cannot pass on task %s: %s", claim.id, error)
            return Outcome.LET_GO
        if queued:
            await self._queue(queued)
        return Outcome.DONE

    async def _queue(self, queued: Queued) -> None:
        """Hand a task to its queue. What goes wrong here is mended by whoever tidies up next."""
        try:
            await self._delivery.add(queued.reference, queued.lane, queued.at_ms)
            await self._store.sent(queued)
        except RedisError as error:
            _log.warning("task %s is not in its queue yet: %s", queued.id, error)

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 4)
            for result in await asyncio.gather(*(run.watch() for run in self._runs), return_exceptions=True):
                if isinstance(result, Exception):
                    # A defect with one task must not cost the others their leases.
                    _log.error("cannot watch a lease", exc_info=result)

    async def _listen(self) -> None:
        """Hear at once of tasks that somebody has ended; what is missed during an outage, the watch sees."""
        async for ident in control_messages(self._connection):
            for run in [run for run in self._runs if run.claim.id == ident]:
                await run.watch()


async def control_messages(connection: RedisConnection) -> AsyncIterator[str]:
    """Ids of tasks as they are ended from outside; for ever, through outages."""
    while True:
        with contextlib.suppress(RedisError):
            async with connection.pubsub() as subscription:
                await subscription.subscribe(CONTROL)
                while True:
                    message = await subscription.get_message(ignore_subscribe_messages=True, timeout=30.0)
                    if message is not None:
                        yield message["data"].decode()
        await asyncio.sleep(_RECONNECT_S)


@contextlib.contextmanager
def _background(work: Coroutine[Any, Any, None]) -> Iterator[None]:
    task = asyncio.ensure_future(work)
    task.add_done_callback(_complain)
    try:
        yield
    finally:
        task.cancel()


def _complain(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("a part of the task worker has failed", exc_info=error)
