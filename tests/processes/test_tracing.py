"""Counted calls: exact, by thread, without what counting costs; repeated arguments, longest calls, awaits as calls."""

from __future__ import annotations

import asyncio
import cProfile
import io
import pstats
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from conftest import wait_until
from headrace.clock import perf_counter
from headrace.errors import ConfigError, SetupError
from headrace.profiling.block import profiling
from headrace.profiling.cpu import costs
from headrace.profiling.cpu.arguments import Arguments, on_main_thread
from headrace.profiling.cpu.awaited import with_awaits
from headrace.profiling.cpu.costs import Costs
from headrace.profiling.cpu.places import Places
from headrace.profiling.cpu.recording import Recording
from headrace.profiling.cpu.tracing import Edge, Graph, Node, Tracer
from headrace.profiling.record import Call, Frame, Machine, Record, Stack


def leaf(value: int) -> int:
    return value + 1


def calling(times: int) -> None:
    for number in range(times):
        leaf(number)


def fib(number: int) -> int:
    return number if number < 2 else fib(number - 1) + fib(number - 2)


def spin(seconds: float) -> None:
    until = perf_counter() + seconds
    while perf_counter() < until:
        sum(range(50))


def traced(run: Callable[[], Any]) -> dict[str, Node]:
    """By the last part of the name."""
    tracer, places = Tracer(), Places()
    tracer.start()
    try:
        run()
    finally:
        tracer.stop()
    graph = tracer.graph(places)
    return {places.frames[number].function.rpartition(".")[2]: node for number, node in graph.items()} | {
        "callers of leaf": Node(callers={}),
        **{
            f"{places.frames[caller].function} → {places.frames[number].function}": Node(edge)
            for number, node in graph.items()
            for caller, edge in node.callers.items()
        },
    }


def recorded(run: Callable[[], Any]) -> Record:
    recording = Recording(budget=0.5)
    recording.start()
    try:
        run()
    finally:
        recording.stop_tracing()
        recording.stop()
    return recording.record("test")


def call_of(record: Record, name: str) -> Call:
    (found,) = [call for call in record.calls if record.frames[call.frame].function.rpartition(".")[2] == name]
    return found


def test_every_call_is_counted_with_its_caller() -> None:
    def run() -> None:
        calling(70)
        leaf(0)
        fib(10)

    found = traced(run)
    assert found["leaf"].all[:2] == (71, 71)
    assert found["calling → leaf"].all[:2] == (70, 70)
    assert found["fib"].all[:2] == (177, 1)
    assert found["calling"].all.cumulative_s >= found["leaf"].all.own_s
    assert not [name for name in found if "disable" in name or name == "stop"]


