"""Every rule of the diagnosis on records made by hand, at its bounds and just beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.profiling.device.timeline import Gap, Timeline
from headrace.profiling.diagnose import RULES, Explained, diagnose
from headrace.profiling.diagnose.explained import duration, percent
from headrace.profiling.record import Block, Call, Child, Frame, Gil, Machine, Record, Stack, read, write

PYTHON = "/usr/lib/python3.11"
SITE = f"{PYTHON}/site-packages"
LOOP = f"{PYTHON}/asyncio/base_events.py!BaseEventLoop._run_once"
JSON = f"{PYTHON}/json/encoder.py!JSONEncoder.encode"
IMPORT = "<frozen·importlib._bootstrap>!_find_and_load"
TORCH = f"{SITE}/torch/nn/modules/module.py!Module._call_impl"
LINEAR = f"{SITE}/torch/nn/modules/linear.py!Linear.forward"
LOADER = f"{SITE}/torch/utils/data/dataloader.py!_BaseDataLoaderIter.__next__"


class Run:
    """A record in the making. A stack is written ``main:3 work:9 /lib/x.py!name``: functions of app.py by
    name and the line that runs, others by file; a built-in function is ``~name``."""

    def __init__(self, wall_s: float = 10.0, cpu_s: float | None = None, **more: Any) -> None:
        self.frames: list[Frame] = []
        self.more = more
        self.wall_s, self.cpu_s = wall_s, wall_s if cpu_s is None else cpu_s
        self.running: list[Stack] = []
        self.waited: list[Stack] = []
        self.calls: list[Call] = []
        self.blocks: list[Block] = []

    def frame(self, word: str) -> tuple[int, int]:
        if word.startswith("~"):
            frame, line = Frame(word[1:].replace("·", " "), "~", 0, "builtin"), 0
        elif "!" in word:
            file, _, name = word.replace("·", " ").partition("!")
            frame, line = Frame(name, file, 1, "library"), 1
        else:
            name, _, at = word.partition(":")
            # A function begins at a line that its name gives, whatever line of it runs.
            frame, line = Frame(name, "app.py", len(name)), int(at or 0)
        if frame not in self.frames:
            self.frames.append(frame)
        return self.frames.index(frame), line

    def _stack(self, way: str, seconds: float, samples: int | None, **more: str) -> Stack:
        frames, lines = zip(*map(self.frame, way.split()), strict=True)
        return Stack(
            list(frames), list(lines), seconds, max(1, int(seconds * 100)) if samples is None else samples, **more
        )

    def cpu(self, way: str, seconds: float, samples: int | None = None, owner: str = "MainThread") -> Run:
        self.running.append(self._stack(way, seconds, samples, owner=owner))
        return self

    def wait(self, reason: str, way: str, seconds: float, owner: str = "MainThread") -> Run:
        self.waited.append(self._stack(way, seconds, None, owner=owner, waits_for=reason))
        return self

    def call(self, name: str, calls: int, own_s: float, cumulative_s: float | None = None, **more: Any) -> Run:
        cumulative_s = own_s if cumulative_s is None else cumulative_s
        callers = {
            self.frame(caller)[0]: (number, number, own, seconds)
            for caller, (number, own, seconds) in more.pop("callers", {}).items()
        }
        primitive = more.pop("primitive", calls)
        self.calls.append(Call(self.frame(name)[0], calls, primitive, own_s, cumulative_s, callers, **more))
        return self

    def block(self, way: str, seconds: float, times: int = 1) -> Run:
        frames, lines = zip(*map(self.frame, way.split()), strict=True)
        self.blocks += [Block(list(frames), list(lines), seconds)] * times
        return self

    def record(self) -> Record:
        return Record(
            command="app.py", started=0.0, pid=1, machine=Machine("f", "p", 2, "linux", "3.11"), rate_hz=100.0,
            wall_s=self.wall_s, cpu_s=self.cpu_s, frames=self.frames, cpu=self.running, waiting=self.waited,
            calls=self.calls, blocks=self.blocks, **self.more,
        )  # fmt: skip

    def found(self) -> list[Explained]:
        found = diagnose(self.record())
        assert all(isinstance(each, Explained) for each in found)
        return found  # type: ignore[return-value]

    def codes(self) -> list[str]:
        return [each.code for each in self.found()]


def spread(run: Run, seconds: float, owner: str = "MainThread", below: str = "main:1") -> Run:
    """Time in ten functions alike."""
    for number in range(10):
        run.cpu(f"{below} part{number}:5", seconds / 10, owner=owner)
    return run


# Nothing to say.


def test_an_empty_run_and_a_balanced_one_have_no_finding() -> None:
    assert Run().codes() == []
    assert Run(0.0).codes() == []
    assert spread(Run(), 10).codes() == []


def test_a_short_run_and_a_run_of_few_samples_have_no_finding() -> None:
    assert Run(0.1).cpu("main:1 work:2", 0.1, samples=100).codes() == []
    assert Run(1.0).cpu("main:1 work:2", 1.0, samples=19).codes() == []
    assert Run(1.0).cpu("main:1 work:2", 1.0, samples=20).codes() == ["cpu_hot_spot"]


def test_a_share_that_chance_may_have_made_is_none() -> None:
    def made(seconds: float, samples: int) -> list[str]:
        run = Run().cpu("main:1 work:2", seconds, samples=samples)
        for number in range(8):
            run.cpu(f"main:1 part{number}:5", (10 - seconds) / 8, samples=samples // 4)
        return run.codes()

    assert made(2.2, 20) == []  # of 60 samples


def test_samples_of_different_lengths_say_less() -> None:
    run = Run().cpu("main:1 work:2", 2.2, samples=3)
    for number in range(8):
        run.cpu(f"main:1 part{number}:5", 7.8 / 8, samples=75)
    assert run.codes() == []


def test_enough_samples_make_a_share_sure() -> None:
    def made(seconds: float, samples: int) -> list[str]:
        return spread(Run(), 10 - seconds).cpu("main:1 work:2", seconds, samples=samples).codes()

    assert made(2.2, 200) == ["cpu_hot_spot"]


def test_every_rule_lives_with_any_record() -> None:
    odd = Run(device={"busy_share": "much", "gaps": 3}).cpu("~exec", 3.0).cpu(f"{JSON}", 3.0).wait("", "main:1", 1.0)
    odd.waited.append(Stack([], [], 1.0, 1))
    odd.running.append(Stack([], [], 1.0, 100))
    odd.blocks.append(Block([], [], 9.0))
    for rule in RULES:
        for finding in rule(odd.record()):
            assert finding.title


# Hot spots.


def test_a_hot_spot_is_named_by_its_hottest_line() -> None:
    run = spread(Run(), 7.0).cpu("main:1 work:8", 1.0).cpu("main:1 work:9", 2.0)
    (finding,) = run.found()
    assert (finding.code, finding.file, finding.line, finding.severity) == ("cpu_hot_spot", "app.py", 9, "warning")
    assert finding.share == pytest.approx(0.3)
    assert "30% of the time in " in finding.evidence


@pytest.mark.parametrize(("seconds", "codes"), [(2.0, ["cpu_hot_spot"]), (1.9, [])])
def test_a_hot_spot_is_a_fifth_of_the_time(seconds: float, codes: list[str]) -> None:
    assert spread(Run(), 10 - seconds).cpu("main:1 work:2", seconds).codes() == codes


@pytest.mark.parametrize(("traced_s", "confirmed"), [(4.0, True), (6.0, True), (6.1, False), (1.0, True)])
def test_a_hot_spot_says_when_the_sampler_does_not_confirm_it(traced_s: float, confirmed: bool) -> None:
    run = spread(Run(), 7.0).cpu("main:1 work:2", 3.0)
    run.call("work", 50, traced_s).call("main", 1, 10 - traced_s, 10.0)
    (finding, *_) = [each for each in run.found() if each.code == "cpu_hot_spot" and each.line == 2]
    assert ("does not confirm" in finding.evidence) is not confirmed
    assert finding.severity == ("warning" if confirmed else "info")


def test_a_trace_alone_is_not_confirmed() -> None:
    (finding,) = Run().call("work", 50, 6.0, callers={"main": (50, 6.0, 6.0)}).call("main", 1, 1.0, 7.0).found()
    assert (finding.code, finding.severity, finding.line) == ("cpu_hot_spot", "info", len("work"))
    assert "not sampled" in finding.evidence


def test_time_of_libraries_belongs_to_the_line_that_called_them() -> None:
    (finding,) = spread(Run(), 6.0).cpu(f"main:1 work:7 {SITE}/tool/deep.py!a {SITE}/tool/deep.py!b", 4.0).found()
    assert (finding.code, finding.file, finding.line) == ("look_into_children", "app.py", 7)
    assert "work > a > b" in finding.evidence


def test_a_function_with_time_of_its_own_beside_a_library_is_a_hot_spot() -> None:
    run = spread(Run(), 6.0).cpu(f"main:1 work:7 {SITE}/tool/deep.py!a", 3.5).cpu("main:1 work:8", 0.5)
    assert [(each.code, each.line) for each in run.found()] == [("cpu_hot_spot", 7)]


def test_a_comprehension_is_part_of_its_function() -> None:
    (finding,) = spread(Run(), 6.0).cpu("main:1 work:7 work.<locals>.<listcomp>:8", 4.0).found()
    assert (finding.title.split()[0], finding.line) == ("work", 7)


def test_what_a_model_computes_is_no_hot_spot() -> None:
    assert Run().cpu(f"main:1 infer:4 {TORCH} {LINEAR}", 9.0).codes() == []


def test_several_hot_spots_come_by_their_share() -> None:
    found = spread(Run(), 4.0).cpu("main:1 less:2", 2.5).cpu("main:1 more:3", 3.5).found()
    assert [each.line for each in found] == [3, 2]


# Look into children.


def test_the_way_to_a_hot_function_far_below_is_printed() -> None:
    hot, way = Run().cpu("<module>:1 outer:2 middle:3 inner:4 leaf:5", 10.0).found()
    assert (hot.code, hot.line, way.code, way.line) == ("cpu_hot_spot", 5, "look_into_children", 2)
    assert "outer:2 > middle:3 > inner:4 > leaf:5" in way.evidence
    assert "leaf" in way.title


def test_a_comprehension_is_no_library_and_no_slow_call() -> None:
    run = spread(Run(), 6.0).cpu("main:3 main.<locals>.<listcomp>:3", 4.0).call("main", 1, 0.1, 10.0)
    run.call("main.<locals>.<listcomp>", 1, 4.0, callers={"main": (1, 4.0, 4.0)})
    assert [(each.code, each.line) for each in run.found()] == [("cpu_hot_spot", 3)]


def test_a_hot_function_just_below_needs_no_way() -> None:
    assert Run().cpu("<module>:1 main:2 leaf:5", 10.0).codes() == ["cpu_hot_spot"]


# Waiting.


@pytest.mark.parametrize(("waited", "cpu", "codes"), [(4.0, 6.0, ["io_wait"]), (3.9, 6.1, [])])
def test_waiting_is_two_fifths_of_the_run(waited: float, cpu: float, codes: list[str]) -> None:
    run = spread(Run(cpu_s=cpu), cpu).wait("socket", "main:1 ask:4", waited)
    assert run.codes() == codes


@pytest.mark.parametrize(
    ("reason", "code"),
    [("socket", "io_wait"), ("sleep", "sleep_wait"), ("process", "process_wait"), ("lock", "lock_wait")],
)
def test_waits_are_told_apart(reason: str, code: str) -> None:
    # With one owner no lock is contended for by several.
    run = Run(cpu_s=1.0).wait(reason, "main:1 hold:4", 2.0).wait(reason, "main:1 ask:4", 7.0)
    finding = run.found()[-1 if code == "lock_wait" else 0]
    assert (finding.code, finding.file, finding.line) == (code, "app.py", 4)
    assert finding.share == pytest.approx(0.9)


def test_the_chain_of_awaits_is_printed_with_its_task_seconds() -> None:
    run = Run(cpu_s=1.0)
    for number in range(3):
        run.wait(
            "socket",
            f"worker:32 step:30 llm:28 {PYTHON}/asyncio/streams.py!StreamReader.read",
            9.0,
            f"Task-{number + 2}",
        )
    run.wait("task", "main:50", 9.5, "Task-1")
    (finding,) = run.found()
    assert (finding.code, finding.line) == ("io_wait", 28)
    assert "worker:32 > step:30 > llm:28" in finding.evidence
    assert "27 task-seconds" in finding.evidence


def test_what_the_main_task_waits_for_counts_not_who_ticks_beside_it() -> None:
    run = Run(cpu_s=1.0).wait("socket", "main:1 ask:4", 9.0, "Task-1")
    for number in range(5):
        run.wait("sleep", "tick:7", 10.0, f"Task-{number + 2}")
    assert run.codes() == ["io_wait"]


def test_a_busy_program_with_tickers_waits_for_nothing() -> None:
    assert spread(Run(), 10.0).wait("sleep", "tick:7", 10.0, "Task-2").codes() == []


def test_a_program_that_others_keep_from_running_waits_for_nothing() -> None:
    """CPU time is half of the run's, for the machine was busy: nothing was seen to wait."""
    assert spread(Run(cpu_s=5.0), 10.0).wait("sleep", "main:1 pause:7", 0.5).codes() == []


