"""From a trace to a timeline: a pure function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.profiling.device import kernels as kernels_of
from headrace.profiling.device.gaps import by_cause, find_gaps
from headrace.profiling.device.timeline import Timeline
from headrace.profiling.device.trace import Trace, busiest, kind_of_call, read, union

_ASSUMED = (
    "memory or compute: by the recorded shapes of matrix products and attention, at a ridge of 200 operations per byte "
    "for 16-bit numbers, 20 for 32-bit ones; by the kernels' names else"
)


def analyse(source: dict[str, Any] | bytes | str | Path, *, top: int = 10) -> Timeline:
    """Read a trace that torch's profiler has exported (``export_chrome_trace``), and say what the GPU did.

    Of several GPUs the busiest is looked at. What is looked at is the run that `record_gpu` has marked, else the steps
    that the profiler was told of, else everything.

    Args:
        source: the trace, as a dictionary or as JSON, or the file it is in.
        top: the most kernels.

    Raises:
        ConfigError: it is no such trace.
    """
    trace = read(source)
    length = trace.window[1] - trace.window[0]
    busy = busiest(trace.kernels, trace.window)
    device = next((device for device, seconds in busy.items() if seconds > 0), None)
    if device is None:
        asked = any(kind_of_call(call.name) == "launch" for call in trace.launches.values())
        note = "no kernel ran on a GPU within this trace" if asked or trace.kernels else "no GPU in this trace"
        return Timeline(gpu=False, window_s=length, steps=trace.steps, notes=[note])
    return _of_device(trace, device, busy, top)


def _of_device(trace: Trace, device: int, busy: dict[int, float], top: int) -> Timeline:
    start, end = trace.window
    kernels = [each for each in trace.kernels[device] if each.start < end and each.end > start]
    idle = find_gaps(trace, device)
    marks = [mark for mark in trace.marks if mark.start < end and mark.end > start]
    syncs = [mark for mark in marks if mark.kind == "sync"]
    return Timeline(
        gpu=True,
        window_s=end - start,
        device=device,
        name=trace.names.get(device, ""),
        busy_s=busy[device],
        busy_share=busy[device] / (end - start),
        copy_s=sum(to - since for since, to in union(trace.copies.get(device, []), trace.window)),
        launches=sum(mark.kind == "launch" for mark in marks),
        calls=len(kernels),
        median_kernel_s=kernels_of.median_length(kernels),
        syncs=len(syncs),
        sync_s=sum(mark.end - mark.start for mark in syncs),
        gaps=by_cause(idle, trace.window),
        kernels=kernels_of.judge(kernels, trace.operators, top),
        bounds=kernels_of.shares(kernels, idle, trace.operators),
        steps=trace.steps,
        others={f"cuda:{other}": seconds / (end - start) for other, seconds in busy.items() if other != device},
        notes=[_ASSUMED],
    )
