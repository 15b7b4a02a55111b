"""The timeline of a GPU, from traces made by hand whose answers are known, and from a real one without a GPU."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.errors import ConfigError
from headrace.profiling.device import Gap, Timeline, analyse, as_text, read_memory, record_gpu

ITEM = "aten::_local_scalar_dense"
LOADER = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"


class Made:
    """A trace under construction. Times in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._correlation = 0
        self._operator = 0

    def host(self, name: str, at: float, lasts: float, category: str = "cuda_runtime", **args: Any) -> None:
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": 1, "ts": at, "dur": lasts, "args": args}
        )

    def gpu(self, name: str, at: float, lasts: float, category: str = "kernel", device: int = 0, **args: Any) -> None:
        args = {"device": device, "stream": 7, **args}
        self.events.append(
            {"ph": "X", "cat": category, "name": name, "pid": device, "tid": 7, "ts": at, "dur": lasts, "args": args}
        )

    def kernel(self, launched: float, at: float, lasts: float, name: str = "some_kernel", **args: Any) -> None:
        """A launch of 2 µs, and what it starts."""
        self._correlation += 1
        self.host("cudaLaunchKernel", launched, 2, correlation=self._correlation)
        self.gpu(name, at, lasts, correlation=self._correlation, **args)

    def copy(self, called: float, blocks: float, at: float, lasts: float, name: str, size: int) -> None:
        self._correlation += 1
        self.host("cudaMemcpyAsync", called, blocks, correlation=self._correlation)
        self.gpu(name, at, lasts, "gpu_memcpy", correlation=self._correlation, bytes=size)

    def operator(self, name: str, shapes: list[Any], kind: str) -> int:
        self._operator += 1
        types = [kind for _ in shapes]
        self.host(name, 0, 1, "cpu_op", **{"External id": self._operator, "Input Dims": shapes, "Input type": types})
        return self._operator

    def window(self, start: float, end: float) -> None:
        self.host("headrace.run", start, end - start, "user_annotation")

    @property
    def trace(self) -> dict[str, Any]:
        return {"traceEvents": self.events, "deviceProperties": [{"id": 0, "name": "A card"}]}

    def analyse(self) -> Timeline:
        return analyse(self.trace)


@pytest.fixture
def made() -> Made:
    return Made()


def microseconds(timeline: Timeline) -> dict[str, float]:
    return {gap.cause: round(1e6 * gap.seconds, 3) for gap in timeline.gaps}


def gap_of(timeline: Timeline, cause: str) -> Gap:
    return next(gap for gap in timeline.gaps if gap.cause == cause)


def test_busy_is_the_union_of_kernels_that_ran_side_by_side(made: Made) -> None:
    made.window(0, 1000)
    made.kernel(0, 100, 300)
    made.kernel(3, 200, 300)
    made.kernel(6, 250, 50)
    found = made.analyse()
    assert found.busy_s == pytest.approx(400e-6)
    assert found.busy_share == pytest.approx(0.4)
    assert (found.calls, found.launches, found.device, found.name) == (3, 3, 0, "A card")
    assert sum(kernel.seconds for kernel in found.kernels) == pytest.approx(650e-6), "the table adds up"


def test_a_host_that_launches_nothing_is_the_cause(made: Made) -> None:
    made.window(0, 5120)
    made.host("prepare", 90, 4800, "user_annotation")
    made.kernel(0, 10, 90)
    made.kernel(5000, 5010, 110)
    found = made.analyse()
    assert [gap.cause for gap in found.gaps] == ["host", "launch"]
    assert microseconds(found) == {"host": 4910, "launch": 10}, "the first kernel was on its way for 10 µs"
    host = gap_of(found, "host")
    assert (host.count, host.longest_s, host.longest_at_s) == (1, pytest.approx(4910e-6), pytest.approx(100e-6))
    assert [each.what for each in host.where] == ["prepare"]


def test_after_a_wait_of_the_host_the_gpu_waits_for_it(made: Made) -> None:
    made.window(10, 2100)
    number = made.operator(ITEM, [[]], "float")
    made.kernel(0, 10, 990)
    made.copy(20, 5, 1001, 1, "Memcpy DtoH (Device -> Pageable)", 4)
    made.host("cudaStreamSynchronize", 26, 984, **{"External id": number})
    made.kernel(1050, 1060, 1040)
    found = made.analyse()
    assert microseconds(found) == {"sync": 60}, "also the four bytes, the Python after it, and the launch"
    assert [each.what for each in found.gaps[0].where] == [f"cudaStreamSynchronize in {ITEM}"]
    assert (found.syncs, found.sync_s) == (2, pytest.approx(989e-6))