def test_a_task_that_waits_for_its_turn_is_not_held_up_by_who_ticks() -> None:
    """CPU time is low, for the machine was busy; the loop was not idle."""
    run = Run(cpu_s=4.0).wait("task", "main:9 ~(waits·for·its·turn·on·the·event·loop)", 9.0, "Task-1")
    for number in range(3):
        run.wait("sleep", "tick:7", 10.0, f"Task-{number + 2}")
    assert run.codes() == []


def test_a_loop_that_is_kept_busy_is_not_idle() -> None:
    run = Run(cpu_s=3.0).cpu(f"main:1 {LOOP} handle:3", 7.0).wait("sleep", "main:9 pause:4", 9.0, "Task-1")
    assert "sleep_wait" not in run.codes()


def test_a_server_waits_for_its_callers_and_that_is_no_finding() -> None:
    run = Run(cpu_s=0.2).wait("future", f"main:9 {PYTHON}/asyncio/base_events.py!Server.serve_forever", 10.0, "Task-1")
    run.wait("socket", f"handle:4 {PYTHON}/asyncio/streams.py!StreamReader.readline", 9.0, "Task-2")
    run.wait("sleep", "tidy:7", 10.0, "Task-3")
    assert run.codes() == []


def test_a_server_that_waits_for_another_within_a_request_is_one() -> None:
    run = Run(cpu_s=0.2).wait("future", f"main:9 {PYTHON}/asyncio/base_events.py!Server.serve_forever", 10.0, "Task-1")
    run.wait("socket", f"handle:4 {PYTHON}/asyncio/streams.py!StreamReader.readline", 1.0, "Task-2")
    run.wait("socket", f"handle:5 query:8 {SITE}/asyncpg/connection.py!fetch", 8.0, "Task-2")
    assert [(each.code, each.line) for each in run.found()] == [("io_wait", 8)]


