"""A ladder's report: the same facts on a terminal, for programs, in Markdown and on a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.optimizing import drift, plot, report, summary
from headrace.optimizing.words import STATUSES, Cell, Noise, Predicted, Report, Row

HOSTILE = '</title><script src="https://evil.example/x.js">alert(1)</script>\x1b[2J\n| `a` __b__ & <img onerror=x>\x00'
BUDGET = {"cos_mean": 0.99, "spearman": 0.985}
# Elements that stand alone; of all others a page closes what it opens.
VOID = {"meta"}


def measured(rung: str, status: str, p50: float, cosine: float, **more: Any) -> Row:
    ratio = 10 / p50
    row = Row(
        rung,
        status,
        speedup=ratio,
        speedup_ci=(ratio * 0.95, ratio * 1.05),
        latency_ms={"p50": p50, "p95": p50 * 1.2},
        throughput=1e3 / p50,
        drift={"cos_mean": cosine, "cos_min": cosine - 0.001, "spearman": cosine, "batch_cos_min": 1.0},
        size_bytes=23 << 20,
        load_s=0.41,
        build_s=3.2,
        first_s=0.02,
        peak_bytes=300 << 20,
        batch=1,
        length=32,
        cells=[
            Cell(size, ratio, (ratio * 0.95, ratio * 1.05), ratio, p50, p50 * 1.2, 1e3 / p50, 12) for size in (1, 8)
        ],
    )
    return msgspec.structs.replace(row, **more)


ROWS = [
    measured("fp32", "baseline", 10.0, 1.0, speedup=1.0, speedup_ci=(1.0, 1.0), drift={"batch_cos_min": 0.9999}),
    measured("sdpa", "not_faster", 9.9, 0.9999999, reason="1.01 times the baseline's speed"),
    measured("ort", "ok", 4.0, 0.999999),
    measured("ort-int8-dynamic+packed", "ok", 3.9, 0.9951),
    measured("ort-int8-static", "inaccurate", 2.1, 0.81, reason="cos_mean 0.81 is under 0.99"),
    measured("bf16", "noisy", 8.0, 0.9998, reason="between 0.90 and 1.60 times the baseline's speed: cannot tell"),
    Row("torchao-int8", "unavailable", "torchao is not installed: pip install 'headrace[quant]'"),
    Row("nf4", "unavailable", "torchao is not installed: pip install 'headrace[quant]'"),
    Row("openvino", "crashed", "killed by SIGSEGV; the end of its log: " + "nothing that helps " * 30, build_s=1.0),
    Row("aot", "build_failed", "RuntimeError: no C++ compiler", build_s=2.0),
    Row("compile", "timeout", "not done within 120 s", build_s=120.0),
    Row("max-autotune", "out_of_memory", "used 900 MiB, more than the cap of 800 MiB"),
]


def ladder(rows: list[Row] = ROWS, **more: Any) -> Report:
    usual: dict[str, Any] = {
        "baseline": "fp32",
        "rows": rows,
        "chosen": "ort",
        "preset": "balanced",
        "objective": "latency",
        "task": "embed",
        "target": "sentence-transformers/all-MiniLM-L6-v2",
        "budget": BUDGET,
        "environment": {"device": "cpu", "threads": 2, "flags": ["avx2", "fma"], "packages": {"torch": "2.11.0"}},
        "noise": Noise(1.003, (0.98, 1.02), 1.001, False),
        "samples": {"count": 200, "evaluation": 136, "calibration": 64, "length_p50": 32},
        "seconds": 312.4,
        "headrace": "1.2.3",
    }
    return Report(**usual | more)


class Page(HTMLParser):
    """Reads a page as a browser would, and remembers what it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag and kind in ["", *attrs.get("class", "").split()]]


def test_the_rows_here_have_every_status() -> None:
    assert {row.status for row in ROWS} == set(STATUSES)


# ── JSON ──


def test_what_is_written_can_be_read_again() -> None:
    assert msgspec.json.decode(report.as_json(ladder()), type=Report) == ladder()


def test_json_has_the_fields_that_scripts_rely_on() -> None:
    found = json.loads(report.as_json(ladder()))
    assert {"baseline", "rows", "chosen", "preset", "environment"} <= set(found)
    row = next(each for each in found["rows"] if each["rung"] == "ort")
    assert {"rung", "status", "reason", "speedup", "speedup_ci", "latency_ms", "throughput", "drift"} <= set(row)
    assert {"size_bytes", "load_s", "build_s", "batch", "length"} <= set(row)
    assert row["speedup_ci"] == [2.375, 2.625]
    assert row["latency_ms"] == {"p50": 4.0, "p95": 4.8}
    assert row["drift"]["cos_mean"] == 0.999999