def test_long_work_after_a_wait_is_the_hosts(made: Made) -> None:
    made.window(10, 7000)
    made.kernel(0, 10, 990)
    made.host("cudaDeviceSynchronize", 20, 990)
    made.kernel(6010, 6020, 980)
    assert microseconds(made.analyse()) == {"host": 5010, "sync": 10}


def test_kernels_shorter_than_their_launches_are_bound_by_them(made: Made) -> None:
    made.window(0, 800)
    for number in range(100):
        made.kernel(8 * number, 8 * number + 5, 3)
    found = made.analyse()
    assert [gap.cause for gap in found.gaps] == ["launch"]
    assert found.gaps[0].count == 100
    assert found.bounds == {"launch": pytest.approx(1.0)}
    assert found.busy_share == pytest.approx(300 / 800)


def test_launched_ahead_kernels_follow_each_other(made: Made) -> None:
    made.window(10, 1029)
    for number in range(10):
        made.kernel(3 * number, 10 + 102 * number, 101, "elementwise")
    found = made.analyse()
    assert microseconds(found) == {"launch": 9}
    assert found.busy_share > 0.98
    assert found.bounds == {"memory": pytest.approx(1.0)}


def test_the_clock_may_count_from_the_machines_start(made: Made) -> None:
    since = 4_792_376_230_274.031
    made.window(since, since + 1000)
    for number in range(10):
        made.kernel(since + 3 * number, since + 100 * number, 100)
    found = made.analyse()
    assert found.gaps == [], "kernels without a gap between them have none by rounding"
    assert found.busy_s == pytest.approx(1e-3, rel=1e-5)


def test_copies_are_named_where_they_hold_the_gpu_up(made: Made) -> None:
    made.window(0, 12000)
    name = "Memcpy HtoD (Pageable -> Device)"
    made.kernel(0, 0, 100)
    made.copy(90, 9000, 200, 9900, name, 64 << 20)
    made.host("cudaStreamSynchronize", 9100, 1010)
    made.kernel(10120, 10130, 1870)
    found = made.analyse()
    assert microseconds(found) == {"copy": 10000, "sync": 30}
    assert [each.what for each in found.gaps[0].where] == [name]
    assert found.copy_s == pytest.approx(9900e-6)


def test_a_copy_beside_a_kernel_holds_nothing_up(made: Made) -> None:
    made.window(0, 1000)
    made.kernel(0, 0, 1000)
    made.copy(10, 5, 100, 800, "Memcpy HtoD (Pinned -> Device)", 64 << 20)
    found = made.analyse()
    assert found.gaps == []
    assert (found.copy_s, found.busy_share) == (pytest.approx(800e-6), pytest.approx(1.0))


def test_copies_and_fills_within_the_gpu_are_work(made: Made) -> None:
    made.window(0, 300)
    made.copy(0, 5, 0, 100, "Memcpy DtoD (Device -> Device)", 64 << 20)
    made.gpu("Memset (Device)", 100, 100, "gpu_memset", bytes=64 << 20)
    found = made.analyse()
    assert found.busy_s == pytest.approx(200e-6)
    assert {kernel.bound for kernel in found.kernels} == {"memory"}


def test_waiting_for_a_loader_is_input(made: Made) -> None:
    made.window(0, 9000)
    made.kernel(0, 0, 100)
    made.host(LOADER, 300, 7000, "user_annotation")
    made.host("cudaHostAlloc", 6000, 50)  # within: a batch is pinned
    made.kernel(7360, 7370, 1630)
    found = made.analyse()
    assert [gap.cause for gap in found.gaps] == ["input", "host"]
    assert microseconds(found) == {"input": 7070, "host": 200}
    assert found.gaps[0].where[0].what == LOADER


def test_memory_from_the_driver_is_allocation(made: Made) -> None:
    made.window(0, 1000)
    made.kernel(0, 0, 100)
    made.host("cudaMalloc", 110, 700)
    made.kernel(830, 840, 160)
    assert microseconds(made.analyse()) == {"allocation": 730, "host": 10}


