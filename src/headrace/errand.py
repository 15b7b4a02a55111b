"""Something that a process is asked to do beside its work, and does whatever its work is stuck in.

Whoever keeps a process sends it a `Request` on its control channel: a function by name, and what it is to be given. The
function is imported then and not before, and runs in a thread of its own, one at a time. A first `Outcome` says that it
has begun, the last one what came of it. Knows no errand, and nothing of who asks for one.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.clock import SYSTEM, Clock
from headrace.core import Cancel, Outcome, Request
from headrace.errors import Fault, HeadraceError, Overloaded, ServiceError, to_fault

_log = logging.getLogger(__name__)


class Errand(msgspec.Struct, frozen=True):
    """The body of a request for one.

    Args:
        function: ``module:name``. It returns bytes, and raises errors of ours.
        arguments: given to it by name; beside them ``cancelled``, a `threading.Event` that is set when nobody waits for
            its answer any more.
    """

    function: str
    arguments: dict[str, Any] = {}


@dataclass(frozen=True)
class _Running:
    id: int
    until: float
    cancelled: threading.Event = field(default_factory=threading.Event)


class Errands:
    """What this process is asked for.

    Args:
        send: takes the outcomes, on any thread.
    """

    def __init__(self, send: Callable[[Outcome], None], clock: Clock = SYSTEM) -> None:
        self._send = send
        self._clock = clock
        self._running: _Running | None = None

    def receive(self, frame: Request | Cancel) -> None:
        """Begin an errand, or tell one that nobody waits for it. Returns at once; always on the same thread."""
        running = self._running
        if isinstance(frame, Cancel):
            if running is not None and running.id == frame.id:
                running.cancelled.set()
            return
        try:
            if running is not None:
                left_s = 0.0 if running.cancelled.is_set() else max(0.0, running.until - self._clock.monotonic())
                raise Overloaded("the same is being done for somebody else", retry_after_s=left_s)
            self._begin(frame)
        except HeadraceError as error:
            self._send(Outcome(frame.id, fault=to_fault(error)))

    def _begin(self, request: Request) -> None:
        """Raises `ServiceError` when there can be no further thread."""
        errand = msgspec.msgpack.decode(request.body, type=Errand)
        running = self._running = _Running(request.id, self._clock.monotonic() + request.deadline_s)
        # Before the thread, whose answer must come after it.
        self._send(Outcome(request.id, last=False))
        try:
            threading.Thread(target=self._run, args=(errand, running), name="errand", daemon=True).start()
        except RuntimeError as error:
            self._running = None
            raise ServiceError(str(error)) from None

    def _run(self, errand: Errand, running: _Running) -> None:
        outcome = _outcome(errand, running)
        # Who has the answer may ask again.
        self._running = None
        self._send(outcome)


def _outcome(errand: Errand, running: _Running) -> Outcome:
    """What a function returns or raises. Nothing that it does may end this process."""
    try:
        module, _, name = errand.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        return Outcome(running.id, bytes(memoryview(function(**errand.arguments, cancelled=running.cancelled))))
    except HeadraceError as error:
        return Outcome(running.id, fault=to_fault(error))
    except BaseException as error:
        _log.exception("%s failed", errand.function)
        return Outcome(running.id, fault=Fault(HeadraceError.code, f"{errand.function} failed: {error!r}"))
