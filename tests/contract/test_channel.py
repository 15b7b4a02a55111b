"""One suite for every `Channel`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from headrace.core import Beat, Cancel, Channel, Hello, ModelInfo, Outcome, Request, Timings, Workload
from headrace.errors import Fault
from headrace.ipc import ChannelClosed, MemoryChannel, SocketChannel, encode_value

Pair = tuple[Channel, Channel]


def sockets() -> Pair:
    left, right = socket.socketpair()
    return SocketChannel(left), SocketChannel(right)


@pytest.fixture(params=[MemoryChannel.pair, sockets], ids=["memory", "socket"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    make: Callable[[], Pair] = request.param
    left, right = make()
    yield left, right
    left.close()
    right.close()


def test_frames_arrive_whole_and_in_order(pair: Pair) -> None:
    left, right = pair
    frames = [
        Hello(ModelInfo("m", "embed", "python", "cpu")),
        Request(1, encode_value({"a": [1, 2.5, None]}), 7, 60.0, "trace"),
        Beat(3, 0.5, [1], Workload(1.0, 0.5, 0.1)),
        Outcome(1, b"x" * 300_000, None, Timings(1, 2, 3)),
        Outcome(2, fault=Fault("invalid_input", "no", "input")),
        Cancel(2),
    ]
    received: list[object] = []
    reader = threading.Thread(
        target=lambda: [received.extend(right.recv(5)) for _ in iter(lambda: len(received) < 6, False)]
    )
    reader.start()
    left.send(*frames[:2])
    left.send(*frames[2:])
    reader.join(10)
    assert received == frames


def test_nothing_comes_back_after_a_time_out(pair: Pair) -> None:
    assert pair[0].recv(0.01) == []


def test_the_end_of_one_side_is_seen_by_the_other(pair: Pair) -> None:
    left, right = pair
    right.send(Cancel(1))
    right.close()
    assert left.recv(5) == [Cancel(1)]
    with pytest.raises(ChannelClosed):
        left.recv(5)
    with pytest.raises(ChannelClosed):
        right.send(Cancel(2))


def test_a_reader_that_waits_is_woken_by_the_close(pair: Pair) -> None:
    left, _ = pair
    seen: list[str] = []

    def read() -> None:
        try:
            left.recv(None)
        except ChannelClosed:
            seen.append("closed")

    reader = threading.Thread(target=read)
    reader.start()
    left.close()
    reader.join(5)
    assert seen == ["closed"]


def test_many_threads_send_whole_frames(pair: Pair) -> None:
    left, right = pair
    senders = [
        threading.Thread(target=lambda n=n: [left.send(Request(n * 1000 + i, b"y" * 2000, 1, 1.0)) for i in range(200)])
        for n in range(4)
    ]
    for sender in senders:
        sender.start()
    received: list[int] = []
    while len(received) < 800:
        frames = right.recv(5)
        assert frames, f"only {len(received)} of 800 came"
        received += [frame.id for frame in frames if isinstance(frame, Request)]
    for sender in senders:
        sender.join()
    for n in range(4):
        assert [i for i in received if i // 1000 == n] == [n * 1000 + i for i in range(200)]
