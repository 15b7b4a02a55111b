"""The `headrace` command. Flags come from `config.py`; heavy modules are imported by the command that needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from headrace import compare_cli, config, lint_cli, ops_cli, optimize_cli, profile_cli, task_cli, top_cli
from headrace.errors import ConfigError, HeadraceError, RequestError
from headrace.version import __version__

_F = TypeVar("_F", bound=Callable[..., Any])


def _options(*groups: str) -> Callable[[_F], _F]:
    """Options of the configuration as flags.

    Args:
        groups: ``server``, ``model`` and ``tasks``.
    """

    def declare_all(function: _F) -> _F:
        for option in reversed(config.options()):
            if not (option.secret or option.argument) and option.group in groups:
                function = _flag(option)(function)
        return click.option(
            "--config",
            "file",
            type=click.Path(path_type=Path),
            help="configuration file [default: headrace.toml if there]",
        )(function)

    return declare_all


def _flag(option: config.Option) -> Callable[[_F], _F]:
    """One option as a flag."""
    default = option.default if option.default != "" else "none"
    shown = str(default).lower() if option.is_switch else default
    return click.option(
        *([f"{option.flag}/--no-{option.flag[2:]}"] if option.is_switch else [option.flag]),
        option.name,
        default=None,
        metavar=None if option.is_switch else option.shape.upper() if "|" not in option.shape else option.shape,
        help=f"{option.help} [default: {shown}; {option.variable}]",
    )


class _Group(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="headrace")
def main() -> None:
    """From "it runs" to "it survives production traffic"."""


@main.command(short_help="Everything on this machine, on real input.")
@click.argument("app", required=False)
@_options("server", "model", "tasks")
def up(app: str | None, file: Path | None, **flags: Any) -> None:
    """Serve models and run the agents of APP (a file or a module), with a task store of its own.

    Without APP and without models in the configuration file it is the demo: an embedding model, and two agents that use
    it.
    """
    from headrace import up as compose

    def read() -> config.Config:
        settings = config.load({**flags, "app": app}, file=file)
        if settings.models or settings.app:
            return settings
        demo = {compose.DEMO_NAME: str(compose.demo_model())}
        return config.load({**flags, "app": compose.DEMO_APP}, targets=demo, file=file)

    _start(read, compose.everything, "up")


@main.command(short_help="HTTP for agents; task workers run elsewhere.")
@click.argument("app", required=False)
@_options("server", "tasks")
def gateway(app: str | None, file: Path | None, **flags: Any) -> None:
    """Accept tasks for the agents of APP: on any number of machines with one --redis, or on one with one --data-dir.

    APP is imported once, in a process of its own, to learn what its agents take; without it the task workers say so.
    """
    from headrace import up as compose

    def read() -> config.Config:
        settings = config.load({**flags, "app": app}, file=file)
        return msgspec.structs.replace(settings, app=settings.app or "", models={})

    _start(read, lambda settings, on_ready, _: compose.gateway(settings, on_ready), "gateway")


@main.group(cls=_Group, short_help="Run tasks, and look after them.")
def task() -> None:
    """Task workers, and commands about single tasks."""


@task.command(name="worker", short_help="Run the tasks of agents.")
@click.argument("app", required=False)
@_options("server", "tasks")
def task_worker(app: str | None, file: Path | None, **flags: Any) -> None:
    """Run the agents of APP, on any number of machines with the same --redis, or the same --data-dir on one."""
    from headrace import up as compose

    def read() -> config.Config:
        settings = config.load({**flags, "app": app}, file=file)
        if not settings.app:
            raise ConfigError("no agents to run", field="app", hint="headrace task worker APP, a file or a module")
        # The port of a machine's `up` or gateway; here it is there when it is asked for.
        admin_port = config.given("admin_port", flags, file=file)
        return msgspec.structs.replace(settings, models={}, admin_port=-1 if admin_port is None else admin_port)

    _start(read, lambda settings, on_ready, _: compose.worker(settings, on_ready), "task worker")


for _command in task_cli.COMMANDS:
    task.add_command(_command)
main.add_command(ops_cli.ops)
main.add_command(optimize_cli.optimize)
main.add_command(lint_cli.lint)
main.add_command(profile_cli.profile)
main.add_command(profile_cli.leak)
main.add_command(compare_cli.compare)
main.add_command(top_cli.top)


@main.command(short_help="Stop the embedded task store.")
@_options("tasks")
def down(file: Path | None, **flags: Any) -> None:
    """Stop the task store of --data-dir now; what it holds stays on disk.

    (It stops by itself when nobody has used it for a minute.)
    """
    from headrace import up as compose

    stopped = compose.down(config.load(flags, file=file))
    click.echo("the task store has stopped" if stopped else "no task store runs")


@main.command(short_help="What this machine has and lacks, and what to do about it.")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
@_options("server", "model", "tasks")
def doctor(style: str, file: Path | None, **flags: Any) -> None:
    """Look at this machine as a server with these options would use it. Nothing is changed.

    Exit status: 1 if something is an error, else 0.
    """
    from headrace.doctor import report

    found = report.examine(flags, file)
    click.echo(report.as_json(found) if style == "json" else report.as_text(found, coloured=sys.stdout.isatty()))
    sys.exit(report.exit_code(found))


@main.command(short_help="Serve a model over HTTP.")
@click.argument("target", required=False)
@click.option("--name", default=None, help="the model's name in paths and metrics [default: made from the target]")
@_options("server", "model")
def serve(target: str | None, name: str | None, file: Path | None, **flags: Any) -> None:
    """Serve TARGET: module:callable, a Hugging Face directory or id, or a TorchScript .pt file.

    Without a target, the models of the configuration file are served.
    """
    from headrace.config import name_of

    targets = {name or name_of(target): target} if target else {}

    def run_models(
        settings: config.Config, on_ready: Callable[[str, str], None], reread: Callable[[], config.Config]
    ) -> int:
        import asyncio

        from headrace import live_profile
        from headrace.serving.server import serve as serve_models

        return asyncio.run(serve_models(settings, on_ready, reread, profiler=live_profile.NAME))

    def read() -> config.Config:
        return msgspec.structs.replace(config.load(flags, targets=targets, file=file), app="")

    _start(read, run_models, "serve")


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


def _start(
    read: Callable[[], config.Config],
    run: Callable[[config.Config, Callable[[str, str], None], Callable[[], config.Config]], int],
    verb: str,
) -> None:
    """Run what the configuration says; a reload reads it again."""
    from headrace import log

    settings = read()
    log.set_up("supervisor", level=settings.log_level, style=settings.log_format)
    for variable in config.unknown_variables():
        click.echo(f"warning: no option reads the variable {variable}; it is ignored", err=True)

    def on_ready(url: str, admin_url: str) -> None:
        lines = [f"ready: {', '.join([*settings.models, *([settings.app] if settings.app else [])]) or verb}"]
        curl = 'curl -H "Authorization: Bearer $HEADRACE_API_KEY"' if settings.api_keys else "curl"
        if settings.models:
            lines.append(f'  try      {curl} --json \'{{"input":"hello world"}}\' {url}/predict')
        if url and settings.app:
            lines.append(f"  agents   {url}/agents")
        if url and settings.app == "headrace.demo":
            question = "how is a batch formed?"
            lines += [
                f"""  index    {curl} --json '{{"agent":"index"}}' {url}/agent/submit""",
                f"  watch    {curl} -N {url}/agent/events/TASK_ID",
                f"""  where    {curl} --json '{{"agent":"where","message":"{question}"}}' {url}/agent/run""",
            ]
        if url:
            lines += [f"  API      {url}/docs", f"  health   {url}/health/ready", f"  metrics  {url}/metrics"]
        if admin_url:
            lines.append(f"  admin    {admin_url}/admin/workers")
        click.echo("\n".join([*lines, "Ctrl-C stops it."]))
        sys.stdout.flush()

    loading = [f"{name} from {model.target}" for name, model in settings.models.items()]
    click.echo(f"loading {', '.join([*loading, *([settings.app] if settings.app else [])]) or verb}", err=True)
    sys.exit(run(settings, on_ready, read))


def run() -> None:
    """Entry point of the command: an error of ours is a line and an exit status, not a traceback."""
    try:
        main()
    except HeadraceError as error:
        # A field of the configuration is named by its message; that of an input may be one of hundreds.
        where = f"{error.field}: " if error.field and isinstance(error, RequestError) else ""
        click.echo(f"headrace: {where}{error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        sys.exit(2)