def test_a_rung_that_was_not_measured_has_the_same_fields() -> None:
    rows = json.loads(report.as_json(ladder()))["rows"]
    assert {frozenset(row) for row in rows} == {frozenset(Row.__struct_fields__)}


def test_three_files_are_written(tmp_path: Path) -> None:
    report.write(ladder(), tmp_path / "new" / "out")
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"report.json", "report.md", "report.html"}
    assert msgspec.json.decode((tmp_path / "new" / "out" / "report.json").read_bytes(), type=Report) == ladder()


# ── terminal ──


def test_the_table_says_what_was_found_of_each_rung() -> None:
    lines = report.as_table(ladder()).splitlines()
    assert " ".join(lines[0].split()) == "rung status speed-up p50 ms items/s cos_mean over budget size build"
    by_rung = {line.split()[0]: line for line in lines[1 : 1 + len(ROWS)]}
    assert list(by_rung) == [row.rung for row in ROWS]
    assert "2.50× [2.38, 2.62]" in by_rung["ort"]
    assert "23 MiB" in by_rung["ort"]
    assert "cos_mean 0.81" in by_rung["ort-int8-static"]
    assert "cos_mean" not in by_rung["ort-int8-dynamic+packed"]
    assert by_rung["nf4"].split()[2:] == ["–"] * 6


def test_below_the_table_stand_the_choice_and_what_to_do() -> None:
    told = " ".join(report.as_table(ladder()).split())
    assert "ort is chosen: 2.50× [2.38, 2.62] the speed of fp32, cos_mean 0.999999 (at least 0.99)" in told
    assert "simpler or ready sooner than ort-int8-dynamic+packed" in told
    assert "not tried: torchao-int8, nf4: torchao is not installed: pip install 'headrace[quant]'" in told
    assert "budget of drift, balanced: cos_mean ≥ 0.99, spearman ≥ 0.985" in told
    assert "control: fp32 beside itself 1.00× [0.98, 1.02]" in told
    assert "build_failed: aot: RuntimeError: no C++ compiler" in told


def test_when_the_baseline_stays_the_reason_is_said() -> None:
    kept = [row for row in ROWS if row.status != "ok"]
    assert summary.choice(ladder(kept, chosen="fp32")).startswith("fp32 stays: of 3 rungs measured, none is faster")
    assert "none takes less memory" in summary.choice(ladder(kept, chosen="fp32", objective="memory"))
    alone = summary.choice(ladder([ROWS[0], ROWS[6]], chosen="fp32"))
    assert alone == "fp32 stays: no other rung could be measured."


def test_the_only_rung_that_passed_is_called_so() -> None:
    told = summary.choice(ladder([ROWS[0], ROWS[2]]))
    assert told.endswith("; the only rung that passed.")


def test_what_a_new_length_takes_is_said_where_it_is_more_than_a_call() -> None:
    alone = Cell(1, 2.0, (1.9, 2.1), 2.0, 5.0, 6.0, 200.0, 4)

    def told(new_shape_ms: float | None) -> str:
        chosen = msgspec.structs.replace(ROWS[2], cells=[alone], batch=1, new_shape_ms=new_shape_ms)
        return summary.choice(ladder([ROWS[0], chosen, ROWS[3]]))

    assert told(43.2).endswith(" One item of a length not met before takes 43.2 ms more, that once.")
    assert "not met before" not in told(4.9) + told(None)


def test_short_and_long_items_stand_apart_and_where_the_chosen_is_slower_is_said() -> None:
    thirds = [
        Cell(32, 1.9, (1.8, 2.0), 1.9, 4.0, 5.0, 250.0, 4, lengths="short", length=9),
        Cell(32, 0.8, (0.7, 0.9), 0.8, 90.0, 95.0, 350.0, 4, lengths="long", length=201),
    ]
    chosen = msgspec.structs.replace(ROWS[2], cells=[*ROWS[2].cells, *thirds])
    told = ladder([ROWS[0], chosen, ROWS[3]])
    assert summary.choice(told).endswith(
        " Yet it is slower than fp32 at 32 a call (long, 201 tokens) 0.80× [0.70, 0.90]."
    )
    assert summary.main_cell(msgspec.structs.replace(chosen, batch=32)) is None, "a third is not what is decided by"
    for text in (report.as_markdown(told), " ".join(Page(report.as_html(told)).text)):
        assert "short, 9 tokens" in text
        assert "long, 201 tokens" in text
    assert "slower than fp32" not in summary.choice(ladder())


