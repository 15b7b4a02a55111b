from __future__ import annotations

import base64
import cProfile
import hashlib
import html.parser
import json
import pstats
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.profiling.finding import Finding
from headrace.profiling.record import Call, Child, Frame, Line, Machine, Record, Stack
from headrace.profiling.render import (
    as_collapsed,
    as_diff_html,
    as_html,
    as_speedscope,
    as_table,
    flame,
    write_prof,
)
from headrace.profiling.render.totals import percent, place, seconds, short

HERE = Machine("abc", "a processor", 2, "Linux", "3.11")
FRAMES = [
    Frame("<module>", "/app/main.py", 1),
    Frame("handle", "/app/main.py", 10),
    Frame("parse", "/app/parsing.py", 4),
    Frame("loads", "/env/lib/python3.11/site-packages/fast/__init__.py", 99, "library"),
    Frame("<built-in method sum>", "~", 0, "builtin"),
]


def record(**fields: Any) -> Record:
    given_ = {"command": "python main.py", "directory": "/app", "wall_s": 3.0, "cpu_s": 2.0, "frames": FRAMES}
    return Record(**{"started": 1.0, "pid": 1, "machine": HERE, **given_, **fields})


SAMPLED = record(
    cpu=[
        Stack([0, 1, 2], [90, 12, 7], 0.75, 75, "MainThread"),
        Stack([0, 1, 2, 3], [90, 12, 8, 300], 0.5, 50, "MainThread"),
        Stack([0, 1, 4], [90, 14, 0], 0.25, 25, "MainThread"),
        Stack([1, 1, 1], [11, 11, 13], 0.5, 50, "pool_0"),
    ],
    waiting=[
        Stack([1, 2], [20, 88], 8.0, 80, "Task-1", "socket"),
        Stack([1, 2], [20, 88], 2.0, 20, "Task-2", "socket"),
    ],
)
TRACED = record(
    calls=[
        Call(0, 1, 1, 0.1, 2.0),
        Call(1, 4, 2, 0.2, 1.9, {0: (2, 2, 0.1, 1.9), 1: (2, 0, 0.1, 0.9)}),
        Call(4, 12_000, 12_000, 1.7, 1.7, {1: (12_000, 12_000, 1.7, 1.7)}),
    ]
)


