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
from headrace.optimizing.words import Predicted, Report, Row

__all__ = ["as_html", "as_json", "as_markdown", "as_table", "foreseen", "live", "pareto", "write"]

WIDTH = 120
_GAP = "  "
# Columns of words may be cut, those of numbers stay whole: the first, a measure's, and this one.
_OVER = "over budget"


def write(report: Report, directory: Path) -> None:
    """`report.json`, `report.md` and `report.html` in a directory, which is made where it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("json", as_json), ("md", as_markdown), ("html", as_html)):
        (directory / f"report.{name}").write_text(content(report), encoding="utf-8")


def as_json(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report), indent=2).decode()


def foreseen(predicted: Predicted) -> str:
    """What weights will take in memory, before they are loaded."""
    return "\n".join(line for told in summary.foreseen(predicted) for line in _wrapped(told))


def live(row: Row) -> str:
    """One line about a rung that is done."""
    told = []
    if row.latency_ms:
        told = [summary.speed_of(row), *_pace(row)]
    if row.reason:
        told.append(summary.plain(row.reason))
    line = f"{summary.clip(summary.plain(row.rung), 28):28}  {row.status:13}  {', '.join(told)}"
    return summary.clip(line.rstrip(), WIDTH)


def _pace(row: Row) -> list[str]:
    cell = summary.main_cell(row)
    if cell is None or cell.tokens_per_s is None:
        return [f"p50 {summary.optional(summary.p50(row))} ms", f"{summary.optional(row.throughput)} items/s"]
    tokens, first, bound = summary.writing(cell)
    paced = [f"{tokens} tokens/s", f"first {first} ms"]
    return paced if cell.share_of_bandwidth is None else [*paced, f"{bound} of bound"]


def as_table(report: Report) -> str:
    """Aligned text, 120 columns at most, and below it what was chosen, why, and what else could be tried."""
    rows = [_head(report), *(_row(row, report) for row in report.rows)]
    widths = _fit(rows)
    lines = [_GAP.join(_align(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes(report)])


def _head(report: Report) -> list[str]:
    measure = summary.measure_of(report.rows, report.budget) or "drift"
    pace = summary.WRITING if summary.writes(report) else ("p50 ms", "items/s")
    return ["rung", "status", "speed-up", *pace, summary.plain(measure), _OVER, "size", "build"]


def _row(row: Row, report: Report) -> list[str]:
    measure = summary.measure_of(report.rows, report.budget)
    pace: tuple[str, ...] = (summary.optional(summary.p50(row)), summary.optional(row.throughput))
    return [
        summary.plain(row.rung),
        row.status,
        summary.speed_of(row) if row.latency_ms else summary.DASH,
        *(summary.writing(summary.main_cell(row)) if summary.writes(report) else pace),
        summary.drift_number(row.drift[measure]) if measure in row.drift else summary.DASH,
        summary.plain(summary.worst(row, report.budget)),
        summary.size(row.size_bytes),
        summary.seconds(row.build_s),
    ]


def _fit(rows: Sequence[Sequence[str]]) -> list[int]:
    """Widths of the columns; the widest words are cut until a line fits."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    over = rows[0].index(_OVER)
    while sum(widths) + len(_GAP) * (len(widths) - 1) > WIDTH:
        widest = max((0, over - 1, over), key=lambda column: widths[column])
        widths[widest] -= 1
    return widths


def _align(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for column, (value, width) in enumerate(zip(row, widths, strict=True)):
        value = summary.clip(value, width)
        # What is over budget stands before the last two.
        yield value.ljust(width) if column in (0, 1, len(row) - 3) else value.rjust(width)


def _notes(report: Report) -> Iterator[str]:
    yield from _wrapped(summary.plain(summary.choice(report)))
    if summary.writes(report) and (batch := summary.row_of(report, report.baseline).batch):
        yield from _wrapped(f"at {batch} text{'s' * (batch != 1)} a call; {summary.READING_OF_WRITING}")
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
        lines += ["## By batch size and length", "", *_cells(report), ""]
    if summary.reaches(report):
        lines += [f"{summary.READING_OF_REACHING}.", ""]
    lines += ["## Conditions", "", *(f"- {name}: {_mark(value)}" for name, value in summary.conditions(report))]
    environment = ((name, summary.environment(value)) for name, value in report.environment.items())
    return "\n".join([*lines, *(f"- {_mark(name)}: {_mark(value)}" for name, value in environment), ""])


def _cells(report: Report) -> list[str]:
    rows = [[row.rung, *summary.cell_values(report, row, cell)] for row in report.rows for cell in row.cells]
    return _table(["rung", *summary.cell_heads(report)], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(each if each == '---' else _mark(each) for each in line)} |" for line in lines]


def _mark(text: str) -> str:
    """A text that Markdown shows as it is."""
    text = summary.plain(text).replace("&", "&amp;")
    return re.sub(r"([\\`*\[\]<>|~]|__)", lambda found: "".join(f"\\{each}" for each in found[0]), text)
