"""A trace as torch's profiler exports it, read into what the analysis looks at: spans on the host and on the GPU."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.errors import ConfigError

RUN = "headrace.run"  # annotation around what is to be looked at
_STEP = "ProfilerStep#"
_INPUT = "enumerate(DataLoader)"
SMALL_BYTES = 4096
TICK_S = 1e-9  # of the trace's clock: what is shorter is a rounding of numbers that count from the machine's start

Kind = Literal["launch", "sync", "copy", "allocation", "input"]


class _Event(msgspec.Struct):
    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: float = 0.0
    dur: float = 0.0
    pid: Any = None
    tid: Any = None
    args: dict[str, Any] | None = None


class _File(msgspec.Struct):
    events: list[_Event] = msgspec.field(name="traceEvents")
    devices: list[dict[str, Any]] = msgspec.field(name="deviceProperties", default_factory=list)


@dataclass(slots=True)
class Span:
    """Something that took time. Seconds, on the trace's own clock."""

    start: float
    end: float
    name: str
    thread: Any = None
    correlation: int | None = None  # joins a call on the host with what it started on the GPU
    operator: int | None = None  # number of the operator that it belongs to
    bytes: int = 0


@dataclass(slots=True)
class Operator:
    """One of torch's, with the shapes of what it was given, where they were recorded."""

    name: str
    shapes: list[Any]
    types: list[Any]


@dataclass(slots=True)
class Mark:
    """A stretch of the host's time whose kind is known."""

    start: float
    end: float
    kind: Kind
    name: str
    operator: int | None = None


@dataclass
class Trace:
    """Everything in order of its start.

    Attributes:
        window: what is to be looked at: the run's annotation, else the steps, else all of it.
        kernels: by device, also copies within it and fills. copies: to it and from it.
        launches: call that started something, by correlation.
        marks: of the threads that launch.
        annotations: the user's own.
    """

    window: tuple[float, float] = (0.0, 0.0)
    kernels: dict[int, list[Span]] = field(default_factory=dict)
    copies: dict[int, list[Span]] = field(default_factory=dict)
    launches: dict[int, Span] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    annotations: list[Span] = field(default_factory=list)
    operators: dict[int, Operator] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    steps: int = 0


def read(source: dict[str, Any] | bytes | str | Path) -> Trace:
    """Read a trace: as a dictionary, as JSON, or from a file. Raises `ConfigError` if it is none."""
    try:
        return _sort(_decode(source.read_bytes() if isinstance(source, Path) else source))
    except OSError as error:
        raise ConfigError(f"cannot read {source!r}: {error.strerror}", field="trace") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(
            f"this is no trace of torch's profiler: {error}", field="trace", hint="export_chrome_trace writes one"
        ) from None


def _decode(source: dict[str, Any] | bytes | str) -> _File:
    if isinstance(source, dict):
        return msgspec.convert(source, _File, strict=False)
    try:
        return msgspec.json.decode(source, type=_File, strict=False)
    except msgspec.DecodeError:  # the profiler writes Infinity and NaN, which are no JSON
        return msgspec.convert(json.loads(source), _File, strict=False)


def _sort(file: _File) -> Trace:
    trace = Trace()
    calls: list[Span] = []
    steps: list[Span] = []
    inputs: list[Span] = []
    bounds: list[Span] = []
    for event in file.events:
        if event.ph != "X":
            continue
        category = event.cat.lower()
        span = _span(event)
        if category in ("kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"):
            moved = category.endswith("memcpy") and "DtoD" not in span.name
            per_device = trace.copies if moved else trace.kernels
            per_device.setdefault(int((event.args or {}).get("device", 0)), []).append(span)
        elif category in ("cuda_runtime", "cuda_driver", "runtime", "driver"):
            calls.append(span)
        elif span.name.startswith(_INPUT):
            inputs.append(span)
        elif category in ("cpu_op", "operator"):
            _add_operator(trace, span, event.args or {})
        elif category == "user_annotation":
            kept = bounds if span.name == RUN else steps if span.name.startswith(_STEP) else trace.annotations
            kept.append(span)
        else:
            continue
        trace.window = _wider(trace.window, span)
    trace.window = _window(bounds or steps, trace.window)
    trace.steps = len(steps)
    trace.names = {
        int(each["id"]): str(each.get("name", "")) for each in file.devices if isinstance(each.get("id"), int)
    }
    trace.marks = _marks(calls, inputs, _small_and_own(trace))
    trace.launches = {span.correlation: span for span in calls if span.correlation is not None}
    for spans in (*trace.kernels.values(), *trace.copies.values(), trace.annotations):
        spans.sort(key=lambda span: span.start)
    return trace