def rows(table: str) -> list[list[str]]:
    """Cells of a table's lines, the head first."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()[2:]]


# The table.


def test_traced_functions_have_exact_calls() -> None:
    assert rows(as_table(TRACED)) == [
        ["own", "cumulative", "calls", "per call", "function", "file:line"],
        ["100 ms", "2.00 s", "1", "2.00 s", "<module>", "main.py:1"],
        ["200 ms", "1.90 s", "4/2", "950 ms", "handle", "main.py:10"],
        ["1.70 s", "1.70 s", "12,000", "142 µs", "<built-in method sum>", "built-in"],
    ]
    assert as_table(TRACED).startswith("3.00 s wall, 2.00 s CPU, 12,005 calls (12,003 primitive), 3 of 3 functions\n")


def test_without_tracing_samples_stand_in_for_calls() -> None:
    found = rows(as_table(SAMPLED))
    assert found[0] == ["own", "cumulative", "samples", "function", "file:line"]
    assert found[1] == ["500 ms", "2.00 s", "200", "handle", "main.py:10"], "recursion counts once"
    assert ["750 ms", "1.25 s", "125", "parse", "parsing.py:4"] in found
    assert ["500 ms", "500 ms", "50", "loads", "fast/__init__.py:99"] in found


@pytest.mark.parametrize(
    ("sort", "first"),
    [
        ("cumulative", "<module>"),
        ("cumtime", "<module>"),
        ("own", "<built-in method sum>"),
        ("tottime", "<built-in method sum>"),
        ("calls", "<built-in method sum>"),
        ("percall", "<module>"),
    ],
)
def test_the_order_is_the_reader_s(sort: str, first: str) -> None:
    assert rows(as_table(TRACED, sort=sort))[1][4] == first


def test_an_unknown_order_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no order 'colour'") as refused:
        as_table(TRACED, sort="colour")
    assert "cumulative, own, calls, percall" in str(refused.value.hint)


def test_only_the_top_is_shown_and_how_many_there_are_is_said() -> None:
    found = as_table(TRACED, top=1)
    assert len(rows(found)) == 2
    assert "1 of 3 functions" in found
    assert len(rows(as_table(TRACED, top=0))) == 4


def test_a_long_or_hostile_name_breaks_neither_width_nor_terminal() -> None:
    frames = [Frame("f" * 300 + "\x1b[31m\n", "/elsewhere/" + "d/" * 200 + "x.py", 7)]
    table = as_table(record(frames=frames, cpu=[Stack([0], [7], 1.0, 10)]))
    assert max(map(len, table.splitlines())) <= 120
    assert len(table.splitlines()) == 4
    assert "\x1b" not in table
    assert table.endswith("d/x.py:7")


def test_nothing_seen_is_said() -> None:
    assert "nothing was seen" in as_table(record())
    assert "all that was seen is waiting" in as_table(msgspec.structs.replace(SAMPLED, cpu=[]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (2.5e-8, "25 ns"),
        (9.996e-4, "1.00 ms"),
        (0.0999, "99.9 ms"),
        (0.99951, "1.00 s"),
        (12.34, "12.3 s"),
        (999.7, "1000 s"),
        (-0.25, "-250 ms"),
        (12_345.6, "12,346 s"),
    ],
)
def test_seconds_have_three_digits(value: float, text: str) -> None:
    assert seconds(value) == text


def test_a_share_is_a_percentage() -> None:
    assert [percent(each) for each in (0.0, 0.004, 0.0994, 0.0996, 0.5, -0.123)] == [
        "0 %",
        "0.4 %",
        "9.9 %",
        "10 %",
        "50 %",
        "-12 %",
    ]


def test_paths_are_those_that_people_know() -> None:
    assert short("/app/deep/x.py", "/app") == "deep/x.py"
    assert short("/apple/x.py", "/app") == "/apple/x.py"
    assert short("/app/.venv/lib/python3.11/site-packages/torch/nn/x.py", "/app") == "torch/nn/x.py"
    assert short("/usr/lib/python3.11/json/decoder.py") == "json/decoder.py"
    assert short(str(Path.cwd() / "x.py")) == "x.py"
    assert place(FRAMES[4]) == "built-in"


# pstats.


def fib(n: int) -> int:
    return n if n < 2 else fib(n - 1) + fib(n - 2)


def work() -> list[str]:
    return sorted(str(fib(n)) for n in range(12))


def traced_by_cprofile() -> tuple[dict[Any, Any], Record]:
    """What cProfile has, and the same as a record."""
    profile = cProfile.Profile()
    profile.runcall(work)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    numbers = {key: number for number, key in enumerate(stats)}
    frames = [Frame(function, file, line) for file, line, function in stats]
    calls = [
        Call(numbers[key], nc, cc, own, total, {numbers[caller]: each for caller, each in callers.items()})
        for key, (cc, nc, own, total, callers) in stats.items()
    ]
    return stats, record(frames=frames, calls=calls)


def test_a_prof_is_what_cprofile_would_have_written(tmp_path: Path) -> None:
    stats, traced = traced_by_cprofile()
    write_prof(traced, tmp_path / "run.prof")
    assert pstats.Stats(str(tmp_path / "run.prof")).stats == stats  # type: ignore[attr-defined]


@pytest.mark.parametrize("run", [TRACED, SAMPLED], ids=["traced", "sampled"])
def test_a_prof_opens_in_the_module_pstats(run: Record, tmp_path: Path) -> None:
    write_prof(run, tmp_path / "run.prof")
    done = subprocess.run(
        [sys.executable, "-m", "pstats", str(tmp_path / "run.prof")],
        input="sort cumtime\nstats\ncallers handle\nquit\n",
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert "main.py:10(handle)" in done.stdout
    assert "Error" not in done.stdout + done.stderr


@pytest.mark.parametrize("run", [TRACED, SAMPLED], ids=["traced", "sampled"])
def test_a_prof_opens_in_snakeviz(run: Record, tmp_path: Path) -> None:
    from snakeviz.stats import json_stats, table_rows

    write_prof(run, tmp_path / "run.prof")
    stats = pstats.Stats(str(tmp_path / "run.prof"))
    assert len(table_rows(stats)) == len(stats.stats)  # type: ignore[attr-defined]
    found = json_stats(stats)
    assert "/app/main.py:10(handle)" in found["/app/main.py:1(<module>)"]["children"]


def test_a_prof_of_nothing_opens_too(tmp_path: Path) -> None:
    from snakeviz.stats import json_stats, table_rows

    write_prof(record(), tmp_path / "run.prof")
    stats = pstats.Stats(str(tmp_path / "run.prof"))
    assert table_rows(stats)[0][0] == ["0", 0]
    assert json_stats(stats) == {}


def test_samples_become_calls_with_their_callers(tmp_path: Path) -> None:
    write_prof(SAMPLED, tmp_path / "run.prof")
    stats = pstats.Stats(str(tmp_path / "run.prof")).stats  # type: ignore[attr-defined]
    assert stats["/app/main.py", 10, "handle"][:4] == (200, 200, 0.5, 2.0)
    assert stats["/app/parsing.py", 4, "parse"] == (
        125,
        125,
        0.75,
        1.25,
        {("/app/main.py", 10, "handle"): (125, 125, 0.75, 1.25)},
    )


def test_a_caller_that_was_not_traced_is_there_all_the_same(tmp_path: Path) -> None:
    """Viewers look each caller up."""
    from snakeviz.stats import json_stats

    write_prof(record(calls=[Call(2, 1, 1, 0.5, 0.5, {1: (1, 1, 0.5, 0.5)})]), tmp_path / "run.prof")
    stats = pstats.Stats(str(tmp_path / "run.prof"))
    assert "/app/main.py:10(handle)" in json_stats(stats)


# Collapsed stacks and speedscope.


def test_collapsed_stacks_name_threads_and_what_is_waited_for() -> None:
    handled = "thread MainThread;<module> (main.py:1);handle (main.py:10)"
    assert as_collapsed(SAMPLED).splitlines() == [
        f"{handled};<built-in method sum> 250000",
        f"{handled};parse (parsing.py:4) 750000",
        f"{handled};parse (parsing.py:4);loads (fast/__init__.py:99) 500000",
        "thread pool_0;handle (main.py:10);handle (main.py:10);handle (main.py:10) 500000",
    ]
    assert as_collapsed(SAMPLED, "waiting") == "handle (main.py:10);parse (parsing.py:4);waits for: socket 10000000\n"
    with pytest.raises(ConfigError, match="no 'other' stacks"):
        as_collapsed(SAMPLED, "other")  # type: ignore[arg-type]


def test_a_separator_in_a_name_separates_nothing() -> None:
    frames = [Frame("a;b\nc 12", "x;y.py", 3)]
    assert as_collapsed(record(frames=frames, cpu=[Stack([0], [3], 1.0, 1)])) == "a,b c 12 (x,y.py:3) 1000000\n"


NAME = {"type": "string"}
NUMBERS = {"type": "array", "items": {"type": "number", "minimum": 0}}
# What https://www.speedscope.app/file-format-schema.json asks of the kind that is written, and nothing beside it.
SPEEDSCOPE = {
    "type": "object",
    "required": ["$schema", "shared", "profiles", "name", "exporter", "activeProfileIndex"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"const": "https://www.speedscope.app/file-format-schema.json"},
        "name": NAME,
        "exporter": NAME,
        "activeProfileIndex": {"const": 0},
        "shared": {
            "type": "object",
            "required": ["frames"],
            "properties": {
                "frames": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name"],
                        "additionalProperties": False,
                        "properties": {"name": NAME, "file": NAME, "line": {"type": "integer", "minimum": 1}},
                    },
                }
            },
        },
        "profiles": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["type", "name", "unit", "startValue", "endValue", "samples", "weights"],
                "additionalProperties": False,
                "properties": {
                    "type": {"const": "sampled"},
                    "name": NAME,
                    "unit": {"const": "seconds"},
                    "startValue": {"const": 0},
                    "endValue": {"type": "number"},
                    "samples": {"type": "array", "items": NUMBERS},
                    "weights": NUMBERS,
                },
            },
        },
    },
}


@pytest.mark.parametrize("run", [SAMPLED, TRACED, record()], ids=["sampled", "traced", "empty"])
def test_speedscope_gets_what_its_schema_asks_for(run: Record) -> None:
    jsonschema.validate(json.loads(as_speedscope(run)), SPEEDSCOPE)


def test_speedscope_has_a_profile_for_each_thread_and_one_of_waiting() -> None:
    child = Child("python child.py", 7, 1.0, msgspec.structs.replace(SAMPLED, waiting=[], cpu=SAMPLED.cpu[:1]))
    found = json.loads(as_speedscope(msgspec.structs.replace(SAMPLED, children=[child])))
    profiles = {each["name"]: each for each in found["profiles"]}
    assert {name: each["endValue"] for name, each in profiles.items()} == {
        "CPU: MainThread": 1.5,
        "CPU: pool_0": 0.5,
        "Waiting": 10.0,
        "CPU of python child.py (7)": 0.75,
    }
    frames = [each["name"] for each in found["shared"]["frames"]]
    assert len(frames) == len(set(frames)), "shared with the child"
    chain = [frames[number] for number in profiles["Waiting"]["samples"][0]]
    assert chain == ["handle", "parse", "waits for: socket"]


# The tree.


STACKS = st.lists(
    st.builds(
        lambda frames, seconds_, samples, waits: Stack(
            frames, [number + 5 for number in frames], seconds_, samples, "MainThread", waits
        ),
        st.lists(st.integers(0, 4), min_size=1, max_size=6),
        st.integers(1, 1000).map(lambda number: number / 64),
        st.integers(1, 50),
        st.sampled_from(["", "", "socket"]),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(STACKS)
def test_no_second_is_lost_or_doubled(stacks: list[Stack]) -> None:
    run = record(cpu=stacks, waiting=stacks)
    whole = sum(stack.seconds for stack in stacks)
    for tree in (flame.cpu(run, lambda frame: frame.file), flame.waiting(run, lambda frame: frame.file)):
        assert sum(tree.own) == pytest.approx(whole)
        assert (tree.total[0] if tree.total else 0) == pytest.approx(whole)
        assert sum(tree.samples[:1]) == sum(stack.samples for stack in stacks)
        for node in range(len(tree.frame)):
            below = sum(tree.total[child] for child in range(1, len(tree.frame)) if tree.parent[child] == node)
            assert tree.total[node] == pytest.approx(tree.own[node] + below)
        assert all(parent < node for node, parent in enumerate(tree.parent) if node)
    lines = [line.rpartition(" ") for line in as_collapsed(run).splitlines()]
    assert sum(int(count) for _, _, count in lines) == pytest.approx(whole * 1e6)
    assert len({name for name, _, _ in lines}) == len(lines)
    profiles = json.loads(as_speedscope(run))["profiles"]
    assert sum(profiles[0]["weights"]) == pytest.approx(whole)


@settings(max_examples=40)
@given(STACKS, STACKS)
def test_a_difference_keeps_the_seconds_of_both(before: list[Stack], after: list[Stack]) -> None:
    runs = record(cpu=before), record(cpu=after)
    tree = flame.difference(*((run, run.cpu, lambda frame: frame.file) for run in runs))
    whole = [sum(stack.seconds for stack in stacks) for stacks in (before, after)]
    assert [sum(tree.before[:1]), sum(tree.total[:1])] == pytest.approx(whole)
    for node in range(len(tree.frame)):
        for column in (tree.before, tree.total):
            below = sum(column[child] for child in range(1, len(tree.frame)) if tree.parent[child] == node)
            assert below <= column[node] + 1e-5


def named(tree: flame.Tree) -> dict[str, int]:
    return {tree.frames[frame][0]: node for node, frame in enumerate(tree.frame)}


def test_a_function_that_moved_in_its_file_is_the_same() -> None:
    moved = msgspec.structs.replace(SAMPLED, frames=[Frame(each.function, each.file, each.line + 9) for each in FRAMES])
    tree = flame.difference(*((run, run.cpu[:3], lambda frame: frame.file) for run in (SAMPLED, moved)))
    node = named(tree)["parse"]
    assert len(tree.frame) == 6
    assert (tree.before[node], tree.total[node]) == (1.25, 1.25)
    assert tree.frames[tree.frame[node]][2] == 13, "where it is now"


def test_a_copy_of_the_script_by_another_name_is_the_same() -> None:
    copied = [Frame(each.function, each.file.replace("main", "copy"), each.line) for each in FRAMES]
    before = msgspec.structs.replace(SAMPLED, arguments=["main.py"])
    after = msgspec.structs.replace(SAMPLED, arguments=["copy.py"], frames=copied)
    tree = data_of(as_diff_html(before, after))["graphs"][0]["tree"]
    assert tree["before"] == tree["total"]
    assert {file for _, file, _, _ in tree["frames"]} >= {"copy.py", "parsing.py"}
    assert "main.py" not in {file for _, file, _, _ in tree["frames"]}


def test_how_python_imports_is_not_drawn() -> None:
    frames = [*FRAMES, Frame("_load", "<frozen importlib._bootstrap>", 7, "library")]
    tree = flame.cpu(
        record(frames=frames, cpu=[Stack([0, 5, 5, 2, 5], [1, 2, 3, 4, 5], 1.0, 3)]), lambda frame: frame.file
    )
    assert [tree.frames[frame][0] for frame in tree.frame] == ["all", "<module> /app/main.py", "parse"]
    assert tree.own == [0, 0, 1.0]
    assert tree.lines == [[], [1, 1.0], [4, 1.0]]


def test_a_node_tells_its_lines_and_its_tasks() -> None:
    tree = flame.cpu(SAMPLED, lambda frame: frame.file)
    assert tree.lines[named(tree)["parse"]] == [7, 0.75, 8, 0.5]
    waiting = flame.waiting(SAMPLED, lambda frame: frame.file)
    count, *some = waiting.owners[named(waiting)["parse"]]
    assert (count, [waiting.names[each] for each in some]) == (2, ["Task-1", "Task-2"])


def test_what_is_below_a_pixel_is_left_out_and_counted() -> None:
    frames = [Frame(f"f{number}", "/app/x.py", number + 1) for number in range(1001)]
    cpu = [Stack([0], [1], 50_000.0, 1)] + [Stack([number], [1], 1.0, 1) for number in range(1, 1001)]
    tree = flame.cpu(record(frames=frames, cpu=cpu), lambda frame: frame.file)
    assert tree.total == [51_000, 50_000]
    assert tree.left_out == 1000
    assert len(tree.frames) == 2


def test_a_tree_does_not_outgrow_a_page() -> None:
    frames = [Frame(f"f{number}", "/app/x.py", number + 1) for number in range(350)]
    cpu = [Stack([number, *range(200, 350)], [1] * 151, 1.0, 1) for number in range(200)]
    tree = flame.cpu(record(frames=frames, cpu=cpu), lambda frame: frame.file)
    assert len(tree.frame) == flame.MOST_NODES
    assert tree.left_out
    assert tree.total[0] == 200


def test_threads_of_a_pool_are_one() -> None:
    assert flame.thread_names(["MainThread", "pool_0", "pool_1", "asyncio_3"]) == {
        "MainThread": "thread MainThread",
        "pool_0": "2 threads pool",
        "pool_1": "2 threads pool",
        "asyncio_3": "thread asyncio_3",
    }


# The page.


class Elements(html.parser.HTMLParser):
    """What stands in a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


