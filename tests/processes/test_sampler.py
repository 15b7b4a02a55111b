"""The sampler on this process: threads that run and that wait, chains of awaits, blocked loops, and its own price."""

from __future__ import annotations

import _thread
import asyncio
import gc
import queue
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from conftest import wait_until
from headrace.clock import perf_counter
from headrace.errors import ConfigError, SetupError
from headrace.profiling.cpu import waits
from headrace.profiling.cpu.places import Places, kind_of
from headrace.profiling.cpu.sampler import Sampler, Samples
from headrace.profiling.record import Stack

LOCK = threading.Lock()


def spin(seconds: float) -> None:
    until = perf_counter() + seconds
    while perf_counter() < until:
        sum(range(50))


def names(seen: Samples, stack: Stack) -> list[str]:
    return [seen.frames[number].function for number in stack.frames]


def seconds(seen: Samples, stacks: list[Stack], function: str) -> float:
    """Of all stacks with a function of this name."""
    return sum(stack.seconds for stack in stacks if function in names(seen, stack))


def waited(seen: Samples, function: str) -> dict[str, float]:
    """Reason → seconds of the waits below a function."""
    found: dict[str, float] = {}
    for stack in seen.waiting:
        if function in names(seen, stack):
            found[stack.waits_for] = found.get(stack.waits_for, 0.0) + stack.seconds
    return found


@contextmanager
def sampled(**options: Any) -> Iterator[list[Samples]]:
    """Half a core may be spent, so that short tests see enough."""
    sampler, found = Sampler(budget=0.5, rate_hz=200, **options), []
    sampler.start()
    try:
        yield found
    finally:
        found.append(sampler.stop())


def watch(main: Callable[[], Coroutine[Any, Any, Any]]) -> Samples:
    with sampled() as found:
        asyncio.run(main())
    return found[0]


# Threads.


def test_a_running_function_gets_the_time_it_ran() -> None:
    with sampled() as found:
        spin(0.3)
    (seen,) = found
    assert seconds(seen, seen.cpu, "spin") == pytest.approx(0.3, abs=0.1)
    top = seen.cpu[0]
    assert names(seen, top)[-1] == "spin"
    assert top.owner == "MainThread"
    frame = seen.frames[top.frames[-1]]
    assert (frame.file, frame.line, frame.kind) == (__file__, spin.__code__.co_firstlineno, "user")
    assert frame.line < top.lines[-1] <= frame.line + 3


def _receive() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.settimeout(0.3)
        with pytest.raises(TimeoutError):
            mine.recv(1)


def _select() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        select.select([mine], [], [], 0.3)


def _sleep() -> None:
    time.sleep(0.3)


def _lock() -> None:
    with LOCK:
        pass


def _acquire() -> None:
    LOCK.acquire(timeout=0.3)


def _event() -> None:
    threading.Event().wait(0.3)


def _queue() -> None:
    with pytest.raises(queue.Empty):
        queue.Queue[int]().get(timeout=0.3)


def _join() -> None:
    thread = threading.Thread(target=_sleep)
    thread.start()
    thread.join()


def _result() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_sleep).result()


def _process() -> None:
    subprocess.run(["sleep", "0.3"], check=True)


