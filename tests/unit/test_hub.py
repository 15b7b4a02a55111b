"""What watchers of tasks see, with a real store: everything, in order, once, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from headrace.tasks import embedded
from headrace.tasks.delivery import connection
from headrace.tasks.hub import Hub, is_final
from headrace.tasks.store import Change, Claim, Event, Store, Submission, events_channel


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The data directory of a store that runs."""
    made = Path(tempfile.mkdtemp(prefix="hr-hub-"))
    try:
        embedded.ensure(made)
        yield made
    finally:
        embedded.stop(made)
        shutil.rmtree(made, ignore_errors=True)


@dataclass
class Scene:
    """A hub, the store behind it, and a client of the store's server for questions about them."""

    hub: Hub
    store: Store
    client: Any
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    async def begin(self) -> Claim:
        """A task that runs."""
        _, ident, _ = await self.store.submit(Submission("agent", b"1"))
        claim = await self.store.claim(ident, 1, "1-0", 20)
        assert isinstance(claim, Claim)
        return claim

    async def say(self, claim: Claim, count: int = 1) -> None:
        """So many events of a task."""
        said = [b'{"type":"CUSTOM","name":"%d"}' % next(self.numbers) for _ in range(count)]
        await self.store.write(claim, Change(str(next(self.numbers)), events=said))

    async def end(self, claim: Claim) -> None:
        final = [b'{"type":"RUN_FINISHED"}']
        await self.store.write(claim, Change(str(next(self.numbers)), what="complete", argument=b"1", events=final))

    def watch(self, ident: str, after: str = "0-0") -> Watching:
        return Watching(self.hub, ident, after)

    async def subscriptions(self) -> int:
        """Connections to the server that have subscribed to something."""
        return len(await self.client.client_list(_type="pubsub"))

    async def listeners(self, ident: str) -> int:
        """How many connections hear a task's channel."""
        return int((await self.client.pubsub_numsub(events_channel(ident)))[0][1])


class Watching:
    """A watcher that reads as fast as it can."""

    def __init__(self, hub: Hub, ident: str, after: str) -> None:
        self.events: list[Event] = []
        self._task = asyncio.ensure_future(self._read(hub, ident, after))

    async def _read(self, hub: Hub, ident: str, after: str) -> None:
        async with contextlib.aclosing(hub.watch(ident, after)) as events:
            async for event in events:
                if event is not None:
                    self.events.append(event)

    async def has(self, count: int) -> None:
        await until(lambda: len(self.events) >= count)

    async def to_the_end(self) -> list[Event]:
        async with asyncio.timeout(10):
            await self._task
        return self.events

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def until_asked(question: Callable[[], Awaitable[int]], answer: int) -> None:
    async with asyncio.timeout(10):
        while await question() != answer:
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Scene]:
    """A scene whose hub does not listen yet."""
    async with connection(embedded.ensure(folder).url) as found, found.client() as client:
        await client.flushall()  # type: ignore[attr-defined]  # missing from docket's protocol
        store = Store(found, result_ttl_s=60.0, max_tasks=1000)
        await store.open()
        yield Scene(Hub(found, store), store, client)


@contextlib.asynccontextmanager
async def listening(hub: Hub) -> AsyncIterator[None]:
    run = asyncio.ensure_future(hub.run())
    try:
        yield
        assert not run.done(), "it listens for ever"
    finally:
        run.cancel()
        await asyncio.wait({run})


