"""Profiles of this server's own processes, on request, while they run.

Each process looks at itself, beside its work (`errand.py`); what they have seen becomes a page or a file in a process
of its own, since a supervisor must not be busy. Knows neither how a process is looked at nor how that is drawn: both is
done by a module that is named to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.errand import Errand
from headrace.errors import DeadlineExceeded, HeadraceError, InvalidInput, NotFound, NotReady, Overloaded
from headrace.supervisor import ITSELF, Supervisor

ALL = "all"
LONGEST_S = 60.0
FORMATS = {
    "html": "text/html; charset=utf-8",
    "json": "application/json",
    "collapsed": "text/plain; charset=utf-8",
    "speedscope": "application/json",
}
KINDS = ("cpu", "waiting")
# What was seen is packed and sent after the last look.
_PACKING_S = 10.0
_DRAWING_S = 30.0


@dataclass(frozen=True)
class Wanted:
    """A profile as it is asked for.

    Args:
        worker: the name of a process, or `ALL`.
        kind: of collapsed stacks, which are of one.
    """

    worker: str
    seconds: float = 10.0
    format: str = "html"
    kind: str = "cpu"


class Profiles:
    """Takes them.

    Args:
        module: has a function ``look(seconds, cancelled)`` for `errand.Errand`, which returns JSON. As a program it is
            given the format and the kind, and on standard input ``{"processes": {name: JSON}, "lost": {name: why}}``;
            it prints the answer.
    """

    def __init__(self, supervisor: Supervisor, module: str) -> None:
        self._supervisor = supervisor
        self._module = module

    def processes(self) -> list[dict[str, Any]]:
        """Those that can be looked at, as the admin port shows them."""
        return [{"name": name, "pid": pid} for name, pid in self._supervisor.pids().items()]

    def parse(self, query: Mapping[str, str]) -> Wanted:
        """Raises `InvalidInput` or `NotFound`, which name the parameter."""
        if not self._module:
            raise NotFound("this server was started without a profiler", hint="`headrace serve` and `up` have one")
        known = list(Wanted.__dataclass_fields__)
        for name in query:
            if name not in known:
                raise InvalidInput(f"there is no parameter {name!r}", field=name, hint=f"known are {', '.join(known)}")
        wanted = Wanted(
            query.get("worker", ""), _seconds(query.get("seconds", "10")), query.get("format", "html"), _kind(query)
        )
        if wanted.format not in FORMATS:
            raise InvalidInput(f"there is no format {wanted.format!r}", field="format", hint=", ".join(FORMATS))
        if not wanted.worker:
            raise InvalidInput("which process?", field="worker", hint=self._names())
        if wanted.worker not in (ALL, ITSELF) and not self._supervisor.knows(wanted.worker):
            raise NotFound(f"there is no process {wanted.worker!r}", field="worker", hint=self._names())
        return wanted

    async def take(self, wanted: Wanted) -> bytes:
        """Look, and draw. Who is cancelled stops looking.

        Raises:
            NotReady, WorkerLost: the process does not run just now, or ended meanwhile.
            Overloaded: somebody else looks at it.
            DeadlineExceeded: it does not answer.
            HeadraceError: it, or what draws, failed.
        """
        names = list(self._supervisor.pids()) if wanted.worker == ALL else [wanted.worker]
        looks = await asyncio.gather(*(self._look(name, wanted.seconds) for name in names), return_exceptions=True)
        seen: dict[str, msgspec.Raw] = {}
        lost: dict[str, str] = {}
        for name, found in zip(names, looks, strict=True):
            if isinstance(found, bytes):
                seen[name] = msgspec.Raw(found)
            elif isinstance(found, HeadraceError) and wanted.worker == ALL and name != ITSELF:
                lost[name] = found.message
            else:
                raise found
        return await self._draw(wanted, {"processes": seen, "lost": lost})

    async def _look(self, name: str, seconds: float) -> bytes:
        errand = Errand(f"{self._module}:look", {"seconds": seconds})
        outside = f"headrace profile --pid {self._supervisor.pids().get(name, 'PID')} looks from outside"
        try:
            return await self._supervisor.ask(name, errand, within_s=seconds + _PACKING_S)
        except Overloaded as error:
            raise Overloaded(
                f"{name} is being profiled already",
                field="worker",
                hint="one look at a process at a time",
                retry_after_s=error.retry_after_s,
            ) from None
        except DeadlineExceeded as error:
            raise DeadlineExceeded(error.message, field="worker", hint=outside) from None
        except NotReady as error:
            raise NotReady(error.message, field="worker", hint=error.hint) from None

    async def _draw(self, wanted: Wanted, seen: dict[str, Any]) -> bytes:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", self._module, wanted.format, wanted.kind),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_DRAWING_S):
                drawn, _ = await process.communicate(msgspec.json.encode(seen))
        except TimeoutError:
            raise DeadlineExceeded("what was seen could not be drawn in time", hint="look for fewer seconds") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            raise HeadraceError("what was seen could not be drawn", hint="the server's log says why")
        return drawn

    def _names(self) -> str:
        return f"{ALL}, or one of {', '.join(self._supervisor.pids())}"


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 1 <= (seconds := float(text)) <= LONGEST_S:
            return seconds
    raise InvalidInput(f"must be a number from 1 to {LONGEST_S:g}, not {text!r}", field="seconds", hint="10 is a start")


def _kind(query: Mapping[str, str]) -> str:
    kind = query.get("kind", KINDS[0])
    if kind not in KINDS:
        raise InvalidInput(f"there is no kind {kind!r}", field="kind", hint=" or ".join(KINDS))
    if "kind" in query and query.get("format") != "collapsed":
        raise InvalidInput("only collapsed stacks are of one kind", field="kind", hint="the others have both")
    return kind