def _pipe() -> None:
    with subprocess.Popen(["sleep", "0.3"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read()


WAITS = {
    _receive: "socket",
    _select: "socket",
    _sleep: "sleep",
    _lock: "lock",
    _acquire: "lock",
    _event: "future",
    _queue: "future",
    _join: "thread",
    _result: "thread",
    _process: "process",
    _pipe: "process",
}


def test_a_wait_is_no_work_and_says_what_for() -> None:
    LOCK.acquire()
    threads = [threading.Thread(target=each, name=each.__name__) for each in WAITS]
    with sampled() as found:
        for thread in threads:
            thread.start()
        wait_until(lambda: not any(thread.is_alive() for thread in threads if thread.name != "_lock"))
        LOCK.release()
        threads[[*WAITS].index(_lock)].join()
    (seen,) = found
    for function, reason in WAITS.items():
        stacks = [stack for stack in seen.waiting if stack.owner == function.__name__]
        ran = sum(stack.seconds for stack in seen.cpu if stack.owner == function.__name__)
        total = sum(stack.seconds for stack in stacks)
        told = {stack.waits_for: stack.seconds for stack in stacks}
        assert total > 0.15, function
        assert ran < total / 2, function
        assert max(told, key=lambda each: told[each]) == reason, (function, told)


def test_the_call_that_waits_is_the_end_of_its_stack() -> None:
    with sampled() as found:
        _receive()
    (seen,) = found
    top = next(stack for stack in seen.waiting if stack.waits_for == "socket")
    assert names(seen, top)[-2:] == ["_receive", "recv"]
    assert seen.frames[top.frames[-1]].kind == "builtin"


def test_threads_that_compute_by_turns_are_all_running() -> None:
    threads = [threading.Thread(target=spin, args=(0.6,), name=f"turn {number}") for number in range(3)]
    with sampled() as found:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (seen,) = found
    assert seen.gil is not None
    assert seen.gil.runnable > 1.8
    assert seen.gil.shares > 0.5
    for thread in threads:
        ran = sum(stack.seconds for stack in seen.cpu if stack.owner == thread.name)
        assert ran > 0.35, seen.cpu


def test_an_idle_pool_waits_for_nobody() -> None:
    with ThreadPoolExecutor(2) as pool:
        pool.submit(int).result()
        with sampled() as found:
            spin(0.1)
    (seen,) = found
    assert not [stack for stack in seen.waiting if "ThreadPool" in stack.owner]


def test_a_thread_without_a_name_is_seen_too() -> None:
    done = []

    def work() -> None:
        spin(0.15)
        done.append(True)

    with sampled() as found:
        _thread.start_new_thread(work, ())
        wait_until(lambda: done)
    (seen,) = found
    assert any(stack.owner.startswith("thread ") and "spin" in names(seen, stack) for stack in seen.cpu)


def test_every_sample_counts_for_the_time_since_the_one_before() -> None:
    sampler = Sampler(rate_hz=10, budget=0.5)  # a first look may cost 10 ms
    sampler.start()
    spin(0.7)
    seen = sampler.stop()
    assert 3 <= seen.samples <= 12
    assert sum(stack.seconds for stack in seen.cpu if stack.owner == "MainThread") == pytest.approx(seen.seconds)


def test_with_a_shorter_switch_interval_short_bursts_are_seen() -> None:
    """Each ends in a wait, before whoever looks from inside would usually get its turn."""

    async def bursts() -> None:
        until = perf_counter() + 0.8
        while perf_counter() < until:
            spin(0.002)
            await asyncio.sleep(0.002)

    usual = sys.getswitchinterval()
    with sampled(switch_s=0.0002) as found:
        asyncio.run(bursts())
    (seen,) = found
    assert sys.getswitchinterval() == usual
    assert seen.gil is not None
    assert seen.gil.switch_s == 0.0002
    assert seconds(seen, seen.cpu, "spin") > 0.1


# Tasks.


def test_a_chain_of_awaits_is_told_from_the_task_to_its_end() -> None:
    async def ask() -> None:
        await asyncio.sleep(0.3)

    async def step() -> None:
        await ask()

    seen = watch(step)
    (chain,) = [stack for stack in seen.waiting if names(seen, stack)[0].endswith(".step")]
    assert [name.rpartition(".")[2] for name in names(seen, chain)] == ["step", "ask", "sleep"]
    assert (chain.waits_for, chain.owner) == ("sleep", "Task-1") or chain.owner.startswith("Task-")
    assert chain.seconds == pytest.approx(0.3, abs=0.1)
    assert chain.lines[1] == ask.__code__.co_firstlineno + 1
    assert seconds(seen, seen.cpu, names(seen, chain)[1]) < 0.1


async def _ask() -> None:
    await asyncio.sleep(0.25)


async def _gathered() -> None:
    await asyncio.gather(_ask(), _ask())


async def _grouped() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_ask())


async def _waited_for() -> None:
    await asyncio.wait_for(_ask(), 5)


async def _waited() -> None:
    await asyncio.wait([asyncio.create_task(_ask())])


async def _shielded() -> None:
    await asyncio.shield(_ask())


async def _task() -> None:
    await asyncio.create_task(_ask())


async def _iterated() -> None:
    async def pages() -> AsyncIterator[int]:
        await _ask()
        yield 1

    async for _ in pages():
        pass


@pytest.mark.parametrize("main", [_gathered, _grouped, _waited_for, _waited, _shielded, _task, _iterated])
def test_a_chain_goes_on_through_the_task_that_is_awaited(main: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    seen = watch(main)
    mine = [stack for stack in seen.waiting if names(seen, stack)[0] == main.__name__]
    best = max(mine, key=lambda stack: stack.seconds)
    assert names(seen, best)[-2:] == ["_ask", "sleep"]
    assert best.waits_for == "sleep"
    assert best.seconds > 0.1


def test_what_a_task_waits_for_has_a_name() -> None:
    async def lock(held: asyncio.Lock) -> None:
        async with held:
            pass

    async def event() -> None:
        await asyncio.Event().wait()

    async def take() -> None:
        await asyncio.Queue[int]().get()

    async def thread() -> None:
        await asyncio.to_thread(time.sleep, 0.3)

    async def executor() -> None:
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.3)

    async def stream() -> None:
        mine, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=mine)
            try:
                await reader.read(1)
            finally:
                writer.close()

    async def process() -> None:
        child = await asyncio.create_subprocess_exec("sleep", "0.35")
        await child.wait()

    async def future() -> None:
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        held = asyncio.Lock()
        await held.acquire()
        jobs = [lock(held), event(), take(), thread(), executor(), stream(), process(), future()]
        tasks = [asyncio.create_task(job, name=job.__name__) for job in jobs]
        await asyncio.sleep(0.3)
        for task in tasks:
            if task.get_name() != "process":
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    seen = watch(main)
    wanted = {"lock": "lock", "event": "future", "take": "future", "thread": "thread", "executor": "thread"}
    wanted |= {"stream": "socket", "process": "process", "future": "future"}
    prefix = "test_what_a_task_waits_for_has_a_name.<locals>."
    for name, reason in wanted.items():
        told = waited(seen, prefix + name)
        assert max(told, key=lambda each: told[each]) == reason, (name, told)


