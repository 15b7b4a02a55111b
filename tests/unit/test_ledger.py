from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace import stats
from headrace.errors import ConfigError
from headrace.profiling import compare, ledger
from headrace.profiling.changes import Change, changes
from headrace.profiling.compare import Side
from headrace.profiling.ledger import Turns
from headrace.profiling.record import Call, Frame, Machine, Record, Stack, write

HERE = Machine("abc", "a processor", 2, "Linux 6.1 x86_64", "CPython 3.11.7", {"torch": "2.13.0"})
FRAMES = [
    Frame("main", "/app/main.py", 1),
    Frame("parse", "/app/parsing.py", 4),
    Frame("loads", "/usr/lib/python3.11/json/__init__.py", 299, "library"),
    Frame("store", "/app/storing.py", 8),
]


def record(**fields: Any) -> Record:
    given = {"command": "python main.py", "arguments": ["main.py"], "directory": "/app", "wall_s": 3.0, "cpu_s": 2.0}
    return Record(**{"started": 1.0, "pid": 1, "machine": HERE, "frames": FRAMES, "exit_status": 0, **given, **fields})


def sampled(parse: int, store: int, samples_s: float = 0.01) -> Record:
    """A run with so many samples of `parse`, a fifth of them below it in a library, and of `store`."""
    below = parse // 5
    cpu = [
        Stack([0, 1], [2, 5], (parse - below) * samples_s, parse - below, "MainThread"),
        Stack([0, 1, 2], [2, 5, 300], below * samples_s, below, "MainThread"),
        Stack([0, 3], [3, 9], store * samples_s, store, "MainThread"),
    ]
    return record(cpu=cpu, cpu_s=(parse + store) * samples_s, wall_s=(parse + store) * samples_s * 1.2)


# Storing.


def test_a_run_is_found_again_by_its_name(tmp_path: Path) -> None:
    stored = sampled(50, 50)
    run = ledger.store(stored, "before", tmp_path)
    (found,) = ledger.named("before", tmp_path)
    assert found == run
    assert ledger.read(found, tmp_path) == stored
    assert (tmp_path / ".headrace" / "profiles" / "index.jsonl").read_bytes().count(b"\n") == 1


def test_the_latest_of_a_name_counts_and_its_repeats_stand_before_it(tmp_path: Path) -> None:
    other = msgspec.structs.replace(HERE, fingerprint="other")
    runs = [
        ledger.store(each, "it", tmp_path)
        for each in (
            record(wall_s=1.0),
            record(wall_s=2.0, arguments=["main.py", "--fast"]),
            record(wall_s=3.0, machine=other),
            record(wall_s=4.0, commit="f00d"),
            record(wall_s=5.0),
        )
    ]
    ledger.store(record(wall_s=6.0), "another", tmp_path)
    assert ledger.named("it", tmp_path) == [runs[0], runs[4]]


def test_a_run_of_other_code_is_no_repeat(tmp_path: Path) -> None:
    code = tmp_path / "main.py"
    run = record(directory=str(tmp_path), frames=[Frame("main", str(code), 1), FRAMES[2]])
    code.write_text("a = 1\n")
    first = ledger.store(run, "it", tmp_path)
    second = ledger.store(run, "it", tmp_path)
    assert ledger.named("it", tmp_path) == [first, second]
    assert not ledger.outdated(second, run)
    code.write_text("a = 2\n")
    third = ledger.store(run, "it", tmp_path)
    assert ledger.named("it", tmp_path) == [third]
    assert ledger.changed(first, third) == [str(code)]
    assert ledger.outdated(second, run) == [str(code)]


