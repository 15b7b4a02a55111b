"""Lines: counted rightly in functions of every kind, which stay what they were; and found before they exist."""

from __future__ import annotations

import asyncio
import builtins
import functools
import inspect
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.errors import ConfigError
from headrace.profiling.linewise import Following, as_text, follow, hottest, profile_lines, run_lines, write_lprof
from headrace.profiling.linewise.hottest import following
from headrace.profiling.record import Call, Frame, Line, Machine, Record, Stack

quietly = functools.partial(profile_lines, report=False)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Whatever a test does, nothing traces afterwards, and there is no ``profile``."""

    def state() -> tuple[Any, ...]:
        tools = [sys.monitoring.get_events(3)] if hasattr(sys, "monitoring") and sys.monitoring.get_tool(3) else []
        return sys.gettrace(), threading.gettrace(), hasattr(builtins, "profile"), any(tool & 1 for tool in tools)

    before = state()
    yield
    assert state() == before


def burn(seconds: float) -> None:
    """Use the processor, however busy the machine is."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def sources(lines: list[Line]) -> dict[str, Line]:
    return {line.source.strip(): line for line in lines}


def hits(lines: list[Line]) -> dict[str, int]:
    return {line.source.strip(): line.hits for line in lines}


def hottest_line(lines: list[Line]) -> str:
    return max(lines, key=lambda line: line.seconds).source.strip()


def collatz(number: int) -> int:
    steps = 0
    while number != 1:
        if number % 2:
            number = 3 * number + 1
        else:
            number //= 2
        steps += 1
    if steps < 0:
        steps = 0
    return steps


def test_every_line_is_counted_and_what_never_ran_has_no_hits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_lines(collatz, 27) == 111
    table = capsys.readouterr().err
    with Following(codes=[collatz.__code__]) as found:
        assert collatz(27) == 111
    assert hits(found.lines()) == {
        "steps = 0": 0,  # the second one: a table by source has the last
        "while number != 1:": 112,
        "if number % 2:": 111,
        "number = 3 * number + 1": 41,
        "number //= 2": 70,
        "steps += 1": 111,
        "if steps < 0:": 1,
        "return steps": 1,
    }
    assert found.lines()[0].hits == 1
    assert {line.function for line in found.lines()} == {"collatz"}
    assert "while number != 1:" in table
    assert f"{'111':>10}" in table


def test_it_counts_as_line_profiler_does() -> None:
    line_profiler = pytest.importorskip("line_profiler")
    namespace: dict[str, Any] = {}
    exec(compile(inspect.getsource(collatz), "collatz.py", "exec"), namespace)
    theirs = line_profiler.LineProfiler()
    theirs(namespace["collatz"])(27)
    ((_, counted),) = theirs.get_stats().timings.items()
    fresh: dict[str, Any] = {}
    exec(compile(inspect.getsource(collatz), "collatz.py", "exec"), fresh)
    with Following(codes=[fresh["collatz"].__code__]) as ours:
        fresh["collatz"](27)
    assert [(line.line, line.hits) for line in ours.lines() if line.hits] == [(line, n) for line, n, _ in counted]


def test_time_is_that_of_the_line_that_took_it() -> None:
    def work() -> None:
        for _ in range(1000):
            pass
        burn(0.03)

    with Following(codes=[work.__code__]) as found:
        work()
    assert hottest_line(found.lines()) == "burn(0.03)"
    assert sources(found.lines())["burn(0.03)"].seconds >= 0.03


def test_a_decorated_function_counts_all_its_calls_and_stays_itself() -> None:
    @quietly()
    def add(first: int, second: int = 2) -> int:
        """Adds."""
        return first + second

    assert [add(1), add(1, second=4)] == [3, 5]
    assert hits(add.lines()) == {"return first + second": 2}
    assert (add.__name__, add.__doc__, str(inspect.signature(add))) == ("add", "Adds.", "(first: 'int', second: 'int' = 2) -> 'int'")  # noqa: E501  # fmt: skip
    with pytest.raises(TypeError):
        add("x")  # type: ignore[arg-type]
    assert hits(add.lines()) == {"return first + second": 3}, "also a line that raised"


