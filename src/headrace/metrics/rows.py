"""Where the values of metrics live: one small shared-memory file per process *slot* (``worker.minilm.0``, ``http.1``).

The process that fills the slot is its only writer, anybody may read, and `/metrics` is the sum over the slots. A
replacement process takes over its predecessor's counters and starts with gauges at 0, so that nothing stale is left by
a kill and no counted request is lost (`docs/adr/0005-metrics-in-shared-memory.md`).

A file is: a 64-byte header, a directory of lines ``first cell, cells, kind, name, labels``, and the cells, each an
8-byte float. Knows nothing of Prometheus.
"""

from __future__ import annotations

import bisect
import mmap
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from headrace.clock import wall
from headrace.metrics.catalogue import CLOSED_LABELS, STATUSES, Kind, Metric

LineKind = Literal["counter", "gauge", "histogram", "exemplars"]
# How the name of a family's exemplars ends; they have a line of their own, which is not summed.
EXAMPLES = "#exemplars"

_MAGIC = b"HDRC0001"
_HEADER = struct.Struct("<8sQQ")  # magic, bytes of the directory in use, cells in use
_HEADER_BYTES = 64
_DIRECTORY_BYTES = 4 << 20  # the file is sparse: only pages that are used take memory
_CELLS = 1 << 17
CELLS_AT = _HEADER_BYTES + _DIRECTORY_BYTES
_FILE_BYTES = CELLS_AT + 8 * _CELLS
# Names that clients can choose must not fill the store of whoever scrapes.
_MOST_SERIES = 2000
# An exemplar: an id padded with zeros, the value it had, when. Longer ids than that are not kept.
EXEMPLAR = struct.Struct("<40sdd")
EXEMPLAR_CELLS = EXEMPLAR.size // 8
LONGEST_EXAMPLE = 40


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
    """Counts per bucket, the sum of the observed values, and for each bucket who was the last one in it."""

    __slots__ = ("_bounds", "_cell", "_cells", "_examples", "_lock", "_sum")

    def __init__(
        self,
        cells: Cells,
        cell: int,
        lock: threading.Lock,
        bounds: Sequence[float],
        examples: tuple[mmap.mmap, int] | None = None,
    ) -> None:
        self._cells, self._cell, self._lock, self._bounds, self._examples = cells, cell, lock, bounds, examples
        self._sum = cell + len(bounds) + 1

    def observe(self, value: float, example: str = "") -> None:
        """Count a value; ``example`` is the id of the request or task that had it, of at most 40 bytes."""
        bucket = bisect.bisect_left(self._bounds, value)
        with self._lock:
            self._cells[self._cell + bucket] += 1.0
            self._cells[self._sum] += value
            if example and self._examples is not None and len(ident := example.encode()) <= LONGEST_EXAMPLE:
                content, start = self._examples
                EXEMPLAR.pack_into(content, start + bucket * EXEMPLAR.size, ident, value, wall())


