"""`headrace profile` as it is typed: programs that run as ever, and what is said of them."""

from __future__ import annotations

import json
import marshal
import os
import pstats
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import HEADRACE, ROOT, children, wait_until
from headrace.profiling import ledger
from headrace.profiling.cpu.attach import attach, find_py_spy
from headrace.profiling.record import Record, Stack, read

PROGRAMS = ROOT / "tests" / "profiled" / "programs"
FAITHFUL = PROGRAMS / "faithful.py"


def run(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HEADRACE, "profile", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
    )


def python(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=folder)


def record_of(folder: Path) -> Record:
    """Of the only run."""
    (path,) = (folder / ".headrace" / "runs").glob("*/record.json")
    return read(path)


def names(record: Record, stack: Stack) -> list[str]:
    return [record.frames[number].function for number in stack.frames]


def line_of(program: str, mark: str) -> int:
    lines = (PROGRAMS / program).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {mark}"))


def calls_of(record: Record) -> dict[str, int]:
    return {record.frames[call.frame].function: call.calls for call in record.calls}


# The program is its own.


@pytest.mark.parametrize("how", ["", "exit", "raise", "text", "thread"])
def test_a_program_runs_as_python_runs_it(how: str, tmp_path: Path) -> None:
    mine, theirs = (
        run(tmp_path, FAITHFUL, *filter(None, [how]), "--top"),
        python(tmp_path, FAITHFUL, *filter(None, [how]), "--top"),
    )
    assert (mine.returncode, mine.stdout) == (theirs.returncode, theirs.stdout)
    # Its errors are the first thing on standard error, to the letter.
    assert mine.stderr.startswith(theirs.stderr)
    record = record_of(tmp_path)
    assert record.exit_status == theirs.returncode
    assert calls_of(record)["spin"] == 1 + (how == "thread")
    assert not [frame for frame in record.frames if "profiling/cpu" in frame.file]


def test_a_module_runs_as_python_runs_it(tmp_path: Path) -> None:
    package = tmp_path / "package" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("print('package')\n")
    (package / "__init__.py").write_text("")
    shutil.copy(FAITHFUL, package / "__main__.py")
    arguments = ["-m", "package.inner", "exit"]
    mine, theirs = run(tmp_path, *arguments), python(tmp_path, *arguments)
    assert (mine.returncode, mine.stdout) == (theirs.returncode, theirs.stdout) != (0, "")
    missing = ["-m", "package.nothing"]
    mine, theirs = run(tmp_path, *missing), python(tmp_path, *missing)
    assert mine.returncode == theirs.returncode
    assert mine.stderr.startswith(theirs.stderr)


