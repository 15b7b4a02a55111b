"""What the machine and the processes of a server do, as metrics: memory, processor, descriptors, event loops, GPUs.

The supervisor looks at its children from outside, so that a process that is stuck is seen too. GPUs are asked through
NVML, the driver's own library: what a card has in use is everybody's, not only torch's. Where there is none, it is
looked for once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from headrace import metrics
from headrace.clock import SYSTEM, Clock

_log = logging.getLogger(__name__)

_SAMPLE_S = 2.0
_LOOP_SAMPLE_S = 0.5
_DRIVER = Path("/proc/driver/nvidia/version")


async def watch_processes(row: metrics.Row, pids: Callable[[], Mapping[str, int]]) -> None:
    """Sample processes every two seconds, for ever.

    Args:
        pids: the living ones of now, by slot.
    """
    processes = Processes(row)
    while True:
        processes.sample(pids())
        await asyncio.sleep(_SAMPLE_S)


async def watch_gpus(row: metrics.Row) -> None:
    """Sample the GPUs every two seconds, for ever; ends at once where there are none."""
    if not _DRIVER.exists():
        return
    gpus = await asyncio.to_thread(find_gpus, row, os.environ.get("CUDA_VISIBLE_DEVICES"))
    while gpus is not None:
        await asyncio.to_thread(gpus.sample)  # a driver may take its time
        await asyncio.sleep(_SAMPLE_S)


async def watch_loop(row: metrics.Row, process: str, clock: Clock = SYSTEM) -> None:
    """Measure how late this event loop is, for ever: what blocks it makes everybody in it wait."""
    lag = row.histogram(metrics.LOOP_LAG, process=process)
    while True:
        due = clock.monotonic() + _LOOP_SAMPLE_S
        await asyncio.sleep(_LOOP_SAMPLE_S)
        lag.observe(max(0.0, clock.monotonic() - due))


class Processes:
    """Memory, processor time and descriptors of processes."""

    def __init__(self, row: metrics.Row) -> None:
        self._row = row
        self._seen: dict[str, psutil.Process] = {}
        self._cpu_s: dict[str, float] = {}

    def sample(self, pids: Mapping[str, int]) -> None:
        """Take the figures of now. A slot without a process has nothing in memory; its processor time stays."""
        for slot, pid in pids.items():
            if slot not in self._seen or self._seen[slot].pid != pid:
                with contextlib.suppress(psutil.Error):
                    self._seen[slot], self._cpu_s[slot] = psutil.Process(pid), 0.0
        for slot, process in self._seen.items():
            memory = files = most = cpu_s = 0.0
            if pids.get(slot) == process.pid:
                with contextlib.suppress(psutil.Error, OSError), process.oneshot():
                    memory = process.memory_info().rss
                    cpu_s = sum(process.cpu_times()[:2])
                    files = process.num_fds()
                    most = process.rlimit(psutil.RLIMIT_NOFILE)[0] if psutil.LINUX else 0
            self._row.gauge(metrics.PROCESS_MEMORY, process=slot).set(memory)
            self._row.gauge(metrics.PROCESS_FILES, process=slot).set(files)
            self._row.gauge(metrics.PROCESS_MOST_FILES, process=slot).set(most)
            self._row.counter(metrics.PROCESS_CPU, process=slot).inc(max(0.0, cpu_s - self._cpu_s[slot]))
            self._cpu_s[slot] = max(cpu_s, self._cpu_s[slot])


class Gpus:
    """The cards that this server may use, as CUDA numbers them.

    Args:
        nvml: the module `pynvml`, or what behaves like it.
        handles: NVML's handle of ``cuda:0``, ``cuda:1``, …
    """

    def __init__(self, row: metrics.Row, nvml: Any, handles: Sequence[Any]) -> None:
        self._nvml = nvml
        self._cards = [
            (
                handle,
                row.gauge(metrics.GPU_MEMORY_USED, device=f"cuda:{index}"),
                row.gauge(metrics.GPU_MEMORY_TOTAL, device=f"cuda:{index}"),
                row.gauge(metrics.GPU_UTILIZATION, device=f"cuda:{index}"),
                row.gauge(metrics.GPU_POWER, device=f"cuda:{index}"),
            )
            for index, handle in enumerate(handles)
        ]

    def sample(self) -> None:
        """Take the figures of now; what a card does not tell stays 0."""
        nvml = self._nvml
        for handle, used, total, busy, power in self._cards:
            with contextlib.suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                used.set(memory.used)
                total.set(memory.total)
            with contextlib.suppress(nvml.NVMLError):
                busy.set(nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            with contextlib.suppress(nvml.NVMLError):
                power.set(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)


def find_gpus(row: metrics.Row, visible: str | None) -> Gpus | None:
    """The cards that `CUDA_VISIBLE_DEVICES` lets this server use, or ``None`` where there is no driver to ask."""
    import pynvml

    try:
        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetUUID(card) for card in cards]
    except pynvml.NVMLError as error:
        _log.warning("the NVIDIA driver does not answer (%s): no metrics of GPUs", error)
        return None
    return Gpus(row, pynvml, [cards[index] for index in visible_indices(visible, names)])


def visible_indices(visible: str | None, names: Sequence[str]) -> list[int]:
    """Numbers of the cards behind ``cuda:0``, ``cuda:1``, …, by the rules of CUDA.

    Args:
        visible: `CUDA_VISIBLE_DEVICES`: numbers or beginnings of names, separated by commas; the first one that names
            no card ends the list. ``None`` when it is not set.
        names: the cards' UUIDs, in the order of the bus. CUDA's own order differs where cards of different speed are
            mixed and `CUDA_DEVICE_ORDER` is not ``PCI_BUS_ID``.
    """
    if visible is None:
        return list(range(len(names)))
    found: list[int] = []
    for word in (each.strip() for each in visible.split(",")):
        if word.isdigit():
            match = [int(word)] if int(word) < len(names) else []
        else:
            match = [index for index, name in enumerate(names) if word and name.startswith(word)]
        if len(match) != 1 or match[0] in found:
            break
        found += match
    return found