def test_the_thread_of_an_idle_loop_and_idle_workers_wait_for_nothing() -> None:
    run = Run(cpu_s=1.0).wait("loop", f"main:1 {LOOP}", 9.0).wait("idle", "work:3", 9.0, "pool")
    run.wait("future", f"consume:5 {PYTHON}/queue.py!Queue.get", 9.0, "Thread-1")
    assert run.codes() == []


def test_waits_that_overlap_already_are_good_to_know_only() -> None:
    run = Run(cpu_s=1.0)
    for number in range(40):
        run.wait("socket", "fetch:4", 9.0, f"Task-{number + 2}")
    (finding,) = run.found()
    assert (finding.code, finding.severity) == ("io_wait", "info")
    assert "about 40 at a time already" in finding.evidence


# Children.


@pytest.mark.parametrize(
    ("children", "own", "codes"),
    [(4.0, 1.0, ["child_processes"]), (0.9, 0.5, ["child_processes"]), (0.7, 0.5, ["process_wait"])],
)
def test_children_that_compute_are_told_from_those_that_wait(children: float, own: float, codes: list[str]) -> None:
    run = Run(cpu_s=own, children_cpu_s=children).wait("process", "main:1 convert:6", 8.0)
    assert run.codes() == codes
    assert run.found()[0].line == 6


