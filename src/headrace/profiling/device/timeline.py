"""What was seen of one GPU during a run: how busy it was, why it was not, and with what."""

from __future__ import annotations

from typing import Literal

import msgspec

Cause = Literal["host", "sync", "copy", "launch", "input", "allocation"]
Bound = Literal["launch", "memory", "compute", "communication", "unknown"]


class Where(msgspec.Struct, frozen=True):
    """A part of the idle time: at what, and for how many seconds."""

    what: str
    seconds: float


class Gap(msgspec.Struct, frozen=True):
    """Idle time of one cause.

    Args:
        cause: ``host``: nothing was launched, Python or data kept the host. ``input``: the same, in ``next`` of a
            DataLoader. ``sync``: the host had waited for the GPU, and the GPU then for the host. ``copy``: memory was
            moved to or from the GPU. ``launch``: the host was launching as fast as it could, one kernel after another.
            ``allocation``: memory was taken from, or given back to, the driver.
        seconds: all of it; ``share`` of the window, 0 to 1.
        count: of gaps in which it had a part.
        longest_s: the longest stretch, which began ``longest_at_s`` after the window's start.
        where: of it, where it is known, the most first.
    """

    cause: Cause
    seconds: float
    share: float
    count: int
    longest_s: float
    longest_at_s: float
    where: list[Where] = []


class Kernel(msgspec.Struct, frozen=True):
    """A kernel, all its calls together.

    Args:
        name: as the profiler has it, shortened; ``operator``: that most of them belong to, empty if that is not known.
        seconds: of all calls added up, also of those that ran side by side.
        share: of all kernels' seconds, 0 to 1.
        bound: by what it would be bound if it were launched in time; ``by``: ``estimate`` of its operations and bytes,
            or its ``name``.
        operations_per_s, bytes_per_s: where the operator's shapes were recorded; ``None`` otherwise.
    """

    name: str
    operator: str
    calls: int
    seconds: float
    share: float
    bound: Bound
    by: str
    operations_per_s: float | None = None
    bytes_per_s: float | None = None


class Memory(msgspec.Struct, frozen=True):
    """Of torch's allocator on one GPU.

    Args:
        allocated_bytes: that tensors have; ``reserved_bytes``: that torch has from the driver.
        unused_bytes: reserved and not allocated; ``split_bytes`` of it lie between living tensors and cannot be given
            back.
        peak_allocated_bytes, peak_reserved_bytes: the most since the program began, or since its statistics were reset.
        retries: how often, in this run, the pool had to be given back to find room; ``out_of_memory``: how often there
            was none.
    """

    allocated_bytes: int
    reserved_bytes: int
    unused_bytes: int
    split_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    retries: int
    out_of_memory: int

    @property
    def fragmentation(self) -> float:
        """Share of what is reserved that no tensor has, 0 to 1."""
        return self.unused_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """One run on one GPU.

    Args:
        gpu: false where the trace has none: the rest is then empty, and ``notes`` say so.
        device: its number; ``name`` where the trace has it.
        window_s: length of what was looked at.
        busy_s: time during which at least one kernel ran: the union, never the sum; ``busy_share`` of the window.
        copy_s: time during which memory was moved, the union too; it may lie beside kernels.
        launches: calls that started kernels; ``calls`` of kernels. One launch of a graph starts many.
        median_kernel_s: the middle of their lengths.
        syncs: calls in which the host waited for the GPU, and ``sync_s`` how long; most of that the GPU was busy.
        gaps: all the time that no kernel ran, by cause, the largest first; together with ``busy_s`` the window.
        kernels: those that took longest.
        bounds: share of the kernels' seconds by what bounds them, 0 to 1; ``launch`` for those that were shorter than
            the gap before them which the launching made.
        steps: that the profiler was told of.
        others: other GPUs of the trace, ``cuda:N`` → their busy share.
        memory: ``None`` where the trace is all there is.
    """

    gpu: bool
    window_s: float
    device: int | None = None
    name: str = ""
    busy_s: float = 0.0
    busy_share: float = 0.0
    copy_s: float = 0.0
    launches: int = 0
    calls: int = 0
    median_kernel_s: float = 0.0
    syncs: int = 0
    sync_s: float = 0.0
    gaps: list[Gap] = []
    kernels: list[Kernel] = []
    bounds: dict[Bound, float] = {}
    steps: int = 0
    others: dict[str, float] = {}
    memory: Memory | None = None
    notes: list[str] = []
