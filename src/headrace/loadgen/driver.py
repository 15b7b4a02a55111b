"""Drives a server at a list of levels and counts what comes back.

Closed loop: so many clients, each sends its next request when it has its answer. Open loop: requests are due at Poisson
arrivals whatever the server does, and a latency counts from the moment a request was *due*, not from when it could be
sent, so that a server that stalls cannot hide it (coordinated omission).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import orjson

from headrace import stats
from headrace.clock import perf_counter
from headrace.errors import ConfigError
from headrace.loadgen.client import Address, Connection

DEFAULT_BODIES: tuple[bytes, ...] = tuple(
    orjson.dumps({"input": text})
    for text in (
        "hello world",
        "The headrace brings water to the wheel at full flow.",
        "A request waits milliseconds in memory and is shed when it is late; a task waits minutes on disk and is kept.",
        "How long does the oldest request wait when the queue is full and every sentence has a different length?",
    )
)
_MAX_CONNECTIONS = 4096
_TIMINGS = b'"timings":'


@dataclass(frozen=True)
class Plan:
    """What to send, and for how long at each level.

    ``check`` sees the index of the body sent, the status and the answer's bytes; what it raises counts as ``wrong``.
    """

    url: str
    bodies: Sequence[bytes]
    path: str = "/predict"
    duration_s: float = 10.0
    warmup_s: float = 2.0
    timeout_s: float = 60.0
    seed: int = 0
    check: Callable[[int, int, bytes], None] | None = None
    content_type: str = "application/json"


@dataclass(frozen=True)
class Level:
    """Either a number of clients or a rate in requests per second."""

    concurrency: int | None = None
    rate: float | None = None


class LevelResult(msgspec.Struct, omit_defaults=True):
    """One measured level; latencies in milliseconds over the answered requests (status below 400)."""

    achieved_rate: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p999_ms: float
    n: int
    errors: dict[str, int]
    concurrency: int | None = None
    rate: float | None = None
    offered_rate: float | None = None
    queue_p50_ms: float | None = None
    queue_p99_ms: float | None = None
    batch_size_mean: float | None = None
    refused_p99_ms: float | None = None


class Results(msgspec.Struct):
    """All levels, the conditions, and where the server saturates (requests per second, with the level that says so)."""

    levels: list[LevelResult]
    saturation: dict[str, Any]
    conditions: dict[str, Any]


@dataclass
class _Tally:
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    queues: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    due: int = 0


def levels(concurrency: str = "", rate: str = "") -> list[Level]:
    """Parse ``1,16,64``.

    Raises:
        ConfigError: not positive numbers.
    """
    try:
        found = [Level(concurrency=int(part)) for part in concurrency.split(",") if part]
        found += [Level(rate=float(part)) for part in rate.split(",") if part]
    except ValueError:
        found = []
    if not found or any((level.concurrency or level.rate or 0) <= 0 for level in found):
        raise ConfigError("levels are positive numbers such as 1,16,64", field="rate" if rate else "concurrency")
    return found


def read_samples(path: Path) -> list[bytes]:
    """Request bodies from JSON Lines, each an object that is sent as it is.

    Raises:
        ConfigError: names the line that is not an object.
    """
    bodies = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}", field="samples") from None
        if not isinstance(value, dict):
            raise ConfigError(f'{path} line {number} must be an object such as {{"input": …}}', field="samples")
        bodies.append(orjson.dumps(value))
    if not bodies:
        raise ConfigError(f"{path} has no samples", field="samples")
    return bodies


def run(plan: Plan, wanted: Sequence[Level], progress: Callable[[str], None] = lambda text: None) -> Results:
    """Measure each level in turn. Starts an event loop of its own."""
    return asyncio.run(measure(plan, wanted, progress))


async def measure(plan: Plan, wanted: Sequence[Level], progress: Callable[[str], None] = lambda text: None) -> Results:
    """As `run`, on the current event loop.

    Raises:
        ConfigError: nobody listens at the URL.
    """
    address = Address.parse(plan.url)
    try:
        (await Connection.open(address)).close()
    except OSError as error:
        raise ConfigError(f"cannot reach {plan.url}: {error}", field="url") from None
    measured = []
    for level in wanted:
        progress(f"{_name(level)}: {plan.warmup_s:g} s warm-up, {plan.duration_s:g} s measured")
        measured.append(await _Run(plan, level, address).result())
        await asyncio.sleep(0)  # connections that were closed just now end in the next turn of the loop
    return Results(
        measured,
        _saturation(measured),
        {
            "url": plan.url + plan.path,
            "duration_s": plan.duration_s,
            "warmup_s": plan.warmup_s,
            "timeout_s": plan.timeout_s,
            "samples": len(plan.bodies),
            "seed": plan.seed,
        },
    )


class _Run:
    """One level."""

    def __init__(self, plan: Plan, level: Level, address: Address) -> None:
        self._plan, self._level, self._address = plan, level, address
        self._requests = [address.request(plan.path, body, plan.content_type) for body in plan.bodies]
        self._random = random.Random(plan.seed)
        self._tally = _Tally()
        self._from = perf_counter() + plan.warmup_s
        self._until = self._from + plan.duration_s

    async def result(self) -> LevelResult:
        if self._level.concurrency:
            await asyncio.gather(*(self._client() for _ in range(self._level.concurrency)))
        else:
            await self._arrivals(self._level.rate or 1.0)
        return _summary(self._tally, self._level, self._plan.duration_s)

    async def _client(self) -> None:
        """A client of the closed loop. Counts what ends within the measured time."""
        connection: Connection | None = None
        order = self._order()
        try:
            while (start := perf_counter()) < self._until:
                connection = await self._send(
                    connection, next(order), start, lambda end: self._from <= end < self._until
                )
                if connection is None:
                    await asyncio.sleep(0.05)  # do not hammer a server that refuses connections
        finally:
            if connection:
                connection.close()

    async def _arrivals(self, rate: float) -> None:
        """The open loop. Counts what was due within the measured time, and waits for all of it."""
        idle: list[Connection] = []
        open_requests: set[asyncio.Task[None]] = set()
        order = self._order()

        async def one(index: int, due: float) -> None:
            connection = idle.pop() if idle else None
            connection = await self._send(connection, index, due, lambda end: self._from <= due < self._until)
            if connection:
                idle.append(connection)

        due = perf_counter()
        while (due := due + self._random.expovariate(rate)) < self._until:
            delay = due - perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            counted = due >= self._from
            self._tally.due += counted
            if len(open_requests) >= _MAX_CONNECTIONS:
                self._tally.errors["not_sent"] += counted
                continue
            task = asyncio.ensure_future(one(next(order), due))
            open_requests.add(task)
            task.add_done_callback(open_requests.discard)
        if open_requests:
            # Each has a time-out of its own, which turns it into an error that is counted.
            await asyncio.wait(open_requests, timeout=self._plan.timeout_s + 5)
        for connection in idle:
            connection.close()

    async def _send(
        self, connection: Connection | None, index: int, start: float, counts: Callable[[float], bool]
    ) -> Connection | None:
        """One request; gives the connection back if it is still good."""
        error = ""
        status, body = 0, b""
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                if connection is None or not connection.usable:
                    connection = await Connection.open(self._address)
                status, body = await connection.exchange(self._requests[index])
        except TimeoutError:
            error = "timeout"
        except OSError:
            error = "connection"
        end = perf_counter()
        if not error:
            error = self._judge(index, status, body)
        if counts(end):
            self._count(error, end - start, body)
        if status == 0 and connection:
            connection.close()
            connection = None
        return connection

    def _judge(self, index: int, status: int, body: bytes) -> str:
        if status >= 400:
            return str(status)
        if self._plan.check:
            try:
                self._plan.check(index, status, body)
            except Exception:
                return "wrong"
        return ""

    def _count(self, error: str, latency_s: float, body: bytes) -> None:
        if error:
            self._tally.errors[error] += 1
            if error == "429":
                self._tally.refusals.append(latency_s)
            return
        self._tally.latencies.append(latency_s)
        at = body.rfind(_TIMINGS)
        if at > 0:
            # Another server's answer may have a field of that name, too.
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                timings = orjson.loads(body[at + len(_TIMINGS) : -1])
                queue_ms, size = float(timings["queue_ms"]), int(timings["batch_size"])
                self._tally.queues.append(queue_ms)
                self._tally.sizes.append(size)

    def _order(self) -> Any:
        """Every body once in a random order, again and again."""
        indices = list(range(len(self._requests)))
        while True:
            self._random.shuffle(indices)
            yield from indices


def _summary(tally: _Tally, level: Level, duration_s: float) -> LevelResult:
    ordered = sorted(tally.latencies)
    at = [_ms(stats.percentile(ordered, share)) for share in (0.5, 0.9, 0.99, 0.999)]
    queues = sorted(tally.queues)
    return LevelResult(
        achieved_rate=round(len(ordered) / duration_s, 2),
        p50_ms=at[0],
        p90_ms=at[1],
        p99_ms=at[2],
        p999_ms=at[3],
        n=len(ordered),
        errors=dict(tally.errors),
        concurrency=level.concurrency,
        rate=level.rate,
        offered_rate=round(tally.due / duration_s, 2) if level.rate else None,
        queue_p50_ms=round(stats.percentile(queues, 0.5), 3) if queues else None,
        queue_p99_ms=round(stats.percentile(queues, 0.99), 3) if queues else None,
        refused_p99_ms=_ms(stats.percentile(sorted(tally.refusals), 0.99)) if tally.refusals else None,
        batch_size_mean=round(sum(tally.sizes) / len(tally.sizes), 2) if tally.sizes else None,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3) if not math.isnan(seconds) else 0.0


def _saturation(measured: list[LevelResult]) -> dict[str, Any]:
    """Closed loop: the best rate seen. Open loop: the highest offered rate of which 95 % was answered without error."""
    kept_up = [
        each
        for each in measured
        if each.offered_rate is None or (each.achieved_rate >= 0.95 * each.offered_rate and not each.errors)
    ]
    if not kept_up:
        return {"rate": None, "reached": True, "reason": "no offered rate was answered in full"}
    best = max(kept_up, key=lambda each: each.achieved_rate)
    reached = best is not measured[-1]
    return {
        "rate": best.achieved_rate,
        "reached": reached,
        "at": {"concurrency": best.concurrency} if best.rate is None else {"rate": best.rate},
    }


def _name(level: Level) -> str:
    return f"{level.concurrency} clients" if level.concurrency else f"{level.rate:g} requests/s"