def test_children_are_named_and_a_busy_parent_is_no_finding() -> None:
    run = Run(cpu_s=1.0, children=[Child("convert --all", 7, 8.0)]).wait("process", "main:1 convert:6", 8.0)
    assert "convert --all 8 s" in run.found()[0].evidence
    inside = Run(8.0).cpu("main:1 pixels:9", 8.0).record()
    run = Run(cpu_s=1.0, children=[Child("convert.py", 7, 8.0, inside)]).wait("process", "main:1 convert:6", 8.0)
    assert "convert.py 8 s, most of it in pixels (app.py:9)" in run.found()[0].evidence
    assert spread(Run(cpu_s=9.0, children_cpu_s=8.0), 9.0).codes() == []


# Event loops.


def loop_with(seconds: float, times: int, wall_s: float = 10.0) -> Run:
    run = Run(wall_s).block(f"{LOOP} handle:3 count:8", seconds, times)
    return spread(run, wall_s).wait("sleep", "tick:7", 1.0, "Task-2")


@pytest.mark.parametrize(
    ("seconds", "times", "codes"),
    [(0.051, 4, ["blocked_loop"]), (0.049, 200, []), (0.051, 3, []), (0.25, 1, ["blocked_loop"]), (0.24, 1, [])],
)
def test_a_loop_is_blocked_for_more_than_50_ms_and_for_long_enough_in_all(
    seconds: float, times: int, codes: list[str]
) -> None:
    assert loop_with(seconds, times).codes() == codes


def test_a_blocked_loop_names_the_line_and_says_what_to_do() -> None:
    (finding,) = loop_with(0.3, 5).found()
    assert (finding.file, finding.line, finding.share) == ("app.py", 8, pytest.approx(0.15))
    assert "5 times for more than 50 ms" in finding.evidence
    assert "to_thread" in finding.advice
    assert "ProcessPoolExecutor" in finding.advice


def test_a_loop_on_which_nobody_else_waits_is_not_blocked() -> None:
    run = spread(Run().block(f"{LOOP} handle:3 count:8", 1.0, 9), 10.0)
    assert run.wait("sleep", "handle:4", 1.0, "Task-1").codes() == []  # it waits itself
    run.wait("future", f"{PYTHON}/threading.py!Thread._bootstrap consume:5", 9.0, "Thread-1")
    assert run.codes() == []  # that is no task
    assert run.wait("sleep", "handle:4", 1.0, "Task-2").codes() == ["blocked_loop"]


def test_blocks_below_one_callback_are_one_finding_where_their_ways_part() -> None:
    run = spread(Run(), 10.0).wait("sleep", "tick:7", 1.0, "Task-2")
    for number in range(5):
        run.block(f"{LOOP} handle:3 answer:6 part{number}:5", 0.2)
    assert [(each.code, each.line) for each in run.found()] == [("blocked_loop", 6)]


