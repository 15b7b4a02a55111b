"""Commands about single tasks: ``headrace task submit``, show, list, cancel, retry, answer, tail.

They ask a server over HTTP, this machine's or another one's. The key comes from ``HEADRACE_API_KEY`` and from nowhere
else, since everybody on a machine can read a command line. Exit status: 0, or 1 when a task that was waited for has not
completed, 2 when nothing could be asked or was refused, 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from headrace import config
from headrace.errors import ConfigError, HeadraceError, TaskConflict, TaskNotFound, Unauthorized

if TYPE_CHECKING:
    from headrace.tasks_client import Task, TaskEvent, Tasks

_F = TypeVar("_F", bound=Callable[..., Any])
_TIMEOUT_S = 30.0
_INTERRUPTED = 130


def _common(function: _F) -> _F:
    """Options of every command here."""
    for option in (
        click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True),
        click.option("--url", default=None, help="the server [default: HEADRACE_URL, or this machine's at its port]"),
    ):
        function = option(function)
    return function


@click.command(short_help="Start a task.")
@click.argument("agent")
@click.argument("text", required=False)
@click.option("--input", "given", metavar="JSON", help="all that the agent takes, instead of TEXT; - is standard input")
@click.option("--priority", metavar="interactive|default|batch", help="its lane [default: the agent's]")
@click.option("--timeout-s", type=float, help="it fails if it is not done by then [default: the agent's]")
@click.option("--idempotency-key", metavar="KEY", help="two submits with one key make one task")
@click.option("--wait", is_flag=True, help="until it has ended; then show it")
@click.option("--tail", is_flag=True, help="show its events until it has ended")
@_common
def submit(
    agent: str,
    text: str | None,
    given: str | None,
    priority: str | None,
    timeout_s: float | None,
    idempotency_key: str | None,
    wait: bool,
    tail: bool,
    url: str | None,
    style: str,
) -> None:
    """Start a task of AGENT with TEXT, for example: headrace task submit answer "how is a batch formed?" --wait."""
    if text is not None and given is not None:
        raise click.UsageError("TEXT and --input exclude each other")
    if wait and tail:
        raise click.UsageError("--wait and --tail exclude each other")
    options: dict[str, Any] = {"priority": priority, "timeout_s": timeout_s, "idempotency_key": idempotency_key}
    if text is not None:
        options["message"] = text
    if given is not None:
        options["input"] = _json("--input", sys.stdin.read() if given == "-" else given)
    with _server(url) as tasks:
        task = tasks.submit(agent, **options)
        if tail:
            click.echo(f"task {task.task_id}", err=True)
            sys.exit(_follow(tasks, task.task_id, "", lambda event: _show_event(event, style)))
        if wait:
            click.echo(f"task {task.task_id}", err=True)
            failed = _follow(tasks, task.task_id, "", lambda event: None)
            _show(tasks.get(task.task_id), style)
            sys.exit(failed)
        _show(task, style)
        click.echo(f"watch it: headrace task tail {task.task_id}", err=True)


@click.command(short_help="Show a task.")
@click.argument("task_id", metavar="ID")
@_common
def show(task_id: str, url: str | None, style: str) -> None:
    """Show the task ID as it is now."""
    with _server(url) as tasks:
        _show(tasks.get(task_id), style)


@click.command(name="list", short_help="List tasks, the newest first.")
@click.option("--status", default="", metavar="STATE", help="only those in this state")
@click.option("--agent", default="", help="only those of this agent")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="most tasks")
@_common
def list_(status: str, agent: str, limit: int, url: str | None, style: str) -> None:
    """List tasks, the newest first."""
    with _server(url) as tasks:
        found = list(itertools.islice(tasks.list(status=status, agent=agent), limit))
    if style == "json":
        _print_json({"tasks": found})
        return
    if not found:
        click.echo("no tasks", err=True)
        return
    head = ("TASK", "AGENT", "STATUS", "STEPS", "ATTEMPT", "CREATED")
    rows = [
        (task.task_id, task.agent, task.status, str(task.steps), str(task.attempt), _time(task.created_at))
        for task in found
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@click.command(short_help="End tasks.")
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@_common
def cancel(task_ids: tuple[str, ...], url: str | None, style: str) -> None:
    """End the tasks ID...; their code is interrupted."""
    ended: list[Task] = []
    refused: list[tuple[str, HeadraceError]] = []
    with _server(url) as tasks:
        for task_id in task_ids:
            try:
                ended.append(tasks.cancel(task_id))
            except (TaskNotFound, TaskConflict) as error:
                refused.append((task_id, error))
    if style == "json":
        problems = [{"task_id": each, "code": why.code, "message": why.message} for each, why in refused]
        _print_json({"tasks": ended, "errors": problems})
    else:
        for task in ended:
            click.echo(f"{task.task_id}  {task.status}")
    for task_id, problem in refused:
        click.echo(f"headrace: {_printable(task_id)}: {_printable(problem.message)}", err=True)
    sys.exit(2 if refused else 0)


@click.command(short_help="Run a failed or cancelled task once more.")
@click.argument("task_id", metavar="ID")
@click.option("--fresh", is_flag=True, help="from its beginning: steps that are done run again")
@_common
def retry(task_id: str, fresh: bool, url: str | None, style: str) -> None:
    """Run the task ID, failed or cancelled, once more; steps that are done are not repeated."""
    with _server(url) as tasks:
        _show(tasks.retry(task_id, fresh=fresh), style)


@click.command(short_help="Tell a task what it asks for.")
@click.argument("task_id", metavar="ID")
@click.argument("value")
@click.option("--text", is_flag=True, help="VALUE is a text, whatever it looks like")
@_common
def answer(task_id: str, value: str, text: bool, url: str | None, style: str) -> None:
    """Tell the task ID what it asks for: VALUE is JSON (true, 12, "…"), and a text if it is none."""
    told: Any = value
    if not text:
        with contextlib.suppress(ValueError):
            told = json.loads(value)
    with _server(url) as tasks:
        _show(tasks.answer(task_id, told), style)


@click.command(short_help="Watch a task.")
@click.argument("task_id", metavar="ID")
@click.option("--after", default="", metavar="EVENT", help="id of the last event that you have seen")
@_common
def tail(task_id: str, after: str, url: str | None, style: str) -> None:
    """Show the events of the task ID as they happen, until it has ended: JSON Lines with --format json."""
    with _server(url) as tasks:
        sys.exit(_follow(tasks, task_id, after, lambda event: _show_event(event, style)))


COMMANDS = (submit, show, list_, cancel, retry, answer, tail)


@contextlib.contextmanager
def _server(url: str | None) -> Iterator[Tasks]:
    """A client of the server that is meant. What goes wrong is a line and an exit status."""
    from headrace.tasks_client import Tasks

    try:
        with Tasks(
            url or os.environ.get("HEADRACE_URL") or _local(),
            api_key=os.environ.get("HEADRACE_API_KEY"),
            timeout_s=_TIMEOUT_S,
        ) as tasks:
            yield tasks
    except HeadraceError as error:
        where = f"{error.field}: " if error.field and not error.message.startswith(error.field) else ""
        click.echo(f"headrace: {_printable(where + error.message)}", err=True)
        hint = "the key is taken from HEADRACE_API_KEY" if isinstance(error, Unauthorized) else error.hint
        if hint:
            click.echo(f"  {_printable(hint)}", err=True)
        sys.exit(2)


def _local() -> str:
    """The server of this machine, where the configuration puts it."""
    port = config.given("port", {})
    if port == 0:
        raise ConfigError("port 0 does not say where the server is", field="port", hint="give --url or HEADRACE_URL")
    return f"http://localhost:{8000 if port is None else port}"


def _follow(tasks: Tasks, task_id: str, after: str, tell: Callable[[TaskEvent], None]) -> int:
    """Watch a task to its end.

    Returns:
        Exit status: whether it has not completed.
    """
    last = None
    try:
        for event in tasks.events(task_id, after):
            last = event
            tell(event)
            if event.data.get("name") == "input_required" and event.type == "CUSTOM":
                click.echo(f"it waits for an answer: headrace task answer {task_id} VALUE", err=True)
        # There are no events behind the last one.
        return int((last.type if last else tasks.get(task_id).status) not in ("RUN_FINISHED", "completed"))
    except KeyboardInterrupt:
        seen = last.id if last else after
        resume = f"headrace task tail {task_id}" + (f" --after {seen}" if seen else "")
        click.echo(f"\ntask {task_id} goes on; watch it from here: {resume}", err=True)
        sys.exit(_INTERRUPTED)


def _show(task: Task, style: str) -> None:
    if style == "json":
        _print_json(task)
        return
    asked = task.input_required
    rows = {
        "task": task.task_id,
        "agent": task.agent,
        "status": task.status,
        "result": json.dumps(task.result, ensure_ascii=False) if task.status == "completed" else "",
        "error": f"{task.error.code}: {task.error.message}" if task.error else "",
        "hint": (task.error.hint or "") if task.error else "",
        "asks": asked.prompt if asked else "",
        "answer": f"headrace task answer {task.task_id} VALUE" if asked else "",
        "steps": str(task.steps) if task.created_at else "",
        "attempts": str(task.attempt) if task.created_at else "",
        "created": _time(task.created_at),
        "updated": _time(task.updated_at),
        "deadline": "" if task.ended else _time(task.deadline),
    }
    for name, value in rows.items():
        if value:
            click.echo(f"{name:<10}{_printable(value)}")


def _show_event(event: TaskEvent, style: str) -> None:
    if style == "json":
        _print_json({"id": event.id, **event.data})
        return
    told = {name: value for name, value in event.data.items() if name not in ("type", "timestamp", "threadId", "runId")}
    known = {
        "CUSTOM": ("name", "value"),
        "STEP_STARTED": ("stepName",),
        "STEP_FINISHED": ("stepName",),
        "RUN_FINISHED": ("result",),
        "RUN_ERROR": ("code", "message"),
    }
    names = known.get(event.type)
    parts = [told[name] for name in names if name in told] if names else [told] if told else []
    texts = [part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts]
    click.echo(_printable("  ".join([_clock_of(event.id), f"{event.type:<14}", *texts]).rstrip()))


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{name} is not JSON: {error}") from None


def _print_json(value: Any) -> None:
    click.echo(msgspec.json.encode(value).decode())


def _time(at: datetime.datetime | None) -> str:
    return at.astimezone().isoformat(" ", "seconds") if at else ""


def _clock_of(ident: str) -> str:
    """Time of day of an event: its id begins with the store's clock."""
    at = datetime.datetime.fromtimestamp(int(ident.partition("-")[0] or 0) / 1000).astimezone()
    return at.isoformat(" ", "milliseconds")[11:23]


def _printable(text: str) -> str:
    """What a task says must not steer the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
