"""The catalogue of metrics, and where their values live.

Every metric is declared once, below, as data: exporter, alert rules, dashboards and `docs/metrics.md` are made from
it. Values live in one small shared-memory file per process *slot* (``worker.minilm.0``, ``http.1``): the process that
fills the slot is its only writer, anybody may read, and `/metrics` is the sum over the slots. A replacement process
takes over its predecessor's counters and starts with gauges at 0, so that nothing stale is left by a kill and no
counted request is lost (`docs/adr/0005-metrics-in-shared-memory.md`).

A file is: an 64-byte header, a directory of lines ``first cell, cells, kind, name, labels``, and the cells, each an
8-byte float. The only words of Prometheus here are the names and the text format.
"""

from __future__ import annotations

import bisect
import itertools
import math
import mmap
import os
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

Kind = Literal["counter", "gauge", "histogram"]

STATUSES = ("success", "error", "timeout", "rejected", "cancelled")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARE = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_SIZE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Metric:
    """One family. ``merge`` says how the gauges of several processes become one value."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Literal["sum", "max"] = "sum"


REQUESTS = Metric(
    "headrace_requests_total",
    "counter",
    "Requests answered, by how they ended. A request with several items counts once.",
    ("model", "endpoint", "status"),
)
REQUEST_DURATION = Metric(
    "headrace_request_duration_seconds",
    "histogram",
    "Time from the last byte of a request to its answer, in the front end.",
    ("model", "endpoint"),
    _LATENCY_S,
)
ITEMS = Metric("headrace_items_total", "counter", "Items computed.", ("model",))
QUEUE_WAIT = Metric(
    "headrace_queue_wait_seconds",
    "histogram",
    "Time an item waited in its worker before its batch started.",
    ("model",),
    _LATENCY_S,
)
BATCH_SIZE = Metric("headrace_batch_size", "histogram", "Items in a batch.", ("model",), _SIZE)
BATCH_DURATION = Metric("headrace_batch_duration_seconds", "histogram", "Time in `run`.", ("model",), _LATENCY_S)
PADDING = Metric(
    "headrace_padding_ratio", "histogram", "Share of a batch's tokens that is padding, 0 to 1.", ("model",), _SHARE
)
TOKENS = Metric(
    "headrace_tokens_total",
    "counter",
    "Tokens put into batches; kind is real or padding.",
    ("model", "kind"),
)
QUEUE_SIZE = Metric("request_queue_size", "gauge", "Requests waiting, their batch not begun.", ("model",))
IN_FLIGHT = Metric("headrace_requests_in_flight", "gauge", "Requests accepted and not yet answered.", ("model",))
REFUSED = Metric(
    "headrace_refused_total",
    "counter",
    "Requests not computed: overloaded (429), expired (deadline passed), abandoned (client gone), invalid (4xx).",
    ("model", "reason"),
)
REFUSAL_DURATION = Metric(
    "headrace_refusal_duration_seconds",
    "histogram",
    "Time from the last byte of a request to its refusal for want of room (429), in the front end.",
    ("model",),
    _LATENCY_S,
)
OUT_OF_MEMORY = Metric(
    "headrace_out_of_memory_total", "counter", "Batches that did not fit in memory and were split.", ("model",)
)
RETRIED = Metric(
    "headrace_retried_total", "counter", "Requests sent a second time because their worker was lost.", ("model",)
)
WORKERS = Metric("headrace_workers", "gauge", "Model worker processes, by state.", ("model", "state"))
WORKER_RESTARTS = Metric(
    "headrace_worker_restarts_total", "counter", "Model workers started again after a death or a hang.", ("model",)
)
HTTP_RESTARTS = Metric("headrace_http_restarts_total", "counter", "HTTP front ends started again after a death.")
_AGENT_S = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_LLM_S = (0.1, 0.5, 1, 2, 5, 10)
_TOKENS = (100, 500, 1000, 2000, 5000, 10000, 50000)
AGENT_REQUESTS = Metric(
    "agent_requests_total", "counter", "Tasks that reached their end, by how; model is the agent.", ("status", "model")
)
AGENT_DURATION = Metric(
    "agent_request_duration_seconds", "histogram", "From the submission of a task to its end.", ("model",), _AGENT_S
)
AGENT_ACTIVE = Metric("agent_active_requests", "gauge", "Tasks whose code runs just now.")
AGENT_TOKENS = Metric(
    "agent_tokens_per_request", "histogram", "Tokens that a task's calls of language models used.", ("model",), _TOKENS
)
LLM_CALLS = Metric(
    "llm_api_calls_total", "counter", "Calls of language models, by how they ended.", ("provider", "model", "status")
)
LLM_DURATION = Metric("llm_api_duration_seconds", "histogram", "Time of one call.", ("model",), _LLM_S)
TOOL_CALLS = Metric("tool_calls_total", "counter", "Calls of tools, by how they ended.", ("tool_name", "status"))
TASK_QUEUE = Metric("headrace_task_queue_depth", "gauge", "Tasks that wait for a worker.", ("lane",), merge="max")
TASK_OLDEST = Metric(
    "headrace_task_oldest_seconds", "gauge", "How long the task that waits longest has waited.", ("lane",), merge="max"
)
TASKS_OPEN = Metric("headrace_tasks_open", "gauge", "Tasks that are not finished.", merge="max")
TASKS_SUBMITTED = Metric("headrace_tasks_submitted_total", "counter", "Tasks accepted.", ("model",))
TASK_ATTEMPTS = Metric("headrace_task_attempts_total", "counter", "Times that a worker took up a task.", ("model",))
TASK_STEPS = Metric(
    "headrace_task_steps_total",
    "counter",
    "Steps by how they ended: success, error, or replayed from the journal.",
    ("model", "status"),
)
LEASE_LOSSES = Metric(
    "headrace_task_lease_losses_total", "counter", "Tasks that a worker let go because they may be another's.", ()
)
TASK_WATCHERS = Metric("headrace_task_watchers", "gauge", "Clients that watch the events of a task.")
TASK_WORKER_RESTARTS = Metric(
    "headrace_task_worker_restarts_total", "counter", "Task workers started again after a death."
)
STORE_UP = Metric("headrace_task_store_up", "gauge", "1 while the store answers this server.", merge="max")
BUILD_INFO = Metric("headrace_build_info", "gauge", "Always 1; the version is the label.", ("version",), merge="max")

CATALOGUE: tuple[Metric, ...] = (
    REQUESTS,
    REQUEST_DURATION,
    ITEMS,
    QUEUE_WAIT,
    BATCH_SIZE,
    BATCH_DURATION,
    PADDING,
    TOKENS,
    QUEUE_SIZE,
    IN_FLIGHT,
    REFUSED,
    REFUSAL_DURATION,
    OUT_OF_MEMORY,
    RETRIED,
    WORKERS,
    WORKER_RESTARTS,
    HTTP_RESTARTS,
    AGENT_REQUESTS,
    AGENT_DURATION,
    AGENT_ACTIVE,
    AGENT_TOKENS,
    LLM_CALLS,
    LLM_DURATION,
    TOOL_CALLS,
    TASK_QUEUE,
    TASK_OLDEST,
    TASKS_OPEN,
    TASKS_SUBMITTED,
    TASK_ATTEMPTS,
    TASK_STEPS,
    LEASE_LOSSES,
    TASK_WATCHERS,
    TASK_WORKER_RESTARTS,
    STORE_UP,
    BUILD_INFO,
)
LANES = ("interactive", "default", "batch")
STEP_STATUSES = ("success", "error", "replayed")
ENDPOINTS = ("predict", "embeddings", "infer")
REFUSAL_REASONS = ("overloaded", "expired", "abandoned", "invalid")
WORKER_STATES = ("starting", "ready", "restarting", "stopping")

_BY_NAME = {metric.name: metric for metric in CATALOGUE}

_MAGIC = b"HDRC0001"
_HEADER = struct.Struct("<8sQQ")  # magic, bytes of the directory in use, cells in use
_HEADER_BYTES = 64
_DIRECTORY_BYTES = 4 << 20  # the file is sparse: only pages that are used take memory
_CELLS = 1 << 17
_FILE_BYTES = _HEADER_BYTES + _DIRECTORY_BYTES + 8 * _CELLS


class Cells(Protocol):
    """What a memoryview of doubles offers; typeshed's own knows integers only for writing."""

    def __getitem__(self, index: int, /) -> float: ...
    def __setitem__(self, index: int, value: float, /) -> None: ...


