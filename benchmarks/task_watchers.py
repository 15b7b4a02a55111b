"""The part `watchers` of `benchmarks/tasks.py`: so many clients watch running tasks through one gateway process.

They come all at once, hang up, come again all at once and stay until the end. Every one must be answered, hear each
event of its task in order, and one final event, after which its stream ends.

The gateway reaches the store through TCP and everybody else through its Unix socket: so the store can tell which
connections are the gateway's. The clients are a few lines over asyncio's transports in this one process, so that the
delay is the server's.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import gc
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import redis

import peers
from headrace import stats
from headrace.serving.http import raise_descriptor_limit
from headrace.tasks import embedded
from serving import children, cpu_s
from task_servers import Note, headrace

_EVERY_S = 1.0  # each task says something so often
_HANG_UP_AFTER = 5  # events
_LATE_S = 20.0  # a stream that ends so long after its task has failed


@dataclasses.dataclass(frozen=True)
class Size:
    """How many watchers, of how many tasks, each of which emits how many events of its own."""

    watchers: int
    tasks: int
    events: int


class Watcher(asyncio.Protocol):
    """One client that watches one task by server-sent events."""

    def __init__(self, ident: str) -> None:
        self._request = f"GET /agent/events/{ident} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n".encode()
        self._rest = b""
        self.status = 0
        self.ids: list[str] = []
        self.ticks: list[tuple[int, float, float]] = []  # number, when it was emitted, when it came
        self.finals = 0
        self.heard = asyncio.Event()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self.status:
                self.status = int(line.split()[1])
            elif line.startswith(b"id: "):
                self.ids.append(line[4:].decode())
                self.heard.set()
            elif line.startswith(b"data: "):
                self._hear(orjson.loads(line[6:]), now)

    def _hear(self, event: dict[str, Any], now: float) -> None:
        if event.get("name") == "tick":
            number, at = event["value"]
            self.ticks.append((number, at, now))
        elif event["type"] in ("RUN_FINISHED", "RUN_ERROR"):
            self.finals += 1

    def connection_lost(self, error: Exception | None) -> None:
        self.heard.set()
        self.ended.set_result(error)


def measure(store: embedded.Embedded, size: Size, note: Note) -> None:
    """Needs an empty store."""
    raise_descriptor_limit()
    with redis.Redis(unix_socket_path=urllib.parse.unquote(store.url.removeprefix("unix://"))) as probe:
        note("watchers: bare pub/sub of the store, p50 ms (bound of the delay)", _floor_ms(probe))
        places = str(-(-size.tasks // 2))
        with (
            _tcp(probe) as url,
            headrace(store.url, "--task-workers", "2", "--concurrency", places, verb="task worker"),
            headrace(url, "--http-workers", "1", verb="gateway") as (gateway, supervisor),
        ):
            (front,) = [pid for pid in children(supervisor) if b"headrace.front" in _argv(pid)]
            asyncio.run(_Measurement(gateway, front, probe, size, note).run())


class _Measurement:
    def __init__(self, url: str, front: int, probe: redis.Redis, size: Size, note: Note) -> None:
        self._url = url
        self._front = front
        self._probe = probe
        self._size = size
        self._note = note

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=30) as self._client:
            await self._warm_up()
            before = self._note_state("before")
            gc.freeze()
            gc.disable()
            try:
                await self._waves(before)
            finally:
                gc.enable()

    async def _waves(self, before: float) -> None:
        """The first wave hears some events before it hangs up, the second one the others."""
        size, note = self._size, self._note
        first_at = time.monotonic() + 2 + size.watchers / 300
        tasks = [await self._submit(first_at, number, size.events) for number in range(size.tasks)]
        last_at = first_at + size.events * _EVERY_S
        wave = await self._come(tasks, "first")
        await asyncio.sleep(first_at + _HANG_UP_AFTER * _EVERY_S - time.monotonic())
        for watcher in wave:
            watcher.transport.abort()
        began = time.monotonic()
        await self._until_none_watches()
        note("watchers: all have hung up, s until the gateway knows", time.monotonic() - began)
        self._note_state("after they hung up")
        cpu, began = cpu_s([self._front]), time.monotonic()
        wave = await self._come(tasks, "second")
        opened = time.monotonic()
        crowded = self._note_state(f"with {size.watchers}")
        _, left = await asyncio.wait([watcher.ended for watcher in wave], timeout=last_at - opened + _LATE_S)
        assert not left, f"{len(left)} of {len(wave)} streams did not end"
        cpu, seconds = cpu_s([self._front]) - cpu, time.monotonic() - began
        _check(wave, size)
        await self._until_none_watches()
        await asyncio.sleep(1)
        self._note_state("after the end")
        note("watchers: the gateway grew per watcher (PSS), KiB", (crowded - before) / size.watchers * 1024)
        note("watchers: share of a core that the gateway takes, %", cpu / seconds * 100)
        note("watchers: CPU s of the gateway, second wave", cpu)
        note("watchers: CPU us per delivered event", cpu / sum(len(watcher.ids) for watcher in wave) * 1e6)
        # What was emitted before all were there is history, delivered from the stream.
        delays = sorted(came - at for watcher in wave for _, at, came in watcher.ticks if at > opened)
        note("watchers: events per s delivered", len(delays) / (last_at - opened))
        for share in (0.5, 0.99):
            note(f"watchers: event to watcher p{share * 100:g} ms", stats.percentile(delays, share) * 1e3)
        note("watchers: event to watcher, the longest, ms", delays[-1] * 1e3)

    async def _submit(self, first_at: float, number: int, events: int) -> str:
        # They take turns within the interval: the rate is steady.
        timetable = {"first_at": first_at + number / self._size.tasks * _EVERY_S, "every_s": _EVERY_S, "count": events}
        answer = await self._client.post("/agent/submit", json={"agent": "reporter", "input": timetable})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    async def _warm_up(self) -> None:
        """A few tasks of each worker, watched to their end: what is loaded at the first use is loaded."""
        idents = [await self._submit(time.monotonic(), number, 1) for number in range(self._size.tasks)]
        watchers = [await _connect(self._url, ident) for ident in idents]
        await asyncio.gather(*(watcher.ended for watcher in watchers))
        await self._until_none_watches()

    async def _come(self, tasks: list[str], which: str) -> list[Watcher]:
        """All watchers, at once; each has its answer and begins to hear its task's past."""
        began = time.monotonic()
        idents = [tasks[index % len(tasks)] for index in range(self._size.watchers)]
        wave = await asyncio.gather(*(_connect(self._url, ident) for ident in idents))
        await asyncio.gather(*(watcher.heard.wait() for watcher in wave))
        self._note(f"watchers: s until all of the {which} wave hear", time.monotonic() - began)
        statuses = collections.Counter(watcher.status for watcher in wave)
        assert set(statuses) == {200}, f"answers: {dict(statuses)}"
        return wave

    async def _until_none_watches(self) -> None:
        while True:
            text = (await self._client.get("/metrics")).text
            (count,) = [line.split()[1] for line in text.splitlines() if line.startswith("headrace_task_watchers ")]
            if float(count) == 0:
                return
            await asyncio.sleep(0.05)

    def _note_state(self, when: str) -> float:
        """Memory and connections of the gateway; gives its PSS in MiB."""
        sizes = _memory_mib(self._front)
        self._note(f"watchers: gateway's RSS {when}, MiB", sizes["Rss"])
        self._note(f"watchers: gateway's PSS {when}, MiB", sizes["Pss"])
        its = [each for each in self._probe.client_list() if each["addr"].startswith("127.0.0.1:")]
        self._note(f"watchers: gateway's connections to the store {when}", len(its))
        # One subscription hears all tasks that are watched, however many watch them.
        channels = [int(each["sub"]) for each in its if each["sub"] != "0"]
        assert len(channels) == 1, f"{len(channels)} subscriptions"
        assert channels[0] <= self._size.tasks + 1, f"{channels[0]} channels"
        return sizes["Pss"]