def test_methods_of_all_kinds() -> None:
    class Thing:
        def __init__(self, size: int) -> None:
            self.size = size

        @quietly()
        def twice(self) -> int:
            return 2 * self.size

        @quietly()
        @staticmethod
        def three() -> int:
            return 3

        @classmethod
        @quietly()
        def four(cls) -> Thing:
            return cls(4)

        @property
        @quietly()
        def area(self) -> int:
            return self.size**2

    assert (Thing(5).twice(), Thing.three(), Thing.four().area) == (10, 3, 16)
    assert hits(Thing.twice.lines()) == {"return 2 * self.size": 1}
    assert hits(Thing.three.lines()) == {"return 3": 1}
    assert hits(Thing.four.lines()) == {"return cls(4)": 1}


def test_a_recursion_counts_every_call() -> None:
    @quietly()
    def factorial(number: int) -> int:
        if number < 2:
            return 1
        return number * factorial(number - 1)

    assert factorial(10) == 3628800
    assert hits(factorial.lines()) == {"if number < 2:": 10, "return 1": 1, "return number * factorial(number - 1)": 9}


async def some_waiting() -> str:
    await asyncio.sleep(0.05)
    return "done" if await asyncio.sleep(0.01, burn(0.001)) is None and burn(0.04) is None else ""


def test_waiting_counts_for_the_line_that_waits_and_what_follows_on_it_too() -> None:
    with Following(codes=[some_waiting.__code__]) as found:
        assert asyncio.run(some_waiting()) == "done"
    waits, burns = (line for line in found.lines() if line.hits)
    assert (waits.hits, burns.hits) == (1, 1)
    assert waits.seconds >= 0.05
    assert burns.seconds >= 0.05, "also what the line did once it went on"


def test_a_decorated_coroutine_function_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    @quietly()
    async def fetch(number: int) -> int:
        await asyncio.sleep(0)
        return number

    async def both() -> list[int]:
        found = await asyncio.gather(fetch(1), fetch(2))
        task = asyncio.create_task(fetch(3))
        await asyncio.sleep(0)
        assert sys.gettrace() is None, "while it waits, nothing is traced"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return found

    assert inspect.iscoroutinefunction(fetch)
    assert asyncio.run(both()) == [1, 2]
    assert hits(fetch.lines())["return number"] == 2
    # Python 3.13 lets a line begin anew when something is thrown into it.
    assert hits(fetch.lines())["await asyncio.sleep(0)"] in (3, 4)
    assert asyncio.run(run_lines(some_waiting)) == "done"
    assert "await asyncio.sleep(0.05)" in capsys.readouterr().err


def echo() -> Iterator[str]:
    """Everything that can be done to a generator."""
    received = "nothing"
    while received != "end":
        try:
            received = yield received  # type: ignore[misc]
        except KeyError as error:
            received = f"caught {error}"
    return "returned"  # type: ignore[return-value]


@pytest.mark.parametrize("make", [lambda: quietly()(echo)(), lambda: run_lines(echo), echo])
def test_a_generator_is_sent_thrown_and_returns_as_ever(make: Callable[[], Any]) -> None:
    generator = make()
    assert next(generator) == "nothing"
    assert generator.send("a") == "a"
    assert generator.throw(KeyError("k")) == "caught 'k'"
    with pytest.raises(StopIteration) as stopped:
        generator.send("end")
    assert stopped.value.value == "returned"
    closed = make()
    next(closed)
    closed.close()


def test_a_generator_does_not_count_what_its_consumer_does() -> None:
    @quietly()
    def numbers() -> Iterator[int]:
        yield 1
        got = [(yield 2), burn(0.03)]
        yield len(got)

    assert inspect.isgeneratorfunction(numbers)
    for _ in numbers():
        burn(0.1)
    lines = sources(numbers.lines())
    assert lines["yield 1"].seconds < 0.1
    assert lines["got = [(yield 2), burn(0.03)]"].seconds >= 0.03
    assert hottest_line(numbers.lines()) == "got = [(yield 2), burn(0.03)]"


