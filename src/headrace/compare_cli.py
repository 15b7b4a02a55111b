"""``headrace compare``: two profiles side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.profiling.changes import Change
    from headrace.profiling.compare import Comparison, Side
    from headrace.profiling.ledger import Turns

_NAME = 48


@click.command(short_help="Two profiles side by side: what got faster, and whether that is noise.")
@click.argument("before", metavar="BEFORE")
@click.argument("after", metavar="AFTER")
@click.option(
    "--rerun",
    "pairs",
    type=click.IntRange(5, 10_000),
    metavar="N",
    help="run both commands again, N times in turns and without a profiler",
)
@click.option(
    "--time-limit", "time_limit_s", default=600.0, show_default=True, metavar="S", help="seconds for all of --rerun"
)
@click.option(
    "--html", "page", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="differential flame graph"
)
@click.option(
    "--fail-slower", type=click.FloatRange(0), metavar="PERCENT", help="exit status 1 if AFTER takes that much longer"
)
@click.option("--top", default=10, show_default=True, metavar="N", help="functions that are shown; 0 for all")
@click.option("--anyway", is_flag=True, help="compare runs of unlike machines too")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def compare(
    before: str,
    after: str,
    pairs: int | None,
    time_limit_s: float,
    page: Path | None,
    fail_slower: float | None,
    top: int,
    anyway: bool,
    style: str,
) -> None:
    """Compare two runs, each the name of a stored one or the file of a record.

    One run each cannot tell how much of a difference is noise of the machine; --rerun measures it. What it measures is
    kept with stored runs. The commands run on the files of now, each in the directory of its profile: to compare two
    states of the same files, profile each in a copy of its own (git worktree).

    Exit status: 0, unless --fail-slower says otherwise. It counts a slowdown that is outside the noise; where noise was
    not measured, any.
    """
    from headrace.profiling import compare as comparing

    sides = comparing.find(before), comparing.find(after)
    comparison = comparing.compare(*sides, anyway=anyway)  # refuses before anything runs for minutes
    turns = _known(*sides) if pairs is None else _measured(*sides, pairs, time_limit_s)
    if turns is not None:
        comparison = comparing.compare(*sides, turns, anyway=anyway)
    if page is not None:
        _write(page, *sides, comparison)
    if style == "json":
        click.echo(msgspec.json.encode(comparison))
    else:
        click.echo("\n".join(_as_text(comparison, top)))
    if fail_slower is not None and comparing.slower_by(comparison) * 100 > fail_slower:
        sys.exit(1)


def _known(before: Side, after: Side) -> Turns | None:
    """What an earlier --rerun of these two has found."""
    from headrace.profiling import ledger

    return ledger.turns_of(before.runs[-1], after.runs[-1]) if before.runs and after.runs else None


def _measured(before: Side, after: Side, pairs: int, time_limit_s: float) -> Turns:
    """Run both in turns; of stored runs it is kept."""
    from headrace.clock import wall
    from headrace.profiling import ledger, rerun

    commands = [rerun.command_of(side.record, side.name) for side in (before, after)]
    notes = _of_now(before, after)
    if commands[0] == commands[1]:
        notes.append("both commands are the same and ran the same files: what differs between them is noise")
    loud = sys.stderr.isatty()
    walls, cpus = rerun.measure(
        commands[0],
        commands[1],
        pairs,
        time_limit_s=time_limit_s,
        tell=lambda text: click.echo(text, err=True) if loud else None,
    )
    idents = [side.runs[-1].ident if side.runs else "" for side in (before, after)]
    turns = ledger.Turns(idents[0], idents[1], wall(), walls, cpus, notes)
    if all(idents):
        ledger.note_turns(turns)
    return turns


def _of_now(*sides: Side) -> list[str]:
    """What was run again is not what was profiled."""
    from headrace.profiling import ledger
    from headrace.profiling.render.totals import short

    found = []
    for side in sides:
        if side.runs and (files := ledger.outdated(side.runs[-1], side.record)):
            names = ", ".join(short(file, side.record.directory) for file in files)
            found.append(f"{side.name} ran as its files are now; changed since it was stored: {names}")
    return found


def _write(page: Path, before: Side, after: Side, comparison: Comparison) -> None:
    from headrace.profiling.render import as_diff_html

    said = [comparison.verdict, *([comparison.worth] if comparison.worth else []), *comparison.notes]
    try:
        page.write_text(as_diff_html(before.record, after.record, said), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {page}: {error.strerror}", field="html") from None


def _as_text(comparison: Comparison, top: int) -> Iterator[str]:
    yield f"{comparison.before} → {comparison.after}"
    yield f"  {comparison.verdict}"
    if comparison.worth:
        yield f"  {comparison.worth}"
    for kind, title in (("cpu", "CPU time by function"), ("waiting", "waiting, in task-seconds")):
        found = [each for each in comparison.changes if each.kind == kind]
        if found:
            yield ""
            yield from _table(title, found[:top] if top > 0 else found, len(found))
    if comparison.notes:
        yield ""
        yield from (f"note: {each}" for each in comparison.notes)


def _table(title: str, shown: list[Change], known: int) -> Iterator[str]:
    from headrace.profiling.render.totals import percent, seconds

    rows = [("before", "after", "change", "share", "of the run", "noise", "function", "where")]
    for each in shown:
        change = each.after_s - each.before_s
        sign = "+" if change > 0 else ""
        rows.append(
            (
                seconds(each.before_s),
                seconds(each.after_s),
                f"{sign}{seconds(change)}",
                f"{percent(each.share_before)} → {percent(each.share_after)}",
                f"{sign}{percent(each.of_run)}",
                {True: "outside", False: "within", None: "unknown"}[each.outside],
                each.function if len(each.function) <= _NAME else each.function[: _NAME - 1] + "…",
                each.where,
            )
        )
    yield title + (f", {len(shown)} of {known}" if len(shown) < known else "")
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[:5], widths, strict=False)]
        yield "  ".join([*numbers, row[5].ljust(widths[5]), row[6].ljust(widths[6]), row[7]]).rstrip()
