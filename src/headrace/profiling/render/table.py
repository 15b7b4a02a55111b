"""The top table for a terminal: where the time went, function by function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headrace.errors import ConfigError
from headrace.profiling.record import Record
from headrace.profiling.render.totals import Total, place, plain, seconds, totals

WIDTH = 120
_KEYS = {
    "cumulative": lambda total: total.cumulative_s,
    "own": lambda total: total.own_s,
    "calls": lambda total: total.calls,
    "percall": lambda total: total.cumulative_s / max(1, total.primitive),
}
# As `pstats` calls them.
_ALSO = {"cumtime": "cumulative", "time": "own", "tottime": "own", "ncalls": "calls", "per-call": "percall"}
_GAP = "  "
# A table can be narrower than this only by cutting its words.
_LEAST = 24


def as_table(record: Record, sort: str = "cumulative", top: int = 20) -> str:
    """The functions that took most, 120 columns at most.

    Traced functions have exact calls; of a run that was only sampled, samples stand in their place, and the times are
    those of running stacks.

    Args:
        sort: ``cumulative``, ``own``, ``calls`` or ``percall``; the names that `pstats` uses for them are known too.
        top: how many; 0 for all.

    Raises:
        ConfigError: there is no such order.
    """
    ordered = ranked(totals(record), sort)
    shown = ordered[:top] if top > 0 else ordered
    rows = [_row(total, record) for total in shown]
    head = ["own", "cumulative", *(("calls", "per call") if record.calls else ("samples",)), "function", "file:line"]
    lines = [_summary(record, len(shown), len(ordered)), ""]
    if rows:
        lines += _aligned([head, *rows])
    elif record.waiting:
        lines.append("nothing of it ran when it was looked at: all that was seen is waiting")
    else:
        lines.append("nothing was seen: the run was neither traced nor sampled, or too short")
    return "\n".join(lines)


def ranked(found: Sequence[Total], sort: str) -> list[Total]:
    """Most first. Raises `ConfigError`."""
    key = _KEYS.get(_ALSO.get(sort, sort))
    if key is None:
        raise ConfigError(f"there is no order {sort!r}", field="sort", hint=f"one of {', '.join(_KEYS)}")
    return sorted(found, key=lambda total: (-key(total), -total.cumulative_s, total.frame.file, total.frame.function))


def _summary(record: Record, shown: int, known: int) -> str:
    words = [f"{seconds(record.wall_s)} wall", f"{seconds(record.cpu_s)} CPU"]
    if record.children_cpu_s >= 0.0005:
        words.append(f"{seconds(record.children_cpu_s)} CPU of child processes")
    if record.calls:
        calls, primitive = (sum(each) for each in zip(*((it.calls, it.primitive) for it in record.calls), strict=True))
        words.append(f"{calls:,} calls" + (f" ({primitive:,} primitive)" if primitive != calls else ""))
    else:
        words.append(f"{sum(stack.samples for stack in record.cpu):,} samples of running stacks")
    return ", ".join([*words, f"{shown} of {known} functions"])


def _row(total: Total, record: Record) -> list[str]:
    calls = f"{total.calls:,}"
    if total.primitive != total.calls:
        calls += f"/{total.primitive:,}"
    exact = [calls, seconds(total.cumulative_s / max(1, total.primitive))] if record.calls else [calls]
    name, where = plain(total.frame.function), plain(place(total.frame, record.directory))
    return [seconds(total.own_s), seconds(total.cumulative_s), *exact, name, where]


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = len(widths) - 2
    room = WIDTH - sum(widths[:numbers]) - len(_GAP) * (len(widths) - 1)
    while sum(widths[numbers:]) > room and max(widths[numbers:]) > _LEAST:
        widest = max((numbers, numbers + 1), key=lambda column: widths[column])
        widths[widest] -= 1
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:numbers], widths, strict=False)]
        name, where = row[numbers:]
        cells += [_clip(name, widths[numbers]).ljust(widths[numbers]), _tail(where, widths[-1])]
        yield _GAP.join(cells).rstrip()


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _tail(text: str, width: int) -> str:
    """Of a path the end says more than the beginning."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
