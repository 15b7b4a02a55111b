"""What this process counts in: the row that its supervisor gave it, and the request that is being served just now."""

from __future__ import annotations

import asyncio
import contextvars
from pathlib import Path
from typing import Protocol

from headrace.errors import HeadraceError
from headrace.metrics.rows import Row


class Meter(Protocol):
    """Whatever sums up the tokens of one request or task."""

    tokens: int


# Of the request or task that this code works for.
meter: contextvars.ContextVar[Meter | None] = contextvars.ContextVar("headrace_meter", default=None)

_adopted: tuple[Row, Path] | None = None

_REJECTED = 429
_LATE = (408, 504)
_TIMEOUTS = ("Timeout", "TimeoutError", "TimeoutException")


def adopt(row: Row, directory: Path) -> None:
    """Let everything in this process count in a row of a server, whose other rows lie in the directory."""
    global _adopted
    _adopted = row, directory


def adopted() -> tuple[Row, Path] | None:
    """The row and the directory of the server that this process is part of."""
    return _adopted


def status_of(error: BaseException) -> str:
    """How metrics call what ended a call: timeout, rejected (429), cancelled or error.

    Clients of others are known by what they have in common: `status_code`, and a name that ends in Timeout.
    """
    if not isinstance(error, Exception) or isinstance(error, asyncio.CancelledError):
        return "cancelled"
    code = error.status if isinstance(error, HeadraceError) else getattr(error, "status_code", None)
    if code is None:
        code = getattr(getattr(error, "response", None), "status_code", None)
    if code == _REJECTED:
        return "rejected"
    if code in _LATE or any(kind.__name__.endswith(_TIMEOUTS) for kind in type(error).__mro__):
        return "timeout"
    return "error"
