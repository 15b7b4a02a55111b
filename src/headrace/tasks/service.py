"""The store and its queues as one process uses them: found or started, opened, kept in order.

Gateways and task workers hold one each. Whichever of them is there revives an embedded store that has died, queues what
was left lying, ends what is late, and keeps the figures on the queues.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from headrace import metrics
from headrace.clock import monotonic
from headrace.config import Config
from headrace.errors import ConfigError, StoreDown, TaskNotFound
from headrace.tasks import embedded
from headrace.tasks.delivery import Delivery, RedisError, connection
from headrace.tasks.store import Ended, Queued, Store
from headrace.tasks.worker import AgentMetrics

_log = logging.getLogger(__name__)

_ROUND_S = 1.0
# What lies for longer was left by a process that died: the living are much faster.
_GRACE_MS = 2000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_PATIENCE_S = 5.0


def data_dir(config: Config) -> Path:
    """Where the embedded store keeps its files."""
    return Path(config.data_dir).expanduser() if config.data_dir else embedded.default_data_dir()


def find_store(config: Config) -> str:
    """URL of the configured store; the embedded one is started if it does not run.

    Raises:
        Unavailable, ConfigError: there is no program for it, or its directory cannot be used.
    """
    if config.redis_url:
        return config.redis_url
    return embedded.ensure(data_dir(config), power_safe=config.durability == "power-safe").url


class Service:
    """An open store. An asynchronous context manager.

    Args:
        row: where metrics go.
    """

    def __init__(self, config: Config, row: metrics.Row) -> None:
        self.name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
        self.metrics = AgentMetrics(row)
        self._config = config
        self._stack = contextlib.AsyncExitStack()
        self._up = row.gauge(metrics.STORE_UP)
        self._open = row.gauge(metrics.TASKS_OPEN)
        self._depths = {lane: row.gauge(metrics.TASK_QUEUE, lane=lane) for lane in metrics.LANES}
        self._oldest = {lane: row.gauge(metrics.TASK_OLDEST, lane=lane) for lane in metrics.LANES}
        self._ends: list[tuple[float, int]] = []
        self.is_up = False

    async def __aenter__(self) -> Service:
        """Wait for the store as long as it takes.

        Raises:
            Unavailable, ConfigError: it cannot be had as configured.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                # Each time: an embedded store that died meanwhile is started again.
                await self._connect(await asyncio.to_thread(find_store, self._config))
                break
            except (RedisError, OSError) as error:
                await self._stack.aclose()
                _log.warning("the task store does not answer: %s; trying again in %.1f s", error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)
            except ConfigError:
                await self._stack.aclose()
                raise
        self._set_up(True)
        keeper = asyncio.ensure_future(self._keep())
        self._stack.callback(keeper.cancel)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def queue(self, queued: Queued) -> None:
        """Hand a task to its queue. Raises `RedisError`; it is then queued by whoever tidies up next."""
        await self.delivery.add(queued.reference, queued.lane, queued.at_ms)
        await self.store.sent(queued)

    def retry_after_s(self) -> float:
        """When a place is likely to be free for one more task, by how many have ended within the last minute."""
        if len(self._ends) < 2:
            return 1.0
        (began, first), (now, last) = self._ends[0], self._ends[-1]
        ended_per_s = (last - first) / max(now - began, 1e-3)
        return min(60.0, max(1.0, 1.0 / ended_per_s)) if ended_per_s > 0 else 60.0

    async def _connect(self, url: str) -> None:
        config = self._config
        self.connection = await self._stack.enter_async_context(connection(url))
        self.store = Store(self.connection, result_ttl_s=config.result_ttl_s, max_tasks=config.max_tasks)
        await self.store.open()
        if not self.connection.is_cluster and await self.store.is_in_cluster():
            raise ConfigError(
                "redis_url names one node of a Cluster", field="redis_url", hint="redis+cluster://… names them all"
            )
        await self.store.ping()
        self.delivery = await self._stack.enter_async_context(Delivery(url, config.lease_s))

    async def _keep(self) -> None:
        while True:
            try:
                async with asyncio.timeout(10 * _ROUND_S):
                    await self._tidy()
                self._set_up(True)
            except (RedisError, TimeoutError, OSError) as error:
                if self.is_up:
                    _log.error(
                        "the task store does not answer: %s; tasks wait until it does", str(error) or "no answer"
                    )
                self._set_up(False)
                await self._revive()
            except Exception:
                _log.exception("cannot tidy up the task store; trying again")
            await asyncio.sleep(_ROUND_S)

    async def _tidy(self) -> None:
        open_, ended = await self.store.totals()
        self._open.set(open_)
        self._ends = [*self._ends[-60:], (monotonic(), ended)]
        for lane, (depth, oldest_s) in (await self.store.depths()).items():
            self._depths[lane].set(depth)
            self._oldest[lane].set(oldest_s)
        if not await self.store.take_sweep(self.name, 0.9 * _ROUND_S):
            return
        queued, late = await self.store.overdue(_GRACE_MS)
        for each in queued:
            await self.queue(each)
        for ident in late:
            with contextlib.suppress(TaskNotFound):
                ended_now = await self.store.end(
                    ident, "failed", "deadline_exceeded", "its deadline passed before it was done", late_only=True
                )
                if isinstance(ended_now, Ended):
                    self.metrics.ended(ended_now)

    async def _revive(self) -> None:
        if self._config.redis_url:
            return
        try:
            await asyncio.to_thread(find_store, self._config)
        except Exception as error:  # whatever it is, it may pass: a full disk, a directory that is gone
            _log.error("cannot start the task store again: %s", error)

    def _set_up(self, up: bool) -> None:
        self.is_up = up
        self._up.set(1.0 if up else 0.0)


@contextlib.asynccontextmanager
async def store_errors() -> AsyncIterator[None]:
    """Turn an outage of the store, also one that only hangs, into the answer that clients get."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            yield
    except (RedisError, TimeoutError, OSError) as error:
        raise StoreDown(
            "the task store does not answer just now",
            hint="try again; nothing that was accepted is lost",
            retry_after_s=1,
        ) from error