def test_what_blocks_the_loop_is_no_hot_spot_beside() -> None:
    run = Run().block(f"{LOOP} handle:3 count:8", 0.5, 18).cpu(f"main:1 {LOOP} handle:3 count:8", 9.0)
    assert run.wait("sleep", "tick:7", 1.0, "Task-2").codes() == ["blocked_loop"]


def test_a_sleep_on_the_loop_blocks_it_and_is_no_wait() -> None:
    run = (
        Run(cpu_s=0.5).block(f"{LOOP} handle:3 fetch:8", 0.5, 18).wait("sleep", f"main:1 {LOOP} handle:3 fetch:8", 9.0)
    )
    assert run.wait("task", "main:2", 9.0, "Task-1").codes() == ["blocked_loop"]


def tokenised(below: str, seconds: float) -> Run:
    run = spread(Run(), 10.0 - seconds).cpu(f"{below} embed:12", seconds)
    run.call("embed", 100, 0.0, seconds)
    return run.call(
        "~method 'encode' of 'tokenizers.Tokenizer' objects", 100, seconds, callers={"embed": (100, seconds, seconds)}
    )


@pytest.mark.parametrize(("seconds", "codes"), [(1.1, ["tokenising_on_loop"]), (1.0, [])])
def test_tokenising_on_the_loop_is_a_tenth_of_the_time(seconds: float, codes: list[str]) -> None:
    assert tokenised(f"main:1 {LOOP}", seconds).codes() == codes


def test_tokenising_in_a_thread_is_where_it_belongs() -> None:
    assert tokenised(f"{PYTHON}/concurrent/futures/thread.py!_worker", 1.5).codes() == []


def test_tokenising_comes_before_the_block_that_it_is() -> None:
    run = tokenised(f"main:1 {LOOP}", 4.0).block(f"{LOOP} embed:12", 0.2, 20).wait("sleep", "tick:7", 1.0, "Task-2")
    assert [(each.code, each.line) for each in run.found()] == [("tokenising_on_loop", 12)]


def test_a_tokeniser_of_python_is_known_by_its_files() -> None:
    run = spread(Run(), 5.0).cpu(f"main:1 {LOOP} embed:12 {SITE}/transformers/tokenization_utils.py!encode", 5.0)
    assert run.codes() == ["tokenising_on_loop"]


# Threads.


def threads(gil: Gil, cpu_s: float = 10.0) -> Run:
    run = Run(cpu_s=cpu_s, gil=gil)
    for number in range(4):
        run.cpu("work:3 digest:9", 10.0, owner=f"Thread-{number}")
    return run


def test_threads_that_take_turns_are_told_with_the_numbers() -> None:
    (finding,) = threads(Gil(3.9, 0.015, 0.95)).found()
    assert (finding.code, finding.line) == ("gil_contention", 9)
    assert "15 ms late" in finding.evidence
    assert "processes" in finding.advice


@pytest.mark.parametrize(
    ("gil", "cpu_s", "contended"),
    [
        (Gil(1.5, 0.004, 0.4), 10.0, True),
        (Gil(1.4, 0.005, 0.4), 10.0, False),
        (Gil(3.0, 0.0039, 0.9), 10.0, False),
        (Gil(2.0, 0.00047, 1.0, 0.0002), 10.0, True),  # a live look: turns are shorter then
        (Gil(2.0, 0.0001, 1.0, 0.0002), 10.0, False),
        (Gil(3.0, 0.020, 0.39), 10.0, False),
        (Gil(3.0, 0.020, 0.9), 14.0, False),  # side by side outside the interpreter
    ],
)
def test_contention_for_the_interpreter_has_bounds(gil: Gil, cpu_s: float, contended: bool) -> None:
    assert ("gil_contention" in threads(gil, cpu_s).codes()) is contended


def locked(waited: float, owners: int, reason: str = "lock", below: str = "") -> Run:
    run = Run(cpu_s=1.0)
    for number in range(owners):
        run.wait(reason, f"work:3 store:4 {below}".strip(), waited, f"Thread-{number}")
        run.wait("future", f"work:3 {PYTHON}/queue.py!Queue.get", 10.0 - waited, f"Thread-{number}")
    return run


@pytest.mark.parametrize(("waited", "owners", "found"), [(3.1, 3, True), (2.9, 3, False), (9.0, 1, False)])
def test_a_lock_that_several_stand_in_line_for(waited: float, owners: int, found: bool) -> None:
    codes = locked(waited, owners).codes()
    assert ("lock_contention" in codes) is found
    if found:
        assert codes[0] == "lock_contention"


def test_waiting_in_a_with_statement_is_no_time_of_its_function() -> None:
    run = spread(Run(cpu_s=6.0), 6.0).call("store", 100, 4.0)
    assert run.codes() == ["cpu_hot_spot"]  # if only the trace were known
    run = run.wait("lock", "main:1 store:4 ~__enter__", 3.9)
    assert run.codes() == []