def test_an_unknown_name_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run is stored as 'before'") as nothing:
        ledger.named("before", tmp_path)
    assert "--name" in str(nothing.value.hint)
    ledger.store(record(), "one", tmp_path)
    ledger.store(record(), "two", tmp_path)
    with pytest.raises(ConfigError) as refused:
        ledger.named("before", tmp_path)
    assert refused.value.hint == "known are two, one"


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "a b", "x" * 81, "a\n"])
def test_a_name_is_no_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        ledger.store(record(), name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_that_is_said(tmp_path: Path) -> None:
    (tmp_path / ".headrace").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write"):
        ledger.store(record(), "it", tmp_path)


STORE_MANY = """
import sys
import msgspec
from headrace.profiling import ledger, record
run = record.read(ledger.Path("run.json"))
for number in range(25):
    ledger.store(msgspec.structs.replace(run, wall_s=float(number)), sys.argv[1])
"""


def test_many_processes_may_store_at_once(tmp_path: Path) -> None:
    write(sampled(50, 50), tmp_path / "run.json")
    processes = [
        subprocess.Popen([sys.executable, "-c", STORE_MANY, f"p{number}"], cwd=tmp_path) for number in range(6)
    ]
    assert [process.wait(25) for process in processes] == [0] * 6
    found = ledger.runs(tmp_path)
    assert len({run.ident for run in found}) == 150
    for number in range(6):
        walls = [run.wall_s for run in found if run.name == f"p{number}"]
        assert walls == list(range(25))
    folder = tmp_path / ledger.FOLDER
    assert {path.name for path in folder.iterdir()} == {".gitignore", "index.jsonl", *(run.file for run in found)}


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    first = ledger.store(record(), "it", tmp_path)
    index = tmp_path / ledger.FOLDER / "index.jsonl"
    index.write_bytes(index.read_bytes() + b'{"type":"run","ident":"half')
    second = ledger.store(record(), "it", tmp_path)
    assert ledger.named("it", tmp_path) == [first, second]


def test_a_record_that_is_gone_is_said(tmp_path: Path) -> None:
    run = ledger.store(record(), "it", tmp_path)
    (tmp_path / ledger.FOLDER / run.file).unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        compare.find("it", tmp_path)


def test_a_file_is_a_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_bytes(msgspec.json.encode(record(wall_s=7.0)))
    (tmp_path / "plain").write_bytes(msgspec.json.encode(record(wall_s=8.0)))
    assert compare.find("run.json").record.wall_s == 7.0
    assert compare.find(str(tmp_path / "run.json")).record.wall_s == 7.0
    assert compare.find("plain").record.wall_s == 8.0
    ledger.store(record(wall_s=9.0), "plain")
    assert compare.find("plain").record.wall_s == 9.0, "a name of the ledger comes first"


# Machines.


def test_this_machine_is_like_itself_and_unlike_another() -> None:
    here = ledger.machine()
    assert here == ledger.machine()
    assert here.cores >= 1
    assert here.processor
    assert here.packages["torch"]
    facts = msgspec.to_builtins(here)
    del facts["fingerprint"]
    assert ledger.fingerprint(facts) == here.fingerprint
    for name, value in (("cores", 99), ("processor", "x"), ("system", "x"), ("python", "x"), ("packages", {"a": "1"})):
        assert ledger.fingerprint({**facts, name: value}) != here.fingerprint, name


def test_what_differs_between_two_machines_is_named() -> None:
    other = msgspec.structs.replace(HERE, fingerprint="x", cores=8, packages={"torch": "2.12.0", "numpy": "2.4"})
    assert ledger.unlike(HERE, HERE) == []
    assert ledger.unlike(HERE, other) == ["cores 2 and 8", "numpy none and 2.4", "torch 2.13.0 and 2.12.0"]
    runs = Side("before", sampled(9, 9)), Side("after", msgspec.structs.replace(sampled(9, 9), machine=other))
    with pytest.raises(ConfigError, match="did not run on the same machine: cores 2 and 8; numpy") as refused:
        compare.compare(*runs)
    assert "--anyway" in str(refused.value.hint)
    assert "unlike machines: cores 2 and 8" in compare.compare(*runs, anyway=True).notes


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_says_whether_files_were_changed(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        options = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *options, *words], check=True, capture_output=True, timeout=20)

    assert ledger.commit(tmp_path) == ""
    git("init")
    (tmp_path / "a.py").write_text("a = 1\n")
    git("add", "a.py")
    git("commit", "-m", "one")
    clean = ledger.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "a.py").write_text("a = 2\n")
    assert ledger.commit(tmp_path) == f"{clean}-dirty"
    assert ledger.commit(tmp_path / "nowhere") == ""


