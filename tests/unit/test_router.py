"""The router against real workers' sockets, on one event loop; the workers are threads of the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from headrace import metrics
from headrace.config import Config, ModelConfig
from headrace.core import Beat, Cancel, Drain, Hello, ModelInfo, Outcome, Request, TextSpec, Timings, Workload
from headrace.errors import DeadlineExceeded, InvalidInput, ModelNotFound, NotReady, Overloaded, WorkerLost
from headrace.ipc import ChannelClosed, SocketChannel, decode_value, encode_value
from headrace.rundir import RunDir
from headrace.serving.link import Pending
from headrace.serving.router import Route, Router

INFO = ModelInfo("m", "custom", "python", "cpu")


class ScriptedWorker:
    """Accepts one front end and does only what the test tells it."""

    def __init__(self, path: Path, info: ModelInfo = INFO) -> None:
        self.info = info
        self.received: list[Any] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._path = path
        self._channel: SocketChannel | None = None
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(ChannelClosed, OSError):
            connection, _ = self._listener.accept()
            self._channel = SocketChannel(connection)
            self._channel.send(Hello(self.info))
            while True:
                self.received += self._channel.recv(None)

    @property
    def channel(self) -> SocketChannel:
        assert self._channel
        return self._channel

    def requests(self) -> list[Request]:
        return [frame for frame in self.received if isinstance(frame, Request)]

    def begin(self, *requests: Request) -> None:
        self.channel.send(Beat(1, began=[request.id for request in requests]))

    def answer(self, *requests: Request) -> None:
        self.channel.send(*(Outcome(request.id, request.body) for request in requests))

    def die(self) -> None:
        if self._channel:
            self._channel.close()
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


Start = Callable[..., ScriptedWorker]


@contextlib.asynccontextmanager
async def routing(**options: Any) -> AsyncIterator[tuple[Route, Start]]:
    model = ModelConfig(name="m", target="t:t", **options)
    config = Config(models={"m": model}, http_workers=1)
    run_dir = RunDir.create(config)
    router = Router(config, run_dir, metrics.Row())
    task = asyncio.ensure_future(router.run())
    workers: list[ScriptedWorker] = []

    def start(index: int, info: ModelInfo = INFO) -> ScriptedWorker:
        workers.append(ScriptedWorker(run_dir.socket(index), info))
        return workers[-1]

    try:
        yield router.route("m"), start
    finally:
        task.cancel()
        await asyncio.wait({task})
        for worker in workers:
            worker.die()
        run_dir.remove()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 25))


def send(route: Route, value: Any = "x", timeout_s: float = 20.0, cost: int = 1) -> Pending:
    places = route.admit(1, timeout_s, "trace")
    return places.submit(encode_value(value), cost, route.info or INFO)


async def value_of(route: Route, pending: Pending) -> Any:
    try:
        return decode_value((await pending.future).body)
    finally:
        route.settle(pending)


def test_before_any_worker_was_there_it_is_not_ready() -> None:
    async def main() -> None:
        async with routing() as (route, _):
            with pytest.raises(NotReady):
                send(route)

    run(main())


def test_the_least_busy_worker_gets_the_next() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            workers = [start(index) for index in range(2)]
            await until(lambda: len(route._links) == 2)
            long = send(route, "long", cost=100)
            short = [send(route, n, cost=10) for n in range(5)]
            await until(lambda: sum(len(worker.requests()) for worker in workers) == 6)
            assert sorted(len(worker.requests()) for worker in workers) == [1, 5]
            for worker in workers:
                worker.answer(*worker.requests())
            assert [await value_of(route, each) for each in (long, *short)] == ["long", 0, 1, 2, 3, 4]

    run(main())


def test_what_had_not_begun_moves_and_what_had_begun_is_tried_once_more() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            first = start(0)
            await until(lambda: route.ready)
            begun, waiting = send(route, "begun"), send(route, "waiting")
            await until(lambda: len(first.requests()) == 2)
            first.begin(first.requests()[0])
            await until(lambda: begun.began)
            second = start(1)
            await until(lambda: len(route._links) == 2)
            first.die()
            await until(lambda: len(second.requests()) == 2)
            second.answer(*second.requests())
            assert await value_of(route, begun) == "begun"
            assert await value_of(route, waiting) == "waiting"

    run(main())


def test_without_another_worker_the_begun_fails_at_once_and_the_rest_waits_for_the_replacement() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            begun, waiting = send(route, "begun"), send(route, "waiting")
            await until(lambda: len(worker.requests()) == 2)
            worker.begin(worker.requests()[0])
            await until(lambda: begun.began)
            worker.die()
            with pytest.raises(WorkerLost):
                await value_of(route, begun)
            late = send(route, "late")
            replacement = start(0)
            await until(lambda: len(replacement.requests()) == 2)
            replacement.answer(*replacement.requests())
            assert [await value_of(route, each) for each in (waiting, late)] == ["waiting", "late"]

    run(main())


def test_a_request_that_lost_two_workers_is_not_given_a_third() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            workers = [start(index) for index in range(3)]
            await until(lambda: len(route._links) == 3)
            poison = send(route)
            for tried in (False, True):
                await until(lambda: any(worker.requests() for worker in workers))
                (holder,) = [worker for worker in workers if worker.requests()]
                workers.remove(holder)
                assert poison.retried is tried
                holder.begin(*holder.requests())
                await until(lambda: poison.began)
                holder.die()
                await until(lambda: not poison.began or poison.future.done())
            with pytest.raises(WorkerLost):
                await value_of(route, poison)

    run(main())


def test_a_model_that_is_not_idempotent_is_not_asked_twice() -> None:
    async def main() -> None:
        async with routing(idempotent=False) as (route, start):
            workers = [start(index) for index in range(2)]
            await until(lambda: len(route._links) == 2)
            pending = send(route)
            await until(lambda: workers[0].requests() or workers[1].requests())
            (holder,) = [worker for worker in workers if worker.requests()]
            holder.begin(*holder.requests())
            await until(lambda: pending.began)
            holder.die()
            with pytest.raises(WorkerLost):
                await value_of(route, pending)

    run(main())


def test_a_deadline_is_kept_and_the_worker_is_told() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            with pytest.raises(DeadlineExceeded):
                await value_of(route, send(route, timeout_s=0.05))
            await until(lambda: any(isinstance(frame, Cancel) for frame in worker.received))
            assert worker.requests()[0].deadline_s <= 0.05

    run(main())


def test_only_what_waits_counts_against_the_bound() -> None:
    async def main() -> None:
        async with routing(max_queue=2) as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            pending = [send(route, 1), send(route, 2)]
            with pytest.raises(Overloaded) as refused:
                send(route, 3)
            assert refused.value.retry_after_s
            await until(lambda: len(worker.requests()) == 2)
            worker.begin(*worker.requests())
            await until(lambda: all(each.began for each in pending))
            pending += [send(route, 3), send(route, 4)]
            with pytest.raises(Overloaded):
                route.admit(1, 20.0, "")
            await until(lambda: len(worker.requests()) == 4)
            worker.answer(*worker.requests())
            assert [await value_of(route, each) for each in pending] == [1, 2, 3, 4]
            route.admit(2, 20.0, "")

    run(main())


def test_rubbish_from_a_worker_ends_the_connection_only() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            pending = send(route)
            worker.channel._socket.send(b"\xff" * 64)
            await until(lambda: not route.ready)
            worker.die()
            replacement = start(0)
            await until(lambda: len(replacement.requests()) == 1)
            replacement.answer(*replacement.requests())
            assert await value_of(route, pending) == "x"

    run(main())


def test_unknown_models_are_named() -> None:
    with tempfile.TemporaryDirectory() as directory:
        config = Config(models={"m": ModelConfig(name="m", target="t:t")})
        with pytest.raises(ModelNotFound, match="nope"):
            Router(config, RunDir(Path(directory)), metrics.Row()).route("nope")


def other_version() -> ModelInfo:
    return ModelInfo("m", "embed", "transformers", "cpu", text=TextSpec("other/tokenizer.json", 8, 100))


def test_a_list_longer_than_the_room_is_refused_for_good() -> None:
    async def main() -> None:
        async with routing(max_queue=2) as (route, start):
            start(0)
            await until(lambda: route.ready)
            with pytest.raises(InvalidInput, match="at most 2"):
                route.admit(3, 20.0, "")

    run(main())


def test_places_are_given_back_whatever_happened() -> None:
    async def main() -> None:
        async with routing(max_queue=2) as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            for _ in range(3):
                with route.admit(2, 20.0, "") as places:
                    places.submit(b"", 1, INFO)
            await until(lambda: len([each for each in worker.received if isinstance(each, Cancel)]) == 3)

    run(main())


def test_what_would_come_too_late_is_refused_at_the_door() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            worker.channel.send(Beat(1, work=Workload(backlog_s=30.0, batch_s=4.0, item_s=0.5)))
            await until(lambda: route._links[0].backlog_s() > 0)
            with pytest.raises(Overloaded, match="longer than this one's deadline") as refused:
                route.admit(1, 20.0, "")
            assert 9 < (refused.value.retry_after_s or 0) <= 10
            route.admit(1, 40.0, "")

    run(main())


def test_the_prediction_counts_what_was_sent_since_and_fades_with_time() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            worker.channel.send(Beat(1, work=Workload(backlog_s=0.2, batch_s=0.1, item_s=1.0)))
            link = route._links[0]
            await until(lambda: link.item_s == 1.0)
            await until(lambda: link.backlog_s() == 0.0)
            pending = [send(route), send(route)]
            assert link.backlog_s() == 2.0
            await until(lambda: len(worker.requests()) == 2)
            worker.answer(*worker.requests())
            assert [await value_of(route, each) for each in pending] == ["x", "x"]

    run(main())


def test_retry_after_says_when_a_place_is_likely_to_be_free() -> None:
    async def main() -> None:
        async with routing(max_queue=4) as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            for _ in range(4):
                send(route)
            worker.channel.send(Beat(1, work=Workload(backlog_s=60.0, batch_s=12.0, item_s=3.0)))
            await until(lambda: route._links[0].item_s)
            with pytest.raises(Overloaded) as refused:
                route.admit(1, 100.0, "")
            assert 11 < (refused.value.retry_after_s or 0) <= 12, "no place is free before the batch ends"

    run(main())


def test_a_draining_worker_gets_nothing_new_and_is_told_so() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            old, new = start(0), start(1)
            await until(lambda: len(route._links) == 2)
            old.channel.send(Drain())
            await until(lambda: any(isinstance(frame, Drain) for frame in old.received))
            pending = [send(route, n) for n in range(4)]
            await until(lambda: len(new.requests()) == 4)
            assert not old.requests()
            new.answer(*new.requests())
            assert [await value_of(route, each) for each in pending] == [0, 1, 2, 3]

    run(main())


def test_what_was_prepared_for_one_version_goes_to_no_other() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            old, new = start(0), start(1, other_version())
            await until(lambda: len(route._links) == 2)
            for_old = route.admit(1, 20.0, "").submit(encode_value("old"), 1, old.info)
            for_new = route.admit(1, 20.0, "").submit(encode_value("new"), 1, new.info)
            await until(lambda: old.requests() and new.requests())
            old.die()
            with pytest.raises(WorkerLost):
                await value_of(route, for_old)
            new.answer(*new.requests())
            assert await value_of(route, for_new) == "new"

    run(main())


def test_a_retried_request_runs_alone() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            workers = [start(0), start(1)]
            await until(lambda: len(route._links) == 2)
            pending = send(route)
            await until(lambda: any(worker.requests() for worker in workers))
            holder, other = sorted(workers, key=lambda worker: not worker.requests())
            assert not holder.requests()[0].alone
            holder.begin(*holder.requests())
            await until(lambda: pending.began)
            holder.die()
            await until(other.requests)
            assert other.requests()[0].alone
            other.answer(*other.requests())
            assert await value_of(route, pending) == "x"

    run(main())


def test_a_stream_comes_in_order_and_is_not_repeated_elsewhere() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            workers = [start(0), start(1)]
            await until(lambda: len(route._links) == 2)
            pending = route.admit(1, 20.0, "").submit(encode_value("x"), 1, INFO, stream=True)
            await until(lambda: any(worker.requests() for worker in workers))
            holder, other = sorted(workers, key=lambda worker: not worker.requests())
            (request,) = holder.requests()
            assert request.stream
            for word in ("a", "b"):
                holder.channel.send(Outcome(request.id, encode_value(word), last=False))
            assert [decode_value((await pending.next_chunk()).body) for _ in range(2)] == ["a", "b"]
            holder.die()
            with pytest.raises(WorkerLost):
                await pending.next_chunk()
            assert not other.requests()
            route.settle(pending)

    run(main())


def test_a_stream_ends_with_its_last_outcome() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            pending = route.admit(1, 20.0, "").submit(encode_value("x"), 1, INFO, stream=True)
            await until(worker.requests)
            worker.channel.send(Outcome(worker.requests()[0].id, timings=Timings(1.0, 2.0, 3)))
            assert (await pending.next_chunk()).last
            route.settle(pending)

    run(main())


def test_an_open_circuit_answers_at_once_also_those_who_wait() -> None:
    async def main() -> None:
        async with routing() as (route, start):
            worker = start(0)
            await until(lambda: route.ready)
            worker.die()
            await until(lambda: not route.ready)
            waiting = send(route)
            route.tick(circuit_open=True)
            with pytest.raises(NotReady, match="again and again"):
                await value_of(route, waiting)
            with pytest.raises(NotReady, match="again and again"):
                send(route)
            assert route.state == "circuit_open"

    run(main())


def test_a_front_end_that_cannot_look_around_looks_again(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with routing() as (route, start):
            router_error = OSError(24, "Too many open files")
            real = RunDir.sockets
            try:
                RunDir.sockets = lambda self: (_ for _ in ()).throw(router_error)  # type: ignore[assignment,method-assign]
                start(0)
                await asyncio.sleep(0.4)
                assert not route.ready
            finally:
                RunDir.sockets = real  # type: ignore[method-assign]
            await until(lambda: route.ready)
            assert caplog.text.count("cannot look for workers") == 1

    run(main())
