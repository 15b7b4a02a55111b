"""Watchers of one gateway hear every event at once, whenever they come."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.tasks import embedded
from headrace.tasks.delivery import connection
from headrace.tasks.hub import Hub
from headrace.tasks.store import Change, Claim, Store, Submission

NEWS = b'{"type":"CUSTOM","name":"news"}'
# Less than a watcher takes to look into the stream by itself.
AT_ONCE_S = 3.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="hr-hub-"))
    try:
        yield embedded.ensure(folder).url
    finally:
        embedded.stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


async def claimed(store: Store) -> Claim:
    queued, ident, _ = await store.submit(Submission("agent", b'"x"'))
    assert queued
    claim = await store.claim(ident, queued.turn, "1-0", 20)
    assert isinstance(claim, Claim)
    return claim


async def until_news(hub: Hub, ident: str, reading: asyncio.Event) -> None:
    """Watch until something new is heard; ``reading`` is set once all of the past is."""
    async with contextlib.aclosing(hub.watch(ident)) as events:
        async for event in events:
            assert event is not None
            if b'"RUN_STARTED"' in event.payload:
                reading.set()
            elif event.payload == NEWS:
                return


# So many turns of the event loop after the hub has begun to connect.
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 20])
def test_who_comes_while_the_hub_connects_hears_everything_at_once(url: str, turns: int) -> None:
    async def story() -> None:
        async with connection(url) as opened:
            store = Store(opened, result_ttl_s=60.0, max_tasks=1000)
            await store.open()
            claims = [await claimed(store) for _ in range(3)]
            hub = Hub(opened, store)
            listening = asyncio.ensure_future(hub.run())
            try:
                for _ in range(turns):
                    await asyncio.sleep(0)
                async with asyncio.timeout(AT_ONCE_S):
                    reading = [asyncio.Event() for _ in claims]
                    watching = [
                        asyncio.ensure_future(until_news(hub, claim.id, event))
                        for claim, event in zip(claims, reading, strict=True)
                    ]
                    await asyncio.gather(*(event.wait() for event in reading))
                    for claim in claims:
                        await store.write(claim, Change("1.1", events=[NEWS]))
                    await asyncio.gather(*watching)
                assert hub.watchers == 0
            finally:
                listening.cancel()
                await asyncio.gather(listening, *watching, return_exceptions=True)

    asyncio.run(story())
