"""``headrace optimize``: the ladder from a shell."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import click

from headrace.errors import ConfigError


def _bounds(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for value in values:
        name, _, number = value.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not MEASURE=NUMBER", context, parameter) from None
    return found


@click.command(short_help="Climb the ladder: the fastest way to run a model that is exact enough.")
@click.argument("target")
@click.option(
    "--samples",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='real inputs, a JSON object a line: {"input": …} or named tensors',
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="where the artifact and the report go")
@click.option(
    "--task",
    type=click.Choice(["auto", "embed", "classify", "generate", "logits"]),
    default="auto",
    show_default=True,
    help="what the answers are compared as",
)
@click.option(
    "--preset",
    type=click.Choice(["exact", "balanced", "small"]),
    default="balanced",
    show_default=True,
    help="how far answers may drift from the model's own",
)
@click.option(
    "--max-drift",
    multiple=True,
    metavar="MEASURE=NUMBER",
    callback=_bounds,
    help="a bound of one measure, such as cos_mean=0.995; once for each",
)
@click.option(
    "--drift",
    default="",
    metavar="MODULE:FUNCTION",
    help="what measures drift instead: of two lists of arrays, wanted and found, a dictionary of numbers by name, "
    "the less the better; --max-drift bounds them",
)
@click.option(
    "--objective",
    type=click.Choice(["latency", "throughput", "memory"]),
    default="latency",
    show_default=True,
    help="what the choice is made by: one item at a time, batches of 32, or memory",
)
@click.option("--rungs", default="", metavar="A,B,C", help="rungs to try [default: those that suit this machine]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda:N")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="CPU threads [default: the cores]")
@click.option("--cap-s", type=click.FloatRange(0), default=0.0, help="time for a build or an answer, seconds")
@click.option("--cap-bytes", type=click.IntRange(0), default=0, help="memory for a process [default: 4/5 of all]")
@click.option("--effort", type=click.FloatRange(0.1, 100), default=1.0, show_default=True, help="factor on timed pairs")
@click.option("--resume", is_flag=True, help="keep the rows of an earlier climb")
@click.option("--format", "shape", type=click.Choice(["text", "json"]), default="text", show_default=True)
def optimize(
    target: str,
    samples: Path,
    out: Path | None,
    task: str,
    preset: str,
    max_drift: dict[str, float],
    drift: str,
    objective: Any,
    rungs: str,
    device: str,
    threads: int,
    cap_s: float,
    cap_bytes: int,
    effort: float,
    resume: bool,
    shape: str,
) -> None:
    """Build, time and compare the ways to run TARGET on its own samples, and keep the best one that is exact enough.

    TARGET: a Hugging Face directory or id, module:factory that gives a torch.nn.Module, a TorchScript .pt, or an
    exported .pt2. DIR gets an artifact that `headrace serve DIR` runs, with report.json, report.md and report.html.
    """
    from headrace.optimizing import report
    from headrace.optimizing.ladder import Wish
    from headrace.optimizing.run import optimize as run

    if resume and out is None:
        raise ConfigError("there is nothing to resume without a directory", field="resume", hint="give --out DIR")
    wish = Wish(
        target,
        samples,
        task=task,
        preset=preset,
        max_drift=max_drift,
        drift=drift,
        objective=objective,
        rungs=[each.strip() for each in rungs.split(",") if each.strip()],
        device=device,
        threads=threads,
        cap_s=cap_s,
        cap_bytes=cap_bytes,
        effort=effort,
    )

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the ladder's processes end with it
    try:
        found = run(
            wish,
            out,
            resume=resume,
            tell=lambda row: progress(report.live(row)),
            foresee=lambda predicted: progress(report.foreseen(predicted)),
        )
    except KeyboardInterrupt:
        if out is not None:
            click.echo("\nheadrace: interrupted; --resume goes on from what was found until now", err=True)
        raise
    click.echo(report.as_json(found) if shape == "json" else report.as_table(found))
    if out is not None:
        click.echo(f"\nheadrace serve {out}", err=shape == "json")
