from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from conftest import wait_until
from headrace import metrics
from headrace.machine import Gpus, Processes, visible_indices, watch_loop


def value(row: metrics.Row, name: str, label: str) -> float:
    return metrics.Reader(rows=[row]).values()[name, (label,)][0]


def test_a_process_has_memory_and_files_while_it_lives_and_keeps_its_processor_time() -> None:
    code = "x = bytearray(50_000_000)\nfor _ in range(10**6): pass\nprint('done', flush=True)\ninput()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    row = metrics.Row()
    processes = Processes(row)
    assert process.stdout
    process.stdout.readline()
    processes.sample({"worker.m.0": process.pid})
    assert value(row, "process_resident_memory_bytes", "worker.m.0") > 50_000_000
    assert value(row, "process_open_fds", "worker.m.0") >= 3
    assert value(row, "process_max_fds", "worker.m.0") >= 64
    taken = value(row, "process_cpu_seconds_total", "worker.m.0")
    assert taken > 0
    process.communicate(b"\n")
    processes.sample({})
    assert value(row, "process_resident_memory_bytes", "worker.m.0") == 0
    assert value(row, "process_open_fds", "worker.m.0") == 0
    assert value(row, "process_cpu_seconds_total", "worker.m.0") == taken

    # A replacement begins at 0 itself; the sum goes on.
    processes.sample({"worker.m.0": os.getpid()})
    assert value(row, "process_cpu_seconds_total", "worker.m.0") > taken
    assert value(row, "process_resident_memory_bytes", "worker.m.0") > 0


def test_a_process_that_has_just_gone_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    row = metrics.Row()
    Processes(row).sample({"a": process.pid, "b": os.getpid()})
    assert value(row, "process_resident_memory_bytes", "b") > 0


def test_a_loop_that_is_blocked_shows_as_lag() -> None:
    row = metrics.Row()

    async def block() -> None:
        watching = asyncio.ensure_future(watch_loop(row, "http.0"))
        await asyncio.sleep(0.4)
        wait_until_blocked()
        await asyncio.sleep(0.05)
        watching.cancel()

    def wait_until_blocked() -> None:
        begun = asyncio.get_running_loop().time()
        wait_until(lambda: asyncio.get_running_loop().time() - begun > 0.6, 5)

    asyncio.run(block())
    *_, total = metrics.Reader(rows=[row]).values()["headrace_event_loop_lag_seconds", ("http.0",)]
    assert 0.3 < total < 5


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("GPU-b,0", [1, 0]),
        ("0,7,1", [0]),
        ("0,-1,1", [0]),
        ("1,1", [1]),
        ("GPU-", []),
    ],
)
def test_cuda_numbers_the_cards_that_it_may_see(visible: str | None, wanted: list[int]) -> None:
    assert visible_indices(visible, ["GPU-a1", "GPU-b2", "GPU-c3"]) == wanted


@dataclass
class Memory:
    used: int
    total: int


class Driver:
    """A driver with cards that tell their memory; the second one does not tell its power."""

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Memory:  # noqa: N802 - NVML's name
        return Memory(10 * (handle + 1), 100)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802 - NVML's name
        return type("Rates", (), {"gpu": 50, "memory": 10})

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802 - NVML's name
        if handle == 1:
            raise self.NVMLError("not supported")
        return 70_000


def test_each_card_tells_what_it_can() -> None:
    row = metrics.Row()
    Gpus(row, Driver(), [0, 1]).sample()
    found = metrics.Reader(rows=[row]).values()
    assert found["gpu_memory_used_bytes", ("cuda:1",)] == [20]
    assert found["gpu_memory_total_bytes", ("cuda:1",)] == [100]
    assert found["headrace_gpu_utilization_ratio", ("cuda:0",)] == [0.5]
    assert found["headrace_gpu_power_watts", ("cuda:0",)] == [70]
    assert found["headrace_gpu_power_watts", ("cuda:1",)] == [0]
