"""What a running server does just now, as numbers and as text, from two looks at its admin port."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from headrace import metrics
from headrace.admin_client import ask
from headrace.clock import monotonic
from headrace.errors import NotFound, ServiceError

_SERIES = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

_Labels = dict[str, str]


class Snapshot(msgspec.Struct, frozen=True):
    """One look. ``at`` is monotonic seconds; ``series`` name → labels and value of each."""

    at: float
    workers: list[dict[str, object]]
    series: dict[str, list[tuple[_Labels, float]]]

    def sum(self, name: str, **labels: str) -> float:
        """Of the series that have these labels."""
        return sum(value for has, value in self.series.get(name, []) if labels.items() <= has.items())

    def values(self, name: str, label: str) -> list[str]:
        return list(dict.fromkeys(has[label] for has, _ in self.series.get(name, []) if label in has))


class Model(msgspec.Struct, frozen=True):
    """Rates are per second; times in milliseconds, ``None`` where nothing was answered."""

    model: str
    ready: int
    workers: int
    waiting: int
    in_flight: int
    requests: float
    failed: float
    refused: float
    items: float
    batch: float | None
    p50_ms: float | None
    p99_ms: float | None


class Process(msgspec.Struct, frozen=True):
    """``cpu`` is of one core, 0 to the number of cores; ``state`` is empty for what is no model worker."""

    process: str
    state: str
    pid: int | None
    restarts: int | None
    cpu: float
    memory_bytes: int


class View(msgspec.Struct, frozen=True):
    """What is shown; rates are those of ``seconds``."""

    url: str
    seconds: float
    models: list[Model]
    agents: dict[str, float]
    processes: list[Process]


def look(address: str) -> Snapshot:
    """Raises `ServiceError` where nobody answers as ours do, `Unauthorized` where a key is wanted."""
    try:
        workers = msgspec.json.decode(ask(address, "/admin/workers"), type=dict[str, list[dict[str, object]]])
        return Snapshot(monotonic(), workers["workers"], parsed(ask(address, "/metrics").decode()))
    except (msgspec.MsgspecError, KeyError, ValueError, NotFound) as error:
        hint = "the startup message of the server names its admin port"
        raise ServiceError(f"{address} is no admin port of headrace: {error}", hint=hint) from None


def parsed(text: str) -> dict[str, list[tuple[_Labels, float]]]:
    """Series of the text format of Prometheus."""
    found: dict[str, list[tuple[_Labels, float]]] = defaultdict(list)
    for line in text.splitlines():
        match = _SERIES.fullmatch(line)
        if match and not line.startswith("#"):
            name, labels, value = match.groups()
            pairs = _LABEL.findall(labels or "")
            found[name].append(({key: re.sub(r"\\(.)", _unescaped, each) for key, each in pairs}, float(value)))
    return found


def _unescaped(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def view(address: str, before: Snapshot, after: Snapshot) -> View:
    """What has happened between two looks. A counter that went back belongs to a server that began anew."""
    seconds = max(1e-9, after.at - before.at)
    if any(after.sum(name) < before.sum(name) for name in (metrics.REQUESTS.name, metrics.PROCESS_CPU.name)):
        before = Snapshot(before.at, [], {})
    names = dict.fromkeys([str(each["model"]) for each in after.workers])
    names.update(dict.fromkeys(after.values(metrics.ITEMS.name, "model")))
    processes = after.values(metrics.PROCESS_MEMORY.name, "process")
    return View(
        address,
        seconds,
        [_model(name, before, after, seconds) for name in names],
        _agents(before, after, seconds),
        [_process(name, before, after, seconds) for name in processes],
    )


def _model(name: str, before: Snapshot, after: Snapshot, seconds: float) -> Model:
    def rate(family: str, **labels: str) -> float:
        return (after.sum(family, model=name, **labels) - before.sum(family, model=name, **labels)) / seconds

    batches, items = rate(f"{metrics.BATCH_SIZE.name}_count"), rate(f"{metrics.BATCH_SIZE.name}_sum")
    workers = [each for each in after.workers if each["model"] == name]
    return Model(
        model=name,
        ready=sum(each["state"] == "ready" for each in workers),
        workers=len(workers),
        waiting=int(after.sum(metrics.QUEUE_SIZE.name, model=name)),
        in_flight=int(after.sum(metrics.IN_FLIGHT.name, model=name)),
        requests=rate(metrics.REQUESTS.name),
        failed=sum(rate(metrics.REQUESTS.name, status=status) for status in ("error", "timeout")),
        refused=rate(metrics.REFUSED.name, reason="overloaded"),
        items=rate(metrics.ITEMS.name),
        batch=items / batches if batches else None,
        p50_ms=_quantile(0.5, name, before, after),
        p99_ms=_quantile(0.99, name, before, after),
    )


def _quantile(share: float, model: str, before: Snapshot, after: Snapshot) -> float | None:
    """Of the answers between two looks, in milliseconds, drawn straight inside a bucket as Prometheus does."""
    family = f"{metrics.REQUEST_DURATION.name}_bucket"
    edges = sorted({float(each) for each in after.values(family, "le")})
    below = []
    for edge in edges:
        counts = [
            sum(
                value
                for has, value in look.series.get(family, [])
                if has["model"] == model and float(has["le"]) == edge
            )
            for look in (before, after)
        ]
        below.append(counts[1] - counts[0])
    if not below or below[-1] <= 0:
        return None
    rank, low, under = share * below[-1], 0.0, 0.0
    for edge, count in zip(edges, below, strict=True):
        if count >= rank:
            inside = (rank - under) / (count - under) if count > under else 1.0
            return (low if math.isinf(edge) else low + (edge - low) * inside) * 1e3
        low, under = edge, count
    return low * 1e3


def _agents(before: Snapshot, after: Snapshot, seconds: float) -> dict[str, float]:
    """Empty where the server runs none."""
    if metrics.TASKS_OPEN.name not in after.series:
        return {}

    def ended(**labels: str) -> float:
        return after.sum(metrics.AGENT_REQUESTS.name, **labels) - before.sum(metrics.AGENT_REQUESTS.name, **labels)

    return {
        "open": after.sum(metrics.TASKS_OPEN.name),
        "waiting": after.sum(metrics.TASK_QUEUE.name),
        "running": after.sum(metrics.AGENT_ACTIVE.name),
        "ended_per_s": ended() / seconds,
        "failed_per_s": sum(ended(status=status) for status in ("error", "timeout")) / seconds,
    }


def _process(name: str, before: Snapshot, after: Snapshot, seconds: float) -> Process:
    worker = next((each for each in after.workers if each["slot"] == name), {})
    used = [each.sum(metrics.PROCESS_CPU.name, process=name) for each in (before, after)]
    pid, restarts = worker.get("pid"), worker.get("restarts")
    return Process(
        process=name,
        state=str(worker.get("state", "")),
        pid=pid if isinstance(pid, int) else None,
        restarts=restarts if isinstance(restarts, int) else None,
        cpu=(used[1] - used[0]) / seconds,
        memory_bytes=int(after.sum(metrics.PROCESS_MEMORY.name, process=name)),
    )


def as_text(found: View) -> list[str]:
    lines = [f"{found.url}, the last {found.seconds:.0f} s", ""]
    head = ["model", "ready", "waiting", "in flight", "requests/s", "failed/s", "refused/s", "items/s", "batch"]
    rows = [[*head, "p50 ms", "p99 ms"]]
    for each in found.models:
        numbers = (each.requests, each.failed, each.refused, each.items, each.batch, each.p50_ms, each.p99_ms)
        counts = [f"{each.ready}/{each.workers}", str(each.waiting), str(each.in_flight)]
        rows.append([each.model, *counts, *map(_number, numbers)])
    if found.models:
        lines += [*_aligned(rows), ""]
    if found.agents:
        lines.append(
            ", ".join(f"{name.replace('_per_s', '/s')} {_number(each)}" for name, each in found.agents.items())
        )
        lines[-1] = f"tasks: {lines[-1]}"
        lines.append("")
    rows = [["process", "state", "pid", "restarts", "CPU %", "MiB"]]
    for process in found.processes:
        words = [process.process, process.state or "–", _optional(process.pid), _optional(process.restarts)]
        rows.append([*words, f"{100 * process.cpu:.0f}", f"{process.memory_bytes / 2**20:.0f}"])
    return [*lines, *_aligned(rows)]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _optional(value: int | None) -> str:
    return "–" if value is None else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [each.rjust(width) for each, width in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:]])