def test_how_near_a_cell_comes_to_the_device_stands_beside_its_times() -> None:
    cells = [msgspec.structs.replace(cell, share_of_peak=0.42) for cell in ROWS[2].cells]
    told = ladder([ROWS[0], msgspec.structs.replace(ROWS[2], cells=cells)])
    shown = table_of(report.as_markdown(told), "## By batch size")
    assert shown[0][8] == "of peak"
    assert [line[8] for line in shown[2:]] == ["–", "–", "42 %", "42 %"]
    assert "float32 on a CPU" in report.as_markdown(told)
    page = " ".join(Page(report.as_html(told)).text)
    assert "of peak" in page
    assert "42 %" in page
    assert "of peak" not in report.as_markdown(ladder()) + " ".join(Page(report.as_html(ladder())).text)


def test_a_choice_for_memory_says_how_much_memory() -> None:
    small = msgspec.structs.replace(ROWS[2], peak_bytes=100 << 20)
    told = summary.choice(ladder([ROWS[0], small, ROWS[3]], objective="memory"))
    assert "at most 100 MiB of memory where fp32 takes 300 MiB" in told
    assert told.endswith("the best for memory of 2 rungs that passed.")


def test_a_busy_machine_is_said_to_be_one() -> None:
    assert "busy" in report.as_table(ladder(noise=Noise(1.3, (0.8, 1.7), 1.0, True)))
    assert "control: not run" in report.as_table(ladder(noise=None))


FLOATS = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1)
NAMES = st.text(max_size=60) | st.sampled_from([HOSTILE, "a" * 300, "bf16+reduce-overhead+torchao-int8-weights"])
MEASURES = st.sampled_from(["cos_mean", "spearman", "kl_mean", "not_finite", "a_measure_of_ones_own_" * 4])
WHOLE = st.integers(0, 2**62)


def any_cells() -> st.SearchStrategy[Cell]:
    maybe = st.none() | FLOATS
    pair = st.tuples(FLOATS, FLOATS)
    return st.builds(Cell, WHOLE, FLOATS, pair, FLOATS, FLOATS, FLOATS, FLOATS, WHOLE, maybe, maybe, maybe)


@st.composite
def any_rows(draw: st.DrawFn) -> Row:
    pair = st.tuples(FLOATS, FLOATS)
    return Row(
        draw(NAMES),
        draw(st.sampled_from(STATUSES)),
        draw(NAMES),
        draw(st.none() | FLOATS),
        draw(st.none() | pair),
        draw(st.none() | st.fixed_dictionaries({"p50": FLOATS, "p95": FLOATS})),
        draw(st.none() | FLOATS),
        draw(st.dictionaries(MEASURES, FLOATS)),
        draw(st.none() | WHOLE),
        draw(st.none() | FLOATS),
        draw(st.none() | FLOATS),
        draw(st.none() | FLOATS),
        draw(st.none() | WHOLE),
        draw(st.none() | WHOLE),
        draw(st.none() | WHOLE),
        draw(st.lists(any_cells(), max_size=2)),
    )


@st.composite
def any_ladders(draw: st.DrawFn) -> Report:
    rows = [ROWS[0], *draw(st.lists(any_rows(), max_size=6))]
    return ladder(
        rows,
        chosen=draw(st.sampled_from([row.rung for row in rows])),
        objective=draw(st.sampled_from(["latency", "throughput", "memory"])),
        budget=draw(st.dictionaries(MEASURES, FLOATS, max_size=3)),
        task=draw(st.sampled_from(["embed", "generate"])),
        target=draw(NAMES),
    )


@given(any_ladders())
def test_whatever_was_found_the_table_fits_and_commands_no_terminal(found: Report) -> None:
    lines = report.as_table(found).split("\n")
    assert max(map(len, lines)) <= 120
    assert all(line.isprintable() for line in lines)
    for row in found.rows:
        assert len(report.live(row)) <= 120
        assert report.live(row).isprintable()