def test_one_launch_of_a_graph_starts_many_kernels(made: Made) -> None:
    made.window(0, 999)
    made.host("cudaGraphLaunch", 0, 5, correlation=99)
    for number in range(9):
        made.gpu("vectorized_elementwise_kernel", 10 + 110 * number, 109, correlation=99)
    found = made.analyse()
    assert (found.launches, found.calls) == (1, 9)
    assert microseconds(found) == {"launch": 10 + 8}


def test_what_threads_do_that_launch_nothing_holds_nobody_up(made: Made) -> None:
    made.window(0, 6000)
    made.kernel(0, 0, 100)
    made.events.append(
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaEventSynchronize", "pid": 1, "tid": 2, "ts": 50, "dur": 5000}
    )
    made.kernel(5200, 5210, 790)
    assert made.analyse().gaps[0].cause == "host"


def test_only_the_steps_are_looked_at_where_there_are_any(made: Made) -> None:
    made.kernel(0, 10, 50)
    for number in range(2):
        made.host(f"ProfilerStep#{number}", 1000 + 1000 * number, 1000, "user_annotation")
        made.kernel(1000 + 1000 * number, 1010 + 1000 * number, 490)
    found = made.analyse()
    assert (found.steps, found.window_s, found.calls) == (2, pytest.approx(2000e-6), 2)
    assert found.busy_share == pytest.approx(0.49)


def test_the_busiest_of_several_gpus_is_looked_at(made: Made) -> None:
    made.window(0, 1000)
    made.gpu("a", 0, 200, device=0)
    made.gpu("b", 0, 700, device=3)
    found = made.analyse()
    assert (found.device, found.busy_share) == (3, pytest.approx(0.7))
    assert found.others == {"cuda:0": pytest.approx(0.2)}
    kept = msgspec.json.decode(msgspec.json.encode(found))
    assert msgspec.convert(kept, Timeline) == found, "it can lie in a record"


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_and_nothing_counted_twice(seed: int) -> None:
    """Busy time and gaps are the window, whatever the host did."""
    draw = random.Random(seed)
    made, clock = Made(), 0.0
    for _ in range(60):
        clock += draw.choice([1, 5, 40, 300])
        lasts = draw.choice([2, 20, 500])
        what = draw.randrange(6)
        if what < 3:
            made.kernel(clock, clock + draw.randrange(400), lasts)
        elif what == 3:
            name = draw.choice(["Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)"])
            made.copy(clock, lasts, clock + draw.randrange(400), lasts, name, draw.choice([4, 1 << 20]))
        else:
            name = draw.choice([LOADER, "cudaStreamSynchronize", "cudaMalloc"])
            made.host(name, clock, lasts, "user_annotation" if name == LOADER else "cuda_runtime")
        clock += draw.choice([0, lasts])
    made.window(draw.choice([0, 100]), clock)
    found = made.analyse()
    assert found.busy_s + sum(gap.seconds for gap in found.gaps) == pytest.approx(found.window_s)
    assert all(gap.seconds > 0 and gap.longest_s <= gap.seconds + 1e-12 for gap in found.gaps)
    assert sum(found.bounds.values()) == pytest.approx(1)


GEMM = "ampere_bf16_s16816gemm_bf16_128x128"


@pytest.mark.parametrize(
    ("operator", "shapes", "kind", "kernel", "bound", "by"),
    [
        ("aten::mm", [[4096, 4096], [4096, 4096]], "c10::BFloat16", GEMM, "compute", "estimate"),
        ("aten::mm", [[1, 4096], [4096, 4096]], "c10::BFloat16", GEMM, "memory", "estimate"),
        ("aten::addmm", [[512], [1024, 512], [512, 512], [], []], "float", "sgemm_32x32", "compute", "estimate"),
        ("aten::bmm", [[96, 128, 64], [96, 64, 128]], "c10::Half", GEMM, "memory", "estimate"),
        ("aten::_flash_attention_forward", [[8, 2048, 16, 64]] * 3, "c10::Half", "flash_fwd", "compute", "estimate"),
        ("aten::mm", [], "float", GEMM, "compute", "name"),
        ("aten::mm", [[1, 4096], [4096, 64]], "float", "splitKreduce_kernel", "memory", "name"),
        ("aten::add", [[64], [64]], "float", "void at::native::vectorized_elementwise_kernel<4>", "memory", "name"),
        ("mine::op", [[64]], "float", "my_very_own", "unknown", "name"),
        ("c10d::allreduce_", [], "float", "ncclDevKernel_AllReduce_Sum_f32_RING", "communication", "name"),
    ],
)
def test_what_bounds_a_kernel(
    made: Made, operator: str, shapes: list[Any], kind: str, kernel: str, bound: str, by: str
) -> None:
    made.window(10, 110)
    made.kernel(0, 10, 100, kernel, **{"External id": made.operator(operator, shapes, kind)})
    (found,) = made.analyse().kernels
    assert (found.bound, found.by, found.operator) == (bound, by, operator)


