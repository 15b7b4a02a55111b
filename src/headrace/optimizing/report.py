"""A ladder's result for a terminal, for programs, for a pull request and for a browser."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from headrace.optimizing import summary
from headrace.optimizing.page import as_html
from headrace.optimizing.plot import pareto
from headrace.optimizing.words import Report, Row

__all__ = ["as_html", "as_json", "as_markdown", "as_table", "live", "pareto", "write"]

WIDTH = 120
_GAP = "  "
# Of the table's columns: words, which may be cut; numbers stay whole.
_WORDS = (0, 5, 6)


def write(report: Report, directory: Path) -> None:
    """`report.json`, `report.md` and `report.html` in a directory, which is made where it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("json", as_json), ("md", as_markdown), ("html", as_html)):
        (directory / f"report.{name}").write_text(content(report), encoding="utf-8")


def as_json(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def live(row: Row) -> str:
    """One line about a rung that is done."""
    told = []
    if row.latency_ms:
        told = [summary.speed_of(row), f"p50 {summary.optional(summary.p50(row))} ms"]
        told.append(f"{summary.optional(row.throughput)} items/s")
    if row.reason:
        told.append(summary.plain(row.reason))
    line = f"{summary.clip(summary.plain(row.rung), 28):28}  {row.status:13}  {', '.join(told)}"
    return summary.clip(line.rstrip(), WIDTH)


def as_table(report: Report) -> str:
    """Aligned text, 120 columns at most, and below it what was chosen, why, and what else could be tried."""
    rows = [_head(report), *(_row(row, report) for row in report.rows)]
    widths = _fit(rows)
    lines = [_GAP.join(_align(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes(report)])


def _head(report: Report) -> list[str]:
    measure = summary.measure_of(report.rows, report.budget) or "drift"
    return ["rung", "status", "speed-up", "p50 ms", "items/s", summary.plain(measure), "over budget", "size", "build"]


def _row(row: Row, report: Report) -> list[str]:
    measure = summary.measure_of(report.rows, report.budget)
    return [
        summary.plain(row.rung),
        row.status,
        summary.speed_of(row) if row.latency_ms else summary.DASH,
        summary.optional(summary.p50(row)),
        summary.optional(row.throughput),
        summary.drift_number(row.drift[measure]) if measure in row.drift else summary.DASH,
        summary.plain(summary.worst(row, report.budget)),
        summary.size(row.size_bytes),
        summary.seconds(row.build_s),
    ]


def _fit(rows: Sequence[Sequence[str]]) -> list[int]:
    """Widths of the columns; the widest words are cut until a line fits."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    while sum(widths) + len(_GAP) * (len(widths) - 1) > WIDTH:
        widest = max(_WORDS, key=lambda column: widths[column])
        widths[widest] -= 1
    return widths


def _align(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for column, (value, width) in enumerate(zip(row, widths, strict=True)):
        value = summary.clip(value, width)
        yield value.ljust(width) if column in (0, 1, 6) else value.rjust(width)


def _notes(report: Report) -> Iterator[str]:
    yield from _wrapped(summary.plain(summary.choice(report)))
    yield from _wrapped(f"budget of drift, {report.preset}: {summary.plain(summary.bounds(report.budget))}")
    yield from _wrapped(f"control: {summary.control(report)}")
    for row in summary.failed(report):
        yield summary.clip(f"{row.status}: {summary.plain(row.rung)}: {summary.plain(row.reason)}", WIDTH)
    for reason, rungs in summary.missing(report).items():
        yield from _wrapped(f"not tried: {', '.join(map(summary.plain, rungs))}: {reason}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def as_markdown(report: Report) -> str:
    measure = summary.measure_of(report.rows, report.budget)
    lines = [f"# headrace optimize: {_mark(report.target)}", "", _mark(summary.choice(report)), ""]
    head = [*_head(report), "reason"]
    rows = [[*_row(row, report), row.reason] for row in report.rows]
    lines += [*_table(head, rows), ""]
    if found := summary.missing(report):
        lines += ["## What could not be tried here", ""]
        lines += [f"- {_mark(', '.join(rungs))}: {_mark(reason)}" for reason, rungs in found.items()] + [""]
    front = pareto(report.rows, measure)
    if len(front) > 1:
        lines += [f"No rung is both faster and nearer to the model as it is than these: {_mark(', '.join(front))}.", ""]
    if any(row.cells for row in report.rows):
        lines += ["## By batch size", "", *_cells(report.rows), ""]
    lines += ["## Conditions", "", *(f"- {name}: {_mark(value)}" for name, value in summary.conditions(report))]
    environment = ((name, summary.environment(value)) for name, value in report.environment.items())
    return "\n".join([*lines, *(f"- {_mark(name)}: {_mark(value)}" for name, value in environment), ""])


def _cells(rows: Sequence[Row]) -> list[str]:
    head = ["rung", "items a call", "speed-up", "by processor time", "p50 ms", "p95 ms", "items/s", "pairs"]
    found = []
    for row in rows:
        for cell in row.cells:
            measured = (cell.p50_ms, cell.p95_ms, cell.throughput)
            ratios = [summary.speed(cell.ratio, cell.interval), summary.speed(cell.cpu_ratio, None)]
            if row.status == "baseline":
                ratios = ["1×", "1×"]
            found.append([row.rung, str(cell.batch), *ratios, *map(summary.number, measured), str(cell.pairs)])
    return _table(head, found)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(each if each == '---' else _mark(each) for each in line)} |" for line in lines]


def _mark(text: str) -> str:
    """A text that Markdown shows as it is."""
    text = summary.plain(text).replace("&", "&amp;")
    return re.sub(r"([\\`*\[\]<>|~]|__)", lambda found: "".join(f"\\{each}" for each in found[0]), text)
