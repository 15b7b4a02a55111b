"""What a search for a leak has found, as a value, as JSON and as text."""

from __future__ import annotations

import os
import resource
import sys
from typing import Any, Literal

import msgspec
import psutil

from headrace import cgroups
from headrace.profiling.leaking.lines import Line

Verdict = Literal["no_leak", "warm_up", "bounded", "cycles", "fragmentation", "leak", "inconclusive"]
LeakKind = Literal["graph", "tensors", "python", "threads", "fds", "native"]


class Limit(msgspec.Struct, frozen=True):
    """What runs out first.

    Args:
        resource: memory, GPU memory, threads or descriptors.
        at: how much there is.
        iterations, seconds: until then, at the growth and the speed that were measured.
    """

    resource: str
    at: int
    iterations: float
    seconds: float


class LeakReport(msgspec.Struct, frozen=True):
    """A verdict and what it rests on.

    Args:
        verdict: ``leak`` only if growth held on in a second run.
        kind: of a leak: what is kept.
        growth_per_iteration: in ``unit`` per call; ``interval`` holds it with 95 % confidence.
        where: the lines that take what is not given back, most first.
        holder: the variable that keeps it, for example "list: closure variable `losses` of train".
        reason: the verdict in words.
        iterations: calls that were looked at, without ``warm_up``.
        seconds_per_iteration: of a call, without the looking.
        agreeing: runs that came to this verdict, of which ``processes`` in fresh processes.
    """

    verdict: Verdict
    kind: LeakKind | None = None
    growth_per_iteration: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)
    unit: str = "bytes"
    where: list[Line] = []
    holder: str | None = None
    reason: str = ""
    limit: Limit | None = None
    iterations: int = 0
    warm_up: int = 0
    seconds_per_iteration: float = 0.0
    agreeing: int = 0
    processes: int = 0

    def __str__(self) -> str:
        return as_text(self)


def as_json(report: LeakReport) -> str:
    return msgspec.json.format(msgspec.json.encode(report)).decode()


def as_text(report: LeakReport) -> str:
    """The report for people: the verdict first, then the numbers, then what to mend."""
    title = report.verdict.upper().replace("_", " ") + (f" ({report.kind})" if report.kind else "")
    low, high = report.interval
    lines = [
        f"{title}: {report.reason}",
        f"  growth    {_quantity(report.growth_per_iteration, report.unit)} per call"
        f"  [{_quantity(low, report.unit)}, {_quantity(high, report.unit)}] with 95 % confidence",
        f"  measured  {report.iterations} calls after {report.warm_up} to warm up,"
        f" {report.seconds_per_iteration * 1e3:.3g} ms each; {report.agreeing} runs agree",
    ]
    if report.limit:
        limit = report.limit
        memory = limit.resource.endswith("memory")
        at = f"{_quantity(limit.at, 'bytes')} of {limit.resource}" if memory else _quantity(limit.at, limit.resource)
        lines.append(
            f"  limit     {at} reached after {limit.iterations:,.0f} calls, {_duration(limit.seconds)} at this speed"
        )
    if report.holder:
        lines.append(f"  holder    {report.holder}")
    for number, line in enumerate(report.where):
        head = "  where     " if number == 0 else "            "
        lines.append(f"{head}{_short(line.file)}:{line.line}  +{_quantity(line.growth, line.unit)} per call")
    return "\n".join(lines)


def _quantity(amount: float, unit: str) -> str:
    if unit != "bytes":
        return f"{amount:,.4g} {unit}" if amount < 1000 else f"{amount:,.0f} {unit}"
    for name in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024 or name == "GiB":
            break
        amount /= 1024
    return f"{amount:.3g} {name}" if abs(amount) < 1000 else f"{amount:.0f} {name}"


def _duration(seconds: float) -> str:
    for name, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {name}"
    return f"{seconds:.3g} s"


def _short(file: str) -> str:
    here = os.path.join(os.getcwd(), "")
    return file.removeprefix(here)


def memory_left() -> tuple[int, int]:
    """Bytes that there are and bytes that are left: what the control group allows, or else what the machine has. What
    others use now is taken as fixed."""
    limits, machine = cgroups.read_limits(), psutil.virtual_memory()
    if limits.memory_bytes is not None and limits.memory_bytes < machine.total:
        most, left = limits.memory_bytes, limits.memory_bytes - limits.memory_used_bytes
    else:
        most, left = machine.total, machine.available
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY and space < most:
        most, left = space, min(left, space - psutil.Process().memory_info().vms)
    return most, max(0, left)


def limit_of_memory(growth: float, seconds: float) -> Limit | None:
    """When memory runs out.

    Args:
        growth: bytes per call.
        seconds: per call.
    """
    return _limit("memory", *memory_left(), growth, seconds)


def limit_of_gpu_memory(growth: float, seconds: float) -> Limit | None:
    torch: Any = sys.modules["torch"]
    free, total = torch.cuda.mem_get_info()
    return _limit("GPU memory", total, free, growth, seconds)


def limit_of_files(growth: float, used: int, seconds: float) -> Limit | None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if most == resource.RLIM_INFINITY else _limit("descriptors", most, most - used, growth, seconds)


def limit_of_threads(growth: float, used: int, seconds: float) -> Limit | None:
    most = cgroups.read_limits().processes
    if most is None:
        most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return None if most == resource.RLIM_INFINITY else _limit("threads", most, most - used, growth, seconds)


def _limit(name: str, most: int, room: float, growth: float, seconds: float) -> Limit | None:
    if growth <= 0:
        return None
    iterations = max(0.0, room) / growth
    return Limit(name, most, iterations, iterations * seconds)
