"""Commands that find what a program costs: ``headrace profile`` and ``headrace leak``."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from headrace.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from headrace.profiling.cpu.program import Job
    from headrace.profiling.finding import Finding
    from headrace.profiling.record import Record

_FORMATS = ("prof", "collapsed", "speedscope", "html", "json")


class _Options(msgspec.Struct, frozen=True):
    """How a run is shown and where it is kept."""

    sort: str
    top: int
    style: str
    output: Path | None
    formats: tuple[str, ...]
    name: str | None
    view: bool


def _formats(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (value or "").split(",") if name.strip())
    for name in names:
        if name not in _FORMATS:
            raise click.BadParameter(f"there is no format {name!r}; known are {', '.join(_FORMATS)}")
    return names


@click.command(
    short_help="Where a program's time goes, with a diagnosis.",
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@click.argument("script", metavar="SCRIPT | -m MODULE", required=False)
@click.argument("arguments", metavar="[ARGUMENTS]...", nargs=-1, type=click.UNPROCESSED)
@click.option("-m", "--module", "is_module", is_flag=True, help="run a module as `python -m` does")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="also write a pstats file there")
@click.option("--sort", default="cumulative", show_default=True, help="cumulative, own, calls or percall")
@click.option("--top", default=20, show_default=True, metavar="N", help="functions in the table; 0 for all")
@click.option("--save", callback=_formats, metavar="FORMATS", help=f"files beside the record: {','.join(_FORMATS)}")
@click.option("--open", "view", is_flag=True, help="open the profile in SnakeViz")
@click.option(
    "--lines", type=click.Choice(["auto"]), help="auto: run it again, following its hottest functions by line"
)
@click.option("--gpu", is_flag=True, help="run it again under torch's profiler: what the GPU did")
@click.option("--name", metavar="NAME", help="keep the run under a name, for `headrace compare`")
@click.option("--trace/--no-trace", default=True, show_default=True, help="count every call; without, only sample")
@click.option("--children/--no-children", default=True, show_default=True, help="sample Python processes it starts too")
@click.option("--pid", type=int, metavar="PID", help="look at a process that runs already, from outside")
@click.option("--url", metavar="URL", help="look at a process of a running server: the URL of its admin port")
@click.option("--worker", default="", metavar="NAME", help="which one, with --url; without it the server names them")
@click.option("--seconds", default=10.0, show_default=True, metavar="S", help="how long, with --pid or --url")
@click.option("--from", "saved", type=click.Path(path_type=Path), metavar="RECORD", help="report of a saved run again")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
def profile(
    script: str | None,
    arguments: tuple[str, ...],
    is_module: bool,
    output: Path | None,
    sort: str,
    top: int,
    save: tuple[str, ...],
    view: bool,
    lines: str | None,
    gpu: bool,
    name: str | None,
    trace: bool,
    children: bool,
    pid: int | None,
    url: str | None,
    worker: str,
    seconds: float,
    saved: Path | None,
    style: str,
) -> None:
    """Run SCRIPT, in a process of its own and as Python itself would, count its calls and look at its threads and tasks
    meanwhile, and say what its time goes into.

    Its output and exit status are its own; the report follows on standard error. With --format json the report is alone
    on standard output, and the program's output goes to standard error. Every run is kept below .headrace/runs.
    """
    from headrace.profiling.render.table import ranked

    ranked([], sort)  # an order that does not exist is told before the program has run
    options = _Options(sort, top, style, output, save, name, view)
    if sum(each is not None for each in (script, pid, url, saved)) != 1:
        raise click.UsageError("one of: a script, -m MODULE, --pid, --url, --from")
    if pid is not None:
        _profile_process(pid, seconds, options)
    elif url is not None:
        _profile_server(url, worker, seconds, options)
    elif saved is not None:
        _report_again(saved, options)
    else:
        assert script is not None
        sys.exit(_profile_program(script, is_module, arguments, trace, children, lines == "auto", gpu, options))


def _profile_program(
    script: str,
    is_module: bool,
    arguments: Sequence[str],
    trace: bool,
    children: bool,
    lines: bool,
    gpu: bool,
    options: _Options,
) -> int:
    """Run a program; its exit status, as a shell has it."""
    from headrace.profiling.cpu import launch
    from headrace.profiling.cpu.program import Job

    if gpu and importlib.util.find_spec("torch") is None:
        raise Unavailable("a timeline of a GPU needs torch", field="gpu", hint="pip install 'headrace[torch]'")
    job = Job(script, is_module, list(arguments), "", trace=trace, children=children)
    launch.check(job)
    job = msgspec.structs.replace(job, folder=str(launch.new_folder()))
    record = launch.run(job, quiet_output=options.style == "json")
    record = _look_again(job, record, lines, gpu)
    _show(record, Path(job.folder), options, on_stderr=options.style == "text")
    status = record.exit_status or 0
    return status if status >= 0 else 128 - status


def _look_again(job: Job, record: Record, lines: bool, gpu: bool) -> Record:
    """Further runs for what cannot be seen in the first one."""
    from headrace.profiling.cpu import launch
    from headrace.profiling.linewise import hottest

    more: dict[str, Any] = {}
    if lines and (frames := hottest(record)):
        _tell(f"running it again, without its output, to follow {', '.join(each.function for each in frames)}")
        more["lines"] = launch.follow_lines(job, frames)
    if gpu:
        _tell("running it again, without its output, under torch's profiler")
        more["device"] = launch.follow_device(job)
        if more["device"] is None:
            more["notes"] = [*record.notes, "the run under torch's profiler left no timeline"]
    return launch.complete(job, record, more) if more else record


def _profile_process(pid: int, seconds: float, options: _Options) -> None:
    from headrace.profiling import record as records
    from headrace.profiling.cpu import attach, launch

    _tell(f"looking at process {pid} for {seconds:g} s")
    record = attach.attach(pid, seconds)
    folder = launch.new_folder()
    records.write(record, folder / "record.json")
    _show(record, folder, options, on_stderr=False)


def _profile_server(url: str, worker: str, seconds: float, options: _Options) -> None:
    from headrace import live_profile
    from headrace.profiling import record as records
    from headrace.profiling.cpu import launch

    if worker:
        _tell(f"looking at {worker} of {url} for {seconds:g} s")
    record = live_profile.fetch(url, worker, seconds)
    folder = launch.new_folder()
    records.write(record, folder / "record.json")
    _show(record, folder, options, on_stderr=False)


def _report_again(saved: Path, options: _Options) -> None:
    from headrace.profiling import record as records

    path = saved / "record.json" if saved.is_dir() else saved
    _show(records.read(path), path.parent, options, on_stderr=False)


def _show(record: Record, folder: Path, options: _Options, *, on_stderr: bool) -> None:
    """Everything that is made from a record that has been saved."""
    from headrace.profiling import ledger
    from headrace.profiling.cpu import report
    from headrace.profiling.cpu.awaited import with_awaits
    from headrace.profiling.diagnose import diagnose
    from headrace.profiling.render import write_prof

    findings = diagnose(record)
    formats = [*options.formats, *(["prof"] if options.view and options.output is None else [])]
    files = {"record": str(folder / "record.json"), **_save(record, findings, formats, folder)}
    if options.output is not None:
        try:
            write_prof(with_awaits(record), options.output)
        except OSError as error:
            raise ConfigError(f"cannot write {options.output}: {error.strerror}", field="output") from None
        files["prof"] = str(options.output)
    if options.name is not None:
        ledger.store(record, options.name)
    if options.style == "json":
        click.echo(report.as_json(record, findings, options.sort, options.top, files))
    else:
        kept = [f"{name:<19}{file}" for name, file in files.items()]
        kept += [f"{'kept as':<19}{options.name}"] if options.name else []
        text = report.as_text(record, findings, options.sort, options.top)
        click.echo("\n\n".join([text, "\n".join(kept)]), err=on_stderr)
    if options.view:
        _open(files["prof"])


def _save(record: Record, findings: Sequence[Finding], formats: Sequence[str], folder: Path) -> dict[str, str]:
    from headrace.profiling.cpu import report

    try:
        return report.save(record, findings, [name for name in formats if name != "json"], folder)
    except OSError as error:
        raise ConfigError(f"cannot write below {folder}: {error.strerror}", field="save") from None


def _open(file: str) -> None:
    """Show a profile in SnakeViz, until Ctrl-C ends it; or say how to get that."""
    if importlib.util.find_spec("snakeviz") is None:
        _tell(f"SnakeViz is not installed: pip install snakeviz, then snakeviz {file}")
        return
    try:
        subprocess.run([sys.executable, "-m", "snakeviz", file], check=False)
    except KeyboardInterrupt:
        return


def _tell(text: str) -> None:
    click.echo(text, err=True)


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
