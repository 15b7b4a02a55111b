"""Answers about a record that several rules ask for are worked out once.

Rules stay plain functions of a record. Of one record at a time, in each thread, the answers are remembered.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from headrace.profiling.record import Record

P = ParamSpec("P")
R = TypeVar("R")
_LOCAL = threading.local()


def once(function: Callable[Concatenate[Record, P], R]) -> Callable[Concatenate[Record, P], R]:
    """A function of a record, and of what can be hashed, whose answers nobody changes."""

    @functools.wraps(function)
    def ask(record: Record, /, *args: P.args, **kwargs: P.kwargs) -> R:
        held: tuple[Record | None, dict[Any, Any]] = getattr(_LOCAL, "known", (None, {}))
        if held[0] is not record:
            held = _LOCAL.known = (record, {})
        known = held[1]
        key = (function, args, *sorted(kwargs.items()))
        if key not in known:
            known[key] = function(record, *args, **kwargs)
        found: R = known[key]
        return found

    return ask


def forget() -> None:
    """Keep no record alive. Without it the last one is."""
    _LOCAL.__dict__.pop("known", None)