class Counter:
    """A number that only grows. `inc` is exact across threads."""

    __slots__ = ("_cell", "_cells", "_lock")

    def __init__(self, cells: Cells, cell: int, lock: threading.Lock) -> None:
        self._cells, self._cell, self._lock = cells, cell, lock

    def inc(self, amount: float = 1.0) -> None:
        with self._lock:
            self._cells[self._cell] += amount

    def advance_to(self, total: float) -> None:
        """For counts that are kept elsewhere: set the new total, which is never lower than the old."""
        with self._lock:
            self._cells[self._cell] = max(total, self._cells[self._cell])


class Gauge(Counter):
    """A number that goes up and down."""

    __slots__ = ()

    def set(self, value: float) -> None:
        self._cells[self._cell] = value


class Histogram:
    """Counts per bucket, and the sum of the observed values."""

    __slots__ = ("_bounds", "_cell", "_cells", "_lock", "_sum")

    def __init__(self, cells: Cells, cell: int, lock: threading.Lock, bounds: Sequence[float]) -> None:
        self._cells, self._cell, self._lock, self._bounds = cells, cell, lock, bounds
        self._sum = cell + len(bounds) + 1

    def observe(self, value: float) -> None:
        index = self._cell + bisect.bisect_left(self._bounds, value)
        with self._lock:
            self._cells[index] += 1.0
            self._cells[self._sum] += value