class Row:
    """The values of one process slot.

    Args:
        path: the slot's file; ``None`` keeps the values in this process (library use, tests).

    Labels must name the metric's labels exactly. A model, tool or agent that comes when its family has 2,000 series, or
    the row is full, is counted as ``other``.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._handles: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._by_status: dict[tuple[str, tuple[tuple[str, str], ...]], Mapping[str, Counter]] = {}
        self._map = map_file(path) if path else mmap.mmap(-1, _FILE_BYTES)
        if self._map[: len(_MAGIC)] != _MAGIC:
            _HEADER.pack_into(self._map, 0, _MAGIC, 0, 0)
        self._view = memoryview(self._map)[CELLS_AT:].cast("d")
        self._cells: Cells = self._view
        self._known = {(line.name, line.labels): line.cell for line in directory(self._map)}
        self._counts: dict[str, int] = {}
        for name, _ in self._known:
            self._counts[name] = self._counts.get(name, 0) + 1
        clear_gauges(self)

    def counter(self, metric: Metric, **labels: str) -> Counter:
        return self._handle(metric, "counter", labels)  # type: ignore[no-any-return]

    def by_status(self, metric: Metric, **labels: str) -> Mapping[str, Counter]:
        """The counters of a family that has the label ``status``: all of them, at 0 before their first event."""
        key = metric.name, tuple(labels.items())
        found = self._by_status.get(key)
        if found is None:
            found = {status: self.counter(metric, status=status, **labels) for status in STATUSES}
            if len(self._by_status) < _MOST_SERIES:
                self._by_status[key] = found
        return found

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
            return self._make(metric, values) if handle is None else handle

    def _make(self, metric: Metric, values: tuple[str, ...]) -> Any:
        if (metric.name, values) not in self._known and self._is_full(metric):
            values = tuple(
                value if label in CLOSED_LABELS else "other" for label, value in zip(metric.labels, values, strict=True)
            )
            if (metric.name, values) in self._handles:
                return self._handles[metric.name, values]
        size = len(metric.buckets) + 2 if metric.kind == "histogram" else 1
        cell = self._register(metric.name, metric.kind, values, size)
        handle: Any
        if metric.kind == "histogram":
            handle = Histogram(self._cells, cell, self._lock, metric.buckets, self._examples(metric, values))
        else:
            handle = (Gauge if metric.kind == "gauge" else Counter)(self._cells, cell, self._lock)
        self._handles[metric.name, values] = handle
        return handle

    def _is_full(self, metric: Metric) -> bool:
        # A quarter is kept for the `other` series of families that are met late.
        _, used_bytes, used_cells = _HEADER.unpack_from(self._map)
        return bool(
            used_bytes > _DIRECTORY_BYTES * 3 // 4
            or used_cells >= _CELLS * 3 // 4
            or self._counts.get(metric.name, 0) >= _MOST_SERIES
        )

    def _examples(self, metric: Metric, values: tuple[str, ...]) -> tuple[mmap.mmap, int] | None:
        if not metric.exemplar:
            return None
        size = (len(metric.buckets) + 1) * EXEMPLAR_CELLS
        cell = self._register(metric.name + EXAMPLES, "exemplars", values, size)
        return self._map, CELLS_AT + 8 * cell

    def _register(self, name: str, kind: LineKind, values: tuple[str, ...], size: int) -> int:
        cell = self._known.get((name, values))
        if cell is not None:
            return cell
        used_bytes: int
        used_cells: int
        _, used_bytes, used_cells = _HEADER.unpack_from(self._map)
        line = Line(used_cells, size, kind, name, values)
        data = msgspec.json.encode(line) + b"\n"
        start = _HEADER_BYTES + used_bytes
        self._map[start : start + len(data)] = data
        # The header is written last: a reader, or a successor after a kill, sees whole lines only.
        _HEADER.pack_into(self._map, 0, _MAGIC, used_bytes + len(data), used_cells + size)
        self._known[name, values] = used_cells
        self._counts[name] = self._counts.get(name, 0) + 1
        return used_cells


class Line(msgspec.Struct, array_like=True, frozen=True):
    """One series in a file's directory."""

    cell: int
    size: int
    kind: LineKind
    name: str
    labels: tuple[str, ...]


def map_file(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, _FILE_BYTES)
        return mmap.mmap(descriptor, _FILE_BYTES)
    finally:
        os.close(descriptor)


def used(content: mmap.mmap) -> int:
    """Bytes of the directory that are written: it has changed when they have."""
    size: int = _HEADER.unpack_from(content)[1]
    return size


def directory(content: mmap.mmap) -> list[Line]:
    _, used_bytes, _ = _HEADER.unpack_from(content)
    text = content[_HEADER_BYTES : _HEADER_BYTES + used_bytes]
    return [msgspec.json.decode(line, type=Line) for line in text.splitlines()]


def clear_gauges(row: Row) -> None:
    """Set every gauge of a slot to 0: its process has ended, or a new one begins."""
    for line in directory(row._map):
        if line.kind == "gauge":
            row._cells[line.cell] = 0.0
