"""The rules of the store, on every kind of server: what an owner may write, what happens once, how long it is kept."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import metrics
from headrace.config import Config
from headrace.errors import ConfigError, InvalidInput, LeaseLost, Overloaded, TaskConflict, TaskNotFound
from headrace.tasks import embedded
from headrace.tasks.delivery import Delivery, Message, Outcome, connection
from headrace.tasks.service import Service
from headrace.tasks.store import CONTROL, Change, Claim, Ended, Store, Submission, events_channel
from stores import KINDS, started

# More than redis-py has room for unless it is told.
PLACES = 110

Story = Callable[[Store], Awaitable[None]]


@pytest.fixture(scope="module", params=["embedded", *KINDS])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of a kind: its URL."""
    folder = Path(tempfile.mkdtemp(prefix="hr-store-"))
    try:
        if request.param == "embedded":
            yield embedded.ensure(folder).url
        else:
            with started(request.param, request.getfixturevalue("redis_server"), folder) as servers:
                yield servers.url
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
                kept = await client.keys("*")
                assert {key.partition(b":")[0] for key in kept} <= {b"{hr}"}, "a Cluster keeps them together"

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


def test_an_answer_goes_to_the_question_that_was_asked_and_once(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, turn = await submitted(store)
        claim = await claimed(store, ident, turn)
        await store.write(claim, Change("1", what="ask", argument=b'{"field":"1:ask","prompt":"?","schema":null}'))
        task = await store.get(ident)
        with pytest.raises(TaskConflict):
            await store.answer(task, "2:ask", b"true")
        queued = await store.answer(task, "1:ask", b"true")
        assert (await store.get(ident)).ask is None
        with pytest.raises(TaskConflict):
            await store.answer(task, "1:ask", b"false")
        assert (await claimed(store, ident, queued.turn)).journal == {"1:ask": b"true"}

    tell(story)


def test_a_retry_goes_on_from_the_journal_or_anew(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, turn = await submitted(store)
        claim = await claimed(store, ident, turn)
        await store.write(claim, Change("1", "1:s", b"1"))
        failed = Change("2", what="fail", argument=b"{}", events=[b'{"type":"RUN_ERROR"}'])
        await store.write(claim, failed)
        queued = await store.retry(ident, fresh=False)
        with pytest.raises(TaskConflict):
            await store.write(claim, failed)
        claim = await claimed(store, ident, queued.turn)
        assert claim.journal == {"1:s": b"1"}
        await store.end(ident, "cancelled", "cancelled", "gone")
        queued = await store.retry(ident, fresh=True)
        assert (await claimed(store, ident, queued.turn)).journal == {}

    tell(story)


def test_what_happens_is_announced_with_its_number(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        async with store._connection.pubsub() as subscription:
            idents = [(await submitted(store)) for _ in range(2)]
            await subscription.subscribe(events_channel(idents[0][0]), CONTROL)
            for _ in range(2):
                assert (await heard(subscription))["type"] == "subscribe"
            await claimed(store, *idents[1])
            await claimed(store, *idents[0])
            await store.end(idents[0][0], "cancelled", "cancelled", "gone")
            said = [(await heard(subscription))["data"] for _ in range(3)]
        events = (await store.events(idents[0][0]))[1:]
        assert said[:2] == [f"{each.id} {each.number} {each.payload.decode()}".encode() for each in events]
        assert said[2] == idents[0][0].encode()

    tell(story)


async def heard(subscription: Any) -> Any:
    """The next message of a subscription."""
    async with asyncio.timeout(5):
        while (message := await subscription.get_message(timeout=5)) is None:
            pass
    return message


def test_more_may_be_asked_at_once_than_there_are_connections(tell: Callable[[Story], None]) -> None:
    async def story(store: Store) -> None:
        ident, _ = await submitted(store)
        tasks = await asyncio.gather(*(store.get(ident) for _ in range(300)))
        assert {task.id for task in tasks} == {ident}
        assert await asyncio.gather(*(store.state_of(ident) for _ in range(300))) == [(0, "pending")] * 300

    tell(story)


async def connections_close(url: str) -> None:
    """With TLS it takes a moment, and whoever gives up a wait does not stay for it."""
    if url.startswith("rediss"):
        await asyncio.sleep(0.2)


def test_messages_go_to_as_many_places_as_one_asks_for_and_each_to_one(url: str) -> None:
    # Each connection with TLS costs a good deal of time; there is nothing else to them.
    count = 6 if url.startswith("rediss") else PLACES

    async def story() -> None:
        running: list[str] = []
        all_run = asyncio.Event()

        async def run(reference: str, message: Message) -> Outcome:
            running.append(reference)
            await all_run.wait()
            await message.renew()
            return Outcome.DONE

        async with Delivery(url, lease_s=20) as delivery, contextlib.AsyncExitStack() as stack:
            places = [
                await stack.enter_async_context(delivery.place("default", f"p{number}", run, keeps_time=number == 0))
                for number in range(count)
            ]
            sent = [f"task-{number}:1" for number in range(count)]
            await asyncio.gather(*(delivery.add(each, "default") for each in sent))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(15):
                    while len(running) < count:
                        await asyncio.sleep(0.02)
            all_run.set()
            for place in places:
                place.cancel()
            await asyncio.wait(places)
            assert sorted(running) == sorted(sent), "all at once, each once"
        await connections_close(url)

    asyncio.run(story())


def test_a_message_that_was_let_go_comes_again_and_a_late_one_comes_late(url: str) -> None:
    async def story() -> None:
        came: list[tuple[str, str, float]] = []

        async def run(reference: str, message: Message) -> Outcome:
            came.append((reference, message.id, time.time()))
            return Outcome.LET_GO if [each[0] for each in came].count("a:1") == 1 else Outcome.DONE

        async with (
            Delivery(url, lease_s=0.5) as delivery,
            delivery.place("batch", "p", run, keeps_time=True) as place,
        ):
            await delivery.add("a:1", "batch")
            wanted_at = time.time() + 0.7
            await delivery.add("b:1", "batch", at_ms=int(wanted_at * 1000))
            async with asyncio.timeout(20):
                while len(came) < 3:
                    await asyncio.sleep(0.02)
            place.cancel()
            await asyncio.wait({place})
        await connections_close(url)
        first, second = (each for each in came if each[0] == "a:1")
        assert first[1] == second[1], "it is the same message"
        assert second[2] - first[2] > 0.4, "it was another worker's for as long as the lease"
        assert [each[2] > wanted_at for each in came if each[0] == "b:1"] == [True]

    asyncio.run(story())


@pytest.mark.parametrize(
    "wrong",
    ["redis://:pa/ss@host:6379", "redis+sentinel://host:26379", "redis+cluster://host:6379/1", "redis+sentinel://:1/x"],
)
def test_a_url_that_is_none_is_an_error_of_its_option_and_gives_no_password_away(wrong: str) -> None:
    async def story() -> None:
        async with Service(Config(redis_url=wrong), metrics.Row()):
            pass

    with pytest.raises(ConfigError) as refused:
        asyncio.run(story())
    assert refused.value.field == "redis_url"
    assert refused.value.hint
    assert "'pa'" not in f"{refused.value.message}{refused.value.hint}{refused.value.__cause__}"