def test_who_waits_for_work_or_for_room_stands_in_no_line() -> None:
    assert locked(9.0, 5, "lock", f"{PYTHON}/asyncio/locks.py!Semaphore.acquire").codes() == []
    assert locked(9.0, 5, "future", f"{PYTHON}/queue.py!Queue.get").codes() == []


# Calls.


def called(calls: int, repeated: float | None, seconds: float = 5.0) -> Run:
    run = spread(Run(), 10.0 - seconds).cpu("main:1 distance:14", seconds)
    return run.call("distance", calls, seconds, repeated=repeated)


@pytest.mark.parametrize(
    ("calls", "repeated", "code"),
    [
        (10_000, 0.5, "cache_it"),
        (9_999, 0.9, "cpu_hot_spot"),
        (10_000, 0.49, "called_often"),
        (10_000, None, "cpu_hot_spot"),
    ],
)
def test_many_calls_are_cached_or_batched(calls: int, repeated: float | None, code: str) -> None:
    (finding,) = called(calls, repeated).found()
    assert finding.code == code
    assert finding.line == (14 if code == "cpu_hot_spot" else len("distance"))


def test_a_cache_saves_what_is_repeated() -> None:
    (finding,) = called(20_000, 0.6).found()
    assert finding.share == pytest.approx(0.3)
    assert "20,000 calls, 60% of them" in finding.evidence
    assert called(20_000, 0.9, seconds=1.9).codes() == []
    assert called(20_000, 0.1, seconds=1.9).codes() == []


def test_of_functions_that_call_each_other_the_one_where_a_cache_saves_most_is_named() -> None:
    run = spread(Run(), 4.0).cpu("main:1 outer:3 inner:4", 5.0).cpu("main:1 outer:3", 1.0)
    run.call("outer", 20_000, 1.0, 6.0, repeated=0.9).call("inner", 80_000, 5.0, repeated=0.9)
    assert [(each.code, each.line) for each in run.found()] == [("cache_it", len("outer"))]


def test_of_functions_that_only_pass_it_on_the_one_that_does_the_work_is_named() -> None:
    run = spread(Run(), 4.0).cpu("main:1 nearest:3 key:3 distance:4", 5.8).cpu("main:1 nearest:3", 0.2)
    for name, own_s, repeated in (("nearest", 0.2, 0.99), ("key", 0.0, 0.99), ("distance", 5.8, 0.7)):
        run.call(name, 20_000, own_s, 6.0, repeated=repeated)
    assert [(each.code, each.line) for each in run.found()] == [("cache_it", len("distance"))]


def slow(calls: int, seconds: float) -> Run:
    run = spread(Run(), 10.0 - seconds).cpu("main:1 key:11", seconds)
    run.call("key", calls, 0.01, seconds)
    return run.call("~_hashlib.pbkdf2_hmac", calls, seconds, callers={"key": (calls, seconds, seconds)})


@pytest.mark.parametrize(
    ("calls", "seconds", "code"),
    [(1, 4.0, "slow_call"), (10, 4.0, "slow_call"), (11, 4.0, "cpu_hot_spot"), (10, 2.1, "slow_call")],
)
def test_few_calls_that_take_long_each(calls: int, seconds: float, code: str) -> None:
    (finding,) = slow(calls, seconds).found()
    assert (finding.code, finding.line) == (code, 11)


def test_a_slow_call_takes_100_ms() -> None:
    def made(each_s: float) -> list[str]:
        run = Run(1.0).cpu("main:1 key:11", 10 * each_s, samples=50).cpu("main:1", 1 - 10 * each_s, samples=50)
        run.call("key", 10, 0.01, 10 * each_s)
        run.call("~_hashlib.scrypt", 10, 10 * each_s, callers={"key": (10, 10 * each_s, 10 * each_s)})
        return run.codes()

    assert made(0.1) == ["slow_call"]
    assert "slow_call" not in made(0.099)


def test_one_call_among_many_that_took_much_longer() -> None:
    def made(longest_s: float, calls: int = 100) -> list[str]:
        run = spread(Run(), 10.0).call("answer", calls, 0.1, longest_s * 1.3, longest_s=longest_s)
        return run.codes()

    assert made(2.0) == ["slow_call"]
    assert made(1.9) == []
    assert made(3.0, calls=10) == []


def test_the_life_of_a_coroutine_or_a_generator_is_no_slow_call() -> None:
    run = spread(Run(), 10.0).call("answer", 100, 0.1, 3.9, longest_s=3.0)
    assert run.codes() == ["slow_call"]
    assert run.wait("lock", "main:1 answer:3", 1.0).codes() == ["slow_call"]  # a thread's stack
    assert run.wait("sleep", "answer:3", 1.0, "Task-1").codes() == []
    assert spread(Run(), 10.0).call("answer", 100, 0.1, 3.6, longest_s=3.0).codes() == []


# Work that has a name.


