"""Commands of those who keep headrace running: ``headrace ops render``."""

from __future__ import annotations

import re
from pathlib import Path

import click

from headrace import config
from headrace.errors import ConfigError


def _addresses(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):\d{1,5}", value):
            raise click.BadParameter(f"{value!r} is not HOST:PORT", context, parameter)
    return values


def _url(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if value and not re.match(r"https?://[^/\s]", value):
        raise click.BadParameter(f"{value!r} is not http://… or https://…", context, parameter)
    return value


@click.group(short_help="Files for the programs beside headrace.")
def ops() -> None:
    """Files for the programs beside headrace: Prometheus, Alertmanager, Grafana."""


@ops.command(short_help="Write the files of Prometheus and Alertmanager.")
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="configuration file [default: headrace.toml if there]",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="HOST:PORT",
    callback=_addresses,
    help="a server to scrape; once for each [default: this one]",
)
@click.option(
    "--alertmanager",
    "alertmanagers",
    multiple=True,
    metavar="HOST:PORT",
    default=("localhost:9093",),
    callback=_addresses,
    show_default=True,
    help="where Prometheus sends alerts",
)
@click.option(
    "--webhook", default="", metavar="URL", callback=_url, help="who is told of alerts, as JSON [default: nobody]"
)
@click.option(
    "--prometheus",
    default="http://localhost:9090",
    show_default=True,
    metavar="URL",
    callback=_url,
    help="where Grafana finds Prometheus",
)
@click.option(
    "--runbooks",
    default="docs/runbooks",
    show_default=True,
    metavar="URL",
    help="where the pages about the alerts are; their names are appended",
)
def render(
    directory: Path,
    file: Path | None,
    targets: tuple[str, ...],
    alertmanagers: tuple[str, ...],
    webhook: str,
    prometheus: str,
    runbooks: str,
) -> None:
    """Write into DIR: prometheus.yml, alertmanager.yml, the alert rules (rules/) and their tests (tests/), dashboards.

    Where the API asks for a key, Prometheus finds it in headrace.key beside them, which only its owner can read.
    """
    from headrace.monitoring.alertmanager import Routing
    from headrace.monitoring.prometheus import Scraping
    from headrace.monitoring.render import render as write
    from headrace.monitoring.thresholds import from_table

    settings = config.load(file=file)
    key = settings.api_keys.partition(",")[0].strip()
    scraping = Scraping(targets or (_address(settings),), alertmanagers, keyed=bool(key), url=prometheus)
    try:
        files = write(
            directory,
            from_table(config.table("alerts", file), runbooks),
            scraping,
            Routing(webhook=webhook),
            api_key=key,
        )
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}", field="DIR") from None
    for path in files:
        click.echo(path)


def _address(settings: config.Config) -> str:
    """This machine's server as Prometheus beside it reaches it."""
    if settings.port == 0:
        raise ConfigError("port 0 does not say where the server is", field="port", hint="give --target HOST:PORT")
    host = "localhost" if settings.host in ("0.0.0.0", "::", "127.0.0.1", "::1") else settings.host
    return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"
