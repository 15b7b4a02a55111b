"""Followed lines as text, and as a file for line_profiler's own viewer."""

from __future__ import annotations

import ast
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from headrace.errors import Unavailable
from headrace.profiling.record import Line

_NOTE = (
    "Wall time of each line with all that it calls or awaits; a generator's yield without its consumer. "
    "What watching a hit costs is taken off."
)
_NOTE_OF_TRACING = " Calls of Python functions from these lines are slower by about half a microsecond each."


def as_text(lines: Sequence[Line]) -> str:
    """A table for each function, those that took longest first. Times in seconds."""
    tables = [list(group) for _, group in itertools.groupby(lines, key=lambda line: (line.file, line.function))]
    if not tables:
        return "None of the followed functions has run."
    tables.sort(key=lambda table: -sum(line.seconds for line in table))
    note = _NOTE if hasattr(sys, "monitoring") else _NOTE + _NOTE_OF_TRACING
    return "\n\n".join([*map(_table, tables), note])


def _table(lines: list[Line]) -> str:
    total = sum(line.seconds for line in lines)
    indent = min((len(line.source) - len(line.source.lstrip()) for line in lines if line.source.strip()), default=0)
    rows = [
        f"{line.line:>6} {line.hits:>10} {line.seconds:>11.6f} {_per_hit(line):>10} "
        f"{100 * line.seconds / total if total else 0.0:>6.1f}  {line.source[indent:]}".rstrip()
        for line in lines
    ]
    head = f"{'line':>6} {'hits':>10} {'seconds':>11} {'µs a hit':>10} {'%':>6}  source"
    return "\n".join([f"{lines[0].function}, {lines[0].file}: {total:.6f} s", head, *rows])


def _per_hit(line: Line) -> str:
    return f"{1e6 * line.seconds / line.hits:.1f}" if line.hits else ""


def write_lprof(lines: Sequence[Line], path: Path) -> None:
    """Write what ``python -m line_profiler FILE`` shows.

    Raises:
        Unavailable: line_profiler is not installed.
        OSError: the file cannot be written.
    """
    try:
        from line_profiler.line_profiler import LineStats
    except ImportError:
        raise Unavailable("an .lprof file needs line_profiler", hint="pip install 'headrace[profile]'") from None
    timings: dict[tuple[str, int, str], list[tuple[int, int, int]]] = {}
    for line in lines:
        if line.hits:
            key = (line.file, _first_line(line), line.function)
            timings.setdefault(key, []).append((line.line, line.hits, round(1e9 * line.seconds)))
    LineStats(timings, 1e-9).to_file(str(path))


def _first_line(line: Line) -> int:
    """Where the function begins that a line is in; the line itself if the file cannot be read."""
    starts = [
        first for first, last, name in _functions(line.file)
        if first <= line.line <= last and name == line.function.rpartition(".")[2]
    ]  # fmt: skip
    return max(starts, default=line.line)


@functools.lru_cache(64)
def _functions(file: str) -> list[tuple[int, int, str]]:
    """First line, with decorators, and last line of each function in a file."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [
        (min([node.lineno, *(each.lineno for each in node.decorator_list)]), node.end_lineno or node.lineno, node.name)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