def test_progress_says_what_became_of_a_rung() -> None:
    ok, failed = report.live(ROWS[2]), report.live(ROWS[9])
    assert " ".join(ok.split()) == "ort ok 2.50× [2.38, 2.62], p50 4 ms, 250 items/s"
    assert failed.split(maxsplit=2) == ["aot", "build_failed", "RuntimeError: no C++ compiler"]


# ── language models ──


def written(rung: str, status: str, p50: float, tokens: float, bound: float | None, **more: Any) -> Row:
    row = measured(rung, status, p50, 1.0, drift={} if status == "baseline" else {"kl_mean": 0.001}, **more)
    cells = [
        msgspec.structs.replace(
            cell,
            prefill_ms=p50 / 4 * cell.batch,
            tokens_per_s=tokens * cell.batch,
            share_of_bandwidth=None if bound is None else bound / cell.batch,
        )
        for cell in row.cells
    ]
    return msgspec.structs.replace(row, cells=cells)


def writing(objective: str = "latency", bound: float | None = 0.51) -> Report:
    batch = 1 if objective == "latency" else 8
    base = written("fp32", "baseline", 200.0, 109, 0.15, speedup=1.0, speedup_ci=(1.0, 1.0), batch=batch)
    rows = [base, written("bf16+kv-static", "ok", 20.0, 758, bound, batch=batch), ROWS[6]]
    more = {"chosen": "bf16+kv-static", "budget": {"kl_mean": 0.02}, "target": "small-llama"}
    return ladder(rows, task="generate", objective=objective, **more)


def test_the_table_of_a_language_model_says_how_it_writes() -> None:
    lines = report.as_table(writing()).splitlines()
    head = "rung status speed-up tokens/s first ms of bound kl_mean over budget size build"
    assert " ".join(lines[0].split()) == head
    assert lines[1].split()[:6] == ["fp32", "baseline", "1×", "109", "50", "15"]
    assert "0.50× [0.47, 0.53]" in lines[2]
    assert lines[2].split()[5:9] == ["758", "5", "51", "%"]
    assert "at 1 texts a call" not in "".join(lines)
    assert "at 1 text a call; tokens/s: after the first one" in " ".join(lines)


def test_the_tokens_are_those_of_the_objectives_batch() -> None:
    lines = report.as_table(writing("throughput")).splitlines()
    assert lines[2].split()[5:9] == ["6064", "40", "6.38", "%"]
    assert "at 8 texts a call" in " ".join(lines)


def test_progress_says_how_a_language_model_writes() -> None:
    told = " ".join(report.live(writing().rows[1]).split())
    assert told == "bf16+kv-static ok 0.50× [0.47, 0.53], 758 tokens/s, first 5 ms, 51 % of bound"
    told = report.live(writing(bound=None).rows[1])
    assert told.endswith("758 tokens/s, first 5 ms")


def test_markdown_and_the_page_say_how_it_writes_at_each_batch_size() -> None:
    text = report.as_markdown(writing())
    assert table_of(text, "# headrace optimize")[0][3:6] == ["tokens/s", "first ms", "of bound"]
    cells = table_of(text, "## By batch size")
    assert cells[0][8:11] == ["tokens/s", "first ms", "of bound"]
    assert [line[8:11] for line in cells[4:]] == [["758", "5", "51 %"], ["6064", "40", "6.38 %"]]
    page = " ".join(Page(report.as_html(writing())).text)
    for told in ("tokens/s", "first ms", "of bound", "51 %", "6.38 %", "until the first token of all"):
        assert told in page
        assert told not in " ".join(Page(report.as_html(ladder())).text)
    assert "tokens/s" not in report.as_markdown(ladder()) + report.as_table(ladder())


def test_what_was_predicted_stands_in_the_reports() -> None:
    found = ladder(predicted=Predicted(22_700_000, {"fp32": 91 << 20, "bf16": 45 << 20}, "cpu", 8 << 30, 6 << 30))
    told = "22.7 M parameters, weights in memory about: fp32 91 MiB; bf16 45 MiB; this machine has 8 GiB"
    assert told in report.as_markdown(found)
    assert told in " ".join(Page(report.as_html(found)).text)
    assert msgspec.json.decode(report.as_json(found), type=Report) == found


# ── numbers ──


@given(FLOATS)
def test_numbers_stay_short_and_keep_three_digits(value: float) -> None:
    told = summary.number(value)
    assert len(told) <= 9
    if abs(value) < 1e300:  # the largest floats round up to infinity
        assert float(told) == pytest.approx(value, rel=0.06)


