"""The merged view over the rows of all processes, as numbers and as text for Prometheus."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.metrics.catalogue import CATALOGUE, Metric
from headrace.metrics.rows import CELLS_AT, EXAMPLES, EXEMPLAR, EXEMPLAR_CELLS, Line, Row, directory, map_file, used

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_TYPE = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_BY_NAME = {metric.name: metric for metric in CATALOGUE}
_RANK = {metric.name: index for index, metric in enumerate(CATALOGUE)}
Key = tuple[str, tuple[str, ...]]


class Reader:
    """The merged view over all slots of a directory (or over given rows, in one process)."""

    def __init__(self, directory: Path | None = None, rows: Iterable[Row] = ()) -> None:
        self._directory = directory
        self._slots: dict[str, _Slot] = {f"memory.{index}": _Slot(row._map) for index, row in enumerate(rows)}
        self._series: dict[Key, _Series] = {}
        self._size = 0
        self._order: list[_Series] = []

    def values(self) -> dict[Key, list[float]]:
        """Merged cells by (name, label values): one number, or a histogram's bucket counts followed by its sum."""
        total = self._merge()
        return {key: total[s.start : s.start + s.size].tolist() for key, s in self._series.items()}

    def answer(self, accept: str) -> tuple[bytes, str]:
        """The text and its type, for a client that accepts these types: OpenMetrics if it is among them."""
        if "application/openmetrics-text" in accept:
            return self.openmetrics(), OPENMETRICS_TYPE
        return self.exposition(), CONTENT_TYPE

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format 0.0.4."""
        total = self._merge().tolist()
        return "".join(self._text(total, lambda metric: metric.name, lambda series: {})).encode()

    def openmetrics(self) -> bytes:
        """All metrics in the OpenMetrics text format 1.0, with exemplars: the id of the last one in each bucket."""
        total = self._merge().tolist()
        examples = self._examples()

        def family(metric: Metric) -> str:
            return metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name

        def examples_of(series: _Series) -> dict[int, str]:
            return examples.get((series.metric.name, series.labels), {})

        return ("".join(self._text(total, family, examples_of)) + "# EOF\n").encode()

    def _text(
        self, total: list[float], family: Callable[[Metric], str], examples: Callable[[_Series], dict[int, str]]
    ) -> Iterator[str]:
        metric: Metric | None = None
        for series in self._order:
            if series.metric is not metric:
                metric = series.metric
                yield f"# HELP {family(metric)} {metric.help}\n# TYPE {family(metric)} {metric.kind}\n"
            yield series.text(total, examples(series))

    def _examples(self) -> dict[Key, dict[int, str]]:
        """By series and bucket, the newest of all slots."""
        newest: dict[Key, dict[int, tuple[float, str]]] = {}
        for slot in self._slots.values():
            for (name, labels), bucket, ident, value, when in slot.examples():
                metric = _BY_NAME.get(name)
                if metric is None:
                    continue
                known = newest.setdefault((name, labels), {})
                if bucket not in known or known[bucket][0] < when:
                    label = f'{metric.exemplar}="{_escape(ident)}"'
                    known[bucket] = (when, f" # {{{label}}} {_number(value)} {when:.3f}")
        return {key: {bucket: text for bucket, (_, text) in found.items()} for key, found in newest.items()}

    def _merge(self) -> npt.NDArray[np.float64]:
        if self._directory:
            for path in sorted(self._directory.iterdir()):
                if path.name not in self._slots:
                    self._slots[path.name] = _Slot(map_file(path))
        for slot in self._slots.values():
            slot.refresh(self._place)
        if len(self._order) < len(self._series):
            self._order = sorted(self._series.values(), key=lambda s: (_RANK[s.metric.name], s.labels))
        total = np.zeros(self._size)
        for slot in self._slots.values():
            slot.add_to(total)
        return total

    def _place(self, line: Line) -> _Series | None:
        metric = _BY_NAME.get(line.name)
        if metric is None or len(line.labels) != len(metric.labels):
            return None  # written by another version of headrace
        series = self._series.get((line.name, line.labels))
        if series is None:
            series = self._series[line.name, line.labels] = _Series(metric, line.labels, self._size, line.size)
            self._size += line.size
        return series


class _Slot:
    """A reader's view of one file: where each of its cells belongs in the merged array."""

    def __init__(self, content: mmap.mmap) -> None:
        self._map = content
        self._cells = np.frombuffer(content, dtype=np.float64, offset=CELLS_AT)
        self._seen = 0
        self._moves: dict[str, tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = {}
        self._exemplars: list[Line] = []

    def refresh(self, place: Callable[[Line], _Series | None]) -> None:
        used_bytes = used(self._map)
        if used_bytes == self._seen:
            return
        self._seen = used_bytes
        cells: dict[str, tuple[list[int], list[int]]] = {"sum": ([], []), "max": ([], [])}
        lines = directory(self._map)
        for line in lines:
            series = place(line)
            if series is not None:
                sources, targets = cells[series.metric.merge]
                sources += range(line.cell, line.cell + line.size)
                targets += range(series.start, series.start + line.size)
        self._moves = {how: (np.array(s, np.intp), np.array(t, np.intp)) for how, (s, t) in cells.items()}
        self._exemplars = [line for line in lines if line.kind == "exemplars"]

    def add_to(self, total: npt.NDArray[np.float64]) -> None:
        for how, (sources, targets) in self._moves.items():
            values = self._cells[sources]
            total[targets] = total[targets] + values if how == "sum" else np.maximum(total[targets], values)

    def examples(self) -> Iterator[tuple[Key, int, str, float, float]]:
        """Series, bucket, id, value and time of each. One that is written just now may be a mixture of two."""
        for line in self._exemplars:
            key = (line.name.removesuffix(EXAMPLES), line.labels)
            for bucket in range(line.size // EXEMPLAR_CELLS):
                ident, value, when = EXEMPLAR.unpack_from(self._map, CELLS_AT + 8 * line.cell + bucket * EXEMPLAR.size)
                if when:
                    yield key, bucket, ident.rstrip(b"\0").decode(errors="replace"), value, when


class _Series:
    """One merged series and its text, made once."""

    def __init__(self, metric: Metric, labels: tuple[str, ...], start: int, size: int) -> None:
        self.metric, self.labels, self.start, self.size = metric, labels, start, size
        pairs = [f'{name}="{_escape(value)}"' for name, value in zip(metric.labels, labels, strict=True)]
        if metric.kind != "histogram":
            self._lines = [metric.name + _braces(pairs)]
            return
        edges = [f'le="{_edge(bound)}"' for bound in (*metric.buckets, math.inf)]
        self._lines = [f"{metric.name}_bucket{_braces([*pairs, edge])}" for edge in edges]
        self._lines += [f"{metric.name}_sum{_braces(pairs)}", f"{metric.name}_count{_braces(pairs)}"]

    def text(self, total: list[float], examples: dict[int, str]) -> str:
        """Its lines. ``examples`` by number of the bucket."""
        cells = total[self.start : self.start + self.size]
        if self.metric.kind == "histogram":
            counts = list(itertools.accumulate(cells[:-1]))
            cells = [*counts, cells[-1], counts[-1]]
        return "".join(
            [
                f"{line} {_number(value)}{examples.get(index, '')}\n" if examples else f"{line} {_number(value)}\n"
                for index, (line, value) in enumerate(zip(self._lines, cells, strict=True))
            ]
        )


def _braces(pairs: list[str]) -> str:
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _edge(bound: float) -> str:
    """As the other Python clients write it, in both formats: 30.0, not 30."""
    return "+Inf" if bound == math.inf else repr(float(bound))


def _number(value: float) -> str:
    if not math.isfinite(value):
        return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")
    return str(int(value)) if value == int(value) else repr(float(value))