HOSTILE = '</script><script>alert(1)</script><img src="http://example.com/" onerror="alert(1)">'


def hostile() -> tuple[Record, Finding]:
    frames = [Frame(HOSTILE, f"/app/{HOSTILE}.py", 3)]
    run = record(
        command=HOSTILE,
        frames=frames,
        cpu=[Stack([0], [3], 1.0, 10, HOSTILE), Stack([0], [3], 1.0, 10, "b")],
        waiting=[Stack([0], [3], 1.0, 10, HOSTILE, HOSTILE)],
        lines=[Line("/app/x.py", 3, HOSTILE, 1, 0.5, HOSTILE)],
        notes=[HOSTILE],
        commit=HOSTILE,
        children=[Child(HOSTILE, 7, 1.0, SAMPLED)],
    )
    return run, Finding("code", "warning", HOSTILE, HOSTILE, HOSTILE, f"/app/{HOSTILE}.py", 3)


@pytest.mark.parametrize("kind", ["run", "difference"])
def test_whatever_a_program_is_called_it_becomes_no_markup(kind: str) -> None:
    run, finding = hostile()
    page = as_html(run, [finding]) if kind == "run" else as_diff_html(run, run, [HOSTILE])
    found = Elements()
    found.feed(page)
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, _ in found.tags if tag in ("img", "link", "iframe", "object", "form", "base")]
    for tag, attributes in found.tags:
        bad = [name for name in attributes if name.startswith("on") or name in ("style", "src", "href")]
        assert not bad, f"{tag} has {bad}"