def _check(wave: list[Watcher], size: Size) -> None:
    """Raises `AssertionError` unless every watcher has heard everything, in order, once."""
    wrong = collections.Counter(
        problem
        for watcher in wave
        for problem, found in (
            ("an event is missing or out of order", [n for n, *_ in watcher.ticks] != list(range(size.events))),
            ("not one final event", watcher.finals != 1),
            ("ids out of order", watcher.ids != sorted(set(watcher.ids), key=_order)),
            ("the connection broke", watcher.ended.result() is not None),
        )
        if found
    )
    assert not wrong, f"of {len(wave)} watchers: {dict(wrong)}"


def _order(ident: str) -> tuple[int, ...]:
    return tuple(map(int, ident.split("-")))


async def _connect(url: str, ident: str) -> Watcher:
    where = urllib.parse.urlsplit(url)
    loop = asyncio.get_running_loop()
    return (await loop.create_connection(lambda: Watcher(ident), where.hostname, where.port))[1]


@contextlib.contextmanager
def _tcp(probe: redis.Redis) -> Iterator[str]:
    """URL by which the store is reached through TCP as well, from this machine only."""
    port = peers.free_port()
    probe.config_set("bind", "127.0.0.1")
    probe.config_set("port", port)
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        probe.config_set("port", 0)


def _floor_ms(probe: redis.Redis, count: int = 500) -> float:
    """What the store alone takes from an announcement to its only hearer."""
    seen = []
    with probe.pubsub(ignore_subscribe_messages=True) as hearer:
        hearer.subscribe("benchmark")
        hearer.get_message(timeout=1)
        for _ in range(count):
            began = time.perf_counter()
            probe.publish("benchmark", b"x" * 150)
            while hearer.get_message(timeout=1) is None:
                pass
            seen.append(time.perf_counter() - began)
    return stats.median(seen) * 1e3


def _memory_mib(pid: int) -> dict[str, float]:
    """Rss and Pss, among others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) / 1024 for name, _, value in (line.partition(":") for line in lines)}


def _argv(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
