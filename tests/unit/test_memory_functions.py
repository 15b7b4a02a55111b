"""What a block keeps, what the process has, and every allocation of a program."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.errors import ConfigError, RunnerError
from headrace.profiling.memory import Growth, allocation_flame, memory_diff, memory_usage

HERE = __file__
MIB = 1 << 20


@pytest.fixture(autouse=True)
def tracing_is_as_it_was() -> Iterator[None]:
    before = tracemalloc.is_tracing()
    yield
    assert tracemalloc.is_tracing() == before


@pytest.fixture
def traces_already() -> Iterator[None]:
    tracemalloc.start(3)
    yield
    tracemalloc.stop()


def here(lines: list[Growth]) -> dict[str, Growth]:
    return {each.source: each for each in lines if each.file == HERE}


def test_lines_are_named_by_what_they_leave() -> None:
    kept: list[object] = []
    with memory_diff() as diff:
        kept.append(bytearray(3 * MIB))
        kept += [str(number) * 9 for number in range(1000)]
        bytearray(9 * MIB)  # is gone again
    first, second = diff.lines[:2]
    assert (first.file, first.source) == (HERE, "kept.append(bytearray(3 * MIB))")
    assert 3 * MIB <= first.bytes < 3 * MIB + 1000
    assert second.source == "kept += [str(number) * 9 for number in range(1000)]"
    assert 1000 <= second.objects <= 1010
    assert "(9 * MIB)" not in str(diff)
    assert diff.grown_bytes >= 3 * MIB
    assert f"+3.0 MiB {first.objects:>+9} objects  {HERE}:{first.line}  {first.source}" in str(diff)
    assert "(tracing itself took " in str(diff)


def test_what_a_block_gives_back_is_taken_off_the_sum() -> None:
    kept: list[object] = []
    with memory_diff() as outer:
        kept.append(bytearray(2 * MIB))
        with memory_diff() as inner:
            kept.clear()
            kept.append(bytearray(MIB))
    assert inner.grown_bytes < -MIB / 2
    assert MIB <= outer.grown_bytes < 1.5 * MIB
    assert list(here(inner.lines)) == ["kept.append(bytearray(MIB))"]


def test_garbage_is_not_counted() -> None:
    gc.disable()
    try:
        with memory_diff() as diff:
            cycle: list[object] = [bytearray(5 * MIB)]
            cycle.append(cycle)
            del cycle
    finally:
        gc.enable()
    assert diff.grown_bytes < MIB


def test_only_as_many_lines_as_asked_for() -> None:
    kept = []
    with memory_diff(top=1) as diff:
        kept.append(bytearray(1000))
        kept.append(bytearray(2000))
    assert [each.source for each in diff.lines] == ["kept.append(bytearray(2000))"]
    for top, frames in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError):
            memory_diff(top, frames=frames)


def test_more_frames_name_the_line_that_called_a_library() -> None:
    text, kept = json.dumps([str(number) for number in range(20_000)]), []

    def load() -> object:
        return json.loads(text)

    with memory_diff() as library:
        kept.append(load())
    with memory_diff(frames=8) as mine:
        kept.append(load())
    assert library.lines[0].file == json.decoder.__file__
    assert "memory_diff(frames=8) names the line of yours" in str(library)
    assert next(iter(here(mine.lines))) == "return json.loads(text)"
    assert mine.lines[0].objects > 19_000, "some short strings are Python's own"
    assert "names the line of yours" not in str(mine)


@pytest.mark.usefixtures("traces_already")
def test_tracing_that_was_on_stays_on() -> None:
    kept = []
    with memory_diff(frames=1) as diff:
        kept.append(bytearray(MIB))
    assert tracemalloc.is_tracing()
    assert tracemalloc.get_traceback_limit() == 3
    assert list(here(diff.lines)) == ["kept.append(bytearray(MIB))"]


def test_blocks_that_end_in_another_order_than_they_began() -> None:
    kept: list[object] = []
    first, second = memory_diff(), memory_diff()
    first.__enter__()
    second.__enter__()
    kept.append(bytearray(MIB))
    first.__exit__(None, None, None)
    assert tracemalloc.is_tracing()
    kept.append(bytearray(2 * MIB))
    second.__exit__(None, None, None)
    assert next(iter(here(first.lines))) == "kept.append(bytearray(MIB))"
    assert next(iter(here(second.lines))) == "kept.append(bytearray(2 * MIB))"


def test_it_is_complete_after_an_exception_and_honest_when_tracing_was_stopped() -> None:
    kept = []

    def fail() -> None:
        kept.append(bytearray(MIB))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), memory_diff() as diff:
        fail()
    assert here(diff.lines)
    with memory_diff() as stopped:
        tracemalloc.stop()
    assert not stopped.traced
    assert str(stopped) == "Tracing was stopped within the block: nothing is known."


def test_threads_may_look_at_once() -> None:
    kept: list[object] = []
    found: list[bool] = []
    begin = threading.Barrier(3)

    def look() -> None:
        begin.wait(20)
        with memory_diff() as diff:
            kept.append(bytearray(MIB))
        found.append("kept.append(bytearray(MIB))" in here(diff.lines))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [True, True, True]


def test_the_process_is_measured_without_torch() -> None:
    code = (
        "import sys\nfrom headrace.profiling.memory import memory_usage\n"
        "before = memory_usage(); kept = bytearray(b'x' * (64 << 20)); after = memory_usage()\n"
        "assert 'torch' not in sys.modules\n"
        "assert after.rss_bytes - before.rss_bytes > 60 << 20, (before, after)\n"
        "assert after.anonymous_bytes - before.anonymous_bytes > 60 << 20\n"
        "assert after.anonymous_bytes < after.rss_bytes\n"
        "assert after.devices == []\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert memory_usage().rss_bytes > MIB


def test_a_flame_graph_of_allocations(tmp_path: Path) -> None:
    pytest.importorskip("memray")
    script, out = tmp_path / "program.py", tmp_path / "flame.html"
    script.write_text(
        "import sys\n"
        "def hold_a_lot():\n    return [bytearray(1000) for _ in range(10_000)]\n"
        "kept = hold_a_lot()\nsys.exit(int(sys.argv[1]))\n"
    )
    found = allocation_flame([str(script), "3"], out)
    assert (found.path, found.exit_status) == (out, 3)
    assert 10 * 10**6 < found.peak_bytes < 40 * 10**6
    assert found.allocations > 10_000
    assert "hold_a_lot" in out.read_text()


def test_a_flame_graph_of_nothing_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("memray")
    with pytest.raises(ConfigError):
        allocation_flame([], tmp_path / "flame.html")
    with pytest.raises(ConfigError):
        allocation_flame(["x.py"], tmp_path / "nowhere" / "flame.html")
    with pytest.raises(RunnerError, match="had not ended"):
        allocation_flame(["-c", "import time; time.sleep(60)"], tmp_path / "flame.html", time_limit_s=0.5)
    with pytest.raises(RunnerError, match="left nothing to draw"):
        allocation_flame([str(tmp_path / "missing.py")], tmp_path / "flame.html")


def test_without_memray_the_error_names_the_command(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['memray'] = None\n"
        "from pathlib import Path\nfrom headrace.errors import Unavailable\n"
        "from headrace.profiling.memory import allocation_flame\n"
        "try: allocation_flame(['x.py'], Path('x.html'))\n"
        "except Unavailable as error: print(error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.stdout == "pip install 'headrace[profile]'\n", done.stderr