class Row:
    """The values of one process slot.

    Args:
        path: the slot's file; ``None`` keeps the values in this process (library use, tests).

    Labels must name the metric's labels exactly. A row that is full folds further label values into ``other``.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._handles: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._map = _map_file(path) if path else mmap.mmap(-1, _FILE_BYTES)
        if self._map[: len(_MAGIC)] != _MAGIC:
            _HEADER.pack_into(self._map, 0, _MAGIC, 0, 0)
        self._view = memoryview(self._map)[_HEADER_BYTES + _DIRECTORY_BYTES :].cast("d")
        self._cells: Cells = self._view
        self._known = {(line.name, line.labels): line.cell for line in _directory(self._map)}
        clear_gauges(self)

    def counter(self, metric: Metric, **labels: str) -> Counter:
        return self._handle(metric, "counter", labels)  # type: ignore[no-any-return]

    def gauge(self, metric: Metric, **labels: str) -> Gauge:
        return self._handle(metric, "gauge", labels)  # type: ignore[no-any-return]

    def histogram(self, metric: Metric, **labels: str) -> Histogram:
        return self._handle(metric, "histogram", labels)  # type: ignore[no-any-return]

    def close(self) -> None:
        """Let go of the file; handles that are still held must not be used any more."""
        self._view.release()
        self._map.close()

    def _handle(self, metric: Metric, kind: Kind, labels: Mapping[str, str]) -> Any:
        if metric.kind != kind or set(labels) != set(metric.labels):
            raise TypeError(f"{metric.name} is a {metric.kind} with labels {metric.labels}, not a {kind} with {labels}")
        values = tuple(labels[name] for name in metric.labels)
        with self._lock:
            handle = self._handles.get((metric.name, values))
            if handle is None:
                cell = self._register(metric, values)
                if kind == "histogram":
                    handle = Histogram(self._cells, cell, self._lock, metric.buckets)
                else:
                    handle = (Gauge if kind == "gauge" else Counter)(self._cells, cell, self._lock)
                self._handles[metric.name, values] = handle
            return handle

    def _register(self, metric: Metric, values: tuple[str, ...]) -> int:
        cell = self._known.get((metric.name, values))
        if cell is not None:
            return cell
        used_bytes: int
        used_cells: int
        _, used_bytes, used_cells = _HEADER.unpack_from(self._map)
        size = len(metric.buckets) + 2 if metric.kind == "histogram" else 1
        line = _Line(used_cells, size, metric.kind, metric.name, values)
        data = msgspec.json.encode(line) + b"\n"
        other = ("other",) * len(values)
        # A quarter is kept for the `other` series of families that are met late.
        full = used_bytes + len(data) > _DIRECTORY_BYTES * 3 // 4 or used_cells + size > _CELLS * 3 // 4
        if full and values != other:
            return self._register(metric, other)
        start = _HEADER_BYTES + used_bytes
        self._map[start : start + len(data)] = data
        # The header is written last: a reader, or a successor after a kill, sees whole lines only.
        _HEADER.pack_into(self._map, 0, _MAGIC, used_bytes + len(data), used_cells + size)
        self._known[metric.name, values] = used_cells
        return used_cells


class _Line(msgspec.Struct, array_like=True, frozen=True):
    """One series in a file's directory."""

    cell: int
    size: int
    kind: Kind
    name: str
    labels: tuple[str, ...]


def _map_file(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, _FILE_BYTES)
        return mmap.mmap(descriptor, _FILE_BYTES)
    finally:
        os.close(descriptor)


def _directory(content: mmap.mmap) -> list[_Line]:
    _, used_bytes, _ = _HEADER.unpack_from(content)
    text = content[_HEADER_BYTES : _HEADER_BYTES + used_bytes]
    return [msgspec.json.decode(line, type=_Line) for line in text.splitlines()]


def clear_gauges(row: Row) -> None:
    """Set every gauge of a slot to 0: its process has ended, or a new one begins."""
    for line in _directory(row._map):
        if line.kind == "gauge":
            row._cells[line.cell] = 0.0