@pytest.mark.parametrize(
    ("below", "code"),
    [
        (JSON, "serialisation"),
        (f"{PYTHON}/copy.py!deepcopy", "serialisation"),
        (f"{PYTHON}/pickle.py!_Pickler.dump", "serialisation"),
        (f"{SITE}/pydantic/main.py!BaseModel.model_validate", "serialisation"),
        (f"{PYTHON}/re/__init__.py!sub", "regular_expressions"),
        (f"{PYTHON}/traceback.py!format_exc", "tracebacks"),
        (f"{PYTHON}/logging/__init__.py!Logger.info", "logging"),
    ],
)
def test_work_is_known_by_the_library_that_does_it(below: str, code: str) -> None:
    (finding,) = spread(Run(), 7.9).cpu(f"main:1 save:6 {below}", 2.1).found()
    assert (finding.code, finding.file, finding.line) == (code, "app.py", 6)
    assert spread(Run(), 8.1).cpu(f"main:1 save:6 {below}", 1.9).codes() == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("~built-in method _pickle.dumps", "serialisation"),
        ("~built-in method orjson.dumps", "serialisation"),
        ("~method 'validate_python' of 'pydantic_core._pydantic_core.SchemaValidator' objects", "serialisation"),
        ("~method 'findall' of 're.Pattern' objects", "regular_expressions"),
        ("~built-in method builtins.sorted", "cpu_hot_spot"),
    ],
)
def test_work_of_built_in_functions_is_known_by_the_trace(name: str, code: str) -> None:
    run = spread(Run(), 5.0).cpu("main:1 save:6", 5.0).call("save", 90, 0.5, 5.0)
    run.calls.append(Call(len(run.frames), 90, 90, 4.5, 4.5, {run.frame("save")[0]: (90, 90, 4.5, 4.5)}))
    run.frames.append(Frame(name[1:], "~", 0, "builtin"))
    (finding,) = run.found()
    assert (finding.code, finding.line) == (code, 6)


def test_imports_are_named_by_the_statement() -> None:
    run = spread(Run(2.0), 1.0).cpu(f"<module>:3 {IMPORT} {SITE}/big/__init__.py!<module>", 0.6)
    run.cpu(f"<module>:4 {IMPORT} {SITE}/small/__init__.py!<module>", 0.2)
    (finding,) = run.found()
    assert (finding.code, finding.line, finding.share) == ("slow_imports", 3, pytest.approx(0.4))
    assert "600 ms at line 3" in finding.evidence


@pytest.mark.parametrize(
    ("wall_s", "import_s", "cpu_s", "found"),
    [(1.0, 0.3, 1.0, True), (1.0, 0.29, 1.0, False), (0.5, 0.29, 0.5, False), (1.0, 0.6, 0.2, False)],
)
def test_imports_are_three_tenths_of_the_run_and_of_a_second(
    wall_s: float, import_s: float, cpu_s: float, found: bool
) -> None:
    """The last one is that of a machine on which imports wait for others to run."""
    run = spread(Run(wall_s, cpu_s, import_s=import_s), wall_s - import_s)
    run.cpu(f"<module>:3 {IMPORT} {SITE}/big/__init__.py!<module>", import_s)
    assert run.codes() == ["slow_imports"] * found


def test_a_library_that_imports_late_is_named_by_the_line_that_called_it() -> None:
    run = spread(Run(2.0), 1.0).cpu(f"main:8 {SITE}/big/core.py!start {IMPORT} {SITE}/big/rest.py!<module>", 1.0)
    assert [(each.code, each.line) for each in run.found()] == [("slow_imports", 8)]


def test_an_import_is_no_hot_spot() -> None:
    assert spread(Run(), 7.5).cpu(f"<module>:3 {IMPORT} {SITE}/big/__init__.py!<module>", 2.5).codes() == []


# Models.


def forwards(calls: int, module_s: float, seconds: float = 6.0) -> Run:
    """A model of six modules."""
    run = spread(Run(), 10.0 - seconds).cpu(f"main:1 classify:21 {TORCH} {LINEAR}", seconds)
    run.call("classify", 1, 0.1, seconds)
    cumulative = calls * 6 * module_s
    return run.call(TORCH, calls * 6, 0.1, cumulative, callers={"classify": (calls, 0.1, cumulative)})


@pytest.mark.parametrize(
    ("calls", "module_s", "seconds", "found"),
    [
        (200, 15e-6, 6.0, True),
        (199, 15e-6, 6.0, False),
        (3000, 19e-6, 6.0, True),
        (3000, 21e-6, 6.0, False),
        (3000, 15e-6, 3.0, True),
        (3000, 15e-6, 2.9, False),
    ],
)
def test_batches_are_small_where_forwards_are_many_and_cost_little_more_than_their_calls(
    calls: int, module_s: float, seconds: float, found: bool
) -> None:
    run = forwards(calls, module_s, seconds)
    assert ("small_batches" in run.codes()) is found
    if found:
        assert run.found()[0].line == 21


def test_what_a_module_costs_is_told_in_processor_time() -> None:
    run = forwards(3000, 30e-6)
    run.cpu_s = 5.0  # of ten seconds, for the machine was busy
    assert run.codes() == ["small_batches"]


