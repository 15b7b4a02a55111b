"""A look at a server that runs: what `POST /admin/profile` and ``headrace profile --url`` are made of.

The parts of it live in three processes: `look` in the one that is looked at, which imports the sampler and nothing
else; `main` in one that draws what was seen, and ends; `fetch` in a command that asks a server.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

import msgspec

from headrace.errors import ServiceError

if TYPE_CHECKING:
    from headrace.profiling.finding import Finding
    from headrace.profiling.record import Record

# For `serving.server.serve`.
NAME = "headrace.live_profile"
# Of a profile of all processes the one that has the others.
_ROOT = "supervisor"
# Beside the seconds that are looked: until it begins, until all is packed and drawn.
_TIMEOUT_S = 60.0


def look(seconds: float, cancelled: threading.Event) -> bytes:
    """This process for some seconds, as the JSON of a record."""
    from headrace.profiling import live

    return msgspec.json.encode(live.look(seconds, cancelled))


def main(argv: list[str]) -> int:
    """``python -m headrace.live_profile FORMAT KIND``; standard input and output as `serving.profiles` has them."""
    from headrace.profiling.record import Record

    os.nice(10)  # whoever is served comes first
    seen = msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, dict[str, msgspec.Raw]])
    processes = {name: msgspec.json.decode(each, type=Record) for name, each in seen["processes"].items()}
    lost = {name: msgspec.json.decode(each, type=str) for name, each in seen["lost"].items()}
    sys.stdout.buffer.write(draw(processes, lost, *argv))
    return 0


def draw(processes: dict[str, Record], lost: dict[str, str], style: str, kind: str) -> bytes:
    """What was seen, in a format: one process, or several as the children of the supervisor.

    Args:
        lost: processes that could not be looked at, and why.
    """
    from headrace.profiling.render import as_html, as_speedscope

    record = whole(processes, lost)
    if style == "html":
        return as_html(record, findings(record)).encode()
    if style == "speedscope":
        return as_speedscope(record)
    if style == "collapsed":
        return _collapsed(record, kind).encode()
    return msgspec.json.encode(record)


def whole(processes: dict[str, Record], lost: dict[str, str]) -> Record:
    """One record of all of them."""
    from headrace.profiling import ledger
    from headrace.profiling.record import Child

    machine = ledger.machine()
    named = [msgspec.structs.replace(each, command=name, machine=machine) for name, each in processes.items()]
    if len(named) == 1 and not lost:
        return named[0]
    (root,) = [each for each in named if each.command == _ROOT]
    children = [Child(each.command, each.pid, each.cpu_s, each) for each in named if each is not root]
    notes = [f"{name} is not in it: {why}" for name, why in lost.items()]
    return msgspec.structs.replace(
        root,
        children_cpu_s=sum(child.cpu_s for child in children),
        children=sorted(children, key=lambda child: -child.cpu_s),
        notes=[*root.notes, *notes],
    )


def findings(record: Record) -> list[Finding]:
    """Of each process by itself, what explains most first: that a supervisor's children do the work is none."""
    from headrace.profiling.diagnose import diagnose

    if not record.children:
        return diagnose(record)
    records = [msgspec.structs.replace(record, children=[], children_cpu_s=0.0)]
    records += [child.record for child in record.children if child.record is not None]
    found = []
    for each in records:
        found += [msgspec.structs.replace(one, title=f"{each.command}: {one.title}") for one in diagnose(each)]
    return sorted(found, key=lambda finding: -getattr(finding, "share", 0.0))


def fetch(url: str, worker: str, seconds: float) -> Record:
    """Have a server look at one of its processes, or at all of them.

    Args:
        url: of its admin port.

    Raises:
        HeadraceError: as `admin_client.ask` does.
    """
    import urllib.parse

    from headrace.admin_client import ask
    from headrace.profiling.record import Record

    query = urllib.parse.urlencode({"worker": worker, "seconds": f"{seconds:g}", "format": "json"})
    answer = ask(url, f"/admin/profile?{query}", method="POST", timeout_s=seconds + _TIMEOUT_S)
    try:
        return msgspec.json.decode(answer, type=Record)
    except msgspec.MsgspecError as error:
        hint = "is it the admin port of a newer headrace?"
        raise ServiceError(f"no profile from {url}: {error}", hint=hint) from None


def _collapsed(record: Record, kind: str) -> str:
    """Every process's; where there are several, each line begins with the process."""
    from headrace.profiling.render import as_collapsed

    parts = [(record.command, record), *((child.command, child.record) for child in record.children)]
    found = []
    for name, each in parts:
        lines = as_collapsed(each, "waiting" if kind == "waiting" else "cpu").splitlines() if each is not None else []
        found += [f"{name};{line}" if record.children else line for line in lines]
    return "".join(f"{line}\n" for line in found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
