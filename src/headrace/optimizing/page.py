"""A report as one HTML file that needs nothing else: no script, no font, no address; light or dark as the reader's."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from headrace.optimizing import summary
from headrace.optimizing.plot import pareto, points, scatter
from headrace.optimizing.words import Report, Row


def as_html(report: Report) -> str:
    title = _text(f"headrace optimize: {report.target}")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            # What a rung has said stands on this page; nothing in it may run or load anything.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
            f'<p class="choice">{_text(summary.choice(report))}</p>',
            *_ladder(report),
            *_plot(report),
            *_missing(report),
            *_cells(report),
            *_conditions(report),
            _READING.format(nearness=_nearness(report)),
            "</body>\n</html>\n",
        ]
    )


def _text(value: object) -> str:
    return html.escape(summary.plain(str(value)))


def _table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[str]) -> list[str]:
    titles = "".join(f'<th scope="col">{_text(each)}</th>' for each in words)
    titles += "".join(f'<th scope="col" class="number">{_text(each)}</th>' for each in numbers)
    return [f'<div class="wide"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>', *rows, "</tbody>\n</table></div>"]


def _cell(value: str, kind: str = "") -> str:
    return f'<td class="{kind}">{_text(value)}</td>' if kind else f"<td>{_text(value)}</td>"


def _ladder(report: Report) -> list[str]:
    measure = summary.measure_of(report.rows, report.budget)
    pace = summary.WRITING if summary.writes(report) else ["items/s"]
    numbers = ["speed-up", "p50 ms", "p95 ms", *pace, measure or "drift", "size", "peak memory", "load", "build"]
    rows = (_row(row, report, measure) for row in report.rows)
    return ["<h2>The ladder</h2>", *_table(["rung", "status"], numbers, rows)]


def _row(row: Row, report: Report, measure: str) -> str:
    latency = row.latency_ms or {}
    drift = summary.drift_number(row.drift[measure]) if measure in row.drift else summary.DASH
    numbers = [
        summary.speed_of(row),
        summary.optional(latency.get("p50")),
        summary.optional(latency.get("p95")),
        *(summary.writing(summary.main_cell(row)) if summary.writes(report) else [summary.optional(row.throughput)]),
        drift,
        summary.size(row.size_bytes),
        summary.size(row.peak_bytes),
        summary.seconds(row.load_s),
        summary.seconds(row.build_s),
    ]
    # Why, where there are no numbers in its stead, and below them otherwise.
    cells = "".join(_cell(each, "number") for each in numbers)
    below = f'<tr><td></td><td class="reason" colspan="{len(numbers) + 1}">{_text(row.reason)}</td></tr>'
    if not row.latency_ms:
        cells = (
            f'<td class="reason" colspan="{len(numbers) - 1}">{_text(row.reason)}</td>{_cell(numbers[-1], "number")}'
        )
    kind = "chosen" if row.rung == report.chosen else "passed" if row.status in ("ok", "baseline") else "out"
    name = f'<th scope="row">{_text(row.rung)}</th>'
    line = f'<tr class="{kind}">{name}{_cell(row.status, "status")}{cells}</tr>'
    return line + below if row.latency_ms and row.reason else line


def _plot(report: Report) -> list[str]:
    drawing = scatter(report)
    if not drawing:
        return []
    measure = summary.measure_of(report.rows, report.budget)
    drawn = {each.row.rung for each in points(report.rows, measure)}
    absent = [row.rung for row in report.rows if row.latency_ms and row.rung not in drawn]
    key = '<svg viewBox="0 0 12 12" class="key"><circle class="dot {}" cx="6" cy="6" r="4"/></svg>'
    legend = "".join(
        f"<span>{key.format(kind)} {name}</span>"
        for kind, name in (("chosen", "chosen"), ("ok", "passed"), ("baseline", "baseline"), ("out", "did not pass"))
    )
    front = ", ".join(pareto(report.rows, measure))
    said = "Left is faster, down is nearer to the model as it is, the dashed line is the most drift that is allowed."
    return [
        "<h2>Latency and drift</h2>",
        f'<figure>{drawing}<figcaption><p class="legend">{legend}</p>',
        f"<p>{said} No rung is both faster and nearer than one on the line: {_text(front)}.</p>",
        f"<p>Timed, but of unknown or endless drift: {_text(', '.join(absent))}.</p>" if absent else "",
        "</figcaption></figure>",
    ]


def _missing(report: Report) -> list[str]:
    found = summary.missing(report)
    if not found:
        return []
    rows = (f"<li><b>{_text(', '.join(rungs))}</b>: {_text(reason)}</li>" for reason, rungs in found.items())
    return ["<h2>What could not be tried here</h2>\n<ul>", *rows, "</ul>"]


def _cells(report: Report) -> list[str]:
    if not any(row.cells for row in report.rows):
        return []
    lines = (line for row in report.rows for line in _cells_of(row, report))
    return ["<h2>By batch size and length</h2>", *_table(["rung"], summary.cell_heads(report), lines)]


def _cells_of(row: Row, report: Report) -> Iterable[str]:
    for index, cell in enumerate(row.cells):
        first = f'<th scope="rowgroup" rowspan="{len(row.cells)}">{_text(row.rung)}</th>' if index == 0 else ""
        numbers = summary.cell_values(report, row, cell)
        yield f"<tr>{first}{''.join(_cell(each, 'number') for each in numbers)}</tr>"


def _conditions(report: Report) -> list[str]:
    return [
        "<h2>Conditions</h2>",
        *_pairs(dict(summary.conditions(report))),
        "<details><summary>Environment</summary>",
        *_pairs({name: summary.environment(value) for name, value in report.environment.items()}),
        "</details>",
    ]


def _nearness(report: Report) -> str:
    if summary.reaches(report):
        return f"<li>{_text(summary.READING_OF_REACHING)}.</li>\n"
    return f"<li>{_text(summary.READING_OF_WRITING)}.</li>\n" if summary.writes(report) else ""


def _pairs(values: Mapping[str, str]) -> list[str]:
    return ["<dl>", *(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in values.items()), "</dl>"]


_READING = """<h2>How to read this</h2>
<ul>
<li><b>Speed-up</b> is the median ratio of neighbouring runs, the baseline's time over the rung's, with its 95 %
interval in brackets. The two took turns, so that what else the machine did fell on both. An interval that holds 1
says that there is no difference to be seen.</li>
<li><b>p50, p95, items/s</b> are of the rung alone. Rungs were not timed at the same moment: compare them by
speed-up.</li>
<li><b>Which</b> items: all as they come, or the short or the long third of your samples, where these are unlike.
What was chosen was chosen by all.</li>
{nearness}<li><b>Drift</b> is the distance to the answers of the model as it is, on your samples. It is no accuracy:
what the model gets wrong, a rung without drift gets wrong too.</li>
<li><b>The control</b> is the baseline beside itself. What it is away from 1, this machine adds to any ratio.</li>
<li><b>Size</b> is of the files, or of the weights in memory where a rung has none. <b>Load</b> comes with every
start, <b>build</b> once.</li>
<li>The numbers belong to this machine, these versions and these samples.</li>
</ul>"""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1f24; --soft: #5b6470; --line: #dfe3e8; --band: #f5f7f9;
  --good: #0a7d5a; --plain: #2f6fd6; --bad: #b3541e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --ink: #e7eaee; --soft: #9aa4b0; --line: #333a43;
  --band: #1c2127; --good: #3ecf9c; --plain: #7aaaf8; --bad: #ef9a62; } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.choice { border-left: 4px solid var(--good); background: var(--band); padding: .7rem 1rem; font-size: 1.05rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: normal; }
thead th { color: var(--soft); font-weight: 600; } tbody th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
.reason { color: var(--soft); overflow-wrap: anywhere; }
tr.chosen { background: var(--band); } tr.chosen th, tr.chosen .status { color: var(--good); }
tr.out .status { color: var(--bad); }
figure { margin: 0; } figure > svg { width: 100%; height: auto; max-width: 60rem; display: block; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .tick, svg .axis { fill: var(--soft); }
.frame { fill: none; stroke: var(--line); } .grid { stroke: var(--line); stroke-width: .6; }
line.budget { stroke: var(--bad); stroke-dasharray: 6 4; stroke-width: 1.4; } text.budget { fill: var(--bad); }
.front { fill: none; stroke: var(--soft); stroke-width: 1.2; } .leader { stroke: var(--soft); stroke-width: .6; }
text.label, text.budget { paint-order: stroke; stroke: var(--page); stroke-width: 3px; }
.dot { fill: var(--plain); stroke: var(--page); } .dot.chosen { fill: var(--good); }
.dot.baseline { fill: var(--ink); } .dot.out { fill: var(--page); stroke: var(--bad); stroke-width: 2; }
.legend span { margin-right: 1.2rem; white-space: nowrap; } .key { width: .8rem; height: .8rem; }
figcaption { color: var(--soft); } dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; }
"""