# What a comparison says of the whole run.


def turns(*pairs: tuple[float, float]) -> Turns:
    return Turns("a", "b", 1.0, list(pairs), list(pairs))


def judged(*pairs: tuple[float, float]) -> compare.Comparison:
    return compare.compare(Side("before", sampled(50, 50)), Side("after", sampled(50, 50)), turns(*pairs))


def test_faster_outside_the_noise_is_said_with_its_interval() -> None:
    found = judged((1.0, 0.80), (2.0, 1.66), (1.0, 0.82), (1.1, 0.90), (1.0, 0.84), (1.5, 1.20))
    assert found.code == "faster"
    assert found.verdict.startswith("faster by 18 % [17, 20]: wall time 1.05 s → ")
    assert found.verdict.endswith("(6 pairs in turns)")
    assert found.worth.startswith("worth it: 18 % of the run is saved")
    assert compare.slower_by(found) == 0


def test_slower_too() -> None:
    found = judged(*[(1.0, 1.25), (1.0, 1.24), (1.0, 1.26)] * 3)
    assert found.verdict.startswith("slower by 25 % [24, 26]")
    assert found.worth.startswith("not worth it by time: the run takes 25 % more")
    assert compare.slower_by(found) == pytest.approx(0.25)


def test_a_difference_inside_the_noise_is_none() -> None:
    found = judged((1.0, 0.9), (1.0, 1.12), (1.0, 0.97), (1.0, 1.05), (1.0, 0.88), (1.0, 1.1))
    assert found.code == "cannot_tell"
    assert found.verdict.startswith("cannot tell: noise 11 %: ")
    assert found.worth == "nothing to be seen in the whole run"
    assert compare.slower_by(found) == 0


def test_a_small_gain_is_a_gain_but_hardly_worth_it() -> None:
    found = judged(*[(1.0, 0.990), (1.0, 0.989), (1.0, 0.991)] * 4)
    assert found.code == "faster"
    assert found.worth.startswith("hardly worth it by time alone: 1.0 % of the run is saved")


def test_processor_time_tells_where_wall_time_cannot() -> None:
    walls = [(1.0, 0.7), (1.0, 1.4), (1.0, 0.9), (1.0, 1.1), (1.0, 1.0)]
    found = compare.compare(
        Side("before", sampled(50, 50)), Side("after", sampled(50, 50)), Turns("a", "b", 1.0, walls, [(1.0, 0.5)] * 5)
    )
    assert found.code == "faster"
    assert found.verdict.startswith("cannot tell: noise 35 %: wall time")
    assert "faster by 50 % [50, 50]: CPU time" in found.verdict


def test_four_pairs_are_too_few() -> None:
    found = judged(*[(1.0, 0.5)] * 4)
    assert found.code == "unknown"
    assert found.verdict.startswith("4 runs each, fewer than 5 cannot tell noise")


def test_equal_commands_are_rarely_told_apart() -> None:
    """At 95 % confidence one comparison in twenty may be wrong; five pairs are a little worse than that."""
    draw, wrong = random.Random(4), 0
    for _ in range(100):
        pairs = [(draw.gauss(1, 0.05), draw.gauss(1, 0.05)) for _ in range(8)]
        low, high = stats.interval([after / before for before, after in pairs], seed=1)
        wrong += not low <= 1 <= high
    assert wrong <= 14


def test_one_run_each_cannot_tell_noise() -> None:
    found = compare.compare(Side("before", record()), Side("after", record(wall_s=1.5, cpu_s=1.0)))
    assert found.code == "unknown"
    assert found.verdict == (
        "one run each cannot tell noise: wall time 3.00 s → 1.50 s, 50 % less; CPU time 2.00 s → 1.00 s, 50 % less"
    )
    back = compare.compare(Side("before", record()), Side("after", record(wall_s=3.9)))
    assert compare.slower_by(back) == pytest.approx(0.3), "what was seen counts where noise is unknown"