def test_the_rates_of_a_product_are_known(made: Made) -> None:
    made.window(10, 110)
    number = made.operator("aten::mm", [[1000, 2000], [2000, 500]], "float")
    made.kernel(0, 10, 100, "sgemm", **{"External id": number})
    (found,) = made.analyse().kernels
    assert found.operations_per_s == pytest.approx(2 * 1000 * 2000 * 500 / 100e-6)
    assert found.bytes_per_s == pytest.approx(4 * (1000 * 2000 + 2000 * 500 + 1000 * 500) / 100e-6)


def test_a_trace_is_read_from_text_and_files_also_with_what_is_no_json(made: Made, tmp_path: Path) -> None:
    made.window(0, 100)
    made.kernel(0, 0, 50, **{"est. achieved occupancy %": float("inf")})
    text = json.dumps(made.trace)
    assert "Infinity" in text
    file = tmp_path / "trace.json"
    file.write_text(text)
    assert analyse(text) == analyse(text.encode()) == analyse(file) == made.analyse()


@pytest.mark.parametrize("wrong", ["", "[]", "{}", '{"traceEvents": 3}', Path("/nowhere/trace.json")])
def test_what_is_no_trace_is_refused(wrong: str | Path) -> None:
    with pytest.raises(ConfigError) as raised:
        analyse(wrong)
    assert raised.value.field == "trace"


def test_a_trace_without_kernels_says_so(made: Made) -> None:
    made.host("aten::mm", 0, 100, "cpu_op")
    found = made.analyse()
    assert (found.gpu, found.notes) == (False, ["no GPU in this trace"])
    assert as_text(found) == "no GPU in this trace"
    made.host("cudaLaunchKernel", 10, 2, correlation=1)
    assert made.analyse().notes == ["no kernel ran on a GPU within this trace"]


def test_the_text_names_causes_and_kernels(made: Made) -> None:
    made.window(0, 5200)
    made.kernel(0, 10, 90, GEMM)
    made.kernel(5000, 5010, 190, GEMM)
    text = as_text(made.analyse())
    assert "GPU 0 A card: busy 5.4% of 5.200 ms; 2 kernels" in text
    assert "host" in text.splitlines()[3]
    assert "4.910" in text.splitlines()[3]
    assert "kernels bound by: compute 100%" in text


def test_fragmentation_is_what_no_tensor_has() -> None:
    before = {"num_alloc_retries": 2, "num_ooms": 1}
    after = {
        "allocated_bytes.all.current": 600,
        "reserved_bytes.all.current": 1000,
        "inactive_split_bytes.all.current": 300,
        "allocated_bytes.all.peak": 900,
        "reserved_bytes.all.peak": 1100,
        "num_alloc_retries": 5,
        "num_ooms": 1,
    }
    found = read_memory(after, before)
    assert (found.unused_bytes, found.split_bytes, found.retries, found.out_of_memory) == (400, 300, 3, 0)
    assert found.fragmentation == pytest.approx(0.4)
    assert read_memory({}).fragmentation == 0.0


def test_a_real_run_without_a_gpu(tmp_path: Path) -> None:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    calls = []

    def run() -> None:
        calls.append(None)
        for (batch,) in DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4):
            (batch @ batch.T).sum().item()

    file = tmp_path / "trace.json"
    once = record_gpu(run)
    several = record_gpu(run, warm_up=1, repeat=2, trace_file=file)
    assert (once.gpu, once.steps, once.notes) == (False, 0, ["no GPU in this trace"])
    assert (several.steps, len(calls)) == (2, 4)
    assert 0 < several.window_s < 60
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("aten::mm") == 2 * 2, "the warm-up is not in it"
    with pytest.raises(ZeroDivisionError):
        record_gpu(lambda: 1 / 0)
    with pytest.raises(ConfigError, match="nothing would be looked at"):
        record_gpu(run, repeat=0)
