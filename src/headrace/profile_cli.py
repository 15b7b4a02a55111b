"""Commands that find what a program costs: ``headrace leak``."""

from __future__ import annotations

import sys

import click


@click.command(short_help="Say whether a function leaks, what, where, and who holds it.")
@click.argument("target", metavar="MODULE:CALLABLE")
@click.option("--iterations", default=100, show_default=True, metavar="N", help="calls of the first run")
@click.option(
    "--warm-up", type=int, default=None, metavar="N", help="calls before it [default: a fifth of them, 5 to 50]"
)
@click.option("--setup", default=None, metavar="MODULE:CALLABLE", help="called once before")
@click.option(
    "--fail-on",
    multiple=True,
    type=click.Choice(["leak", "cycles", "fragmentation", "bounded", "inconclusive"]),
    help="exit status 1 for this verdict; may be given several times",
)
@click.option(
    "--time-limit", "time_limit_s", default=300.0, show_default=True, metavar="S", help="seconds for all of it"
)
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def leak(
    target: str,
    iterations: int,
    warm_up: int | None,
    setup: str | None,
    fail_on: tuple[str, ...],
    time_limit_s: float,
    style: str,
) -> None:
    """Call MODULE:CALLABLE, async or not, again and again in a process of its own, and judge what grows.

    A leak is confirmed by as many calls again, where they are quick by several times as many, and by a second process.
    What the function prints goes to standard error.

    Exit status: 0 whatever was found, unless --fail-on says otherwise.
    """
    from headrace.profiling.leak import find_leak
    from headrace.profiling.leaking.report import as_json, as_text

    if sys.stderr.isatty():
        click.echo(f"calling {target}, {iterations} times to begin with, for {time_limit_s:g} s at most", err=True)
    report = find_leak(target, iterations=iterations, setup=setup, warm_up=warm_up, time_limit_s=time_limit_s)
    click.echo(as_json(report) if style == "json" else as_text(report))
    sys.exit(1 if report.verdict in fail_on else 0)
