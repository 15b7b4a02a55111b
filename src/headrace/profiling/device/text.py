"""A timeline as text."""

from __future__ import annotations

from headrace.profiling.device.timeline import Gap, Kernel, Memory, Timeline

_CAUSES = {
    "host": "nothing was launched: Python or data kept the host",
    "input": "the host waited for its DataLoader",
    "sync": "the host had waited for the GPU",
    "copy": "memory was moved to or from the GPU",
    "launch": "kernels are shorter than launching them takes",
    "allocation": "memory was taken from or given back to the driver",
}
_NAMES = 60


def as_text(timeline: Timeline) -> str:
    """The timeline in words and tables, times in milliseconds."""
    if not timeline.gpu:
        return "; ".join(timeline.notes)
    shares = ", ".join(f"{bound} {share:.0%}" for bound, share in timeline.bounds.items())
    parts = [
        f"GPU {timeline.device} {timeline.name}".rstrip()
        + f": busy {timeline.busy_share:.1%} of {_ms(timeline.window_s)}; {timeline.calls} kernels"
        + f" (median {1e6 * timeline.median_kernel_s:.1f} µs) from {timeline.launches} launches;"
        + f" {timeline.syncs} waits of the host for the GPU",
        *([f"other GPUs: {_others(timeline)}"] if timeline.others else []),
        "",
        f"{'idle because':<12} {'ms':>10} {'share':>7} {'gaps':>7} {'longest':>10}",
        *map(_gap, timeline.gaps),
        "",
        f"{'kernel ms':>12} {'share':>7} {'calls':>7}  {'bound by':<14} kernel",
        *map(_kernel, timeline.kernels),
        "",
        f"kernels bound by: {shares}",
        *([_memory(timeline.memory)] if timeline.memory is not None else []),
        *(f"({note})" for note in timeline.notes),
    ]
    return "\n".join(parts)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def _others(timeline: Timeline) -> str:
    return ", ".join(f"{device}: busy {share:.1%}" for device, share in timeline.others.items())


def _gap(gap: Gap) -> str:
    where = ", ".join(f"{each.what} {_ms(each.seconds)}" for each in gap.where)
    row = f"{gap.cause:<12} {1e3 * gap.seconds:>10.3f} {gap.share:>7.1%} {gap.count:>7} {1e3 * gap.longest_s:>10.3f}"
    return f"{row}  {_CAUSES[gap.cause]}" + (f" ({where})" if where else "")


def _kernel(kernel: Kernel) -> str:
    rate = f"{kernel.operations_per_s / 1e12:.1f} TFLOP/s " if kernel.operations_per_s else ""
    name = kernel.name if len(kernel.name) <= _NAMES else kernel.name[: _NAMES - 1] + "…"
    said = " ".join(filter(None, [kernel.operator, rate.strip(), name]))
    return f"{1e3 * kernel.seconds:>12.3f} {kernel.share:>7.1%} {kernel.calls:>7}  {kernel.bound:<14} {said}"


def _memory(memory: Memory) -> str:
    gib = 2**30
    return (
        f"memory: {memory.allocated_bytes / gib:.2f} GiB allocated of {memory.reserved_bytes / gib:.2f} GiB reserved "
        f"({memory.fragmentation:.0%} unused, {memory.split_bytes / gib:.2f} GiB between tensors), "
        f"{memory.retries} retries, {memory.out_of_memory} times out of memory"
    )
