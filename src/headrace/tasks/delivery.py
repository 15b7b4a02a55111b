"""Who runs which task when: docket's queues, one per lane, and its worker, one per place.

The only file that knows docket. What it uses beyond docket's public surface is checked when it starts (`check`), and
two things that docket 0.27 does not do are made good here (docs/adr/0009-delivery.md):

- A docket worker that meets an error of Redis takes nothing new until all that it runs has ended. So each place is a
  worker of its own that runs one task at a time.
- An owner that was suspended past its lease would acknowledge the message of whoever took over. So a run that may not
  be ours any more ends with `Outcome.LET_GO`, which leaves the message alone.

Only a reference to a task passes through docket, which pickles what it stores.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import enum
import importlib.metadata
import itertools
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

from docket import CurrentExecution, CurrentWorker, Docket, Execution, Worker
from docket import worker as docket_worker
from docket._redis import CONNECT_TIMEOUT, PUBSUB_RESP_VERSION, RedisConnection
from docket._redis_sentinel import OwnedSentinelConnectionPool
from docket.dependencies import AdmissionBlocked
from redis.asyncio import ConnectionPool, Redis, RedisCluster
from redis.asyncio.client import PubSub
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from headrace.errors import ConfigError, Unavailable
from headrace.metrics import LANES

_SUPPORTED = ("0.27",)
# A free place waits for a message this long before it looks around; a message wakes it at once.
_IDLE = timedelta(seconds=1)
# A busy place looks this often whether its task has ended. It asks nobody but itself.
_BUSY = timedelta(milliseconds=5)
# Messages are taken over a little early, so that a task goes on within 1.3 leases.
_SHARE_OF_LEASE = 0.95
_DEAD_MS = 3_600_000
_MOST_CONNECTIONS = 10_000
# Places and subscriptions wait for their messages as long as it takes.
_TIMEOUTS: dict[str, Any] = {"socket_timeout": None, "socket_connect_timeout": CONNECT_TIMEOUT}


class Outcome(enum.Enum):
    """What becomes of the message of a run."""

    DONE = "done"  # acknowledged
    LET_GO = "let go"  # left alone: it is another worker's, or will be


Run = Callable[[str, "Message"], Awaitable[Outcome]]


class Message:
    """A delivery on its way: what is needed to keep its lease."""

    def __init__(self, execution: Execution, consumer: str) -> None:
        self._execution = execution
        self._consumer = consumer
        self.id = (execution.message_id or b"").decode()

    async def renew(self) -> None:
        """Reset the time after which others may take it over. Raises `RedisError`."""
        lane = self._execution.docket
        async with lane.redis() as redis:
            await redis.xclaim(
                name=lane.stream_key,
                groupname=lane.worker_group_name,
                consumername=self._consumer,
                min_idle_time=0,
                message_ids=[self._execution.message_id or b""],
                idle=0,
                justid=True,
            )


class _StoreConnection(RedisConnection):
    """docket's, but for its ways with a Cluster, and with room for as many places as one may ask for: each holds a
    connection while it waits, and redis-py refuses the 101st; so it does with the questions to a Sentinel."""

    async def __aenter__(self) -> RedisConnection:
        with _as_wrong_url():
            return await super().__aenter__()

    async def _connection_pool_from_url(self, *arguments: Any, **options: Any) -> ConnectionPool:
        pool = await super()._connection_pool_from_url(*arguments, **options)
        sentinels = pool.sentinel_clients if isinstance(pool, OwnedSentinelConnectionPool) else ()
        for each in (pool, *(sentinel.connection_pool for sentinel in sentinels)):
            each.max_connections = _MOST_CONNECTIONS
        return pool

    async def _create_cluster_client(self) -> RedisCluster:
        try:
            # Without repetition, as with any other server: a script whose reply was lost must not run again unasked.
            once = Retry(NoBackoff(), 0)
            client = _Cluster.from_url(
                self._normalized_url(), retry=once, max_connections=_MOST_CONNECTIONS, **_TIMEOUTS
            )
        except RedisClusterException as error:  # a number of a database, for example
            raise ValueError from error
        return await client.initialize()

    def _create_node_pool(self) -> ConnectionPool:
        """Of any master, each of which tells and hears everything. docket's own knows neither the certificates that the
        URL names nor a password that has to be quoted in it."""
        assert self.cluster_client
        node = random.choice(self.cluster_client.get_primaries())
        where = {"host": node.host, "port": int(node.port), "protocol": PUBSUB_RESP_VERSION}
        return ConnectionPool(**{**parse_url(self._normalized_url()), **where, **_TIMEOUTS})

    @contextlib.asynccontextmanager
    async def _cluster_pubsub(self) -> AsyncGenerator[PubSub, None]:
        """Through another node each time: docket stays with its first one, also when that is gone for ever."""
        async with Redis.from_pool(self._create_node_pool()) as node, node.pubsub() as subscription:
            yield subscription


class _Cluster(RedisCluster):
    """redis-py calls the outage of a Cluster by a name that is no `RedisError`."""

    async def initialize(self, *args: Any, **options: Any) -> RedisCluster:
        with _as_outage():
            return await super().initialize(*args, **options)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with _as_outage():
            return await super().execute_command(*args, **options)


@contextlib.contextmanager
def _as_outage() -> Iterator[None]:
    try:
        yield
    except RedisClusterException as error:
        raise RedisConnectionError(str(error)) from error


@contextlib.contextmanager
def _as_wrong_url() -> Iterator[None]:
    try:
        yield
    except ValueError:
        # What it says may quote a part of the password.
        raise ConfigError(
            "redis_url cannot be read",
            field="redis_url",
            hint="redis://USER:PASSWORD@HOST:PORT/0, with %2F for a / in the password, and so on; Sentinel needs the "
            "master's name, redis+sentinel://HOST:26379/NAME/0; a Cluster, redis+cluster://HOST:PORT, has one database",
        ) from None


class _Lane(Docket):
    """One queue. Each place looks for abandoned messages by itself: docket lets one worker of the fleet do so at a
    time, and one that runs a single task would take over one message per round."""

    _rounds = itertools.count()

    def __init__(self, name: str, url: str) -> None:
        # A turn of a task is queued once: docket need not remember what has ended.
        super().__init__(name, url, heartbeat_interval=timedelta(seconds=30), execution_ttl=timedelta(0))
        self._redis = connection(url)

    @property
    def redelivery_sweep_key(self) -> str:
        return f"{super().redelivery_sweep_key}:{id(self)}:{next(self._rounds)}"


class _Place(Worker):
    """One place of a lane: runs one task at a time."""

    run_task: Run

    @property
    def minimum_check_interval(self) -> timedelta:
        return _BUSY if self._tasks_by_key else _IDLE

    @minimum_check_interval.setter
    def minimum_check_interval(self, value: timedelta) -> None:
        """Fixed by what the place does."""

    async def _cancellation_listener(self) -> None:
        """We interrupt tasks ourselves, with one subscription per process."""
        session = self._processing_session
        assert session
        session.cancellation_ready.set()
        await session.stopping.wait()


class Delivery:
    """The queues of all lanes.

    Args:
        url: the store's.
        lease_s: after this long without a sign of life a message is given to another worker.
    """

    def __init__(self, url: str, lease_s: float) -> None:
        check()
        self._lease_s = lease_s
        self._lanes = {lane: _Lane(f"hr-{lane}", url) for lane in LANES}
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Delivery:
        for lane in self._lanes.values():
            lane.register(_run, names=["run"])
            with _as_outage():
                await self._stack.enter_async_context(lane)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def add(self, reference: str, lane: str, at_ms: int | None = None) -> None:
        """Queue a reference, at once or at a time (ms since 1970), unless it is queued. Raises `RedisError`."""
        when = datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC) if at_ms else None
        await self._lanes[lane].add("run", when=when, key=reference)(reference)

    async def forget_dead_places(self) -> None:
        """Remove the names that places of ended processes left behind, if they hold nothing. Raises `RedisError`."""
        for lane in self._lanes.values():
            async with lane.redis() as redis:
                try:
                    known = await redis.xinfo_consumers(lane.stream_key, lane.worker_group_name)
                except ResponseError:  # nobody has read this lane yet
                    continue
                for each in known:
                    # A living place asks at least once a second.
                    if each["pending"] == 0 and each["idle"] > _DEAD_MS:
                        await redis.xgroup_delconsumer(  # type: ignore[attr-defined]  # missing from docket's protocol
                            lane.stream_key, lane.worker_group_name, each["name"]
                        )

    @contextlib.asynccontextmanager
    async def place(self, lane: str, name: str, run: Run, *, keeps_time: bool) -> AsyncIterator[asyncio.Task[None]]:
        """A place that takes tasks of a lane until the task given back is cancelled; it then waits for what it runs.

        Args:
            name: tells this place from all others of the fleet.
            run: runs the task of a reference.
            keeps_time: whether it also moves what sleeps into the queue in time; one place per lane and process should.
        """

        place = _Place(
            self._lanes[lane],
            name=name,
            concurrency=1,
            redelivery_timeout=timedelta(seconds=self._lease_s * _SHARE_OF_LEASE),
            reconnection_delay=timedelta(seconds=0.5),
            scheduling_resolution=timedelta(seconds=0.25 if keeps_time else 60),
            schedule_automatic_tasks=False,
        )
        place.run_task = run
        async with place:
            yield asyncio.ensure_future(place.run_forever())


async def _run(
    reference: str,
    execution: Execution = CurrentExecution(),  # noqa: B008 - docket's way to ask for it
    place: Worker = CurrentWorker(),  # noqa: B008
) -> None:
    """The only task that docket knows: whatever the place that it was delivered to does."""
    assert isinstance(place, _Place)
    if await place.run_task(reference, Message(execution, place.name)) is Outcome.LET_GO:
        raise AdmissionBlocked(execution, reason="it is another worker's", handled=True)


class _Brief(logging.Filter):
    """An outage of the store is said once, by us: docket's places would each add a traceback per attempt."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return not (isinstance(error, RedisError | RedisClusterException) or "Redis" in record.getMessage())


