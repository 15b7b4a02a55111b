"""Whatever workers do, in whatever order: no request is lost, answered twice, or left waiting without a place."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace import metrics
from headrace.config import ModelConfig
from headrace.core import Beat, Drain, Hello, ModelInfo, Outcome, Request
from headrace.errors import HeadraceError, NotReady, Overloaded
from headrace.ipc import FrameDecoder, encode_frames, encode_value
from headrace.serving.link import Link, Pending
from headrace.serving.router import Admission, Route

INFO = ModelInfo("m", "custom", "python", "cpu")
ROOM = 6


class ScriptedWorker:
    """A worker at the other end of a link that exists only in memory."""

    def __init__(self, router: Any) -> None:
        self.decoder = FrameDecoder()
        self.waiting: dict[int, Request] = {}
        self.begun: dict[int, Request] = {}
        self.told = False
        self.link = Link(router)
        self.link.connection_made(self)  # type: ignore[arg-type]  # of a transport it uses write and abort
        self.say(Hello(INFO))

    def write(self, data: bytes) -> None:
        for frame in self.decoder.feed(data):
            if isinstance(frame, Request):
                assert not self.told, "a worker that has been told goodbye gets nothing new"
                self.waiting[frame.id] = frame
            elif isinstance(frame, Drain):
                self.told = True
            else:
                self.waiting.pop(frame.id, None)  # type: ignore[union-attr]

    def abort(self) -> None:
        self.link.connection_lost(None)

    def say(self, *frames: Any) -> None:
        self.link.data_received(bytes(encode_frames(frames)))


class World:
    """The route, its workers, and what became of each request."""

    def __init__(self, idempotent: bool) -> None:
        config = ModelConfig(name="m", target="t:t", idempotent=idempotent)
        self.route = Route(config, ROOM, metrics.Row(), lambda info: None)
        self.routes = {"m": self.route}
        self.workers: list[ScriptedWorker] = []
        self.open: dict[int, tuple[Admission, Pending]] = {}
        self.runs: Counter[int] = Counter()
        self.number = 0

    async def step(self, action: str, choice: int) -> None:
        getattr(self, action)(choice)
        await asyncio.sleep(0)  # frames of a turn leave at its end
        self.check()

    def join(self, choice: int) -> None:
        if len(self.workers) < 3:
            self.workers.append(ScriptedWorker(self))

    def die(self, choice: int) -> None:
        if self.workers:
            self.workers.pop(choice % len(self.workers)).link.connection_lost(None)

    def drain(self, choice: int) -> None:
        if self.workers:
            worker = self.workers[choice % len(self.workers)]
            worker.say(Drain())

    def submit(self, choice: int) -> None:
        count = 1 + choice % 3
        before = self.route._waiting
        try:
            places = self.route.admit(count, 60.0, "")
        except Overloaded:
            assert before + count > ROOM
            return
        except NotReady:
            assert self.route.info is None
            return
        for _ in range(count):
            self.number += 1
            self.open[self.number] = (places, places.submit(encode_value(self.number), 1, INFO))

    def begin(self, choice: int) -> None:
        for worker in self.workers:
            ids = list(worker.waiting)[: 1 + choice % 3]
            for ident in ids:
                worker.begun[ident] = worker.waiting.pop(ident)
                self.runs[ident] += 1
            worker.say(Beat(1, began=ids))

    def answer(self, choice: int) -> None:
        for worker in self.workers[choice % 2 :]:
            frames = [Outcome(ident, request.body) for ident, request in worker.begun.items()]
            worker.begun.clear()
            worker.say(*frames)

    def leave(self, choice: int) -> None:
        """A client goes, with all that it asked for."""
        if self.open:
            places, _ = self.open[list(self.open)[choice % len(self.open)]]
            self.settle(places)

    def expire(self, choice: int) -> None:
        if self.open:
            self.open[list(self.open)[choice % len(self.open)]][1].expire()

    def settle(self, places: Admission) -> None:
        places.__exit__(None, None, None)
        self.open = {number: entry for number, entry in self.open.items() if entry[0] is not places}

    def check(self) -> None:
        held = Counter(ident for worker in self.workers for ident in worker.link.pending)
        parked = set(self.route._parked)
        for _, pending in self.open.values():
            places = held[pending.id] + (pending.id in parked)
            assert places == 1 if not pending.future.done() else places <= 1, (
                "in exactly one place until it is answered"
            )
        assert self.route._waiting == sum(not pending.began for _, pending in self.open.values())
        assert self.route._waiting <= ROOM + sum(pending.retried for _, pending in self.open.values())
        limit = 2 if self.route.config.idempotent else 1
        assert all(times <= limit for times in self.runs.values()), "never begun more often than it may be"

    async def finish(self) -> None:
        """A healthy worker comes: everything gets its one answer, its own."""
        self.workers.append(ScriptedWorker(self))
        for _ in range(ROOM * 4):
            await self.step("begin", 2)
            await self.step("answer", 0)
        for number, (_, pending) in list(self.open.items()):
            assert pending.future.done(), "nobody waits for ever"
            error = pending.future.exception()
            if error is None:
                assert pending.future.result().body == encode_value(number), "its own answer"
            else:
                assert isinstance(error, HeadraceError)
                assert error.retryable
        for places in {id(entry[0]): entry[0] for entry in self.open.values()}.values():
            self.settle(places)
        assert self.route._waiting == self.route._open == 0


ACTIONS = ["join", "die", "drain", "submit", "submit", "begin", "begin", "answer", "answer", "leave", "expire"]


@given(st.booleans(), st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5)), max_size=40))
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_doubled_or_forgotten(idempotent: bool, steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        world = World(idempotent)
        await world.step("join", 0)
        for action, choice in steps:
            await world.step(action, choice)
        await world.finish()

    asyncio.run(main())
