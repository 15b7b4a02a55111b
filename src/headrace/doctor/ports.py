"""Who is on a port: nobody, a headrace, or another program."""

from __future__ import annotations

import contextlib
import errno
import http.client
import re
import socket
from typing import Literal

import msgspec

_ANSWER_S = 2.0
_MOST_BYTES = 4 << 20
# What a wildcard listens on can be asked here.
_ASKED = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class Port(msgspec.Struct, frozen=True):
    """One port of the configuration.

    Args:
        option: its name.
        state: ``off`` for a port that is not used, ``any`` where one is picked at the start.
        version: of the headrace that is there; empty when it does not tell strangers.
        problem: why it cannot be listened on.
    """

    option: str
    host: str = "127.0.0.1"
    number: int = 8000
    state: Literal["off", "any", "free", "headrace", "other", "impossible"] = "free"
    version: str = ""
    problem: str = ""


def read_port(option: str, host: str, number: int) -> Port:
    """Try to bind the port as a server does; if that fails, ask who is there."""
    if number <= 0:
        return Port(option, host, number, "any" if number == 0 else "off")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
        return Port(option, host, number)
    except OSError as error:
        problem = error.strerror or str(error)
        if error.errno != errno.EADDRINUSE:
            return Port(option, host, number, "impossible", problem=problem)
    with contextlib.suppress(OSError, http.client.HTTPException):
        version = _headrace(_ASKED.get(host, host), number)
        if version is not None:
            return Port(option, host, number, "headrace", version, problem)
    return Port(option, host, number, "other", problem=problem)


def _headrace(host: str, number: int) -> str | None:
    """The version of the headrace that answers there; empty if it wants a key first, ``None`` if it is none.

    It is shown no key of ours: who knows what it is.
    """
    connection = http.client.HTTPConnection(host, number, timeout=_ANSWER_S)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        text = answer.read(_MOST_BYTES).decode(errors="replace")
    if found := re.search(r'^headrace_build_info\{version="([^"]*)"', text, re.MULTILINE):
        return found[1]
    ours = answer.status == 401 and answer.headers.get("x-request-id") and '"unauthorized"' in text
    return "" if ours else None