def test_what_python_cannot_compile_is_told_as_python_tells_it(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def f(:\n")
    mine, theirs = run(tmp_path, "wrong.py"), python(tmp_path, "wrong.py")
    assert mine.returncode == theirs.returncode == 1
    assert mine.stderr.startswith(theirs.stderr)
    missing = run(tmp_path, "none.py")
    assert missing.returncode == 2
    assert "there is no script none.py" in missing.stderr


@contextmanager
def endless(folder: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A profile of a program that does not end, once it is at work; it leads a process group, as in a terminal."""
    process = subprocess.Popen(
        [HEADRACE, "profile", *map(str, arguments), str(PROGRAMS / "endless.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        before = _cpu_s(process.pid)
        wait_until(lambda: _cpu_s(process.pid) > before + 0.4)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_ends_the_program_and_the_report_follows(tmp_path: Path) -> None:
    with endless(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGINT
    traceback, _, report = errors.partition("KeyboardInterrupt\n")
    assert "in compute" in traceback
    assert "headrace" not in traceback
    assert "compute" in report
    assert record_of(tmp_path).exit_status == -signal.SIGINT


def test_a_signal_is_passed_on_and_the_report_follows(tmp_path: Path) -> None:
    with endless(tmp_path) as process:
        process.terminate()
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "compute" in errors
    record = record_of(tmp_path)
    assert record.calls
    assert "compute" in names(record, record.cpu[0])


def _cpu_s(pid: int) -> float:
    """Of the processes that one has started."""
    fields = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split() for child in children(pid)]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


def test_of_a_program_that_vanishes_what_was_known_is_kept(tmp_path: Path) -> None:
    done = run(tmp_path, FAITHFUL, "_exit")
    assert done.returncode == 4
    record = record_of(tmp_path)
    assert record.exit_status == 4
    assert "spin" in names(record, record.cpu[0])
    assert any("ended with status 4 at once" in note for note in record.notes)


# What is said of it.


def test_the_graph_of_waiting_names_who_awaits(tmp_path: Path) -> None:
    done = run(tmp_path, "--format", "json", PROGRAMS / "awaiting.py")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert "done" in done.stderr
    top = document["waiting"][0]
    lines = {mark: line_of("awaiting.py", mark) for mark in ("STEP", "ASK", "SLEEP")}
    expected = f"worker:{lines['STEP']} > step:{lines['ASK']} > ask:{lines['SLEEP']} > sleep"
    assert top["chain"].startswith(expected)
    assert top["waits_for"] == "sleep"
    assert top["seconds"] == pytest.approx(4 * 8 * 0.05, rel=0.35)
    # The table has it too, where a trace alone has the loop's select.
    by_name = {each["function"]: each for each in document["top"]}
    assert by_name["ask"]["cumulative_s"] > 1.0
    assert {"findings", "wall_s", "cpu_s", "top", "files"} <= document.keys()
    assert [finding["code"] for finding in document["findings"]] == ["sleep_wait"]
    assert document["findings"][0]["line"] == lines["SLEEP"]
    record = record_of(tmp_path)
    assert Path(document["files"]["record"]) == next((tmp_path / ".headrace").rglob("record.json"))
    assert record.arguments == [str(PROGRAMS / "awaiting.py")]
    assert record.directory == str(tmp_path)
    assert record.machine == ledger.machine()


def test_a_run_is_saved_in_every_format_and_reported_again(tmp_path: Path) -> None:
    formats = "prof,collapsed,speedscope,html,json"
    done = run(tmp_path, "-o", "out.prof", "--save", formats, "--name", "first", "--top", "3", FAITHFUL)
    assert done.returncode == 0, done.stderr
    assert "spin" in done.stderr
    folder = next(path for path in (tmp_path / ".headrace" / "runs").iterdir() if path.is_dir())
    assert calls_of(record_of(tmp_path))["spin"] == 1
    for file in (tmp_path / "out.prof", folder / "profile.prof"):
        stats = pstats.Stats(str(file))
        assert ("spin", 1) in [(name, numbers[1]) for (_, _, name), numbers in stats.stats.items()]  # type: ignore[attr-defined]
        assert marshal.loads(file.read_bytes())
    assert "spin" in (folder / "cpu.collapsed").read_text()
    assert json.loads((folder / "profile.speedscope.json").read_text())["profiles"]
    assert "spin" in (folder / "profile.html").read_text()
    assert ledger.runs(tmp_path)[0].name == "first"
    again = run(tmp_path, "--from", folder, "--sort", "own", "--format", "json")
    assert again.returncode == 0, again.stderr
    assert "spin" in [each["function"] for each in json.loads(again.stdout)["top"]]


def test_a_run_can_be_sampled_alone(tmp_path: Path) -> None:
    done = run(tmp_path, "--no-trace", "--no-children", FAITHFUL)
    assert done.returncode == 0
    record = record_of(tmp_path)
    assert record.calls == []
    assert record.tracing_s == 0
    assert "spin" in names(record, record.cpu[0])


def test_the_hottest_functions_are_followed_in_a_second_run(tmp_path: Path) -> None:
    done = run(tmp_path, "--lines", "auto", FAITHFUL)
    assert done.stdout.count("at exit") == 1
    assert "sum(range(100))" in done.stderr
    hits = {line.source.strip(): line.hits for line in record_of(tmp_path).lines}
    assert hits["sum(range(100))"] > 100


def test_what_makes_no_sense_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for arguments, told in (
        (["--sort", "beauty", str(FAITHFUL)], "there is no order 'beauty'"),
        (["--save", "pdf", str(FAITHFUL)], "no format 'pdf'"),
        ([], "one of: a script"),
        (["--pid", "1", str(FAITHFUL)], "one of: a script"),
        (["--from", "none.json"], "cannot read none.json"),
    ):
        done = run(tmp_path, *arguments)
        assert done.returncode == 2
        assert told in done.stderr
        assert done.stdout == ""


def test_without_snakeviz_it_says_how_to_get_it(tmp_path: Path) -> None:
    done = run(tmp_path, "--open", FAITHFUL, PYTHONPATH=str(_no_snakeviz(tmp_path)))
    assert done.returncode == 0
    assert "pip install snakeviz" in done.stderr
    assert "profile.prof" in done.stderr


def _no_snakeviz(folder: Path) -> Path:
    """A place from which no module of that name can be found, whether it is installed or not."""
    code = "import sys\nsys.modules['snakeviz'] = None\nimport importlib.util\n"
    code += "find = importlib.util.find_spec\n"
    code += "importlib.util.find_spec = lambda name, *rest: None if name == 'snakeviz' else find(name, *rest)\n"
    place = folder / "hidden"
    place.mkdir()
    (place / "sitecustomize.py").write_text(code)
    return place


def test_the_names_of_the_library_lead_there(tmp_path: Path) -> None:
    """Also after the package of the same name has been imported."""
    (tmp_path / "names.py").write_text(
        "import headrace as hr\n"
        "import headrace.profiling.leak\n"
        "for _ in range(2):\n"
        "    with hr.profiling('block.prof', top_n=3) as p:\n"
        "        sorted(range(10), key=str)\n"
        "assert p.record.calls\n"
        "with hr.timed() as t:\n"
        "    pass\n"
        "assert t.seconds >= 0\n"
        "assert hr.timed(len)([1]) == 1 == hr.timed('length')(len)([1])\n"
        "assert callable(hr.timeit)\n"
    )
    done = python(tmp_path, "names.py")
    assert done.returncode == 0, done.stderr
    assert "sorted" in done.stderr
    assert (tmp_path / "block.prof").exists()


# Child processes.


@pytest.mark.parametrize("how", ["fork", "spawn", "executor", "by_hand", "program", "killed"])
def test_children_are_looked_at_too(how: str, tmp_path: Path) -> None:
    done = run(tmp_path, PROGRAMS / "families.py", how, PYTHONPATH=str(PROGRAMS))
    assert done.returncode == 0, done.stderr
    record = record_of(tmp_path)
    worked = []
    for child in record.children:
        assert child.record is not None
        assert child.pid != record.pid
        seconds = sum(stack.seconds for stack in child.record.cpu if "work" in names(child.record, stack))
        if seconds > 0.05:
            worked.append(child)
            assert child.cpu_s > 0.05
            assert "\n" not in child.command
    assert len(worked) == (2 if how in ("fork", "spawn", "executor") else 1), record.children
    assert record.children_cpu_s > 0.2
    assert "work" not in [record.frames[number].function for stack in record.cpu for number in stack.frames]


def test_children_keep_their_own_sitecustomize(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.MARK = 7\n")
    code = "import subprocess, sys\nchild = [sys.executable, '-c', 'import sys; sys.exit(MARK)']\n"
    code += "sys.exit(subprocess.run(child).returncode)\n"
    (tmp_path / "parent.py").write_text(code)
    done = run(tmp_path, "parent.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 7
    assert len(record_of(tmp_path).children) == 1


# A process that runs already.


@pytest.fixture
def running() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, str(PROGRAMS / "endless.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.fixture
def _py_spy() -> None:
    from headrace.errors import Unavailable

    try:
        find_py_spy()
    except Unavailable:
        assert not os.environ.get("CI"), "py-spy is missing"
        pytest.skip("py-spy is missing")


@pytest.mark.usefixtures("_py_spy")
def test_a_running_process_is_looked_at_from_outside(running: subprocess.Popen[str], tmp_path: Path) -> None:
    done = run(tmp_path, "--pid", str(running.pid), "--seconds", "1", "--format", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["top"][0]["function"] in ("compute", "<module>")
    record = record_of(tmp_path)
    assert record.attached
    assert record.pid == running.pid
    top = record.cpu[0]
    assert names(record, top)[-1] == "compute"
    assert top.lines[-1] == line_of("endless.py", "COMPUTE")
    assert record.frames[top.frames[-1]].line == top.lines[-1] - 2
    assert top.seconds > 0.5
    (waits,) = [stack for stack in record.waiting if stack.owner == "waiting"]
    assert waits.waits_for == "socket"
    assert waits.lines[-1] == line_of("endless.py", "RECEIVE")
    assert running.poll() is None


@pytest.mark.usefixtures("_py_spy")
def test_a_process_that_is_none_or_no_python_is_told(tmp_path: Path) -> None:
    done = run(tmp_path, "--pid", str(2**22 - 1))
    assert done.returncode == 2
    assert "there is no process" in done.stderr
    with subprocess.Popen(["sleep", "60"]) as process:
        done = run(tmp_path, "--pid", str(process.pid), "--seconds", "1")
        process.kill()
    assert done.returncode == 2
    assert "no Python" in done.stderr


@pytest.mark.usefixtures("_py_spy")
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can give up the right to look")
def test_who_may_not_look_is_told_what_to_do(running: subprocess.Popen[str], tmp_path: Path) -> None:
    command = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", HEADRACE, "profile"]
    command += ["--pid", str(running.pid), "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "does not let this process look" in done.stderr
    assert "--cap-add SYS_PTRACE" in done.stderr


def test_without_py_spy_it_says_how_to_get_it(tmp_path: Path) -> None:
    from headrace.errors import Unavailable

    bare = tmp_path / "bin" / "python"
    bare.parent.mkdir()
    before = sys.executable, os.environ["PATH"]
    try:
        sys.executable, os.environ["PATH"] = str(bare), str(bare.parent)
        with pytest.raises(Unavailable) as caught:
            attach(os.getpid(), 1)
    finally:
        sys.executable, os.environ["PATH"] = before
    assert caught.value.hint is not None
    assert "pip install" in caught.value.hint