def play(folder: Path, story: Callable[[Scene], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with opened(folder) as scene, listening(scene.hub):
            await story(scene)

    asyncio.run(whole())


def test_all_watchers_of_all_tasks_share_one_subscription(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claims = [await scene.begin() for _ in range(10)]
        watching = [scene.watch(claim.id) for claim in claims for _ in range(5)]
        for each in watching:
            await each.has(2)
        assert scene.hub.watchers == 50
        assert await scene.subscriptions() == 1
        assert [await scene.listeners(claim.id) for claim in claims] == [1] * 10
        for claim in claims:
            await scene.say(claim, 3)
            await scene.end(claim)
        for claim, each in zip([claim for claim in claims for _ in range(5)], watching, strict=True):
            assert await each.to_the_end() == await scene.store.events(claim.id), "its own task's, and all of them"

    play(folder, story)


def test_whoever_comes_while_things_happen_sees_each_once_and_in_order(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claim = await scene.begin()
        watching: list[tuple[str, Watching]] = []
        for round_ in range(60):
            # In the middle of it come watchers, some of which know a part already.
            known = await scene.store.events(claim.id)
            places = ("0-0", known[len(known) // 2].id, known[-1].id)
            watching += [(after, scene.watch(claim.id, after)) for after in places]
            await scene.say(claim, 1 + round_ % 4)
        await scene.end(claim)
        everything = await scene.store.events(claim.id)
        ids = ["0-0", *(event.id for event in everything)]
        for after, each in watching:
            assert await each.to_the_end() == everything[ids.index(after) :]

    play(folder, story)


def test_events_come_as_they_happen_and_not_when_somebody_looks(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claim = await scene.begin()
        watching = scene.watch(claim.id)
        await until_asked(lambda: scene.listeners(claim.id), 1)
        await watching.has(2)
        for count in range(3, 20):
            await scene.say(claim)
            async with asyncio.timeout(2):
                await watching.has(count)
        await watching.leave()

    play(folder, story)


def test_watchers_that_come_before_the_connection_are_heard_as_well(folder: Path) -> None:
    async def whole() -> None:
        async with opened(folder) as scene:
            claims = [await scene.begin() for _ in range(20)]
            watching = [scene.watch(claim.id) for claim in claims]
            await until(lambda: scene.hub.watchers == 20)
            async with listening(scene.hub):
                await until_asked(scene.subscriptions, 1)
                more = [scene.watch(claim.id) for claim in claims]
                for claim, first, second in zip(claims, watching, more, strict=True):
                    await first.has(2)
                    await second.has(2)
                    await scene.end(claim)
                    assert await first.to_the_end() == await second.to_the_end()
                assert await scene.subscriptions() == 1

    asyncio.run(whole())


def test_a_slow_watcher_holds_little_and_misses_nothing(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claim = await scene.begin()
        quick = scene.watch(claim.id)
        async with contextlib.aclosing(scene.hub.watch(claim.id)) as slow:
            seen = [await anext(slow), await anext(slow)]
            for _ in range(8):
                await scene.say(claim, 100)
            await quick.has(802)
            kept = max(len(each.waiting) for each in scene.hub._watchers[events_channel(claim.id)])
            assert kept <= 256, "what it has not read is in the store"
            await scene.end(claim)
            async with asyncio.timeout(10):
                seen += [event async for event in slow]
        everything = await scene.store.events(claim.id, count=2000)
        assert len(everything) == 803
        assert seen == everything
        assert await quick.to_the_end() == everything

    play(folder, story)


def test_a_lost_subscription_is_made_again_and_what_was_said_meanwhile_is_read(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claims = [await scene.begin() for _ in range(3)]
        watching = [scene.watch(claim.id) for claim in claims]
        for each in watching:
            await each.has(2)
        for _ in range(2):
            (there,) = await scene.client.client_list(_type="pubsub")
            assert await scene.client.client_kill_filter(_id=there["id"]) == 1
            await until_asked(scene.subscriptions, 0)
            for claim in claims:
                await scene.say(claim, 2)
            await until_asked(scene.subscriptions, 1)
            for claim in claims:
                await until_asked(lambda ident=claim.id: scene.listeners(ident), 1)  # type: ignore[misc]
        for claim, each in zip(claims, watching, strict=True):
            await scene.end(claim)
            assert await each.to_the_end() == await scene.store.events(claim.id)

    play(folder, story)


def test_an_announcement_that_got_lost_is_noticed_by_the_next_one(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claim = await scene.begin()
        watching = scene.watch(claim.id)
        await watching.has(2)
        await until_asked(lambda: scene.listeners(claim.id), 1)
        number = await scene.client.hincrby(f"{{hr}}:task:{claim.id}", "seq", 1)
        await scene.client.xadd(events_channel(claim.id), {"e": b'{"type":"CUSTOM","name":"unheard"}', "n": number})
        await scene.say(claim)
        await watching.has(4)
        await scene.end(claim)
        assert await watching.to_the_end() == await scene.store.events(claim.id)

    play(folder, story)


def test_watchers_outlive_the_server(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claim = await scene.begin()
        watching = scene.watch(claim.id)
        await watching.has(2)
        await until_asked(lambda: scene.listeners(claim.id), 1)
        os.kill(embedded.ensure(folder).pid, signal.SIGKILL)
        await asyncio.to_thread(embedded.ensure, folder)
        await scene.say(claim, 2)
        await watching.has(4)
        await until_asked(lambda: scene.listeners(claim.id), 1)
        await scene.end(claim)
        assert await watching.to_the_end() == await scene.store.events(claim.id)

    play(folder, story)


def test_a_channel_is_left_with_its_last_watcher_and_can_be_heard_again(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claim, other = await scene.begin(), await scene.begin()
        first, second, third = scene.watch(claim.id), scene.watch(claim.id), scene.watch(other.id)
        for each in (first, second, third):
            await each.has(2)
        await first.leave()
        assert await scene.listeners(claim.id) == 1, "one more listens"
        await second.leave()
        await until_asked(lambda: scene.listeners(claim.id), 0)
        assert scene.hub.watchers == 1
        assert not scene.hub._confirmed.keys() - {events_channel(other.id)}
        # They come and go in the same moment.
        for _ in range(20):
            passing = scene.watch(claim.id)
            await passing.has(2)
            await passing.leave()
        again = scene.watch(claim.id)
        await again.has(2)
        await scene.end(claim)
        assert await again.to_the_end() == await scene.store.events(claim.id)
        await until_asked(lambda: scene.listeners(claim.id), 0)
        assert await scene.listeners(other.id) == 1
        await third.leave()

    play(folder, story)


def test_a_task_that_is_retried_is_watched_on(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claim = await scene.begin()
        await scene.store.end(claim.id, "cancelled", "cancelled", "gone")
        ended = await scene.watch(claim.id).to_the_end()
        assert is_final(ended[-1].payload)
        queued = await scene.store.retry(claim.id, fresh=False)
        # One has seen the end, the other begins anew: it must not stop at an end that is none any more.
        on, anew = scene.watch(claim.id, ended[-1].id), scene.watch(claim.id)
        await anew.has(3)
        again = await scene.store.claim(claim.id, queued.turn, "2-0", 20)
        assert isinstance(again, Claim)
        await scene.end(again)
        everything = await scene.store.events(claim.id)
        assert await anew.to_the_end() == everything
        assert await on.to_the_end() == everything[2:]

    play(folder, story)


def test_at_the_end_of_the_gateway_all_watching_ends_also_what_begins_then(folder: Path) -> None:
    async def story(scene: Scene) -> None:
        claim = await scene.begin()
        watching = [scene.watch(claim.id) for _ in range(3)]
        for each in watching:
            await each.has(2)
        scene.hub.close()
        for each in watching:
            assert len(await each.to_the_end()) == 2
        assert await scene.watch(claim.id).to_the_end() == []
        assert scene.hub.watchers == 0

    play(folder, story)
