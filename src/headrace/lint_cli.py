"""``headrace lint``: pitfalls of deep-learning programs, found in their source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

if TYPE_CHECKING:
    from headrace.profiling.lint import Report


@click.command(short_help="Pitfalls of deep-learning programs, found in their source.")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def lint(paths: tuple[Path, ...], style: str) -> None:
    """Read files, and the *.py files below folders, for what makes a model slow or wrong. Nothing is imported or run.

    Not read in folders: hidden ones, site-packages, node_modules, build, dist. A line is left alone with the comment
    "# headrace: ignore[CODE]".

    Exit status: 1 if something is at least a warning, else 0.
    """
    from headrace.profiling.lint import check

    report = check(paths)
    if style == "json":
        click.echo(msgspec.json.encode(report))
    else:
        click.echo(_as_text(report))
        for each in report.skipped:
            click.echo(f"{_printable(each.file)}: not read: {_printable(each.reason)}", err=True)
    sys.exit(int(any(each.severity != "info" for each in report.findings)))


def _as_text(report: Report) -> str:
    """Each finding on a line with its place, what to do below it, and how many there are."""
    lines = []
    for each in report.findings:
        place = f"{each.file}:{each.line}:{each.column}"
        lines += [_printable(f"{place}: {each.severity} {each.code}: {each.title}"), f"    → {each.advice}"]
    count = {severity: sum(each.severity == severity for each in report.findings) for severity in ("warning", "info")}
    total = f"{count['warning']} warning{'' if count['warning'] == 1 else 's'}, {count['info']} info"
    return "\n".join([*lines, f"{total} in {report.files} file{'' if report.files == 1 else 's'}"])


def _printable(text: str) -> str:
    """What stands in a stranger's source must not steer the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
