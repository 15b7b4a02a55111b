"""`headrace compare` as it is typed: stored runs and files, measured again in turns, as a page, as a gate of a CI."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import HEADRACE, wait_until
from headrace.profiling import ledger
from headrace.profiling.record import Frame, Record, Stack, write

FRAMES = [Frame("main", "main.py", 1), Frame("work", "main.py", 2)]
# Each run notes that it was there; the second argument says how much there is to do.
PROGRAM = """\
import sys
with open(sys.argv[1], "a") as notes:
    notes.write(sys.argv[0][0])
total = 0
for number in range(int(sys.argv[2])):
    total += number * number
"""


def run_of(folder: Path, *arguments: str, work: int = 300) -> Record:
    """What a profile of a program in this folder would have recorded."""
    cpu = [Stack([0, 1], [1, 3], work / 100, work, "MainThread"), Stack([0], [1], 1.0, 100, "MainThread")]
    return Record(
        command=" ".join(["python", *arguments]),
        arguments=list(arguments),
        directory=str(folder),
        started=1.0,
        pid=1,
        machine=ledger.machine(),
        wall_s=1 + work / 100,
        cpu_s=1 + work / 100,
        exit_status=0,
        frames=FRAMES,
        cpu=cpu,
    )


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HEADRACE, "compare", *arguments], capture_output=True, text=True, encoding="utf-8", timeout=60, cwd=folder
    )


def document(folder: Path, *arguments: str) -> dict[str, Any]:
    done = compare(folder, *arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "quiet where no one looks on"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with a stored run of `a.py` and one of `b.py`, which does an eighth of the work."""
    for name, work in (("a.py", "1200000"), ("b.py", "150000")):
        (tmp_path / name).write_text(PROGRAM)
        record = run_of(tmp_path, name, "notes", work, work=300 if name == "a.py" else 40)
        ledger.store(record, "before" if name == "a.py" else "after", tmp_path)
    return tmp_path


def test_one_run_each_says_what_changed_and_that_noise_is_unknown(two: Path) -> None:
    done = compare(two, "before", "after")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert "one run each cannot tell noise: wall time 4.00 s → 1.40 s, 65 % less" in done.stdout
    assert "worth it by the samples: `work` takes 2.60 s less" in done.stdout
    row = "3.00 s 400 ms -2.60 s 75 % → 29 % -65 % outside work main.py:2"
    assert row.split() in lines


def test_measured_again_in_turns_it_is_told_from_noise_and_kept(two: Path) -> None:
    found = document(two, "before", "after", "--rerun", "5")
    assert (two / "notes").read_text() == "ab" * 6, "each once to warm up, then in turns"
    assert found["code"] == "faster"
    assert found["verdict"].startswith(("faster by", "cannot tell: noise")), "wall time may drown; CPU time tells"
    wall, cpu = found["measures"]
    assert [wall["what"], wall["way"], wall["runs"]] == ["wall", "turns", 5]
    low, high = cpu["interval"]
    assert low <= cpu["ratio"] <= high < 1
    assert cpu["before_s"] > cpu["after_s"] > 0
    again = document(two, "before", "after")
    assert again["measures"] == found["measures"], "kept with the stored runs"
    assert (two / "notes").read_text() == "ab" * 6


def test_the_same_command_twice_is_noise(two: Path) -> None:
    found = document(two, "after", "after", "--rerun", "8")
    assert any("both commands are the same" in note for note in found["notes"])
    walls = next(each for each in found["measures"] if each["what"] == "wall")
    assert 0.4 < walls["ratio"] < 2.5


def test_a_slowdown_fails_a_gate_and_a_gain_does_not(two: Path) -> None:
    assert compare(two, "after", "before", "--fail-slower", "10").returncode == 1
    assert compare(two, "after", "before", "--fail-slower", "500").returncode == 0
    assert compare(two, "before", "after", "--fail-slower", "10").returncode == 0
    done = compare(two, "after", "before", "--rerun", "5", "--fail-slower", "10")
    assert done.returncode == 1, done.stdout
    assert "slower by" in done.stdout