def test_an_idle_loop_is_told_by_its_tasks_alone() -> None:
    seen = watch(_ask)
    assert waited(seen, "BaseEventLoop.run_forever") == {}
    assert seconds(seen, seen.cpu, "BaseEventLoop.run_forever") < 0.15


def test_of_many_tasks_a_few_stand_for_all_and_the_budget_holds() -> None:
    async def main() -> None:
        await asyncio.gather(*[asyncio.create_task(asyncio.sleep(1.2)) for _ in range(1000)])

    sampler = Sampler(budget=0.01)
    gc.disable()  # one that falls into a look is paid for by it, and walks what all tests before left
    try:
        sampler.start()
        asyncio.run(main())
        seen = sampler.stop()
    finally:
        gc.enable()
    # A look at its beginning may cost more than the time until its end pays for.
    assert seen.sampling_cpu_s < 0.01 * seen.seconds + 0.02
    assert seen.samples >= 4
    slept = sum(stack.seconds for stack in seen.waiting if stack.waits_for == "sleep")
    assert slept == pytest.approx(1000 * 1.2, rel=0.35)
    assert len({stack.owner for stack in seen.waiting}) < 1000


def test_the_tasks_of_another_kind_of_loop_are_seen() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        task = asyncio.create_task(_ticking())
        await asyncio.sleep(0.15)
        spin(0.2)
        await asyncio.sleep(0.05)
        task.cancel()

    with sampled() as found, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    (seen,) = found
    assert waited(seen, "_ticking").keys() >= {"sleep"}
    (block,) = seen.blocks
    assert seen.frames[block.frames[-1]].function == "spin"
    assert 0.1 < block.seconds < 0.4


# Blocked loops.


async def _ticking() -> None:
    while True:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("block", [spin, time.sleep])
def test_a_callback_that_holds_the_loop_is_a_block(block: Callable[[float], None]) -> None:
    async def hold() -> None:
        for _ in range(2):
            await asyncio.sleep(0.03)
            block(0.15)

    async def main() -> None:
        task = asyncio.create_task(_ticking())
        await hold()
        task.cancel()

    seen = watch(main)
    assert len(seen.blocks) == 2
    for each in seen.blocks:
        assert hold.__qualname__ in [seen.frames[number].function for number in each.frames]
        assert len(each.frames) == len(each.lines)
        assert 0.1 < each.seconds < 0.4


