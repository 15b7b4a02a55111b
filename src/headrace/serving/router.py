"""The front end's side of the model workers: who is there, who gets the next request, what happens when one dies.

Bodies stay here until they are answered, so that a worker's death loses nothing: what had not begun goes to another
worker or waits for the replacement within its deadline; what had begun is sent once more elsewhere if the model is
idempotent, else it fails at once. Lives on one event loop; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from headrace import metrics
from headrace.config import Config, ModelConfig
from headrace.core import ModelInfo
from headrace.errors import (
    InvalidInput,
    ModelNotFound,
    NotReady,
    Overloaded,
    WorkerLost,
)
from headrace.rundir import RunDir
from headrace.serving.link import Link, Pending

_log = logging.getLogger(__name__)

SCAN_S = 0.1
_MEETING_STEPS = 20
# What was refused is expected back: of those refusals this share still counts after each tick (about a second in all).
_REFUSALS_KEPT = 0.9


class Admission:
    """Places for the items of one request: taken together, given back together. A context manager.

    Leaving it forgets the items, answered or not; workers do not compute what has no answer then.
    """

    def __init__(self, route: Route, places: int, deadline: float, trace: str) -> None:
        self._route = route
        self._places = places
        self._deadline = deadline
        self._trace = trace
        self.pending: list[Pending] = []

    def __enter__(self) -> Admission:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pending in self.pending:
            self._route.settle(pending)
        self._route.free(self._places)

    def submit(self, body: bytes, cost: int, info: ModelInfo, *, stream: bool = False) -> Pending:
        """Send an item, prepared for workers with ``info``, to the least busy of them."""
        assert self._places, "more items than were admitted"
        self._places -= 1
        pending = self._route.pend(body, cost, self._deadline, self._trace, info)
        self.pending.append(pending)
        if stream:
            pending.as_stream()
        self._route.place(pending)
        return pending


class Route:
    """One model: its workers, and the requests that wait for one.

    Args:
        config: the model's options; replaced by a reload.
        share: which part of `max_queue` this front end may hold waiting.
        row: where metrics go.
        on_model: told what the model is, each time that a worker says it.

    ``refused_lately`` is about how many were refused for want of room in the last second.
    """

    def __init__(
        self, config: ModelConfig, share: int, row: metrics.Row, on_model: Callable[[ModelInfo], None]
    ) -> None:
        self.config = config
        self.share = share
        self.circuit_open = False
        self._on_model = on_model
        self.info: ModelInfo | None = None
        self._links: list[Link] = []
        self._parked: dict[int, Pending] = {}
        self._ids = itertools.count(1)
        self._waiting = 0
        self._open = 0
        self.refused_lately = 0.0
        self._queue_size = row.gauge(metrics.QUEUE_SIZE, model=config.name)
        self._in_flight = row.gauge(metrics.IN_FLIGHT, model=config.name)
        self._retried = row.counter(metrics.RETRIED, model=config.name)

    @property
    def ready(self) -> bool:
        """Whether a worker is connected."""
        return bool(self._links)

    @property
    def state(self) -> str:
        """For health reports: ready, loading, not_ready (no worker just now) or circuit_open (they fail repeatedly)."""
        if self._links:
            return "ready"
        if self.circuit_open:
            return "circuit_open"
        return "not_ready" if self.info else "loading"

    def admit(self, count: int, timeout_s: float, trace: str) -> Admission:
        """Take places for this many items, all or none.

        Raises:
            InvalidInput: so many have no room even when nothing waits.
            NotReady: no worker has been ready yet, or they fail again and again.
            Overloaded: no room, or none that would be served within ``timeout_s``; says when to try again.
        """
        name = self.config.name
        if count > self.share:
            raise InvalidInput(f"has {count} items, at most {self.share} may be sent at once", field="inputs")
        if self.info is None:
            raise NotReady(f"model {name} is loading", retry_after_s=1.0)
        if self.circuit_open and not self._links:
            raise self._broken()
        if self._waiting + count > self.share:
            self.refused_lately += count
            raise Overloaded(
                f"{self._waiting} requests wait for {name} and {self.share} may",
                retry_after_s=self._until_free_s(count),
            )
        wait_s = min((link.backlog_s() for link in self._links), default=0.0)
        if wait_s > timeout_s:
            raise Overloaded(
                f"requests that wait for {name} take about {wait_s:.1f} s, longer than this one's deadline",
                retry_after_s=wait_s - timeout_s,
            )
        self._waiting += count
        return Admission(self, count, asyncio.get_running_loop().time() + timeout_s, trace)

    def pend(self, body: bytes, cost: int, deadline: float, trace: str, info: ModelInfo) -> Pending:
        """A request in one of the places that were admitted; `settle` it in any case."""
        pending = Pending(next(self._ids), body, cost, deadline, trace, info)
        pending.timer = asyncio.get_running_loop().call_at(deadline, pending.expire)
        self._open += 1
        return pending

    def settle(self, pending: Pending) -> None:
        """Forget a request, answered or not; the worker does not compute what is not answered."""
        if pending.timer:
            pending.timer.cancel()
        self._parked.pop(pending.id, None)
        if pending.link:
            pending.link.cancel(pending.id)
        if pending.future.done() and not pending.future.cancelled():
            pending.future.exception()  # read, so that asyncio does not report it as never retrieved
        self._open -= 1
        self.mark_begun(pending)

    def free(self, places: int) -> None:
        """Give back places that no request came to."""
        self._waiting -= places

    def mark_begun(self, pending: Pending) -> None:
        if not pending.began:
            pending.began = True
            self._waiting -= 1

    def add(self, link: Link) -> None:
        """A worker has said hello."""
        assert link.info
        self._learn(link.info)
        self._links.append(link)
        parked, self._parked = self._parked, {}
        for pending in parked.values():
            self.place(pending)

    def retire(self, link: Link) -> None:
        """A worker takes nothing new any more; what it has it will answer."""
        if link in self._links:
            self._links.remove(link)
            # Prepare for the workers that are left.
            if self._links and self.info and not any(other.takes(self.info) for other in self._links):
                newest = self._links[-1].info
                assert newest
                self._learn(newest)

    def remove(self, link: Link) -> None:
        """A worker is gone: answer, re-send or park each request that it had."""
        self.retire(link)
        orphans = list(link.pending.values())
        link.pending.clear()
        for pending in orphans:
            pending.link = None
            again = not pending.retried and self.config.idempotent and bool(self._links)
            if pending.future.done() or (pending.began and not again):
                # Also what is answered in part, which cannot be taken back; elsewhere nobody reads it any more.
                pending.fail(WorkerLost("the worker that ran this request died", retry_after_s=1.0))
                continue
            if pending.began:
                self._retried.inc()
                pending.retried, pending.began = True, False
                self._waiting += 1
            self.place(pending)

    def tick(self, circuit_open: bool) -> None:
        """Bring the slow figures up to date."""
        self.circuit_open = circuit_open
        if circuit_open and not self._links:
            for pending in self._parked.values():
                pending.fail(self._broken())
        self.refused_lately *= _REFUSALS_KEPT
        self._queue_size.set(self._waiting)
        self._in_flight.set(self._open)

    def place(self, pending: Pending) -> None:
        """Send a request to the least busy worker; keep it while there is none."""
        links = self._links
        if not links:
            self._parked[pending.id] = pending
            return
        fitting = (
            links
            if len(links) == 1 and links[0].takes(pending.info)
            else [link for link in links if link.takes(pending.info)]
        )
        if fitting:
            (fitting[0] if len(fitting) == 1 else min(fitting, key=_load)).send(pending)
        else:
            pending.fail(WorkerLost("the model was replaced by one that takes other inputs", retry_after_s=1.0))

    def close(self) -> None:
        """The model is served no longer: leave no stale figures."""
        self._queue_size.set(0)
        self._in_flight.set(0)

    def _broken(self) -> NotReady:
        return NotReady(
            f"the workers of {self.config.name} fail again and again",
            retry_after_s=5.0,
            hint="the server's log says why",
        )

    def _learn(self, info: ModelInfo) -> None:
        self.info = info
        self._on_model(info)

    def _until_free_s(self, count: int) -> float:
        """When so many more places are likely to be free, with those in mind who were refused a moment ago."""
        item_s = max((link.item_s for link in self._links), default=0.0)
        places = min(self._waiting, self._waiting + count - self.share + self.refused_lately)
        batch_s = min((link.batch_ends_in_s() for link in self._links), default=0.0)
        return max(1.0, batch_s, places * item_s / max(1, len(self._links)))


def _load(link: Link) -> tuple[int, int]:
    """Outstanding work: tokens where they are known, else requests."""
    return link.cost, len(link.pending)


class Router:
    """All models of a server, as one front end sees them.

    Args:
        front_ends: how many there are now, among which `max_queue` is divided; the configuration's number by default.
    """

    def __init__(
        self, config: Config, run_dir: RunDir, row: metrics.Row, front_ends: Callable[[], int] | None = None
    ) -> None:
        self._run_dir = run_dir
        self._front_ends = front_ends
        self._row = row
        self._version = run_dir.config_version()
        self._links: dict[Path, Link] = {}
        self._failing = ""
        self.on_config: Callable[[Config], None] = lambda config: None
        self.on_model: Callable[[ModelInfo], None] = lambda info: None
        self.on_tick: list[Callable[[], None]] = []
        self.routes: dict[str, Route] = {}
        self.default = ""
        self._configure(config)

    def route(self, name: str | None) -> Route:
        """The route of a model, or of the default one.

        Raises:
            ModelNotFound: names the models there are.
        """
        route = self.routes.get(self.default if name is None else name)
        if route is None:
            known = ", ".join(self.routes) or "none"
            raise ModelNotFound(f"there is no model {name!r}", field="model", hint=f"models here: {known}")
        return route

    async def meet(self, route: Route) -> None:
        """Wait a moment for a worker that is there and that this front end has not met yet: another one has perhaps,
        and told its clients that the model is ready."""
        for _ in range(_MEETING_STEPS):
            if route.info or not self._run_dir.sockets():
                return
            await asyncio.sleep(SCAN_S / 2)

    @property
    def ready(self) -> bool:
        """Whether every model has a worker."""
        return all(route.ready for route in self.routes.values())

    async def run(self) -> None:
        """Keep up with workers that come and go and with changes of the configuration, until cancelled."""
        try:
            while True:
                try:
                    await self._look_around()
                    self._failing = ""
                except Exception as error:
                    # No descriptor free just now, perhaps. Whatever it is, a front end that stops looking is blind.
                    if repr(error) != self._failing:
                        _log.exception("cannot look for workers; trying again every %g s", SCAN_S)
                    self._failing = repr(error)
                await asyncio.sleep(SCAN_S)
        finally:
            for link in self._links.values():
                link.close()

    async def _look_around(self) -> None:
        version = self._run_dir.config_version()
        if version != self._version and version != (0, 0):
            self._version = version
            config = self._run_dir.config()
            self._configure(config)
            self.on_config(config)
        for path in self._run_dir.sockets():
            if path not in self._links:
                # A socket whose worker has just died refuses; its successor makes a new one.
                with contextlib.suppress(ConnectionError, FileNotFoundError):
                    await self._connect(path)
        broken = self._run_dir.open_circuits()
        front_ends = self._front_ends() if self._front_ends else self._processes
        for name, route in self.routes.items():
            route.share = max(1, math.ceil(route.config.max_queue / front_ends))
            route.tick(name in broken)
        for call in self.on_tick:
            call()

    async def _connect(self, path: Path) -> None:
        def gone() -> None:
            if self._links.get(path) is link:
                del self._links[path]

        link = self._links[path] = Link(self, gone)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: link, str(path))
        except OSError:
            gone()
            raise

    def _configure(self, config: Config) -> None:
        self._processes = config.http_worker_count()
        self.default = config.default_model
        for name in [name for name in self.routes if name not in config.models]:
            self.routes.pop(name).close()
        routes: dict[str, Route] = {}
        for name, model in config.models.items():
            share = max(1, math.ceil(model.max_queue / self._processes))
            route = self.routes.get(name)
            if route is None:
                route = Route(model, share, self._row, lambda info: self.on_model(info))
            route.config, route.share = model, share
            routes[name] = route
        self.routes = routes
