"""`headrace leak` and `find_leak` on programs that leak in one known way, and on programs that only look like it."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from conftest import HEADRACE, ROOT
from headrace.errors import ConfigError, LoadError, RunnerError
from headrace.profiling.leak import find_leak
from headrace.profiling.leaking.lines import Line
from headrace.profiling.leaking.process import confirmed
from headrace.profiling.leaking.report import LeakReport, Limit, as_text

LEAKS = ROOT / "tests" / "leaks"
sys.path.append(str(LEAKS))

import harmless  # noqa: E402
import planted  # noqa: E402


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(LEAKS)


def marked(file: str, program: str) -> int:
    """The line that a program leaks at."""
    lines = (LEAKS / file).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# LEAK {program}"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HEADRACE, "leak", *arguments], capture_output=True, text=True, timeout=30, cwd=LEAKS)


# Programs that leak.


@pytest.mark.parametrize("program", planted.HOLDERS)
def test_a_leak_is_found_with_its_kind_its_line_and_its_holder(program: str) -> None:
    kind, holder = planted.HOLDERS[program]
    report = find_leak(f"planted:{program}", iterations=60)
    assert (report.verdict, report.kind, report.processes) == ("leak", kind, 2), as_text(report)
    assert report.growth_per_iteration > 0
    assert report.interval[0] <= report.growth_per_iteration <= report.interval[1]
    assert ("planted.py", marked("planted.py", program)) in [(Path(each.file).name, each.line) for each in report.where]
    if holder:
        assert holder in (report.holder or "")
    assert report.limit is not None
    assert report.limit.iterations > 0


def test_growth_is_told_in_what_is_lost() -> None:
    report = find_leak("planted:list_grows", iterations=60)
    # 200 bytes and the header of an object of bytes, a pointer in a list.
    assert report.unit == "bytes"
    assert report.growth_per_iteration == pytest.approx(233 + 8, rel=0.05)
    assert find_leak("planted:fd_leak", iterations=40).growth_per_iteration == 1


# Programs that do not.


@pytest.mark.parametrize("program", harmless.QUIET)
def test_what_only_moves_is_no_leak(program: str) -> None:
    report = find_leak(f"harmless:{program}", iterations=60)
    assert report.verdict in ("no_leak", "warm_up"), as_text(report)
    assert report.kind is None
    assert report.where == []


@pytest.mark.parametrize("program", ["few_keys", "ten_keys_each_late", "warm_pool", "thread_pool"])
def test_what_fills_up_and_stops_is_a_warm_up(program: str) -> None:
    report = find_leak(f"harmless:{program}", iterations=100, warm_up=5)
    assert report.verdict == "warm_up", as_text(report)


@pytest.mark.parametrize("program", harmless.BOUNDED)
def test_a_container_with_a_limit_is_still_filling(program: str) -> None:
    report = find_leak(f"harmless:{program}", iterations=60)
    assert report.verdict == "bounded", as_text(report)
    assert re.search(r"still filling, \d+ of (4000|100000) ", report.reason)
    assert (report.holder or "").startswith(harmless.BOUNDED[program])
    assert (report.growth_per_iteration, report.unit) == (1, "entries")


@pytest.mark.parametrize("program", harmless.CYCLES)
def test_what_only_the_collector_frees_is_told_apart(program: str) -> None:
    report = find_leak(f"harmless:{program}", iterations=60)
    assert report.verdict == "cycles"
    assert re.search(r"leaves 1 objects, 2,\d+ bytes", report.reason), report.reason


def test_memory_that_is_kept_free_is_fragmentation() -> None:
    report = find_leak("harmless:fragments", iterations=100)
    assert report.verdict == "fragmentation", as_text(report)
    assert report.growth_per_iteration == pytest.approx(40_000, rel=0.2)


# torch.


@pytest.fixture(scope="module")
def with_torch() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(LEAKS / "tensors.py")], capture_output=True, text=True, timeout=120, cwd=LEAKS
    )
    assert done.returncode == 0, done.stderr
    return {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("program", "kind", "holder"),
    [
        ("loss_list", "graph", "list: closure variable `losses` of make_losses.step"),
        ("loss_sum", "graph", "Tensor: attribute `total` of Trainer"),
        ("tensor_list", "tensors", "list: global `outputs` of __main__"),
    ],
)
def test_kept_tensors_and_kept_graphs(
    with_torch: dict[str, dict[str, Any]], program: str, kind: str, holder: str
) -> None:
    report = with_torch[program]
    assert (report["verdict"], report["kind"], report["holder"]) == ("leak", kind, holder)
    assert marked("tensors.py", program) in [each["line"] for each in report["where"]]


def test_a_tensor_counts_with_what_it_holds(with_torch: dict[str, dict[str, Any]]) -> None:
    report = with_torch["tensor_list"]
    assert (report["growth_per_iteration"], report["unit"]) == (4000, "bytes")
    assert report["where"][0]["growth"] == 4000


@pytest.mark.parametrize("program", ["training_step", "detached_sum", "inference"])
def test_training_and_inference_are_no_leaks(with_torch: dict[str, dict[str, Any]], program: str) -> None:
    assert with_torch[program]["verdict"] in ("no_leak", "warm_up")


def test_a_window_of_tensors_is_still_filling(with_torch: dict[str, dict[str, Any]]) -> None:
    report = with_torch["bounded_outputs"]
    assert (report["verdict"], report["holder"]) == ("bounded", "deque: global `recent` of __main__")


# In the process of a user's own test.


def test_a_closure_is_searched_where_it_is_and_nothing_is_left_behind() -> None:
    before = (
        tracemalloc.is_tracing(),
        gc.get_freeze_count(),
        list(gc.callbacks),
        sys.gettrace(),
        threading.active_count(),
    )
    losses: list[bytes] = []
    report = find_leak(lambda: losses.append(random.randbytes(100)), iterations=40)
    assert (report.verdict, report.kind, report.processes) == ("leak", "python", 0)
    assert report.holder is not None
    assert report.holder.startswith("list: closure variable `losses` of test_a_closure_is_searched")
    assert Path(report.where[0].file) == Path(__file__)
    after = (
        tracemalloc.is_tracing(),
        gc.get_freeze_count(),
        list(gc.callbacks),
        sys.gettrace(),
        threading.active_count(),
    )
    assert after == before


def test_calls_too_slow_to_look_ahead_take_nothing_back() -> None:
    chain: Any = None  # no container that gets longer: only the bytes tell

    def call() -> None:
        nonlocal chain
        time.sleep(0.02)  # so that half a second has room for about 23 calls more
        chain = (chain, random.randbytes(100))

    report = find_leak(call, iterations=40)
    assert (report.verdict, report.kind) == ("leak", "python"), as_text(report)


def test_set_up_runs_once_before() -> None:
    made: list[int] = []
    calls: list[int] = [0]

    def call() -> None:
        assert made == [1]
        calls[0] += 1

    report = find_leak(call, setup=lambda: made.append(1), iterations=20, warm_up=3)
    assert (report.verdict, report.iterations, report.warm_up, calls) == ("no_leak", 20, 3, [23])


def test_an_async_function_runs_on_one_loop() -> None:
    loops: set[int] = set()

    async def call() -> None:
        loops.add(id(asyncio.get_running_loop()))
        await asyncio.sleep(0)

    assert find_leak(call, iterations=20).verdict == "no_leak"
    assert len(loops) == 1


def test_an_exception_of_the_function_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        find_leak(lambda: 1 / 0)
    assert gc.get_freeze_count() == 0
    assert not tracemalloc.is_tracing()


def test_what_cannot_be_searched_is_refused() -> None:
    def generate() -> Any:
        yield 1

    with pytest.raises(ConfigError, match="is a generator"):
        find_leak(generate)
    with pytest.raises(ConfigError, match="cannot be called without arguments"):
        find_leak(len)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="3 calls tell nothing"):
        find_leak(generate, iterations=3)

    async def on_a_loop() -> None:
        find_leak(lambda: None)

    with pytest.raises(ConfigError, match="running event loop"):
        asyncio.run(on_a_loop())


def test_running_out_of_what_is_leaked_is_a_result() -> None:
    script = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))\nfrom planted import fd_leak\n"
    script += "from headrace.profiling.leak import find_leak\nprint(find_leak(fd_leak))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, cwd=LEAKS)
    assert done.stdout.startswith("LEAK (fds)"), done.stderr
    assert "100 descriptors reached after" in done.stdout


# The command.


def test_the_command_writes_one_json_document_whatever_the_function_prints() -> None:
    done = command("talking:prints", "--iterations", "20", "--format", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "no_leak"
    assert set(report) >= {"verdict", "kind", "growth_per_iteration", "interval", "unit", "where", "holder"}
    assert "hello from the function" in done.stderr


def test_the_exit_status_says_leak_only_where_it_was_asked_for() -> None:
    assert command("planted:list_grows", "--iterations", "20").returncode == 0
    done = command("planted:list_grows", "--iterations", "20", "--fail-on", "leak", "--format", "json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert (report["verdict"], report["kind"]) == ("leak", "python")
    assert report["where"][0].keys() >= {"file", "line", "growth"}
    assert command("harmless:nothing", "--iterations", "20", "--fail-on", "leak").returncode == 0


def test_the_text_names_the_verdict_the_line_and_the_holder() -> None:
    out = command("planted:list_grows", "--iterations", "20").stdout
    assert out.startswith("LEAK (python): every call keeps Python objects")
    assert "holder    list: global `kept` of planted" in out
    assert f"where     planted.py:{marked('planted.py', 'list_grows')}  +" in out
    assert "GiB of memory reached after" in out


def test_a_call_that_never_ends_is_inconclusive() -> None:
    done = command("talking:hangs", "--iterations", "20", "--time-limit", "2")
    assert done.returncode == 0
    assert done.stdout.startswith("INCONCLUSIVE: a call had not ended after")


def test_calls_too_slow_for_the_time_are_inconclusive() -> None:
    done = command("talking:slow", "--iterations", "20", "--time-limit", "2")
    assert re.match(r"INCONCLUSIVE: the time limit was reached after \d calls", done.stdout), done.stdout


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere:x", "there is no module 'nowhere'"),
        ("planted:nothing", "planted:nothing: module 'planted' has no attribute 'nothing'"),
        ("planted", "'planted' is not module:callable"),
        ("planted:kept", "planted:kept is a list, not a function"),
        ("talking:raises", "talking:raises raised ValueError: broken"),
        ("talking:dies", "the process that called talking:dies ended of SIGABRT"),
    ],
)
def test_a_function_that_cannot_be_called_is_an_error(target: str, message: str) -> None:
    done = command(target, "--iterations", "20")
    assert done.returncode == 2
    assert f"headrace: {message}" in done.stderr


def test_errors_in_another_process_keep_their_type() -> None:
    with pytest.raises(LoadError):
        find_leak("nowhere:x")
    with pytest.raises(RunnerError, match="raised ValueError: broken"):
        find_leak("talking:raises", iterations=20)
    with pytest.raises(ConfigError):
        find_leak("planted:list_grows", setup=lambda: None)


# Two processes.

LEAK = LeakReport(
    "leak", "python", 100.0, (90.0, 110.0), where=[Line("a.py", 1, 100.0)], limit=Limit("memory", 1, 2, 3), agreeing=3
)


def test_two_processes_that_agree_give_one_wider_interval() -> None:
    both = confirmed(LEAK, LeakReport("leak", "python", 104.0, (95.0, 120.0), agreeing=2))
    assert (both.growth_per_iteration, both.interval) == (102, (90, 120))
    assert (both.agreeing, both.processes, both.where) == (5, 2, LEAK.where)


def test_two_processes_that_disagree_are_inconclusive() -> None:
    both = confirmed(LEAK, LeakReport("no_leak", reason="nothing grows"))
    assert (both.verdict, both.kind, both.limit) == ("inconclusive", None, None)
    assert both.reason == "one process says leak (python), a second says no_leak: nothing grows"
