"""The worker on memory channels: real threads, no processes, no sockets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from conftest import wait_until
from headrace import metrics
from headrace.calibration import Calibration
from headrace.config import ModelConfig
from headrace.core import Beat, Cancel, Drain, Hello, ModelInfo, Outcome, Request
from headrace.errors import InvalidInput
from headrace.ipc import ChannelClosed, MemoryChannel, decode_value, encode_value
from headrace.isolation import DeviceLost
from headrace.runners import Loaded
from headrace.serving.worker import Worker
from headrace.testing import FakeClock, FakeRunner

CONFIG = ModelConfig(name="m", target="t:t", max_batch_size=4)


class Gate:
    """A runner that waits to be let through, so that tests say what is in a batch."""

    def __init__(self) -> None:
        self.inner = FakeRunner()
        self.open = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def load(self, device: str) -> None: ...

    def run(self, inputs: list[Any]) -> list[Any]:
        self.entered.release()
        assert self.open.acquire(timeout=10)
        return self.inner.run(inputs)


@contextlib.contextmanager
def working(runner: Any, row: metrics.Row | None = None, **parts: Any) -> Iterator[tuple[Worker, MemoryChannel]]:
    loaded = Loaded(runner, ModelInfo("m", "custom", "python", "cpu"), **parts)
    worker = Worker(loaded, CONFIG, row or metrics.Row(), Calibration(4))
    ours, theirs = MemoryChannel.pair()
    worker.attach(theirs)
    model = threading.Thread(target=worker.serve)
    model.start()
    assert isinstance(ours.recv(5)[0], Hello)
    try:
        yield worker, ours
    finally:
        worker.drain()
        with contextlib.suppress(ChannelClosed):
            ours.send(Drain())
        model.join(10)
        assert not model.is_alive()


def ask(channel: MemoryChannel, *values: Any, first: int = 1, deadline_s: float = 60.0) -> None:
    channel.send(*(Request(first + i, encode_value(value), 1, deadline_s) for i, value in enumerate(values)))


def answers(channel: MemoryChannel, count: int) -> dict[int, Any]:
    """Answers by id: a value, or the code of a fault. Fails on a second answer to one request."""
    found: dict[int, Any] = {}
    while len(found) < count:
        frames = channel.recv(10)
        assert frames, f"only {found}"
        for frame in frames:
            if isinstance(frame, Outcome):
                assert frame.id not in found
                found[frame.id] = frame.fault.code if frame.fault else decode_value(frame.body)
    return found


def waiting(worker: Worker) -> list[Any]:
    return [entry.item.input for entry in worker._room.waiting()]


def test_each_request_gets_its_own_answer() -> None:
    with working(FakeRunner(lambda x: x * 2)) as (_, channel):
        ask(channel, *range(50))
        assert answers(channel, 50) == {i + 1: i * 2 for i in range(50)}


def test_requests_that_wait_together_run_together() -> None:
    gate = Gate()
    with working(gate) as (worker, channel):
        ask(channel, "a")
        assert gate.entered.acquire(timeout=5)
        ask(channel, *"bcdef", first=2)
        wait_until(lambda: waiting(worker) == list("bcdef"))
        gate.open.release(3)
        assert answers(channel, 6) == dict(enumerate("abcdef", 1))
    assert gate.inner.batches == [["a"], list("bcde"), ["f"]]


def test_front_ends_learn_what_has_begun() -> None:
    gate = Gate()
    with working(gate) as (worker, channel):
        ask(channel, "a")
        frames = channel.recv(5)
        assert isinstance(frames[0], Beat)
        assert frames[0].began == [1]
        assert gate.entered.acquire(timeout=5)
        assert worker.beat().step == 1
        gate.open.release()
        assert answers(channel, 1) == {1: "a"}


def test_what_is_cancelled_while_it_waits_is_not_run() -> None:
    gate = Gate()
    with working(gate) as (_, channel):
        ask(channel, "first")
        assert gate.entered.acquire(timeout=5)
        ask(channel, "second", "third", first=2)
        channel.send(Cancel(2))
        ask(channel, "last", first=4)
        gate.open.release(3)
        assert answers(channel, 3) == {1: "first", 3: "third", 4: "last"}
    assert "second" not in sum(gate.inner.batches, [])


def test_what_is_late_is_answered_and_not_run() -> None:
    gate = Gate()
    with working(gate) as (_, channel):
        ask(channel, "first")
        assert gate.entered.acquire(timeout=5)
        ask(channel, "late", first=2, deadline_s=0.0)
        ask(channel, "good", first=3)
        gate.open.release(3)
        assert answers(channel, 3) == {1: "first", 2: "deadline_exceeded", 3: "good"}
    assert "late" not in sum(gate.inner.batches, [])


def test_a_bad_item_fails_alone() -> None:
    class Picky(FakeRunner):
        def run(self, inputs: list[Any]) -> list[Any]:
            super().run(inputs)
            if "bad" in inputs:
                raise ValueError("bad")
            return [KeyError(item) if item == "sour" else item for item in inputs]

    with working(Picky()) as (_, channel):
        ask(channel, "a", "bad", "sour", "d")
        assert answers(channel, 4) == {1: "a", 2: "runner_error", 3: "runner_error", 4: "d"}


def test_a_wrong_number_of_answers_is_an_error_of_the_model() -> None:
    class Short(FakeRunner):
        def run(self, inputs: list[Any]) -> list[Any]:
            return inputs[1:]

    with working(Short()) as (_, channel):
        ask(channel, "a", "b")
        assert answers(channel, 2) == {1: "runner_error", 2: "runner_error"}


def test_an_answer_that_cannot_be_sent_fails_alone() -> None:
    with working(FakeRunner(lambda x: object() if x == "odd" else x)) as (_, channel):
        ask(channel, "odd", "even")
        assert answers(channel, 2) == {1: "runner_error", 2: "even"}


def test_prepare_cost_and_finish_are_used_and_a_refusal_names_its_field() -> None:
    def prepare(item: Any) -> Any:
        if item == "no":
            raise InvalidInput("not this", field="input.x")
        return [item]

    with working(FakeRunner(), prepare=prepare, cost=lambda item: 3, finish=lambda out: {"out": out}) as (_, channel):
        ask(channel, "a", "no")
        assert answers(channel, 2) == {1: {"out": ["a"]}, 2: "invalid_input"}


def test_everything_accepted_is_answered_before_a_drain_ends() -> None:
    gate = Gate()
    with working(gate) as (worker, channel):
        ask(channel, *range(10))
        assert gate.entered.acquire(timeout=5)
        worker.drain()
        gate.open.release(20)
        assert len(answers(channel, 10)) == 10


def test_the_requests_of_a_front_end_that_died_are_not_run() -> None:
    gate = Gate()
    with working(gate) as (worker, channel):
        other, theirs = MemoryChannel.pair()
        worker.attach(theirs)
        ask(channel, "first")
        assert gate.entered.acquire(timeout=5)
        ask(other, "orphan", first=1)
        wait_until(lambda: waiting(worker) == ["orphan"])
        other.close()
        wait_until(lambda: waiting(worker) == [])
        ask(channel, "next", first=2)
        gate.open.release(3)
        assert answers(channel, 2) == {1: "first", 2: "next"}
    assert "orphan" not in sum(gate.inner.batches, [])


def test_batches_are_counted() -> None:
    row = metrics.Row()
    with working(FakeRunner(), row=row, cost=lambda item: item) as (_, channel):
        channel.send(*(Request(i, encode_value(cost), 0, 60.0) for i, cost in enumerate([10, 10, 4])))
        answers(channel, 3)
    values = metrics.Reader(rows=[row]).values()
    assert values["headrace_items_total", ("m",)] == [3]
    assert values["headrace_tokens_total", ("m", "real")] == [24]
    assert sum(values["headrace_queue_wait_seconds", ("m",)][:-1]) == 3


def test_frames_are_small() -> None:
    assert len(msgspec.msgpack.encode(Beat(1, began=[1, 2, 3]))) < 32


def test_a_batch_that_does_not_fit_is_halved_and_so_are_those_that_follow() -> None:
    class Small(FakeRunner):
        def run(self, inputs: list[Any]) -> list[Any]:
            super().run(inputs)
            if len(inputs) > 2:
                raise MemoryError
            return inputs

    runner, row = Small(), metrics.Row()
    gate = threading.Event()
    with working(runner, row=row, cost=lambda item: gate.wait(5) and 1) as (worker, channel):
        ask(channel, *range(12))
        gate.set()
        assert answers(channel, 12) == {i + 1: i for i in range(12)}
        assert worker._ceiling.tokens == 2
    sizes = [len(batch) for batch in runner.batches]
    assert sizes.count(4) == 1, "the ceiling spares the next batches the failed attempt"
    assert metrics.Reader(rows=[row]).values()["headrace_out_of_memory_total", ("m",)] == [1]


def test_one_item_that_does_not_fit_is_no_failure_of_the_model_and_lowers_nothing() -> None:
    class Small(FakeRunner):
        def run(self, inputs: list[Any]) -> list[Any]:
            if "huge" in inputs:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            return inputs

    with working(Small()) as (worker, channel):
        ask(channel, "huge")
        assert answers(channel, 1) == {1: "out_of_memory"}
        assert worker._ceiling.tokens == CONFIG.max_batch_tokens


def test_a_lost_device_ends_the_worker_without_answers() -> None:
    class AcceleratorError(RuntimeError):
        pass

    class Broken(FakeRunner):
        def run(self, inputs: list[Any]) -> list[Any]:
            raise AcceleratorError("CUDA error: device-side assert triggered")

    worker = Worker(Loaded(Broken(), ModelInfo("m", "custom", "python", "cpu")), CONFIG, metrics.Row(), Calibration(4))
    ours, theirs = MemoryChannel.pair()
    worker.attach(theirs)
    ask(ours, "a", "b")
    with pytest.raises(DeviceLost, match="device-side assert"):
        worker.serve()
    assert not [frame for frame in ours.recv(1) if isinstance(frame, Outcome)]


def test_a_model_that_exits_fails_its_item_only() -> None:
    def exits(item: Any) -> Any:
        raise SystemExit(1)

    with working(FakeRunner(exits)) as (_, channel):
        ask(channel, "a")
        assert answers(channel, 1) == {1: "runner_error"}


def test_what_killed_a_worker_before_runs_alone() -> None:
    gate = Gate()
    with working(gate) as (_, channel):
        ask(channel, "first")
        assert gate.entered.acquire(timeout=5)
        channel.send(*(Request(n, encode_value(n), 1, 60.0, alone=n in (3, 4)) for n in range(2, 6)))
        gate.open.release(9)
        answers(channel, 5)
    assert [3] in gate.inner.batches
    assert [4] in gate.inner.batches


def stream_of(channel: MemoryChannel, ident: int) -> list[Any]:
    """Chunks of one request, up to its last outcome; a fault ends it as its code."""
    chunks: list[Any] = []
    while True:
        frames = channel.recv(10)
        assert frames, chunks
        for frame in frames:
            if isinstance(frame, Outcome) and frame.id == ident:
                if frame.fault:
                    return [*chunks, frame.fault.code]
                if frame.last:
                    return chunks
                chunks.append(decode_value(frame.body))


def words(inputs: list[str]) -> Iterator[list[Any]]:
    split = [text.split() for text in inputs]
    for step in range(max(map(len, split))):
        yield [each[step] if step < len(each) else None for each in split]


def ask_for_stream(channel: MemoryChannel, *texts: str) -> None:
    channel.send(*(Request(i, encode_value(text), 1, 60.0, stream=True) for i, text in enumerate(texts, 1)))


def test_a_stream_gives_each_its_own_chunks() -> None:
    with working(FakeRunner(), stream=words) as (_, channel):
        ask_for_stream(channel, "one two three")
        assert stream_of(channel, 1) == ["one", "two", "three"]


def test_a_stream_that_fails_says_so_after_what_it_gave() -> None:
    def breaks(inputs: list[str]) -> Iterator[list[Any]]:
        yield ["first"]
        raise ValueError("no more")

    with working(FakeRunner(), stream=breaks) as (_, channel):
        ask_for_stream(channel, "x")
        assert stream_of(channel, 1) == ["first", "runner_error"]


def test_a_stream_that_nobody_reads_is_ended() -> None:
    closed = threading.Event()

    def endless(inputs: list[str]) -> Iterator[list[Any]]:
        try:
            while not closed.wait(0.005):
                yield ["more"]
        finally:
            closed.set()

    with working(FakeRunner(), stream=endless) as (_, channel):
        ask_for_stream(channel, "x")
        wait_until(lambda: any(isinstance(frame, Outcome) for frame in channel.recv(1)))
        channel.send(Cancel(1))
        assert closed.wait(5)


def test_front_ends_learn_how_much_there_is_to_do() -> None:
    gate = Gate()
    with working(gate) as (worker, channel):
        ask(channel, "first")
        assert gate.entered.acquire(timeout=5)
        gate.open.release()
        answers(channel, 1)
        ask(channel, "second", first=2)
        assert gate.entered.acquire(timeout=5)
        ask(channel, *range(6), first=3)
        wait_until(lambda: len(worker._room) == 6)
        gate.open.release(9)
        answers(channel, 7)
        speed = worker._speed
        assert speed.item_s > 0
        assert speed.time_for(8) == 8 * speed.time_for(1)


def test_a_draining_worker_waits_for_what_is_on_its_way() -> None:
    worker = Worker(Loaded(FakeRunner(), ModelInfo("m", "custom", "python", "cpu")), CONFIG, metrics.Row())
    ours, theirs = MemoryChannel.pair()
    worker.attach(theirs)
    model = threading.Thread(target=worker.serve)
    model.start()
    worker.drain()
    ask(ours, "sent before the front end knew")
    ours.send(Drain())
    model.join(5)
    frames = ours.recv(1)
    assert not model.is_alive()
    assert [type(frame) for frame in frames][:2] == [Hello, Drain]
    assert [decode_value(frame.body) for frame in frames if isinstance(frame, Outcome)] == [
        "sent before the front end knew"
    ]


def test_a_front_end_that_does_not_answer_does_not_hold_up_the_end() -> None:
    clock = FakeClock()
    loaded = Loaded(FakeRunner(), ModelInfo("m", "custom", "python", "cpu"))
    worker = Worker(loaded, CONFIG, metrics.Row(), clock=clock)
    _, theirs = MemoryChannel.pair()
    worker.attach(theirs)
    model = threading.Thread(target=worker.serve)
    model.start()
    worker.drain()
    clock.advance(60)
    model.join(5)
    assert not model.is_alive()