class Reader:
    """The merged view over all slots of a directory (or over given rows, in one process)."""

    def __init__(self, directory: Path | None = None, rows: Iterable[Row] = ()) -> None:
        self._directory = directory
        self._slots: dict[str, _Slot] = {f"memory.{index}": _Slot(row._map) for index, row in enumerate(rows)}
        self._series: dict[tuple[str, tuple[str, ...]], _Series] = {}
        self._size = 0
        self._order: list[_Series] = []

    def values(self) -> dict[tuple[str, tuple[str, ...]], list[float]]:
        """Merged cells by (name, label values): one number, or a histogram's bucket counts followed by its sum."""
        total = self._merge()
        return {key: total[s.start : s.start + s.size].tolist() for key, s in self._series.items()}

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format 0.0.4."""
        total = self._merge().tolist()
        out: list[str] = []
        family = ""
        for series in self._order:
            if series.metric.name != family:
                family = series.metric.name
                out.append(f"# HELP {family} {series.metric.help}\n# TYPE {family} {series.metric.kind}\n")
            series.render(total, out)
        return "".join(out).encode()

    def _merge(self) -> npt.NDArray[np.float64]:
        if self._directory:
            for path in sorted(self._directory.iterdir()):
                if path.name not in self._slots:
                    self._slots[path.name] = _Slot(_map_file(path))
        for slot in self._slots.values():
            slot.refresh(self._place)
        total = np.zeros(self._size)
        for slot in self._slots.values():
            slot.add_to(total)
        return total

    def _place(self, line: _Line) -> _Series | None:
        metric = _BY_NAME.get(line.name)
        if metric is None or len(line.labels) != len(metric.labels):
            return None  # written by another version of headrace
        series = self._series.get((line.name, line.labels))
        if series is None:
            series = self._series[line.name, line.labels] = _Series(metric, line.labels, self._size, line.size)
            self._size += line.size
            rank = {name: index for index, name in enumerate(_BY_NAME)}
            self._order = sorted(self._series.values(), key=lambda s: (rank[s.metric.name], s.labels))
        return series


class _Slot:
    """A reader's view of one file: where each of its cells belongs in the merged array."""

    def __init__(self, content: mmap.mmap) -> None:
        self._map = content
        self._cells = np.frombuffer(content, dtype=np.float64, offset=_HEADER_BYTES + _DIRECTORY_BYTES)
        self._seen = 0
        self._moves: dict[str, tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = {}

    def refresh(self, place: Any) -> None:
        _, used_bytes, _ = _HEADER.unpack_from(self._map)
        if used_bytes == self._seen:
            return
        self._seen = used_bytes
        cells: dict[str, tuple[list[int], list[int]]] = {"sum": ([], []), "max": ([], [])}
        for line in _directory(self._map):
            series = place(line)
            if series is not None:
                sources, targets = cells[series.metric.merge]
                sources += range(line.cell, line.cell + line.size)
                targets += range(series.start, series.start + line.size)
        self._moves = {how: (np.array(s, np.intp), np.array(t, np.intp)) for how, (s, t) in cells.items()}

    def add_to(self, total: npt.NDArray[np.float64]) -> None:
        for how, (sources, targets) in self._moves.items():
            values = self._cells[sources]
            total[targets] = total[targets] + values if how == "sum" else np.maximum(total[targets], values)


class _Series:
    """One merged series and its text, made once."""

    def __init__(self, metric: Metric, labels: tuple[str, ...], start: int, size: int) -> None:
        self.metric, self.labels, self.start, self.size = metric, labels, start, size
        pairs = [f'{name}="{_escape(value)}"' for name, value in zip(metric.labels, labels, strict=True)]
        if metric.kind != "histogram":
            self._lines = [metric.name + _braces(pairs)]
            return
        edges = [f'le="{_number(bound)}"' for bound in (*metric.buckets, math.inf)]
        self._lines = [f"{metric.name}_bucket{_braces([*pairs, edge])}" for edge in edges]
        self._lines += [f"{metric.name}_sum{_braces(pairs)}", f"{metric.name}_count{_braces(pairs)}"]

    def render(self, total: list[float], out: list[str]) -> None:
        cells = total[self.start : self.start + self.size]
        if self.metric.kind == "histogram":
            counts = list(itertools.accumulate(cells[:-1]))
            cells = [*counts, cells[-1], counts[-1]]
        out.extend(f"{line} {_number(value)}\n" for line, value in zip(self._lines, cells, strict=True))


def _braces(pairs: list[str]) -> str:
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if not math.isfinite(value):
        return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")
    return str(int(value)) if value == int(value) else repr(float(value))