def test_a_module_of_the_users_own_is_not_who_calls_the_model() -> None:
    run = Run().cpu(f"main:1 infer:21 {TORCH} Net.forward:30 {TORCH} {LINEAR}", 9.0)
    run.call("infer", 1, 0.1, 9.0).call("Net.forward", 500, 0.1, 0.5, callers={TORCH: (500, 0.1, 0.5)})
    run.call(TORCH, 15_000, 0.1, 0.6, callers={"infer": (500, 0.1, 0.2), "Net.forward": (14_500, 0.1, 0.15)})
    assert [(each.code, each.line) for each in run.found()] == [("small_batches", 21)]


def loaded(seconds: float, batches: int, way: str = f"main:1 train:33 {LOADER} Pictures.__getitem__:9") -> Run:
    run = Run().cpu(way, seconds).cpu(f"main:1 train:34 {TORCH} {LINEAR}", 10.0 - seconds)
    return run.call(LOADER, batches, 0.1, seconds)


@pytest.mark.parametrize(
    ("seconds", "batches", "found"), [(3.0, 5, True), (2.9, 5, False), (3.0, 4, False), (3.0, 7000, False)]
)
def test_a_loop_waits_for_its_data(seconds: float, batches: int, found: bool) -> None:
    run = loaded(seconds, batches)
    assert ("input_bound" in run.codes()) is found
    if found:
        assert run.found()[0].line == 33
        assert "Pictures.__getitem__ (app.py:9)" in run.found()[0].evidence


def test_a_generator_that_makes_batches_is_known_by_its_name_where_a_model_runs() -> None:
    assert loaded(6.0, 20, "main:1 train:33 batches:9").codes() == ["input_bound"]
    assert loaded(6.0, 20, "main:1 train:33 numbers:9").codes() == ["cpu_hot_spot"]


def test_waiting_for_loaders_in_other_processes_counts() -> None:
    run = Run(cpu_s=3.0).wait("process", f"main:1 train:33 {LOADER} {PYTHON}/multiprocessing/connection.py!wait", 7.0)
    run.cpu(f"main:1 train:34 {TORCH} {LINEAR}", 3.0)
    assert run.found()[0].code == "input_bound"


# GPUs.


def timeline(busy: float, window_s: float = 1.0, **causes: float) -> dict[str, Any]:
    """As `headrace.profiling.device` makes it."""
    gaps = [Gap(cause, share * window_s, share, 9, 0.01, 0.1) for cause, share in causes.items()]  # type: ignore[arg-type]
    made = Timeline(gpu=True, window_s=window_s, device=0, busy_s=busy * window_s, busy_share=busy, gaps=gaps)
    return msgspec.to_builtins(made)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("busy", "window_s", "found"), [(0.69, 1.0, True), (0.71, 1.0, False), (0.1, 0.05, False)])
def test_a_gpu_is_idle_for_three_tenths_of_the_time(busy: float, window_s: float, found: bool) -> None:
    run = spread(Run(device=timeline(busy, window_s, host=1 - busy)), 10.0)
    assert run.codes() == ["gpu_idle"] * found


@pytest.mark.parametrize(
    ("cause", "advice"),
    [
        ("host", "beside the GPU"),
        ("input", "num_workers"),
        ("sync", ".item()"),
        ("copy", "pinned"),
        ("launch", "CUDA graph"),
        ("allocation", "empty_cache"),
    ],
)
def test_an_idle_gpu_is_told_by_cause_with_the_line_that_ran(cause: str, advice: str) -> None:
    run = spread(Run(device=timeline(0.2, **{"host": 0.1, cause: 0.7})), 9.0).cpu("main:1 step:44", 1.0)
    (finding,) = run.found()
    assert advice in finding.advice
    assert f"{cause} 70%" in finding.evidence
    assert (finding.file, finding.share) == ("app.py", pytest.approx(0.8))


# All together.


def test_findings_are_ordered_by_the_share_that_they_explain() -> None:
    run = Run(cpu_s=4.0).wait("sleep", "main:1 pause:4", 6.0).cpu("main:1 work:9", 4.0)
    found = run.found()
    assert [each.code for each in found] == ["sleep_wait", "cpu_hot_spot"]
    assert [round(each.share, 2) for each in found] == [0.6, 0.4]


def test_a_saved_record_has_the_same_findings(tmp_path: Path) -> None:
    run = called(20_000, 0.6)
    write(run.record(), tmp_path / "run.json")
    assert diagnose(read(tmp_path / "run.json")) == run.found()


def test_numbers_are_told_for_people() -> None:
    assert [duration(each) for each in (12.0, 1.239, 0.0123, 4.1e-6, 3e-9)] == [
        "12 s",
        "1.24 s",
        "12.3 ms",
        "4.1 µs",
        "3 ns",
    ]
    assert (percent(0.347), percent(0.004)) == ("35%", "under 1%")