def _span(event: _Event) -> Span:
    args = event.args or {}
    start = event.ts / 1e6
    return Span(
        start,
        start + event.dur / 1e6,
        event.name,
        (event.pid, event.tid),
        _number(args.get("correlation")),
        _number(args.get("External id", args.get("external id"))),
        _number(args.get("bytes", args.get("Bytes"))) or 0,
    )


def _number(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


def _add_operator(trace: Trace, span: Span, args: dict[str, Any]) -> None:
    if span.operator is not None:
        types = args.get("Input type", args.get("Input types", []))
        trace.operators[span.operator] = Operator(span.name, args.get("Input Dims", []), types)


def _wider(window: tuple[float, float], span: Span) -> tuple[float, float]:
    if window == (0.0, 0.0):
        return span.start, span.end
    return min(window[0], span.start), max(window[1], span.end)


def _window(named: list[Span], whole: tuple[float, float]) -> tuple[float, float]:
    if not named:
        return whole
    return min(span.start for span in named), max(span.end for span in named)


def _small_and_own(trace: Trace) -> dict[int, Kind]:
    """Correlation → what a copy really is: within the GPU one more launch; a few bytes from it, ``item()``, a wait."""
    found: dict[int, Kind] = {}
    for span in itertools.chain.from_iterable(trace.kernels.values()):
        if span.correlation is not None:
            found[span.correlation] = "launch"
    for span in itertools.chain.from_iterable(trace.copies.values()):
        if span.correlation is not None and span.bytes <= SMALL_BYTES:
            found[span.correlation] = "sync" if "DtoH" in span.name else "launch"
    return found


def _marks(calls: list[Span], inputs: list[Span], really: dict[int, Kind]) -> list[Mark]:
    """What the launching threads did, in order. Threads that launch nothing only prepare: nobody need wait for them."""
    kinds = [(span, kind) for span in calls if (kind := kind_of_call(span.name)) is not None]
    launching = {span.thread for span, kind in kinds if kind == "launch"}
    found = [Mark(span.start, span.end, "input", span.name) for span in inputs]
    for span, kind in kinds:
        if span.thread in launching:
            if kind == "copy" and span.correlation is not None:
                kind = really.get(span.correlation, kind)
            found.append(Mark(span.start, span.end, kind, span.name, span.operator))
    # A pass over a DataLoader holds calls of its own: it comes first.
    return sorted(found, key=lambda mark: (mark.start, -mark.end))


def kind_of_call(name: str) -> Kind | None:
    """What a call of the CUDA or HIP runtime or driver is; ``None`` for those that only ask or note something."""
    if "Launch" in name:
        return "launch"
    if "Synchronize" in name or name in ("cudaMemcpy", "hipMemcpy"):
        return "sync"
    if "Memcpy" in name or "Memset" in name:
        return "copy"
    if "Malloc" in name or "Free" in name or "HostAlloc" in name or "HostRegister" in name:
        return "allocation"
    return None


def union(spans: Iterable[Span], window: tuple[float, float]) -> list[tuple[float, float]]:
    """The stretches of the window that at least one of them covers; they are in order of their start."""
    found: list[tuple[float, float]] = []
    for span in spans:
        start, end = max(span.start, window[0]), min(span.end, window[1])
        if end <= start:
            continue
        if found and start <= found[-1][1] + TICK_S:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def busiest(per_device: dict[int, list[Span]], window: tuple[float, float]) -> dict[int, float]:
    """Device → seconds that a kernel ran, the largest first."""
    busy = {device: sum(end - start for start, end in union(spans, window)) for device, spans in per_device.items()}
    return dict(Counter(busy).most_common())