def test_the_page_has_the_verdict_and_both_runs(two: Path) -> None:
    done = compare(two, "before", "after", "--html", "diff.html")
    assert done.returncode == 0
    page = (two / "diff.html").read_text()
    assert "one run each cannot tell noise" in page
    tree = json.loads(page.partition('id="data">')[2].partition("</script>")[0])["graphs"][0]["tree"]
    assert (tree["before"][0], tree["total"][0]) == (4.0, 1.4)
    assert "cannot write" in compare(two, "before", "after", "--html", "nowhere/diff.html").stderr


def test_files_of_records_are_compared_as_stored_runs_are(two: Path) -> None:
    for name in ("before", "after"):
        write(ledger.read(ledger.named(name, two)[-1], two), two / f"{name}.json")
    found = document(two, "before.json", "after.json")
    assert found["code"] == "unknown"
    assert found["changes"] == document(two, "before", "after")["changes"]


def test_unlike_machines_are_refused_by_what_differs(two: Path) -> None:
    machine = msgspec.structs.replace(ledger.machine(), fingerprint="x", processor="a slow one")
    ledger.store(msgspec.structs.replace(run_of(two, "b.py"), machine=machine), "elsewhere", two)
    done = compare(two, "before", "elsewhere")
    assert done.returncode == 2
    assert "did not run on the same machine: processor" in done.stderr
    assert "a slow one" in done.stderr
    assert "--anyway" in done.stderr
    assert compare(two, "before", "elsewhere", "--anyway").returncode == 0


def test_what_is_wrong_with_a_run_is_said_in_a_line(two: Path) -> None:
    (two / "broken.py").write_text("import sys\nprint('no input', file=sys.stderr)\nsys.exit(3)\n")
    ledger.store(run_of(two, "broken.py"), "broken", two)
    ledger.store(msgspec.structs.replace(run_of(two), arguments=[]), "live", two)
    ledger.store(run_of(two / "gone", "a.py"), "gone", two)
    (two / "no.json").write_text("{}")
    for arguments, told in (
        (["before", "nothing"], "no run is stored as 'nothing'"),
        (["before", "no.json"], "no.json is no record of a run"),
        (["before", "missing.json"], "cannot read missing.json"),
        (["before", "broken", "--rerun", "5"], "broken.py ended with 3, not 0\n  no input"),
        (["before", "live", "--rerun", "5"], "live keeps no command that could be run again"),
        (["before", "gone", "--rerun", "5"], "the directory of gone is gone"),
        (["before", "after", "--rerun", "4"], "4 is not in the range"),
    ):
        done = compare(two, *arguments)
        assert done.returncode == 2, arguments
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_a_command_that_hangs_is_ended_when_time_is_over(two: Path) -> None:
    code = "import os, subprocess\nopen('pid', 'w').write(str(os.getpid()))\nsubprocess.run(['sleep', '1000'])\n"
    (two / "hangs.py").write_text(code)
    ledger.store(run_of(two, "hangs.py"), "hangs", two)
    done = compare(two, "hangs", "before", "--rerun", "5", "--time-limit", "2")
    assert done.returncode == 2
    assert "no pair of runs within 2 s" in done.stderr
    group = (two / "pid").read_text()

    def left() -> bool:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
                if of_group == group and state != "Z":
                    return True
        return False

    wait_until(lambda: not left(), 5, "the program and what it has started are gone")


def test_files_that_changed_since_are_said_when_they_run_again(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(PROGRAM)
        record = run_of(tmp_path, name, "notes", "1000")
        ledger.store(msgspec.structs.replace(record, frames=[Frame("main", name, 1)] * 2), name[0], tmp_path)
    (tmp_path / "a.py").write_text(PROGRAM + "\n")
    found = document(tmp_path, "a", "b", "--rerun", "5")
    assert "a ran as its files are now; changed since it was stored: a.py" in found["notes"]
    assert not any(note.startswith("b ran") for note in found["notes"])