@pytest.mark.parametrize(
    ("count", "told"),
    [(None, "–"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (90 << 20, "90 MiB"), (7 << 40, "7 TiB")],
)
def test_sizes_are_said_in_their_unit(count: int | None, told: str) -> None:
    assert summary.size(count) == told


@pytest.mark.parametrize("task", ["embed", "classify", "logits"])
def test_reports_and_the_ladder_agree_on_what_is_a_breach(task: str) -> None:
    for preset in drift.PRESETS:
        for name, bound in drift.budget(task, preset, {}).items():
            for value in (bound, bound - 1e-5, bound + 1e-5):
                row = Row("ort", "ok", drift={name: value})
                told = drift.breaches({name: value}, {name: bound})
                assert bool(summary.breached(row, {name: bound})) == bool(told), (name, value, bound)


def test_the_worst_breach_is_the_one_furthest_out_for_its_bound() -> None:
    row = Row("ort", "inaccurate", drift={"top1": 0.97, "kl_mean": 0.9})
    assert summary.worst(row, {"top1": 0.98, "kl_mean": 0.02}) == "kl_mean 0.9"
    assert summary.worst(row, {"top1": 1.0, "kl_mean": 0.02}) == "top1 0.97"
    assert summary.worst(Row("x", "inaccurate", drift={"not_finite": 1.0}), BUDGET) == "not finite"


# ── Pareto front ──

COORDINATE = st.integers(1, 6).map(float) | st.floats(0.1, 100)


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=12))
def test_the_front_is_what_nothing_beats(some: list[tuple[float, float]]) -> None:
    rows = [
        Row(f"r{index}", "ok", latency_ms={"p50": latency}, drift={"kl_mean": lost})
        for index, (latency, lost) in enumerate(some)
    ]
    beaten = {
        f"r{index}"
        for index, (latency, lost) in enumerate(some)
        if any(a <= latency and b <= lost and (a < latency or b < lost) for a, b in some)
    }
    front = report.pareto(rows)
    assert len(front) == len(set(front))
    assert set(front) == {row.rung for row in rows} - beaten
    speeds = [some[int(rung[1:])][0] for rung in front]
    assert speeds == sorted(speeds)


def test_the_front_of_a_ladder() -> None:
    assert report.pareto(ROWS) == ["ort-int8-static", "ort-int8-dynamic+packed", "ort", "sdpa", "fp32"]


def test_what_was_not_measured_is_on_no_front() -> None:
    assert report.pareto([ROWS[6], ROWS[8]]) == []


# ── page ──


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    page = Page(report.as_html(ladder()))
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    assert not {"src", "href", "srcset", "data", "action"} & {name for _, attrs in page.elements for name in attrs}
    assert not re.search(r"https?:|url\(|@import", report.as_html(ladder()))
    assert "prefers-color-scheme: dark" in report.as_html(ladder())
    text = " ".join(page.text)
    for row in ROWS:
        assert row.rung in text
        assert summary.plain(row.reason) in text
    assert "torch 2.11.0" in text
    assert "cos_mean ≥ 0.99, spearman ≥ 0.985" in text


def test_a_page_shows_every_cell_with_its_interval() -> None:
    text = " ".join(Page(report.as_html(ladder())).text)
    assert text.count("2.50× [2.38, 2.62]") == 1 + 1 + 2 + 1  # its row, the choice, two batch sizes, the dot's tooltip


@given(any_ladders())
def test_no_rung_can_write_on_the_page(found: Report) -> None:
    page = Page(report.as_html(found))
    calm = Page(report.as_html(ladder()))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in calm.elements}
    names = {(tag, name) for tag, attrs in calm.elements for name in attrs}
    assert {(tag, name) for tag, attrs in page.elements for name in attrs} <= names


def test_hostile_words_are_shown_as_words() -> None:
    rows = [ROWS[0], measured(HOSTILE, HOSTILE, 3.0, 0.9, reason=HOSTILE), Row("x", "unavailable", HOSTILE)]
    found = ladder(rows, chosen=HOSTILE, target=HOSTILE, environment={HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]})
    page = Page(report.as_html(found))
    assert not page.of("script")
    assert not page.of("img")
    assert '<script src="https://evil.example/x.js">alert(1)</script>' in " ".join(page.text)
    marked = report.as_markdown(found)
    assert not re.search(r"(?<!\\)<", marked)
    assert not re.search(r"(?<!\\)`", marked)
    assert "\x1b" not in marked + report.as_html(found)