def test_threads_that_start_meanwhile_are_counted_each_for_itself() -> None:
    def run() -> None:
        threads = [threading.Thread(target=calling, args=(1000,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        calling(1000)
        for thread in threads:
            thread.join()

    found = traced(run)
    assert found["calling"].all.calls == 4
    assert found["leaf"].all.calls == 4000
    # By turns, each of them has the time of all.
    assert found["calling → leaf"].all.calls == 4000


def test_skipped_threads_are_not_counted() -> None:
    skipped: set[int] = set()
    tracer, places, ready = Tracer(skipped), Places(), threading.Event()

    def work() -> None:
        skipped.add(threading.get_ident())
        ready.wait()
        calling(10)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: skipped)
    tracer.start()
    ready.set()
    thread.join()
    tracer.stop()
    tracer.graph(places)
    assert "leaf" not in [frame.function for frame in places.frames]


def test_another_profiler_is_left_alone() -> None:
    def other(_frame: FrameType, _event: str, _arg: object) -> None:
        return None

    sys.setprofile(other)
    try:
        with pytest.raises(SetupError, match="another profiler"):
            Tracer().start()
        with pytest.raises(SetupError, match="another profiler"):
            Recording().start()
        assert sys.getprofile() is other
    finally:
        sys.setprofile(None)


@pytest.mark.skipif(hasattr(sys, "monitoring"), reason="from Python 3.12 on the program is refused a second profiler")
def test_a_profiler_of_the_programs_own_is_noted() -> None:
    def run() -> None:
        own = cProfile.Profile()
        own.enable()
        calling(10)
        own.disable()

    assert any("a profiler of its own" in note for note in recorded(run).notes)
    assert not any("a profiler of its own" in note for note in recorded(lambda: calling(10)).notes)


# What counting costs.


def graph_of_two() -> tuple[Graph, list[Frame]]:
    """A function that calls another one a thousand times, and one of C twice as often."""
    frames = [Frame("outer", "a.py", 1), Frame("inner", "a.py", 5), Frame("abs", "~", 0, "builtin")]
    graph = {
        0: Node(Edge(1, 1, 1.0, 4.0)),
        1: Node(Edge(1000, 1000, 2.0, 2.0), {0: Edge(1000, 1000, 2.0, 2.0)}),
        2: Node(Edge(2000, 2000, 1.0, 1.0), {0: Edge(2000, 2000, 1.0, 1.0)}),
    }
    return graph, frames


def test_the_cost_of_a_call_is_taken_off_where_it_fell() -> None:
    graph, frames = graph_of_two()
    left, taken = costs.take_off(graph, frames, Costs(inside=1e-3, outside=2e-4, c_inside=1e-4, c_outside=1e-4))
    assert left[1].all.own_s == pytest.approx(2.0 - 1.0)
    assert left[2].all.own_s == pytest.approx(1.0 - 0.2)
    assert left[0].all.own_s == pytest.approx(1.0 - 0.2 - 0.2 - 0.001)
    assert left[0].all.cumulative_s == pytest.approx(0.599 + 1.0 + 0.8, rel=1e-3)
    assert left[1].callers[0] == pytest.approx(Edge(1000, 1000, 1.0, 1.0))
    assert taken == pytest.approx(4.0 - 2.399)


def test_no_more_is_taken_off_than_there_is() -> None:
    graph, frames = graph_of_two()
    left, taken = costs.take_off(graph, frames, Costs(inside=1.0, outside=1.0, c_inside=1.0, c_outside=1.0))
    assert all(node.all.own_s == node.all.cumulative_s == 0.0 for node in left.values())
    assert taken == pytest.approx(4.0)


def test_functions_that_call_each_other_in_circles_keep_sensible_times() -> None:
    frames = [Frame("even", "a.py", 1), Frame("odd", "a.py", 5)]
    graph = {
        0: Node(Edge(50, 1, 0.6, 1.0), {1: Edge(49, 1, 0.5, 0.9)}),
        1: Node(Edge(50, 1, 0.4, 0.9), {0: Edge(50, 1, 0.4, 0.9)}),
    }
    left, taken = costs.take_off(graph, frames, Costs(inside=0.004, outside=0.001))
    for number in (0, 1):
        assert 0 < left[number].all.own_s <= left[number].all.cumulative_s < graph[number].all.cumulative_s
    assert taken == pytest.approx(100 * 0.004 + 99 * 0.001)


def test_what_is_left_is_nearer_to_the_truth_than_what_was_traced() -> None:
    def timed() -> float:
        began = perf_counter()
        calling(20_000)
        return perf_counter() - began

    alone = min(timed() for _ in range(5))
    price = costs.measure()
    found = []
    for _ in range(5):
        tracer, places = Tracer(), Places()
        tracer.start()
        timed()
        tracer.stop()
        graph = tracer.graph(places)
        number = next(n for n in graph if places.frames[n].function == "calling")
        left, _ = costs.take_off(graph, places.frames, price)
        found.append((graph[number].all.cumulative_s, left[number].all.cumulative_s))
    raw, corrected = min(found)
    assert raw > 1.5 * alone
    assert abs(corrected - alone) < abs(raw - alone)


# Arguments and longest calls.


def squares(values: list[float]) -> float:
    return sum([square(value) for value in values])


def square(value: float) -> float:
    return value * value


class Point:
    def __init__(self, x: float) -> None:
        self.x = x

    def norm(self) -> float:
        return abs(self.x)


def until(arguments: Arguments, name: str, run: Callable[[], Any]) -> float:
    """Run until a function's arguments are known; the share that was repeated."""
    ends = perf_counter() + 10
    while perf_counter() < ends:
        run()
        arguments.look(perf_counter())
        for code, share in arguments.repeated():
            if code.co_name == name:
                return share
    raise AssertionError(f"{name} was not looked at")


@pytest.fixture
def arguments() -> Any:
    found = Arguments()
    yield found
    found.stop()
    assert sys.gettrace() is None


def test_the_same_arguments_are_noticed(arguments: Arguments) -> None:
    assert until(arguments, "square", lambda: squares([1.0, 2.0, 3.0] * 20)) > 0.8


def test_different_arguments_are_no_repetition(arguments: Arguments) -> None:
    numbers = iter(range(10_000_000))
    assert until(arguments, "square", lambda: squares([float(next(numbers)) for _ in range(60)])) == 0.0


def test_new_objects_in_the_place_of_old_ones_are_other_ones(arguments: Arguments) -> None:
    numbers = iter(range(10_000_000))
    assert until(arguments, "norm", lambda: [Point(float(next(numbers))).norm() for _ in range(60)]) < 0.1


def test_an_object_that_stays_the_same_is_the_same(arguments: Arguments) -> None:
    point = Point(1.0)
    assert until(arguments, "norm", lambda: [point.norm() for _ in range(60)]) > 0.8


def test_what_cannot_be_compared_counts_as_new(arguments: Arguments) -> None:
    def size(value: object) -> int:
        return 0

    big = list(range(1000))
    assert until(arguments, "size", lambda: [size(big) for _ in range(60)]) == 0.0


class Elusive:
    """Answers to every name, by way of itself."""

    def __getattr__(self, name: str) -> Any:
        return self.other[name]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("must not be asked")

    __hash__ = None  # type: ignore[assignment]


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self, left: int) -> None:
        self.left = left  # and nothing on the right

    def get(self) -> int:
        return self.left


class Counted(Elusive):
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("must not matter")


@pytest.mark.parametrize("kind", [Elusive, Counted])
def test_objects_that_are_hard_to_look_at_do_not_notice(arguments: Arguments, kind: type) -> None:
    value = kind()

    def use(value: object) -> int:
        return 1

    assert until(arguments, "use", lambda: [use(value) for _ in range(60)]) in (0.0, pytest.approx(1.0, abs=0.2))


def test_what_is_held_in_slots_counts(arguments: Arguments) -> None:
    numbers = iter(range(10_000_000))
    assert until(arguments, "get", lambda: [Slotted(next(numbers)).get() for _ in range(60)]) < 0.1


def test_beside_other_threads_nothing_is_looked_at() -> None:
    asked: list[object] = []
    arguments = Arguments(schedule=lambda function: not asked.append(function))
    arguments.look(perf_counter() + 1, threads=2)
    assert bool(asked) == (sys.version_info >= (3, 13))
    arguments.look(perf_counter() + 1, threads=1)
    assert asked


def test_a_burst_ends_although_nothing_is_called(arguments: Arguments) -> None:
    def tracing() -> bool:
        arguments.look(perf_counter())
        return sys.gettrace() is not None

    def not_tracing() -> bool:
        return not tracing()

    wait_until(tracing)
    wait_until(not_tracing)


def test_a_debugger_keeps_its_thread() -> None:
    def debugger(_frame: FrameType, _event: str, _arg: object) -> None:
        return None

    asked = []
    arguments = Arguments(schedule=lambda function: not asked.append(function))
    sys.settrace(debugger)
    try:
        arguments.look(perf_counter() + 1)
        asked[0]()
        arguments.stop()
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(None)


def test_an_exception_on_its_way_is_not_lost() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    def run() -> None:
        schedule(fail)
        spin(1)

    schedule = on_main_thread()
    with pytest.raises(KeyboardInterrupt):
        run()


def test_repetition_and_the_longest_call_are_in_the_record() -> None:
    def slow_once(first: bool) -> None:
        spin(0.2 if first else 0.02)

    def run() -> None:
        for number in range(6):
            slow_once(number == 0)
        ends = perf_counter() + 0.8
        while perf_counter() < ends:
            squares([1.0, 2.0] * 20)

    record = recorded(run)
    slow = call_of(record, "slow_once")
    assert slow.longest_s == pytest.approx(0.2, abs=0.1)
    assert slow.longest_s > 2 * slow.cumulative_s / slow.calls
    assert (call_of(record, "square").repeated or 0) > 0.8
    assert call_of(record, "run").longest_s == call_of(record, "run").cumulative_s
    assert record.tracing_s > 0
    assert record.sampling_cpu_s > 0
    assert sys._getframe().f_trace is None


def test_marks_of_the_longest_calls_are_taken_off() -> None:
    record = recorded(lambda: spin(0.1))
    assert record.cpu
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        assert frame.f_trace is None
        frame = frame.f_back


# Awaits in the table, and the block.


async def ask() -> None:
    await asyncio.sleep(0.2)


async def ask_twice() -> None:
    await asyncio.gather(ask(), ask())


def test_the_wall_time_of_an_await_is_its_coroutines() -> None:
    record = recorded(lambda: asyncio.run(ask_twice()))
    assert call_of(record, "ask").cumulative_s < 0.1
    shown = with_awaits(record)
    assert call_of(shown, "ask").cumulative_s > 0.3
    assert call_of(shown, "sleep").own_s > 0.3
    number = call_of(shown, "ask").frame
    assert call_of(shown, "sleep").callers[number][3] > 0.3
    selects = [call for call in shown.calls if "select.epoll" in shown.frames[call.frame].function]
    assert all(call.own_s < 0.05 for call in selects)
    assert any("coroutines" in note for note in record.notes)


def test_a_thread_that_waits_is_no_coroutine() -> None:
    frames = [Frame("<module>", "a.py", 1), Frame("work", "a.py", 2), Frame("sleep", "~", 0, "builtin")]
    record = Record(
        command="a.py",
        started=0.0,
        pid=1,
        machine=Machine("", "", 0, "", ""),
        wall_s=1.0,
        cpu_s=0.0,
        frames=frames,
        waiting=[Stack([0, 1, 2], [5, 3, 0], 1.0, 10, "MainThread", "sleep")],
        calls=[Call(1, 1, 1, 0.1, 1.0)],
    )
    assert with_awaits(record) is record


def test_a_block_is_profiled_and_read_by_pstats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "block.prof"
    with profiling(file, top_n=3, sort_by="calls") as found:
        with pytest.raises(SetupError, match="not ended"):
            _ = found.record
        calling(5000)
        spin(0.1)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "leak" not in printed.err
    assert "leaf" in printed.err
    assert call_of(found.record, "leaf").calls == 5000
    assert "block.py" not in {Path(found.record.frames[call.frame].file).name for call in found.record.calls}
    assert any(found.record.frames[number].function == "spin" for stack in found.record.cpu for number in stack.frames)
    assert found.record.machine.fingerprint
    assert isinstance(found.findings, list)
    stats = pstats.Stats(str(file), stream=io.StringIO())
    calls = {name: numbers[0] for (_, _, name), numbers in stats.stats.items()}  # type: ignore[attr-defined]
    assert calls["leaf"] == 5000


def test_a_block_around_awaits_in_a_running_loop(capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> Record:
        with profiling(top_n=5) as found:
            await ask_twice()
        await asyncio.sleep(0)
        return found.record

    record = asyncio.run(main())
    chains = [[record.frames[number].function for number in stack.frames] for stack in record.waiting]
    assert any(chain[-3:] == ["ask_twice", "ask", "sleep"] for chain in chains)
    table = capsys.readouterr().err
    assert "ask" in table.partition("BaseEventLoop")[0]


def test_a_block_that_fails_is_told_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = profiling(top_n=-1)

    def fail() -> None:
        with found:
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert found.record.wall_s < 5
    assert capsys.readouterr().err == ""


def test_a_block_refuses_what_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no order"):
        profiling(sort_by="beauty")
    with profiling(top_n=-1), pytest.raises(SetupError, match="another block"):
        profiling(top_n=-1).__enter__()
    block = profiling(tmp_path / "none" / "x.prof", top_n=-1)
    block.__enter__()
    with pytest.raises(ConfigError, match="cannot write"):
        block.__exit__(None, None, None)
    time.sleep(0)