@pytest.mark.parametrize("page", [as_html(SAMPLED, []), as_diff_html(SAMPLED, SAMPLED)], ids=["run", "difference"])
def test_the_policy_of_a_page_allows_its_own_script_and_style_alone(page: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for name, content in (
        ("style-src", re.findall(r"<style>(.*?)</style>", page, re.DOTALL)),
        ("script-src", re.findall(r"<script>(.*?)</script>", page, re.DOTALL)),
    ):
        (text,) = content
        assert rules[name] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert not re.search(r"https?://", page)


def data_of(page: str) -> dict[str, Any]:
    (text,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_run_that_only_waits_opens_on_what_it_waits_for() -> None:
    assert data_of(as_html(msgspec.structs.replace(SAMPLED, cpu=[]), []))["first"] == "waiting"
    assert data_of(as_html(SAMPLED, []))["first"] == "cpu"


def test_windows_of_two_lengths_are_scaled_to_one() -> None:
    longer = msgspec.structs.replace(SAMPLED, wall_s=6.0, attached=True)
    before, after = SAMPLED, longer
    (tree, _) = (each["tree"] for each in data_of(as_diff_html(before, after))["graphs"])
    assert (tree["before"][0], tree["total"][0]) == (4.0, 2.0)
    (tree, _) = (
        each["tree"]
        for each in data_of(as_diff_html(before, msgspec.structs.replace(longer, attached=False)))["graphs"]
    )
    assert (tree["before"][0], tree["total"][0]) == (2.0, 2.0)


def test_the_page_says_under_which_conditions_it_was_measured() -> None:
    page = as_html(record(commit="f00d", rate_hz=97.0, notes=["one thing could not be seen"], cpu=SAMPLED.cpu), [])
    assert all(part in page for part in ("a processor, 2 cores", "f00d", "at 97 Hz", "one thing could not be seen"))
    assert "No rule found anything to say" in page
