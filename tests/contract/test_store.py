"""The rules of the store, on the real server: what an owner may write, what happens once, what is kept how long."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from headrace.errors import InvalidInput, LeaseLost, Overloaded, TaskConflict, TaskNotFound
from headrace.tasks import embedded
from headrace.tasks.delivery import connection
from headrace.tasks.store import Change, Claim, Ended, Store, Submission

Story = Callable[[Store], Awaitable[None]]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="hr-store-"))
    try:
        yield embedded.ensure(folder).url
    finally:
        embedded.stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def tell(url: str) -> Callable[[Story], None]:
    """Runs a story on an empty store with room for three tasks."""

    def run(story: Story) -> None:
        async def whole() -> None:
            async with connection(url) as opened, opened.client() as client:
                await client.flushall()  # type: ignore[attr-defined]  # missing from docket's protocol
                store = Store(opened, result_ttl_s=60.0, max_tasks=3)
                await store.open()
                await story(store)

        asyncio.run(whole())

    return run


async def submitted(store: Store, **options: str | float) -> tuple[str, int]:
    queued, ident, _ = await store.submit(Submission("agent", b'"x"', **options))  # type: ignore[arg-type]
    assert queued
    return ident, queued.turn


async def claimed(store: Store, ident: str, turn: int, message: str = "1-0") -> Claim:
    claim = await store.claim(ident, turn, message, 20)
    assert isinstance(claim, Claim)
    return claim


async def kinds(store: Store, ident: str) -> list[str]:
    return [json.loads(event.payload)["type"] for event in await store.events(ident)]


EVENT = b'{"type":"CUSTOM","name":"n","value":1}'
FINAL = b'{"type":"RUN_FINISHED"}'


def test_a_former_owner_can_write_nothing(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, turn = await submitted(store)
        old = await claimed(store, ident, turn)
        new = await claimed(store, ident, turn)
        assert new.fence == old.fence + 1
        for change in (Change("a", "1:s", b"1"), Change("b", what="complete", argument=b"1", events=[FINAL])):
            with pytest.raises(LeaseLost):
                await store.write(old, change)
        assert (await store.get(ident)).steps == 0
        await store.write(new, Change("c", "1:s", b"2", events=[EVENT]))
        assert (await store.get(ident)).steps == 1

    tell(story)


def test_a_write_that_is_repeated_happens_once(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, turn = await submitted(store)
        claim = await claimed(store, ident, turn)
        for _ in range(2):
            await store.write(claim, Change("1.1", "1:s", b"1", events=[EVENT]))
        for _ in range(2):
            await store.write(claim, Change("1.2", what="complete", argument=b"1", events=[FINAL]))
        assert await kinds(store, ident) == ["CUSTOM", "RUN_STARTED", "CUSTOM", "RUN_FINISHED"]
        assert await store.totals() == (0, 1)
        with pytest.raises(TaskConflict):
            await store.write(claim, Change("1.3", "2:s", b"1", events=[EVENT]))

    tell(story)


def test_a_delivery_of_another_turn_or_a_second_one_of_the_same_has_nothing_to_run(
    tell: Callable[[Story], None],
) -> None:
    async def story(store: Store) -> None:
        ident, turn = await submitted(store)
        claim = await claimed(store, ident, turn, "1-0")
        assert await store.claim(ident, turn, "2-0", 20) is None, "queued twice while it ran"
        assert isinstance(await store.claim(ident, turn, "1-0", 20), Claim), "the same delivery, taken over"
        with pytest.raises(LeaseLost):
            await store.write(claim, Change("x", what="release"))
        owner = await claimed(store, ident, turn, "1-0")
        queued = await store.write(owner, Change("y", what="release"))
        assert queued
        assert queued.turn == turn + 1
        assert await store.claim(ident, turn, "1-0", 20) is None
        assert isinstance(await store.claim(ident, queued.turn, "3-0", 20), Claim)

    tell(story)


def test_a_key_of_idempotency_is_one_task_of_one_owner(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, _ = await submitted(store, idempotency_key="k", digest="d", owner="me")
        assert (await store.submit(Submission("agent", b"1", idempotency_key="k", digest="d", owner="me")))[1] == ident
        with pytest.raises(InvalidInput):
            await store.submit(Submission("agent", b"1", idempotency_key="k", digest="other", owner="me"))
        assert (await submitted(store, idempotency_key="k", digest="d", owner="you"))[0] != ident

    tell(story)


def test_at_the_bound_nothing_is_written(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        made = [(await submitted(store))[0] for _ in range(3)]
        with pytest.raises(Overloaded):
            await submitted(store)
        assert {task.id for task in (await store.tasks(None, 10))[0]} == set(made)
        assert isinstance(await store.end(made[0], "cancelled", "cancelled", "gone"), Ended)
        await submitted(store)

    tell(story)


def test_a_task_that_killed_its_workers_or_is_late_is_given_up(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, turn = await submitted(store)
        for _ in range(2):
            assert isinstance(await store.claim(ident, turn, "1-0", 2), Claim)
        ended = await store.claim(ident, turn, "1-0", 2)
        assert isinstance(ended, Ended)
        assert ended.status == "error"
        assert json.loads((await store.get(ident)).error or b"")["code"] == "attempts_exhausted"
        late, turn = await submitted(store, timeout_s=0.001)
        await asyncio.sleep(0.01)
        ended = await store.claim(late, turn, "1-0", 2)
        assert isinstance(ended, Ended)
        assert ended.status == "timeout"

    tell(story)


def test_what_has_ended_is_kept_for_a_while_and_what_has_not_for_ever(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, turn = await submitted(store, idempotency_key="k")
        keys = [f"{{hr}}:{kind}:{ident}" for kind in ("task", "events")] + ["{hr}:idem::k"]

        async def lives() -> list[bool]:
            return [await store._client.pttl(key) > 0 for key in keys]

        assert await lives() == [False] * 3
        claim = await claimed(store, ident, turn)
        await store.write(claim, Change("1", what="fail", argument=b"{}", events=[b'{"type":"RUN_ERROR"}']))
        assert await lives() == [True] * 3
        with pytest.raises(TaskConflict):
            await store.answer(await store.get(ident), "1:ask", b"1")
        queued = await store.retry(ident, fresh=False)
        assert await lives() == [False] * 3
        assert "RUN_ERROR" not in await kinds(store, ident), "it is not final any more"
        assert isinstance(await store.claim(ident, queued.turn, "2-0", 20), Claim)
        with pytest.raises(TaskConflict):
            await store.retry(ident, fresh=False)
        with pytest.raises(TaskNotFound):
            await store.get("nothing")

    tell(story)


def test_what_was_left_lying_is_found(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, turn = await submitted(store)
        assert ([each.reference for each in (await store.overdue(-1000))[0]]) == [f"{ident}:{turn}"]
        claim = await claimed(store, ident, turn)
        assert await store.overdue(-1000) == ([], [])
        await store.write(claim, Change("1", what="ask", argument=b'{"field":"1:ask","prompt":"?","schema":null}'))
        assert await store.overdue(-1000) == ([], []), "it waits for a client"
        queued = await store.answer(await store.get(ident), "1:ask", b"true")
        assert [each.turn for each in (await store.overdue(-1000))[0]] == [queued.turn]
        assert (await claimed(store, ident, queued.turn)).journal == {"1:ask": b"true"}

    tell(story)
