"""One HTML file that needs nothing else: findings in words, the flame graph, the table, the conditions.

It opens from a disk, asks no other host, and runs only the one script whose hash it names: whatever a program calls its
functions, nothing of it can become markup or code.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from typing import Any

import msgspec

from headrace.profiling.finding import Finding
from headrace.profiling.record import Frame, Record
from headrace.profiling.render.flame import cpu, difference, waiting
from headrace.profiling.render.formats import processes
from headrace.profiling.render.table import ranked
from headrace.profiling.render.totals import percent, place, plain, script, seconds, short, totals

_FUNCTIONS = 30
_LINES = 60
_UNITS = {
    "cpu": "seconds in which code ran or was ready to, by samples of every thread",
    "waiting": "task-seconds: what ten tasks wait for one second is ten; never added to CPU",
}
_EMPTY = {
    "cpu": "No running code was sampled. The table below has what was traced.",
    "waiting": "Nothing was seen waiting.",
}


def as_html(record: Record, findings: Sequence[Finding]) -> str:
    """The page of one run.

    Args:
        findings: what was diagnosed, the most important first.
    """
    graphs = [each for name, part in processes(record) for each in _graphs(name, part)]
    first = "cpu" if record.cpu or not record.waiting else "waiting"
    data = {"compared": False, "first": first, "units": _UNITS, "empty": _EMPTY, "graphs": graphs}
    title = f"headrace profile: {record.command}"
    body = [
        f"<h1>{_text(title)}</h1>",
        *_facts(record),
        *_findings(findings, record),
        *_graph_section([name for name, _ in processes(record)], _LEGEND),
        *_functions(record),
        *_lines(record),
        *_conditions([("", record)]),
    ]
    return _page(title, body, data)


def as_diff_html(before: Record, after: Record, said: Sequence[str] = ()) -> str:
    """The page of two runs: one flame graph, coloured by what takes more or less time.

    Runs are compared by seconds. Where one was only looked at for a while, those before are scaled until both windows
    are equally long.

    Args:
        said: the verdict, a sentence each.
    """
    factors = (1.0, 1.0)
    if scaled := before.attached or after.attached:
        factors = (after.wall_s / before.wall_s if before.wall_s > 0 else 1.0, 1.0)
    graphs = []
    for kind, one, other in (("cpu", before.cpu, after.cpu), ("waiting", before.waiting, after.waiting)):
        tree = difference((before, one, _path(before, after)), (after, other, _path(after)), factors)
        graphs.append({"kind": kind, "process": "", "tree": tree})
    first = "cpu" if before.cpu or after.cpu else "waiting"
    empty = {**_EMPTY, "cpu": "No running code was sampled in either run."}
    data = {"compared": True, "first": first, "units": _UNITS, "empty": empty, "graphs": graphs}
    title = f"headrace compare: {before.command}"
    lines = [f"<li>{_text(each)}</li>" for each in said]
    note = "Seconds before are scaled to the length of the run after."
    body = [
        f"<h1>{_text(title)}</h1>",
        *(['<ul class="said" data-testid="verdict">', *lines, "</ul>"] if lines else []),
        *_graph_section([""], _LEGEND_DIFF + (f'<p class="unit">{note}</p>' if scaled else ""), compared=True),
        *_conditions([("before", before), ("after", after)]),
    ]
    return _page(title, body, data)


def _graphs(process: str, record: Record) -> Iterator[dict[str, Any]]:
    yield {"kind": "cpu", "process": process, "tree": cpu(record, _path(record))}
    yield {"kind": "waiting", "process": process, "tree": waiting(record, _path(record))}


def _path(record: Record, later: Record | None = None) -> Callable[[Frame], str]:
    """What tells a frame's file.

    Args:
        later: the run that it is compared with: the file that was run is called as there.
    """
    own = script(record)
    now = short(script(later), later.directory) if later is not None and script(later) else ""

    def path(frame: Frame) -> str:
        if now and frame.file == own:
            return now
        return "built-in" if frame.file in ("", "~") else short(frame.file, record.directory)

    return path


def _text(value: object) -> str:
    return html.escape(plain(str(value)))


def _page(title: str, body: Iterable[str], data: dict[str, Any]) -> str:
    style, script = _asset("page.css"), _asset("flame.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    # No "<" in there: the text of a script element ends at the first "</script", wherever that stands.
    text = msgspec.json.encode(data).decode().replace("<", "\\u003c")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>",
            *body,
            f'<script type="application/json" id="data">{text}</script>',
            f"<script>{script}</script>\n</body>\n</html>\n",
        ]
    )


def _asset(name: str) -> str:
    return resources.files("headrace.profiling.render").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _facts(record: Record) -> list[str]:
    facts = [(seconds(record.wall_s), "wall time"), (seconds(record.cpu_s), "processor time")]
    if record.children_cpu_s >= 0.0005:
        facts.append((seconds(record.children_cpu_s), "of child processes"))
    facts.append((f"{sum(each.samples for each in record.cpu):,}", "samples of running code"))
    if record.waiting:
        facts.append((seconds(sum(each.seconds for each in record.waiting)), "waited, in task-seconds"))
    if record.exit_status:
        facts.append((str(record.exit_status), "exit status"))
    return [f'<p class="facts">{", ".join(f"<b>{_text(value)}</b> {name}" for value, name in facts)}</p>']


def _findings(findings: Sequence[Finding], record: Record) -> list[str]:
    if not findings:
        return ['<h2>Findings</h2>\n<p data-testid="findings">No rule found anything to say.</p>']
    items = []
    for each in findings:
        where = ""
        if each.file:
            file = short(each.file, record.directory)
            shown = f"{file}:{each.line}" if each.line else file
            sought = _function_at(record, each.file, each.line) or file
            where = f'<button type="button" class="find" data-search="{_text(sought)}">{_text(shown)}</button> '
        items.append(
            f'<li class="{_text(each.severity)}" data-testid="finding">\n'
            f'<h3><span class="severity">{_text(each.severity)}:</span> {_text(each.title)}</h3>\n'
            f'<p class="evidence">{_text(each.evidence)}</p>\n<p>→ {_text(each.advice)}</p>\n'
            f'<p class="code">{where}{_text(each.code)}</p></li>'
        )
    return ['<h2>Findings</h2>\n<ol class="findings" data-testid="findings">', *items, "</ol>"]


def _function_at(record: Record, file: str, line: int) -> str:
    """The function that a line of a file is in: of those that were seen the one that begins last before it."""
    known = [each for each in record.frames if each.file == file and 0 < each.line <= line]
    return max(known, key=lambda frame: frame.line).function if known else ""


def _graph_section(names: Sequence[str], legend: str, *, compared: bool = False) -> list[str]:
    choice = ""
    if len(names) > 1:
        options = "".join(
            f'<option value="{_text(name)}">{_text(name or "the program itself")}</option>' for name in names
        )
        choice = f'<label>process <select data-testid="process">{options}</select></label>'
    sides = _group("Widths", "side", (("after", "widths after"), ("before", "widths before"))) if compared else ""
    kinds = _group("What is drawn", "kind", (("cpu", "CPU"), ("waiting", "WAIT")))
    return [
        '<section data-testid="graph-section">\n<h2 id="graph-title">Flame graph</h2>',
        f'<div class="tools">{kinds}{sides}{choice}',
        '<label>search <input type="search" data-testid="search" placeholder="function or file, key: /"></label>',
        '<output class="matches" data-testid="matches"></output>',
        '<button type="button" data-testid="reset" disabled>show all</button></div>',
        '<p class="unit" data-testid="unit"></p>\n<p data-testid="empty" hidden></p>',
        '<div data-testid="canvas">\n<nav class="trail" data-testid="trail" aria-label="What is zoomed into"></nav>',
        '<div class="scroll">'
        '<div class="graph" data-testid="graph" role="tree" aria-labelledby="graph-title"></div></div>',
        '<div class="details" data-testid="details"></div>\n<p class="hint" data-testid="hint"></p></div>',
        legend,
        '<p class="unit">Click or Enter: zoom in. Esc: out. Arrow keys: from frame to frame. Enter in the search: the'
        " next match.</p>",
        "<noscript><p>The graph is drawn by a script of this page; everything else is here.</p></noscript>",
        "</section>",
    ]


def _group(label: str, name: str, choices: Sequence[tuple[str, str]]) -> str:
    buttons = "".join(
        f'<button type="button" data-{name}="{value}" data-testid="show-{value}" aria-pressed="false">{shown}</button>'
        for value, shown in choices
    )
    return f'<div role="group" aria-label="{label}">{buttons}</div>'


def _functions(record: Record) -> list[str]:
    found = ranked(totals(record), "own")
    if not found:
        return []
    whole = sum(each.own_s for each in found) or 1.0
    rows = []
    for each in found[:_FUNCTIONS]:
        name, calls = _text(each.frame.function), f"{each.calls:,}"
        numbers = [seconds(each.own_s), percent(each.own_s / whole), seconds(each.cumulative_s), calls]
        if record.calls:
            numbers.append(seconds(each.cumulative_s / max(1, each.primitive)))
        button = f'<button type="button" class="find" data-search="{name}">{name}</button>'
        where = f'<td class="place">{_text(place(each.frame, record.directory))}</td>'
        rows.append(f'<tr><th scope="row">{button}</th>{where}{_numbers(numbers)}</tr>')
    heads = ["own", "of all", "cumulative", *(("calls", "per call") if record.calls else ("samples",))]
    source = "traced: exact counts" if record.calls else "by samples of running code"
    return [f"<h2>Functions, {source}</h2>", *_table(["function", "where"], heads, rows, "functions")]


def _lines(record: Record) -> list[str]:
    if not record.lines:
        return []
    rows = []
    for each in sorted(record.lines, key=lambda line: -line.seconds)[:_LINES]:
        words = f'<th scope="row">{_text(each.function)}</th>'
        words += f'<td class="place">{_text(short(each.file, record.directory))}:{each.line}</td>'
        source = html.escape("".join(char if char.isprintable() else " " for char in each.source.strip()))
        rows.append(
            f'<tr>{words}{_numbers([seconds(each.seconds), f"{each.hits:,}"])}<td class="source">{source}</td></tr>'
        )
    head = _table(["function", "where"], ["time", "hits"], rows, "lines", last="line")
    return ["<h2>Lines that took most</h2>", *head]


def _table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[str], name: str, last: str = "") -> list[str]:
    titles = "".join(f'<th scope="col">{_text(each)}</th>' for each in words)
    titles += "".join(f'<th scope="col" class="number">{_text(each)}</th>' for each in numbers)
    titles += f'<th scope="col">{_text(last)}</th>' if last else ""
    head = f'<div class="wide"><table data-testid="{name}">\n<thead><tr>{titles}</tr></thead>\n<tbody>'
    return [head, *rows, "</tbody>\n</table></div>"]


def _numbers(values: Iterable[str]) -> str:
    return "".join(f'<td class="number">{_text(each)}</td>' for each in values)


def _conditions(records: Sequence[tuple[str, Record]]) -> list[str]:
    lines = ["<h2>Conditions</h2>"]
    for name, record in records:
        lines += [f"<h3>{_text(name)}</h3>"] if name else []
        pairs = "".join(f"<dt>{key}</dt><dd>{_text(value)}</dd>" for key, value in _pairs(record) if value)
        lines.append(f"<dl>{pairs}</dl>")
        if record.notes:
            lines.append(f'<ul data-testid="notes">{"".join(f"<li>{_text(each)}</li>" for each in record.notes)}</ul>')
    return lines


def _pairs(record: Record) -> Iterator[tuple[str, str]]:
    machine = record.machine
    yield "command", record.command
    yield "commit", record.commit
    yield "processor", f"{machine.processor}, {machine.cores} cores"
    yield "system", machine.system
    yield "Python", machine.python
    yield "packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield (
        "sampled",
        f"at {record.rate_hz:.0f} Hz, which took {seconds(record.sampling_cpu_s)}" if record.rate_hz else "",
    )
    yield "traced", f"which took {seconds(record.tracing_s)}" if record.tracing_s else ""
    yield "imports", seconds(record.import_s) if record.import_s else ""


_LEGEND = (
    '<p class="legend"><span class="key-user">your code</span><span class="key-library">libraries</span>'
    '<span class="key-builtin">built in</span><span class="key-wait">waits</span></p>'
)
_LEGEND_DIFF = (
    '<p class="legend"><span class="key-slower">takes more time than before</span>'
    '<span class="key-faster">takes less</span><span>no difference to speak of</span></p>'
)
