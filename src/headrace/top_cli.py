"""``headrace top``: what a running server does just now, in a terminal."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import deque
from typing import TYPE_CHECKING

import click
import msgspec

from headrace import config
from headrace.clock import sleep
from headrace.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from headrace.monitoring.live import Snapshot

# Rates are those of so many seconds: a server looks at its processes every two.
_WINDOW_S = 5.0
_ONCE_S = 2.0


@click.command(short_help="What a running server does just now.")
@click.argument("url", required=False)
@click.option("--once", is_flag=True, help=f"look for {_ONCE_S:g} s, print once, and end")
@click.option("--interval", "interval_s", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, metavar="S")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", help="json: once, one document")
def top(url: str | None, once: bool, interval_s: float, style: str) -> None:
    """Watch the server whose admin port is at URL [default: this machine's, as configured]. Ctrl-C ends it.

    Rates are those of the last five seconds. A key, where the server has some, comes from HEADRACE_API_KEY.
    """
    from headrace.monitoring import live

    address = _address(url)
    seen = deque([live.look(address)])
    if once or style == "json":
        sleep(_ONCE_S)
        found = live.view(address, seen[0], live.look(address))
        click.echo(msgspec.json.encode(found) if style == "json" else "\n".join(live.as_text(found)))
        return
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            sleep(interval_s)
            _show(address, seen)


def _show(address: str, seen: deque[Snapshot]) -> None:
    """Draw once more. A server that does not answer may be starting again: that is shown, and it is asked again."""
    from headrace.monitoring import live

    try:
        seen.append(live.look(address))
    except ServiceError as error:
        lines = [error.message]
    else:
        while len(seen) > 2 and seen[-1].at - seen[1].at >= _WINDOW_S:
            seen.popleft()
        lines = live.as_text(live.view(address, seen[0], seen[-1]))
    clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
    click.echo(clear + "\n".join([*lines, ""]))
    sys.stdout.flush()


def _address(url: str | None) -> str:
    if url is None:
        settings = config.load()
        if settings.admin_port <= 0:
            raise ConfigError("the configuration names no admin port", field="URL", hint="give its URL")
        host = settings.admin_host if settings.admin_host not in ("0.0.0.0", "::") else "localhost"
        return f"http://{f'[{host}]' if ':' in host else host}:{settings.admin_port}"
    if not re.fullmatch(r"https?://[^/\s]+/?", url):
        raise ConfigError(f"{url!r} is not the URL of an admin port", field="URL", hint="such as http://localhost:8001")
    return url.rstrip("/")
