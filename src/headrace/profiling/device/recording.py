"""A run under torch's profiler, and what the allocator's counters say of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace.errors import ConfigError, Unavailable
from headrace.profiling.device.analysis import analyse
from headrace.profiling.device.timeline import Memory, Timeline
from headrace.profiling.device.trace import RUN


def record_gpu(
    run: Callable[[], Any],
    *,
    warm_up: int = 0,
    repeat: int = 1,
    shapes: bool = True,
    top: int = 10,
    trace_file: Path | None = None,
) -> Timeline:
    """Run something under torch's profiler and say what the GPU did meanwhile.

    The GPU is waited for at the end, so that what was launched is seen to its end. Everything is kept in memory until
    then, about a kilobyte for each operator and kernel: give it seconds, not hours. An exception of the run's passes
    through.

    Args:
        run: called ``warm_up`` times, which are not looked at, then ``repeat`` times, which are.
        shapes: record the operators' shapes, without which fewer kernels are known to be bound by memory or by
            arithmetic; costs a few microseconds for each operator.
        top: the most kernels that are named.
        trace_file: where the trace is kept, for Perfetto or ``chrome://tracing`` [default: nowhere].

    Raises:
        Unavailable: torch is not installed.
        ConfigError: a number makes no sense.
    """
    if warm_up < 0 or repeat < 1:
        raise ConfigError("nothing would be looked at", field="repeat" if repeat < 1 else "warm_up")
    try:
        import torch
    except ImportError:
        raise Unavailable("a timeline of a GPU needs torch", hint="pip install 'headrace[torch]'") from None
    before = _statistics(torch)
    profiler = _profile(torch, run, warm_up, repeat, shapes)
    with tempfile.TemporaryDirectory(prefix="headrace-gpu-") as folder:
        file = trace_file or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        timeline = analyse(file, top=top)
    after = _statistics(torch)
    if timeline.device is None or timeline.device not in after:
        return timeline
    memory = read_memory(after[timeline.device], before.get(timeline.device, {}))
    name = timeline.name or torch.cuda.get_device_name(timeline.device)
    return msgspec.structs.replace(timeline, memory=memory, name=name)


def _profile(torch: Any, run: Callable[[], Any], warm_up: int, repeat: int, shapes: bool) -> Any:
    """The profiler, with one finished trace in it."""
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, *([kinds.CUDA] if torch.cuda.is_available() else [])]
    # Without calls to warm up, a schedule would only warn that there are none.
    schedule = torch.profiler.schedule(wait=0, warmup=warm_up, active=repeat, repeat=1) if warm_up else None
    with torch.profiler.profile(activities=activities, schedule=schedule, record_shapes=shapes) as profiler:
        for number in range(warm_up + repeat):
            with torch.profiler.record_function(RUN):  # the trace begins after the warm-up
                run()
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
            if warm_up and number < warm_up + repeat - 1:
                profiler.step()
    return profiler


def _statistics(torch: Any) -> dict[int, dict[str, Any]]:
    """Of torch's allocator, by device; empty where CUDA is not in use."""
    if not torch.cuda.is_initialized():
        return {}
    return {device: torch.cuda.memory_stats(device) for device in range(torch.cuda.device_count())}


def read_memory(statistics: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Memory:
    """What ``torch.cuda.memory_stats`` says, in our words; counts since ``before``."""

    def value(name: str) -> int:
        return int(statistics.get(name, 0))

    def since(name: str) -> int:
        return value(name) - int((before or {}).get(name, 0))

    allocated, reserved = value("allocated_bytes.all.current"), value("reserved_bytes.all.current")
    return Memory(
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        unused_bytes=reserved - allocated,
        split_bytes=value("inactive_split_bytes.all.current"),
        peak_allocated_bytes=value("allocated_bytes.all.peak"),
        peak_reserved_bytes=value("reserved_bytes.all.peak"),
        retries=since("num_alloc_retries"),
        out_of_memory=since("num_ooms"),
    )
