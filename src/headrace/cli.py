"""The `headrace` command. Flags come from `config.py`; heavy modules are imported by the command that needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from headrace import config
from headrace.errors import HeadraceError
from headrace.version import __version__

_F = TypeVar("_F", bound=Callable[..., Any])


def _options(function: _F) -> _F:
    """Every option of the configuration as a flag."""
    for option in reversed(config.options()):
        if option.secret:
            continue
        default = option.default if option.default != "" else "none"
        shown = str(default).lower() if option.is_switch else default
        declare = click.option(
            *([f"{option.flag}/--no-{option.flag[2:]}"] if option.is_switch else [option.flag]),
            option.name,
            default=None,
            metavar=None if option.is_switch else option.shape.upper() if "|" not in option.shape else option.shape,
            help=f"{option.help} [default: {shown}; {option.variable}]",
        )
        function = declare(function)
    return click.option(
        "--config", "file", type=click.Path(path_type=Path), help="configuration file [default: headrace.toml if there]"
    )(function)


class _Group(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="headrace")
def main() -> None:
    """From "it runs" to "it survives production traffic"."""


@main.command(short_help="Everything on this machine, on real input.")
@_options
def up(file: Path | None, **flags: Any) -> None:
    """Serve the demo's embedding model, or the models of the configuration file, and print a request to try."""
    from headrace.up import DEMO_NAME, demo_model

    def read() -> config.Config:
        settings = config.load(flags, file=file)
        return settings if settings.models else config.load(flags, targets={DEMO_NAME: str(demo_model())}, file=file)

    _serve(read)


@main.command(short_help="Serve a model over HTTP.")
@click.argument("target", required=False)
@click.option("--name", default=None, help="the model's name in paths and metrics [default: made from the target]")
@_options
def serve(target: str | None, name: str | None, file: Path | None, **flags: Any) -> None:
    """Serve TARGET: module:callable, a Hugging Face directory or id, or a TorchScript .pt file.

    Without a target, the models of the configuration file are served.
    """
    from headrace.config import name_of

    targets = {name or name_of(target): target} if target else {}
    _serve(lambda: config.load(flags, targets=targets, file=file))


@main.command(short_help="Measure a server under load.")
@click.argument("url")
@click.option("--samples", type=click.Path(exists=True, path_type=Path), help='JSON Lines, each {"input": …}')
@click.option("--concurrency", default=None, help="closed loop: clients, for example 1,16,64")
@click.option("--rate", default=None, help="open loop: requests per second with Poisson arrivals, for example 50,100")
@click.option("--duration", "duration_s", default=10.0, show_default=True, help="seconds per level")
@click.option("--warmup", "warmup_s", default=2.0, show_default=True, help="seconds before each level, not counted")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="seconds until a request counts as lost")
@click.option("--path", default="/predict", show_default=True, help="path to post to")
@click.option("--seed", default=0, show_default=True, help="of the order of samples and of the arrivals")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
def bench(
    url: str,
    samples: Path | None,
    concurrency: str | None,
    rate: str | None,
    duration_s: float,
    warmup_s: float,
    timeout_s: float,
    path: str,
    seed: int,
    style: str,
) -> None:
    """Measure URL, for example http://localhost:8000, and find where it saturates."""
    from headrace.loadgen import driver, report

    if concurrency and rate:
        raise click.UsageError("--concurrency (closed loop) and --rate (open loop) exclude each other")
    levels = driver.levels(concurrency=concurrency or ("" if rate else "1,16,64"), rate=rate or "")
    plan = driver.Plan(
        url=url,
        path=path,
        bodies=driver.read_samples(samples) if samples else driver.DEFAULT_BODIES,
        duration_s=duration_s,
        warmup_s=warmup_s,
        timeout_s=timeout_s,
        seed=seed,
    )
    results = driver.run(plan, levels, progress=lambda text: click.echo(text, err=True))
    click.echo(report.as_json(results) if style == "json" else report.as_table(results))


def _serve(read: Callable[[], config.Config]) -> None:
    """Serve what the configuration says; a reload reads it again."""
    import asyncio

    from headrace import log
    from headrace.serving.server import serve

    settings = read()
    log.set_up("supervisor", level=settings.log_level, style=settings.log_format)
    for variable in config.unknown_variables():
        click.echo(f"warning: no option reads the variable {variable}; it is ignored", err=True)

    def on_ready(url: str, admin_url: str) -> None:
        click.echo(
            f"ready: {', '.join(settings.models)}\n"
            f'  try      curl --json \'{{"input":"hello world"}}\' {url}/predict\n'
            f"  API      {url}/docs\n"
            f"  health   {url}/health/ready\n"
            f"  metrics  {url}/metrics\n"
            + (f"  admin    {admin_url}/admin/workers\n" if admin_url else "")
            + "Ctrl-C stops it."
        )
        sys.stdout.flush()

    names = ", ".join(f"{name} from {model.target}" for name, model in settings.models.items())
    click.echo(f"loading {names}", err=True)
    sys.exit(asyncio.run(serve(settings, on_ready, read)))


def run() -> None:
    """Entry point of the command: an error of ours is a line and an exit status, not a traceback."""
    try:
        main()
    except HeadraceError as error:
        click.echo(f"headrace: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        sys.exit(2)