def test_stored_repeats_tell_noise_less_well(tmp_path: Path) -> None:
    for number in range(5):
        ledger.store(record(wall_s=3.0 + number / 100, cpu_s=2.0), "before", tmp_path)
        ledger.store(record(wall_s=2.0 + number / 100, cpu_s=1.0, arguments=["new.py"]), "after", tmp_path)
    found = compare.compare(compare.find("before", tmp_path), compare.find("after", tmp_path))
    assert found.code == "faster"
    assert found.verdict.startswith("faster by 33 % [32, 34]: wall time 3.02 s → 2.02 s")
    assert found.verdict.endswith("(5 stored runs each)")
    assert any("not taken in turns" in note for note in found.notes)


def test_what_was_measured_in_turns_is_found_again(tmp_path: Path) -> None:
    before, after = (ledger.store(record(), name, tmp_path) for name in ("before", "after"))
    assert ledger.turns_of(before, after, tmp_path) is None
    for factor in (0.5, 0.6):
        ledger.note_turns(Turns(before.ident, after.ident, 1.0, [(1.0, factor)] * 5, [(1.0, factor)] * 5), tmp_path)
    found = ledger.turns_of(before, after, tmp_path)
    assert found is not None
    assert found.wall_s[0] == (1.0, 0.6), "the latest"
    assert ledger.turns_of(after, before, tmp_path) is None


def test_windows_on_running_processes_have_no_length() -> None:
    before, after = (msgspec.structs.replace(sampled(80, 20), attached=True, wall_s=wall_s) for wall_s in (5.0, 10.0))
    found = compare.compare(Side("before", before), Side("after", after))
    assert found.measures == []
    assert "only shares can be compared" in found.verdict
    assert found.changes[0].before_s == pytest.approx(1.6), "as if it had been watched for ten seconds too"


# What a comparison says of functions.


def changed(before: Record, after: Record) -> dict[str, Change]:
    return {each.function: each for each in changes(before, after)}


def test_a_function_has_what_it_calls_in_libraries_and_its_share() -> None:
    found = changed(sampled(300, 100), sampled(100, 100))
    assert list(found) == ["parse", "store"]
    parse = found["parse"]
    assert (parse.before_s, parse.after_s) == (pytest.approx(3.0), pytest.approx(1.0))
    assert (parse.share_before, parse.share_after) == (0.75, 0.5)
    assert parse.of_run == pytest.approx(-0.5)
    assert parse.where == "parsing.py:4"
    assert parse.outside is True
    assert found["store"].outside is False


def test_a_copy_of_the_script_by_another_name_is_the_same_program() -> None:
    before, after = sampled(300, 100), sampled(100, 100)
    frames = [msgspec.structs.replace(each, file=each.file.replace("main", "copy")) for each in FRAMES]
    cpu = [msgspec.structs.replace(stack, frames=[0, *stack.frames[2:]]) for stack in after.cpu]
    renamed = msgspec.structs.replace(after, frames=frames, cpu=cpu, arguments=["copy.py"])
    first = msgspec.structs.replace(before, cpu=[msgspec.structs.replace(stack, frames=[0]) for stack in before.cpu])
    found = changed(first, renamed)
    assert set(found) == {"main"}
    assert found["main"].where == "copy.py:1"


def test_a_machine_that_is_slower_as_a_whole_is_no_change_of_a_function() -> None:
    found = changed(sampled(300, 100), sampled(600, 200))
    assert [each.outside for each in found.values()] == [None, None]
    said = compare.compare(Side("before", sampled(300, 100)), Side("after", sampled(600, 200))).worth
    assert "on a machine of another speed it would look the same" in said


def test_few_samples_tell_nothing() -> None:
    found = compare.compare(Side("before", sampled(5, 4)), Side("after", sampled(3, 4)))
    assert not any(each.outside for each in found.changes)
    assert found.worth == "no function changed by more than sampling explains"