def table_of(text: str, title: str) -> list[list[str]]:
    lines = text[text.index(title) :].splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| ---")) - 1
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append([each.strip() for each in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def test_markdown_tables_are_as_wide_as_their_heads() -> None:
    rows = [*ROWS, Row("a|b", "build_failed", "x | y\nz")]
    text = report.as_markdown(ladder(rows))
    shown = table_of(text, "# headrace optimize")
    assert {len(line) for line in shown} == {10}
    assert len(shown) == 2 + len(rows)
    cells = table_of(text, "## By batch size")
    assert {len(line) for line in cells} == {9}
    assert len(cells) == 2 + sum(len(row.cells) for row in rows)


# ── drawing ──


def inside(x: float, y: float) -> bool:
    return plot.LEFT <= x <= plot.WIDTH - plot.RIGHT and plot.TOP <= y <= plot.HEIGHT - plot.BOTTOM


def check_drawing(drawing: str) -> Page:
    page = Page(drawing)
    assert page.of("circle")
    assert "nan" not in drawing.lower().replace("nano", "")
    for dot in page.of("circle"):
        assert inside(float(dot["cx"]), float(dot["cy"]))
    for point in page.of("polyline")[0]["points"].split():
        assert inside(*map(float, point.split(",")))
    for line in page.of("line"):
        assert inside(float(line["x1"]), float(line["y1"]))
        assert inside(float(line["x2"]), float(line["y2"]))
    for label in page.of("text", "label"):
        assert inside(float(label["x"]), float(label["y"]))
    return page


def test_the_drawing_shows_every_measured_rung_by_name() -> None:
    page = check_drawing(plot.scatter(ladder()))
    assert len(page.of("circle")) == 6
    assert len(page.of("circle", "chosen")) == 1
    assert len(page.of("line", "budget")) == 1
    assert len(page.of("text", "label")) == 6
    dots = {kind: page.of("circle", kind)[0] for kind in ("chosen", "baseline")}
    assert float(dots["chosen"]["cx"]) < float(dots["baseline"]["cx"])
    text = "".join(page.text)
    assert "1 − cos_mean (drift)" in text
    assert "≤ 1e-07" in text


def test_a_rung_within_the_budget_lies_below_its_line() -> None:
    page = check_drawing(plot.scatter(ladder()))
    line = float(page.of("line", "budget")[0]["y1"])
    below = [dot for dot in page.of("circle") if float(dot["cy"]) >= line]
    assert len(below) == 5


def test_a_crowd_of_rungs_keeps_its_labels_apart() -> None:
    crowd = [measured(f"rung-{index}", "ok", 4 + index * 0.01, 0.999) for index in range(20)]
    page = check_drawing(plot.scatter(ladder([ROWS[0], *crowd], chosen="rung-3")))
    labels = [(float(each["x"]), float(each["y"])) for each in page.of("text", "label")]
    assert len(labels) == 21
    for index, (x, y) in enumerate(labels):
        assert not any(abs(x - a) < 39 and abs(y - b) < 12 for a, b in labels[index + 1 :])


EXTREME = st.floats(1e-9, 1e9) | st.sampled_from([1.0, 1.0 + 1e-12, 5e-324, 1e300])


@given(
    st.lists(st.tuples(EXTREME, st.floats(0, 1e9) | st.sampled_from([0.0, 1e-8, 0.02, 1e300])), max_size=8),
    st.none() | st.floats(0, 1e6),
)
def test_points_stay_inside_the_frame(some: list[tuple[float, float]], bound: float | None) -> None:
    rows = [
        Row(f"r{index}", "ok", latency_ms={"p50": latency}, drift={"kl_mean": lost})
        for index, (latency, lost) in enumerate(some)
    ]
    drawing = plot.scatter(ladder([ROWS[0], *rows], chosen="fp32", budget={} if bound is None else {"kl_mean": bound}))
    if drawing:
        check_drawing(drawing)
    else:
        assert len(plot.points([ROWS[0], *rows], "kl_mean")) < 2


def test_one_point_is_no_drawing() -> None:
    assert plot.scatter(ladder([ROWS[0], ROWS[6]], chosen="fp32")) == ""
    Page(report.as_html(ladder([ROWS[0], ROWS[6]], chosen="fp32")))