def test_many_short_callbacks_are_no_block() -> None:
    async def busy() -> None:
        until = perf_counter() + 0.3
        while perf_counter() < until:
            spin(0.002)
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*[busy() for _ in range(5)])

    seen = watch(main)
    assert seconds(seen, seen.cpu, "spin") > 0.15
    assert seen.blocks == []


def test_whoever_could_run_waits_for_its_turn() -> None:
    async def ready() -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        task = asyncio.create_task(ready())
        spin(0.2)
        await task

    seen = watch(main)
    assert waited(seen, "(waits for its turn on the event loop)").get("task", 0) > 0.1


# The sampler itself.


def test_nothing_of_the_program_changes() -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    threads = threading.active_count()
    with sampled() as found:
        spin(0.1)
        assert threading.active_count() == threads
    assert random.random() == expected
    (seen,) = found
    assert all(not frame.file.endswith("/cpu/sampler.py") for frame in seen.frames)


def test_it_ends_by_itself_and_keeps_what_it_saw() -> None:
    sampler = Sampler(budget=0.5, seconds=0.2)
    sampler.start()
    spin(0.5)
    seen = sampler.samples()
    assert 0.1 < seen.seconds < 0.35
    assert sampler.stop() == seen == sampler.stop()


def test_it_runs_once_and_within_reason() -> None:
    with sampled():
        pass
    sampler = Sampler()
    sampler.start()
    sampler.stop()
    with pytest.raises(SetupError):
        sampler.start()
    for wrong in ({"budget": 0}, {"budget": 2}, {"rate_hz": 0}, {"seconds": 0}):
        with pytest.raises(ConfigError):
            Sampler(**wrong)  # type: ignore[arg-type]


def test_it_can_be_started_from_another_thread() -> None:
    found: list[Samples] = []

    def look() -> None:
        with sampled() as seen:
            time.sleep(0.2)
        found.extend(seen)

    thread = threading.Thread(target=look)
    thread.start()
    spin(0.25)
    thread.join()
    assert seconds(found[0], [s for s in found[0].cpu if s.owner == "MainThread"], "spin") > 0.1


def test_an_error_of_its_own_ends_only_it() -> None:
    def fail(*_: object) -> float | None:
        raise RuntimeError("broken")

    with sampled(on_look=fail) as found:
        spin(0.05)
    assert found[0].notes == [note for note in found[0].notes if "RuntimeError: broken" in note]
    assert len(found[0].notes) == 1


# What a line calls.


def _lines() -> dict[str, Callable[[], Any]]:
    held, poll, name = threading.Lock(), select.poll(), time.sleep
    return {
        "acquire": lambda: held.acquire(True, max(3, 5)),
        "poll": lambda: poll.poll(1000 * len([1])),
        "name": lambda: name(3),
        "sleep": lambda: time.sleep(min(1, 2) + 1),
        "select": lambda: select.select([], [], [], 5.0),
        "get": lambda: queue.SimpleQueue[int]().get(timeout=5, block=True),
    }


@pytest.mark.parametrize("name", sorted(_lines()))
def test_the_name_of_what_is_called_is_read_from_the_code(name: str) -> None:
    import dis

    code = _lines()[name].__code__
    calls = [each.offset for each in dis.get_instructions(code) if each.opname in ("CALL", "CALL_KW")]
    assert waits.called(code, calls[-1], globals()) == name
    assert waits.called(code, 0, globals()) == ""


def test_whose_code_a_file_is() -> None:
    import click

    assert kind_of(__file__) == kind_of("<string>") == "user"
    assert kind_of(asyncio.__file__) == kind_of(str(click.__file__)) == kind_of(waits.__file__) == "library"
    assert kind_of("<frozen importlib._bootstrap>") == "library"
    assert kind_of("~") == "builtin"


def test_of_a_very_deep_stack_the_ends_are_kept() -> None:
    def down(depth: int) -> list[int]:
        return down(depth - 1) if depth else places.of_stack(sys._getframe())

    places = Places()
    found = down(500)
    assert len(found) == 300
    called = [places.frames[places.places[number].frame].function for number in found]
    assert "down" not in called[0]
    assert called[-1] == down.__qualname__