def test_samples_alone_tell_whether_it_was_worth_it() -> None:
    found = compare.compare(Side("before", sampled(300, 100)), Side("after", sampled(100, 100)))
    assert found.code == "unknown"
    assert found.worth.startswith(
        "worth it by the samples: `parse` takes 2.00 s less, 50 % of all running code before (share 75 % → 50 %)"
    )
    worse = compare.compare(Side("before", sampled(100, 100)), Side("after", sampled(300, 100)))
    assert worse.worth.startswith("not worth it by the samples: `parse` takes 2.00 s more")
    small = compare.compare(Side("before", sampled(100, 9900)), Side("after", sampled(10, 9900)))
    assert small.worth.startswith("hardly worth it: `parse` takes 900 ms less, 0.9 % of all")


def test_sampling_the_same_program_twice_hardly_ever_finds_a_change() -> None:
    draw, found = random.Random(7), 0
    for _ in range(150):
        counts = []
        for _ in range(2):
            parse = sum(draw.random() < 0.6 for _ in range(400))
            counts.append(sampled(parse, 400 - parse))
        found += sum(each.outside is True for each in changes(*counts))
    assert found <= 3


def test_waiting_is_told_apart_from_running_and_by_what_is_waited_for() -> None:
    waits = [Stack([0, 1], [2, 5], 9.0, 900, "Task-1", "socket"), Stack([0, 1], [2, 6], 1.0, 100, "Task-1", "sleep")]
    before, after = (record(waiting=[msgspec.structs.replace(waits[0], seconds=s), waits[1]]) for s in (9.0, 4.0))
    found = changes(before, after)
    assert [(each.kind, each.function) for each in found] == [
        ("waiting", "parse, waits for: socket"),
        ("waiting", "parse, waits for: sleep"),
    ]
    assert found[0].of_run == pytest.approx(-0.5)


def test_without_samples_exact_counts_are_compared_and_nothing_is_said_of_noise() -> None:
    before, after = (record(calls=[Call(1, 10, 10, own_s, own_s)]) for own_s in (1.0, 0.4))
    (found,) = changes(before, after)
    assert (found.function, found.before_s, found.after_s) == ("parse", 1.0, 0.4)
    assert (found.noise_s, found.outside) == (None, None)


def test_notes_say_what_else_differs(tmp_path: Path) -> None:
    code = tmp_path / "main.py"
    frames = [Frame("main", str(code), 1)]
    run = record(directory=str(tmp_path), frames=frames, commit="aaa")
    code.write_text("a = 1\n")
    ledger.store(run, "before", tmp_path)
    ledger.store(msgspec.structs.replace(run, tracing_s=0.5), "same", tmp_path)
    code.write_text("a = 2\n")
    ledger.store(msgspec.structs.replace(run, commit="bbb", arguments=["other.py"], command="c"), "after", tmp_path)
    before, same, after = (compare.find(name, tmp_path) for name in ("before", "same", "after"))
    notes = compare.compare(before, after).notes
    assert "the commands differ: python main.py and c" in notes
    assert "commit aaa and bbb" in notes
    assert "changed: main.py" in notes
    notes = compare.compare(before, same).notes
    assert any(note.startswith("no file of the program") for note in notes)
    assert "tracing took 0 s and 500 ms of these runs" in notes


# Intervals.


def test_an_interval_holds_the_median_nineteen_times_in_twenty() -> None:
    draw, held = random.Random(3), 0
    for seed in range(100):
        low, high = stats.interval([draw.gauss(5, 1) for _ in range(12)], seed=seed)
        held += low <= 5 <= high
    assert held >= 88


def test_a_ratio_of_medians_has_an_interval_too() -> None:
    low, high = stats.ratio_interval([2.0, 2.1, 1.9, 2.05, 1.95], [1.0, 1.02, 0.98, 1.01, 0.99])
    assert 1.85 < low < 2 < high < 2.15
