"""A GPU that has nothing to run, by the cause that its timeline shows."""

from __future__ import annotations

import msgspec

from headrace.profiling.device.timeline import Gap, Timeline
from headrace.profiling.diagnose.explained import Claim, Explained, duration, percent
from headrace.profiling.diagnose.once import once
from headrace.profiling.diagnose.view import place, spots
from headrace.profiling.record import Record

_IDLE = 0.3
_LEAST_S = 0.05
_WHY = {
    "host": (
        "the program does other things between two kernels",
        "move what Python does between the steps out of the loop, into other processes, or beside the GPU (let the "
        "next batch be made while this one runs)",
    ),
    "input": (
        "it waits for the next batch",
        "load in other processes: `num_workers`, `persistent_workers=True`, `pin_memory=True`; do less per item",
    ),
    "sync": (
        "the program waits for the GPU, and then the GPU for the program",
        "fetch results every so many steps (`.item()`, `.cpu()`, `print(tensor)` wait each time); `watch_torch` names "
        "the lines",
    ),
    "copy": (
        "memory is moved to or from it",
        "copy from pinned memory with `non_blocking=True` while the GPU computes; keep on the GPU what is used again",
    ),
    "launch": (
        "kernels are shorter than what it takes to launch them",
        "larger batches; `torch.compile(mode='reduce-overhead')` or a CUDA graph launches many kernels at once",
    ),
    "allocation": (
        "memory is asked of the driver again and again",
        "leave the allocator its pool: no `empty_cache()` in the loop, like shapes, "
        "`PYTORCH_ALLOC_CONF=expandable_segments:True`",
    ),
}


@once
def idle(record: Record) -> list[Claim]:
    """No kernel runs for 30 % of the window or more."""
    timeline = _timeline(record)
    if timeline is None or not timeline.gpu or timeline.window_s <= 0 or not timeline.gaps:
        return []
    share = 1.0 - timeline.busy_share
    if share < _IDLE or share * timeline.window_s < _LEAST_S:
        return []
    most = max(timeline.gaps, key=lambda gap: gap.seconds)
    why, advice = _WHY[most.cause]
    top = max(spots(record).values(), key=lambda spot: spot.seconds, default=None)
    where = f"; meanwhile most of the CPU time is in {place(record, top.frame, top.line)}" if top is not None else ""
    finding = Explained(
        "gpu_idle",
        "warning",
        f"the GPU is idle {percent(share)} of the time, mostly because {why}",
        f"a kernel ran for {percent(timeline.busy_share)} of {duration(timeline.window_s)}; idle by cause: "
        f"{', '.join(map(_told, timeline.gaps))}{where}",
        advice,
        record.frames[top.frame].file if top is not None else "",
        top.line if top is not None else 0,
        share=share,
    )
    return [Claim(finding)]


def _told(gap: Gap) -> str:
    what = f" ({gap.where[0].what})" if gap.where else ""
    return f"{gap.cause} {percent(gap.share)}, {gap.count:,} gaps, {duration(gap.longest_s)} at most{what}"


def _timeline(record: Record) -> Timeline | None:
    try:
        return msgspec.convert(record.device, Timeline)
    except msgspec.ValidationError:  # of another version, or of none
        return None