def test_an_async_generator_is_sent_thrown_and_closed_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    async def aecho() -> AsyncIterator[str]:
        received = "nothing"
        try:
            while received != "end":
                await asyncio.sleep(0.01)
                try:
                    received = yield received  # type: ignore[misc]
                except KeyError as error:
                    received = f"caught {error}"
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    async def use(generator: Any) -> None:
        assert await anext(generator) == "nothing"
        burn(0.1)
        assert await generator.asend("a") == "a"
        assert await generator.athrow(KeyError("k")) == "caught 'k'"
        with pytest.raises(StopAsyncIteration):
            await generator.asend("end")

    async def leave(generator: Any) -> None:
        await anext(generator)
        await generator.aclose()

    decorated = quietly()(aecho)
    assert inspect.isasyncgenfunction(decorated)
    for make in (decorated, lambda: run_lines(aecho), aecho):
        asyncio.run(use(make()))
        asyncio.run(leave(make()))
    assert len(closed) == 6
    lines = sources(decorated.lines())
    assert lines["await asyncio.sleep(0.01)"].seconds >= 0.03
    assert lines["received = yield received  # type: ignore[misc]"].seconds < 0.1, "the consumer burns that"
    assert "await asyncio.sleep(0.01)" in capsys.readouterr().err


def test_threads_that_begin_meanwhile_are_followed() -> None:
    with Following(codes=[collatz.__code__]) as found:
        threads = [threading.Thread(target=collatz, args=(27,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert hits(found.lines())["steps += 1"] == 3 * 111


def test_two_that_follow_the_same_each_have_their_own_time() -> None:
    with Following(codes=[collatz.__code__]) as outer:
        collatz(27)
        with Following(codes=[collatz.__code__]) as inner:
            collatz(27)
        collatz(27)
    collatz(27)
    assert (hits(outer.lines())["steps += 1"], hits(inner.lines())["steps += 1"]) == (333, 111)


def test_what_a_function_calls_is_followed_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    class Callable_:  # noqa: N801
        def __call__(self) -> int:
            return collatz(3)

    def outer() -> int:
        return collatz(27) + Callable_()()

    assert run_lines(outer, also=[collatz, Callable_()]) == 118
    table = capsys.readouterr().err
    assert "return collatz(3)" in table
    assert "number //= 2" in table
    with pytest.raises(ZeroDivisionError):
        run_lines(lambda: 1 / 0)
    assert "run_lines(lambda: 1 / 0)" in capsys.readouterr().err, "the table comes also then"


def test_a_module_of_torch_means_its_forward(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    assert run_lines(Net(), torch.zeros(1)).item() == 1
    assert "return x + 1" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [len, 3, Path])
def test_what_has_no_lines_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        run_lines(wrong)
    assert raised.value.field == "fn"
    with pytest.raises(ConfigError):
        profile_lines(wrong)


PROGRAM = """\
def main():
    def inner(count):
        for _ in range(count):
            pass
    inner(10)
    return [Thing().method() for _ in range(3)]

class Thing:
    @staticmethod
    def method():
        return 1

done = main()
if done[0] == 2:
    raise SystemExit(3)
"""


def test_functions_are_followed_that_do_not_exist_yet(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    frames = [
        Frame("main.<locals>.inner", str(script), 2),
        Frame("Thing.method", str(script), 9),
        Frame("<module>", str(script), 1),
    ]
    lines = follow(frames, lambda: runpy.run_path(str(script), run_name="__main__"))
    assert [(line.function, line.line, line.hits) for line in lines if line.function != "<module>"] == [
        ("main.<locals>.inner", 3, 11),
        ("main.<locals>.inner", 4, 10),
        ("Thing.method", 11, 3),
    ]
    assert ("<module>", 13, 1) in [(line.function, line.line, line.hits) for line in lines]
    assert "main" not in {line.function for line in lines}, (
        "it begins on the module's first line, and was not asked for"
    )


def test_a_program_that_ends_itself_leaves_its_lines(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("return 1", "return 2"))
    with pytest.raises(SystemExit), following([Frame("method", str(script), 9)]) as found:
        runpy.run_path(str(script), run_name="__main__")
    assert hits(found.lines()) == {"return 2": 3}


def test_profile_of_line_profiler_is_honoured(tmp_path: Path) -> None:
    pytest.importorskip("line_profiler")
    script = tmp_path / "program.py"
    script.write_text(
        "from line_profiler import profile as theirs\n"
        "@theirs\ndef one():\n    return 1\n\n"
        "@profile\ndef two():\n    return 2\n\n"
        "one(), two()\n"
    )
    lines = follow([], lambda: runpy.run_path(str(script)))
    assert hits(lines) == {"return 1": 1, "return 2": 1}
    import line_profiler

    assert type(line_profiler.profile).__name__ == "GlobalProfiler", "it has its own again"


def record(frames: list[Frame], **seen: Any) -> Record:
    machine = Machine("", "", 1, "", "")
    return Record(command="", started=0, pid=1, machine=machine, wall_s=1, cpu_s=1, frames=frames, **seen)


FRAMES = [
    Frame("main", "a.py", 1),
    Frame("encode", "json.py", 7, "library"),
    Frame("len", "~", 0, "builtin"),
    Frame("busy", "a.py", 20),
    Frame("idle", "a.py", 30),
]


def test_the_hottest_are_those_whose_lines_the_time_is_spent_for() -> None:
    stacks = [
        Stack([0], [2], 1.0, 10),
        Stack([0, 3, 1, 2], [3, 21, 8, 0], 5.0, 50),  # in a library, for `busy`
        Stack([0, 4], [4, 31], 0.01, 1),
        Stack([1], [9], 9.0, 90),  # nobody's
    ]
    assert hottest(record(FRAMES, cpu=stacks)) == [FRAMES[3], FRAMES[0]]
    assert hottest(record(FRAMES, cpu=stacks), most=1) == [FRAMES[3]]
    assert hottest(record(FRAMES)) == []


def test_without_samples_the_trace_says_which_are_hottest() -> None:
    calls = [
        Call(0, 1, 1, 1.0, 8.0),
        Call(1, 100, 100, 5.0, 5.5, {3: (90, 90, 4.5, 5.0), 2: (10, 10, 0.5, 0.5)}),
        Call(2, 10, 10, 0.5, 0.5, {1: (10, 10, 0.5, 0.5)}),
        Call(3, 1, 1, 0.5, 5.5, {0: (1, 1, 0.5, 5.5)}),
        Call(4, 1, 1, 0.001, 0.001, {0: (1, 1, 0.001, 0.001)}),
    ]
    assert hottest(record(FRAMES, calls=calls)) == [FRAMES[3], FRAMES[0]]


def test_the_report_comes_when_the_program_ends(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "from headrace.profiling.linewise import profile_lines\n"
        "@profile_lines\ndef never(): return 0\n"
        "@profile_lines\ndef answer():\n    return sum(range(1000))\n"
        "print(answer())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "499500\n"
    assert "return sum(range(1000))" in done.stderr
    assert "never" not in done.stderr
    assert as_text([]) == "None of the followed functions has run."


def test_line_profilers_viewer_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("line_profiler")
    with Following(codes=[collatz.__code__]) as found:
        collatz(27)
    write_lprof(found.lines(), tmp_path / "lines.lprof")
    viewer = [sys.executable, "-m", "line_profiler", str(tmp_path / "lines.lprof")]
    shown = subprocess.run(viewer, capture_output=True, text=True, timeout=30, check=True).stdout
    assert "Function: collatz" in shown
    assert "def collatz(number: int) -> int:" in shown
    assert [line.split()[1] for line in shown.splitlines() if "number = 3 * number + 1" in line] == ["41"]


def test_without_line_profiler_only_its_file_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['line_profiler'] = None\n"
        "from headrace.profiling.linewise import *\n"
        "from headrace.errors import Unavailable\n"
        "from pathlib import Path\n"
        "def f(): return 1\n"
        "assert run_lines(f) == 1\n"
        "try: write_lprof([], Path('x'))\n"
        "except Unavailable as error: print(error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.stdout == "pip install 'headrace[profile]'\n", done.stderr