for _name in ("docket.worker", "docket.strikelist", "docket._redelivery"):
    logging.getLogger(_name).addFilter(_Brief())


def check() -> None:
    """Raises `Unavailable` where the installed docket is not one that this file knows."""
    version = importlib.metadata.version("pydocket")
    needed = {
        docket_worker.Worker: ("_cancellation_listener", "minimum_check_interval", "run_forever"),
        docket_worker._ProcessingSession: ("stopping", "cancellation_ready"),
        Docket: ("redelivery_sweep_key", "worker_group_name", "stream_key"),
        RedisConnection: (
            *("client", "pubsub", "prefix", "_connection_pool_from_url"),
            *("_create_cluster_client", "_create_node_pool", "_cluster_pubsub", "_normalized_url"),
        ),
        OwnedSentinelConnectionPool: ("sentinel_clients",),
    }
    names = {
        name
        for owner, attributes in needed.items()
        for name in attributes
        if not hasattr(owner, name) and name not in getattr(owner, "__annotations__", {})
    }
    if names or not version.startswith(_SUPPORTED):
        raise Unavailable(
            f"pydocket {version} is not one that headrace knows{': ' + ', '.join(sorted(names)) if names else ''}",
            hint="pip install 'pydocket>=0.27,<0.28'",
        )


def connection(url: str) -> RedisConnection:
    """Connections to the store, whatever kind of server its URL names. An asynchronous context manager.

    Raises:
        ConfigError: not a URL of a store; when it is entered, too.
    """
    with _as_wrong_url():
        return _StoreConnection(url)


__all__ = ["Delivery", "Message", "Outcome", "RedisConnection", "RedisError", "Run", "connection"]
