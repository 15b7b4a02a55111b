"""The doctor's verdicts from made-up facts, and what it reads from made-up files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from headrace.cgroups import Limits, read_limits
from headrace.config import Config, ModelConfig
from headrace.doctor import checks, host_checks, report, store_checks
from headrace.doctor.address import HIDDEN, parse, without_secrets
from headrace.doctor.ask import ask
from headrace.doctor.check import Check, size
from headrace.doctor.checks import judge
from headrace.doctor.folders import LONGEST_SOCKET, Folder, Runtime, file_system_of, read_folder
from headrace.doctor.gpus import Card, Driver, Torch, cards_of, read_driver
from headrace.doctor.machine import Limit, Machine, Memory, Program, memory_of, processor_of
from headrace.doctor.packages import Installation, Package, read_installation
from headrace.doctor.ports import Port
from headrace.doctor.store import Answer, Node, Store

GIB = 1 << 30
H100 = Card("NVIDIA H100", 80 * GIB, 79 * GIB, "GPU-1a2b")
CUDA_TORCH = Torch("2.13.0", "CUDA 12.8", [H100], threads=8)
HOST = "redis://:secret@tasks.example:6379"


def finding(check: Any, config: Config | None = None, **facts: Any) -> Check:
    """The one verdict of a check on a machine that is well but for these facts."""
    found = check(config or Config(), Machine(**facts))
    (only,) = found if isinstance(found, list) else [found]
    return only


def status(check: Any, config: Config | None = None, **facts: Any) -> str:
    return finding(check, config, **facts).status


def remote(url: str = HOST, *nodes: Node, **answer: Any) -> Store:
    return Store(False, parse(url), Answer(nodes=nodes or [Node(version="7.2.4")], **answer))


def models(**options: Any) -> Config:
    return Config(models={"m": ModelConfig(name="m", target="t:T", **options)})


def test_a_machine_that_is_well_has_no_warning_and_no_error() -> None:
    found = judge(Config(), Machine(store=remote(), torch=CUDA_TORCH, driver=Driver(True, "570", [H100])))
    assert {each.status for each in found} <= {"ok", "info", "warning"}
    # The URL in use is not encrypted.
    assert [each.name for each in found if each.status == "warning"] == ["store.access"]
    assert not [each for each in judge(Config(), Machine()) if each.status in ("warning", "error")]


def test_names_are_unique_and_every_fault_comes_with_what_to_do() -> None:
    machine = Machine(
        installation=Installation("0", ">=3.99", False, [Package("a", "a>=1"), Package("b", "b>=2", "x")]),
        torch=Torch("2", imports=False, problem="no libgomp"),
        driver=Driver(True, "570", problem="no answer within 10 s"),
        cgroup=Limits(cores=0.5, memory_bytes=GIB, memory_used_bytes=GIB, processes=10),
        memory=Memory(GIB, GIB // 2, 4 * GIB, 4 * GIB),
        open_files=Limit(64, 64),
        somaxconn=128,
        runtime=Runtime(problem="No space left on device"),
        data=Folder("/d", problem="/d is not a folder"),
        store=Store(problem="there is none"),
        ports=[Port("port", state="other"), Port("admin_port", state="impossible", problem="Permission denied")],
        programs=[Program("nginx")],
        unknown_variables=["HEADRACE_PROT"],
    )
    found = judge(Config(host="0.0.0.0"), machine)
    names = [each.name for each in found]
    assert len(names) == len(set(names))
    assert all(each.fix for each in found if each.status in ("warning", "error"))
    assert sum(each.status in ("warning", "error") for each in found) >= 15


def test_the_page_about_it_names_every_check() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text()
    machine = Machine(
        installation=Installation("1", packages=[Package("a", "a>=1"), Package("b", "b>=1", "x")]),
        torch=CUDA_TORCH,
        driver=Driver(True, "570", [H100]),
        cuda_visible="0",
        somaxconn=4096,
        shared_memory_bytes=GIB,
        store=remote(),
        ports=[Port("port"), Port("admin_port")],
        programs=[Program("nginx")],
    )
    for each in judge(Config(), machine):
        name = each.name
        for area in ("extra", "program"):
            name = f"{area}.NAME" if name.startswith(f"{area}.") else name
        assert f"`{name}`" in page, name


# Software.


def test_a_python_outside_the_declared_range_is_a_warning() -> None:
    assert status(checks.check_python) == "ok"
    found = finding(checks.check_python, installation=Installation("1", ">=3.99", False))
    assert found.status == "warning"
    assert ">=3.99" in found.fix


def test_only_linux_and_macos_are_platforms() -> None:
    assert status(checks.check_platform, system="Darwin") == "ok"
    assert status(checks.check_platform, system="Windows") == "error"


def test_two_versions_of_headrace_at_once_are_noticed() -> None:
    assert status(checks.check_headrace) == "ok"
    assert status(checks.check_headrace, installation=Installation("0.0.1")) == "warning"
    assert status(checks.check_headrace, installation=Installation(problem="not installed")) == "warning"
    assert status(checks.check_bytecode) == "ok"
    found = finding(checks.check_bytecode, bytecode_kept=False, source="/opt/headrace")
    assert (found.status, "compileall /opt/headrace" in found.fix) == ("warning", True)


def test_a_dependency_is_there_missing_or_of_another_version() -> None:
    fits, unfit = Package("a", "a>=1", "", "1.5"), Package("b", "b<2", "", "2.1", False)
    assert status(checks.check_dependencies, installation=Installation("1", packages=[fits])) == "ok"
    found = finding(checks.check_dependencies, installation=Installation("1", packages=[fits, unfit]))
    assert (found.status, found.fix) == ("warning", "pip install 'b<2'")
    assert "b 2.1 is here" in found.detail
    missing = Installation("1", packages=[fits, Package("c", "c>=3")])
    assert status(checks.check_dependencies, installation=missing) == "error"


def test_an_extra_is_there_missing_or_of_another_version() -> None:
    packages = [
        Package("base", "base>=1", "", "1"),
        Package("torch", "torch>=2", "torch", "2.1"),
        Package("pydantic-ai", "pydantic-ai>=2", "agents"),
        Package("onnxruntime", "onnxruntime>=1.20", "onnx", "1.10", False),
    ]
    found = checks.check_extras(Config(), Machine(installation=Installation("1", packages=packages)))
    assert {each.name: (each.status, each.fix) for each in found} == {
        "extra.torch": ("ok", ""),
        "extra.agents": ("info", "pip install 'headrace[agents]'"),
        "extra.onnx": ("warning", "pip install 'onnxruntime>=1.20'"),
    }


def test_the_real_metadata_are_understood() -> None:
    found = read_installation()
    assert not found.problem
    assert found.python_fits
    names = {each.name: each for each in found.packages if not each.extra}
    assert names["msgspec"].version
    assert names["msgspec"].fits
    assert {"torch", "demo"} <= {each.extra for each in found.packages}
    assert not {each.name for each in found.packages if each.extra} & set(names)
    assert "all" not in {each.extra for each in found.packages}
    assert "not installed" in read_installation("headrace-that-nobody-has").problem


def test_a_misspelt_variable_is_named() -> None:
    assert status(checks.check_variables) == "ok"
    found = finding(checks.check_variables, unknown_variables=["HEADRACE_PROT"])
    assert (found.status, "HEADRACE_PROT" in found.detail) == ("warning", True)


# Devices.


def test_a_torch_that_cannot_be_imported_is_an_error() -> None:
    assert status(checks.check_torch, torch=CUDA_TORCH) == "ok"
    found = finding(checks.check_torch, torch=Torch("2.13.0", imports=False, problem="crashed with SIGSEGV"))
    assert (found.status, "SIGSEGV" in found.detail) == ("error", True)
    assert checks.check_torch(Config(), Machine()) == []


def test_a_cpu_build_beside_an_nvidia_driver_is_an_error_that_says_what_to_install() -> None:
    driver, torch = Driver(True, "570.1", [H100]), Torch("2.13.0+cpu", "CPU")
    found = finding(checks.check_gpus, driver=driver, torch=torch)
    assert found.status == "error"
    assert "torch==2.13.0:" in found.fix
    assert "NVIDIA H100 (79.0 GiB of 80.0 GiB free)" in found.detail
    assert status(checks.check_gpus, Config(device="cpu"), driver=driver, torch=torch) == "info"
    assert status(checks.check_gpus, driver=driver, torch=CUDA_TORCH) == "ok"
    assert status(checks.check_gpus, driver=driver) == "info"  # no torch at all


def test_no_gpu_at_all_is_no_fault() -> None:
    assert finding(checks.check_gpus).detail == "none: models run on the CPU"
    assert finding(checks.check_gpus, torch=Torch("2", mps=True)).detail == "MPS"


def test_gpus_that_only_the_driver_sees_are_an_error_unless_somebody_hid_them() -> None:
    driver = Driver(True, "440", [H100, H100])
    old = Torch("2.13.0", "CUDA 12.8", problem="The NVIDIA driver on your system is too old")
    found = finding(checks.check_gpus, driver=driver, torch=old)
    assert (found.status, "too old" in found.detail) == ("error", True)
    assert status(checks.check_gpus, driver=driver, torch=CUDA_TORCH) == "error"
    assert status(checks.check_gpus, driver=driver, torch=CUDA_TORCH, cuda_visible="0") == "ok"


def test_a_gpu_that_cannot_compute_and_a_driver_that_is_silent_are_errors() -> None:
    broken = Torch("2.13.0", "CUDA 12.8", [Card("NVIDIA H100", problem="no kernel image is available")])
    found = finding(checks.check_gpus, driver=Driver(True, "570", [H100]), torch=broken)
    assert (found.status, "no kernel image" in found.detail) == ("error", True)
    silent = Driver(True, "570", problem="nvidia-smi: no answer within 10 s")
    assert status(checks.check_gpus, driver=silent) == "error"
    assert status(checks.check_gpus, driver=Driver(True, "570")) == "error"
    # In a container the driver's program may be missing while the driver works.
    assert status(checks.check_gpus, driver=silent, torch=CUDA_TORCH) == "ok"


def test_a_gpu_whose_memory_is_taken_is_a_warning() -> None:
    full = Torch("2.13.0", "CUDA 12.8", [Card("NVIDIA H100", 80 * GIB, GIB)])
    assert status(checks.check_gpus, driver=Driver(True, "570", [H100]), torch=full) == "warning"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0", "ok"),
        ("0,1", "ok"),
        ("GPU-1a", "ok"),
        ("MIG-7", "ok"),
        ("0,2", "error"),
        ("", "warning"),
        ("-1", "warning"),
    ],
)
def test_cuda_visible_devices_names_gpus_that_are_here(visible: str, expected: str) -> None:
    driver = Driver(True, "570", [H100, H100])
    assert status(checks.check_cuda_visible, driver=driver, cuda_visible=visible) == expected


def test_without_gpus_nothing_is_said_of_their_visibility() -> None:
    assert checks.check_cuda_visible(Config(), Machine(cuda_visible="0")) == []
    assert checks.check_cuda_visible(Config(), Machine(driver=Driver(True, "570", [H100]))) == []


@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device": "cuda:1"}, {"devices": "all"}, {"devices": "0+1"}])
def test_a_device_that_is_configured_and_not_here_is_an_error(options: dict[str, Any]) -> None:
    assert status(checks.check_device, models(**options)) == "error"
    assert status(checks.check_device, models(**options), torch=Torch("2", "CUDA", [H100, H100])) == "ok"


def test_workers_are_bound_to_gpus_without_torch_but_do_not_compute_there() -> None:
    driver = Driver(True, "570", [H100])
    assert status(checks.check_device, models(devices="0"), driver=driver) == "ok"
    assert status(checks.check_device, models(device="cuda"), driver=driver) == "error"


def test_mps_is_asked_for_where_it_is() -> None:
    assert status(checks.check_device, Config(device="mps")) == "error"
    assert status(checks.check_device, Config(device="mps"), torch=Torch("2", mps=True)) == "ok"


def test_the_output_of_nvidia_smi_is_read_line_by_line() -> None:
    text = "NVIDIA H100 80GB HBM3, GPU-1, 81559, 80994\nNVIDIA GB10, GPU-2, [N/A], [N/A]\nNo devices\n"
    assert cards_of(text) == [
        Card("NVIDIA H100 80GB HBM3", 81559 << 20, 80994 << 20, "GPU-1"),
        Card("NVIDIA GB10", 0, 0, "GPU-2"),
    ]


def test_a_driver_without_its_program_is_a_driver_that_is_silent(tmp_path: Path) -> None:
    assert read_driver(tmp_path) == Driver()
    place = tmp_path / "proc/driver/nvidia"
    place.mkdir(parents=True)
    for kind in ("Kernel Module  570.86.15  Tue", "Open Kernel Module for x86_64  570.86.15  Release Build"):
        (place / "version").write_text(f"NVRM version: NVIDIA UNIX {kind}\nGCC version:  gcc version 15.3.0 (GCC)\n")
        found = read_driver(tmp_path)
        assert (found.present, found.version) == (True, "570.86.15")


# Processor and memory.


def test_cores_that_the_control_group_does_not_allow_are_not_divided() -> None:
    assert status(checks.check_cores, cgroup=Limits(cores=8)) == "ok"
    found = finding(checks.check_cores, cgroup=Limits(cores=1.5), processor="AMD EPYC", processor_flags=["avx2"])
    assert found.status == "warning"
    assert "the control group allows 1.5, but headrace divides 8" in found.detail


def test_threads_are_counted_over_all_workers() -> None:
    assert status(checks.check_threads, models(workers=4)) == "ok"
    found = finding(checks.check_threads, models(workers=4, threads=4))
    assert (found.status, "4 model workers with 16 threads together" in found.detail) == ("warning", True)
    assert status(checks.check_threads, models(workers=16)) == "warning"
    on_gpus = {"torch": Torch("2", "CUDA", [H100] * 4)}
    assert status(checks.check_threads, models(threads=4, devices="all"), **on_gpus) == "warning"
    assert status(checks.check_threads, models(threads=4, devices="0,1"), **on_gpus) == "ok"


def test_variables_that_give_every_worker_too_many_threads_are_named() -> None:
    assert status(checks.check_threads, models(workers=2), variables={"OPENBLAS_NUM_THREADS": "4"}) == "ok"
    found = finding(checks.check_threads, models(workers=2), variables={"OPENBLAS_NUM_THREADS": "8"})
    assert (found.status, "OPENBLAS_NUM_THREADS=8 in each of 2" in found.detail) == ("warning", True)
    # headrace says OMP_NUM_THREADS to model workers itself.
    assert status(checks.check_threads, models(workers=2), variables={"OMP_NUM_THREADS": "8"}) == "ok"
    tasks = Config(task_workers=4)
    assert status(checks.check_threads, tasks) == "warning"
    assert status(checks.check_threads, tasks, variables={"OMP_NUM_THREADS": "2,1"}) == "ok"
    assert status(checks.check_threads, tasks, variables={"OMP_NUM_THREADS": "4"}) == "warning"


def test_little_memory_is_a_warning_whoever_limits_it() -> None:
    memory, swap = checks.check_memory(Config(), Machine())
    assert (memory.status, swap.status) == ("ok", "ok")
    memory, _ = checks.check_memory(Config(), Machine(cgroup=Limits(memory_bytes=4 * GIB, memory_used_bytes=GIB)))
    assert (memory.status, "allows 4.0 GiB" in memory.detail) == ("ok", True)
    tight = Machine(cgroup=Limits(memory_bytes=2 * GIB, memory_used_bytes=2 * GIB - 1))
    assert checks.check_memory(Config(), tight)[0].status == "warning"
    assert checks.check_memory(Config(), Machine(memory=Memory(64 * GIB, GIB // 2)))[0].status == "warning"
    assert (
        checks.check_memory(Config(), Machine(memory=Memory(64 * GIB, 9 * GIB, 4 * GIB, 3 * GIB)))[1].status
        == "warning"
    )


def test_the_texts_of_the_kernel_are_read() -> None:
    assert memory_of("MemTotal: 10 kB\nMemAvailable: 4 kB\nSwapTotal: 8 kB\nSwapFree: 5 kB\n") == Memory(
        10240, 4096, 8192, 3072
    )
    assert memory_of("").total_bytes > GIB
    text = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 amx_bf16\n"
    assert processor_of(text) == ("AMD EPYC", ["avx2", "amx_bf16"])


def files(root: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_strictest_control_group_up_to_the_root_counts(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/system.slice/headrace.service\n")
    root = files(
        tmp_path / "v2",
        {
            "system.slice/cpu.max": "max 100000\n",
            "system.slice/memory.max": "2000\n",
            "system.slice/memory.current": "1500\n",
            "system.slice/memory.stat": "anon 1000\ninactive_file 400\n",
            "system.slice/headrace.service/cpu.max": "150000 100000\n",
            "system.slice/headrace.service/memory.max": "max\n",
            "system.slice/headrace.service/pids.max": "100\n",
            "system.slice/headrace.service/pids.current": "7\n",
        },
    )
    assert read_limits(membership, root) == Limits(1.5, 2000, 1100, 100, 7)


def test_control_groups_of_version_1_are_read_and_their_largest_number_is_no_limit(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n1:pids:/docker/1\n")
    root = files(
        tmp_path / "v1",
        {
            # As in a container: the path that the kernel names is not to be seen there.
            "cpu/cpu.cfs_quota_us": "50000\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "pids/pids.max": "max\n",
        },
    )
    assert read_limits(membership, root) == Limits(cores=0.5)
    (root / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert read_limits(membership, root) == Limits()
    assert read_limits(tmp_path / "none", root) == Limits()


# Limits of the operating system.


def test_open_files_are_compared_with_the_queues() -> None:
    assert status(host_checks.check_open_files) == "ok"
    found = finding(host_checks.check_open_files, models(max_queue=5000), open_files=Limit(1024, 4096))
    assert found.status == "warning"
    assert "soft 1,024, hard 4,096; 5,000 waiting requests need up to 5,256" in found.detail
    # A front end raises its own limit; a task worker does not.
    assert status(host_checks.check_open_files, open_files=Limit(1024, None)) == "ok"
    assert status(host_checks.check_open_files, Config(concurrency=1024), open_files=Limit(1024, None)) == "warning"


def test_processes_are_counted_against_the_user_and_the_control_group() -> None:
    assert status(host_checks.check_processes) == "ok"
    assert status(host_checks.check_processes, user_processes=Limit(4096, 4096)) == "ok"
    assert status(host_checks.check_processes, user_processes=Limit(50, 50)) == "warning"
    assert status(host_checks.check_processes, cgroup=Limits(processes=1000, processes_used=990)) == "warning"


def test_a_backlog_shorter_than_headrace_asks_for_is_a_warning() -> None:
    assert status(host_checks.check_backlog, somaxconn=4096) == "ok"
    assert status(host_checks.check_backlog, somaxconn=128) == "warning"
    assert host_checks.check_backlog(Config(), Machine()) == []  # macOS


def test_core_dumps_and_shared_memory_are_good_to_know() -> None:
    assert finding(host_checks.check_core_dumps).detail == "off"
    assert finding(host_checks.check_core_dumps, core_bytes=Limit(None, None)).detail == "on"
    assert status(host_checks.check_shared_memory, shared_memory_bytes=8 * GIB) == "ok"
    assert status(host_checks.check_shared_memory, shared_memory_bytes=64 << 20) == "info"
    assert host_checks.check_shared_memory(Config(), Machine()) == []


# Places.


def test_the_runtime_folder_has_to_work_and_to_be_short() -> None:
    assert status(host_checks.check_runtime_dir) == "ok"
    assert status(host_checks.check_runtime_dir, runtime=Runtime(problem="Operation not supported")) == "error"
    assert status(host_checks.check_runtime_dir, runtime=Runtime(longest_socket=LONGEST_SOCKET + 1)) == "error"
    passed_over = Runtime("/very/long", Folder("/tmp"))
    assert status(host_checks.check_runtime_dir, runtime=passed_over) == "warning"
    shared = Runtime(folder=Folder("/home/x/run", file_system="nfs4"))
    assert status(host_checks.check_runtime_dir, runtime=shared) == "warning"


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ({}, "ok"),
        ({"exists": False}, "ok"),
        ({"problem": "/d is not a folder"}, "error"),
        ({"writable": False}, "error"),
        ({"open_to_all": True}, "error"),
        ({"file_system": "tmpfs"}, "warning"),
        ({"file_system": "nfs4"}, "warning"),
        ({"file_system": "overlay"}, "warning"),
    ],
)
def test_the_data_directory_has_to_keep_what_it_is_given(folder: dict[str, Any], expected: str) -> None:
    assert status(host_checks.check_data_dir, data=Folder("/d", **folder)) == expected
    # With a store elsewhere nothing durable is there.
    elsewhere = status(host_checks.check_data_dir, Config(redis_url="redis://h"), data=Folder("/d", **folder))
    assert elsewhere == ("warning" if "problem" in folder or "writable" in folder else "ok")


def test_a_disk_that_is_full_or_nearly_so_is_said() -> None:
    assert status(host_checks.check_disk) == "ok"
    assert status(host_checks.check_disk, data=Folder("/d", free_bytes=GIB // 2)) == "warning"
    assert status(host_checks.check_disk, data=Folder("/d", free_bytes=1000)) == "error"
    assert (
        status(host_checks.check_disk, Config(redis_url="redis://h"), data=Folder("/d", free_bytes=1000)) == "warning"
    )
    assert status(host_checks.check_disk, data=Folder("/d", free_files=3)) == "warning"
    assert host_checks.check_disk(Config(), Machine(data=Folder("/d", problem="it is a file"))) == []


def test_a_folder_is_looked_at_where_it_is_or_would_be(tmp_path: Path) -> None:
    there = read_folder(tmp_path)
    assert (there.exists, there.writable, there.open_to_all, there.problem) == (True, True, False, "")
    assert there.total_bytes > there.free_bytes > 0
    later = read_folder(tmp_path / "a" / "b")
    assert (later.exists, later.parent) == (False, os.path.realpath(tmp_path))
    tmp_path.chmod(0o777)
    assert read_folder(tmp_path).open_to_all
    assert not read_folder(tmp_path / "a").open_to_all
    (tmp_path / "file").write_text("")
    assert "is not a folder" in read_folder(tmp_path / "file").problem
    assert "is not a folder" in read_folder(tmp_path / "file" / "below").problem


def test_a_file_system_is_that_of_the_nearest_mount_and_the_last_one_there() -> None:
    mounts = (
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        "2 1 0:5 / /data rw shared:1 - nfs4 server:/x rw\n"
        "3 1 0:6 / /with\\040space rw - tmpfs tmpfs rw\n"
        "4 1 8:2 / /data rw - xfs /dev/sdb rw\n"
    )
    assert file_system_of(Path("/data/headrace"), mounts) == "xfs"
    assert file_system_of(Path("/database"), mounts) == "ext4"
    assert file_system_of(Path("/with space/x"), mounts) == "tmpfs"
    assert file_system_of(Path("/x"), "") == ""


# The task store.


def test_an_embedded_store_needs_its_program() -> None:
    idle = Store(program="/bin/valkey-server", program_version="Valkey server v=9.1.2 sha=0")
    found = finding(store_checks.check_store, store=idle)
    assert (found.status, "9.1.2" in found.detail) == ("ok", True)
    assert status(store_checks.check_store, store=Store(problem="there is none")) == "error"
    hung = Store(address=parse("unix:///run/s"), answer=Answer("no answer within 2 s"), program="/bin/v")
    assert status(store_checks.check_store, store=hung) == "error"


def test_a_store_by_url_answers_or_says_why_not() -> None:
    found = finding(store_checks.check_store, store=remote())
    assert (found.status, "Redis 7.2.4 at redis://tasks.example:6379" in found.detail) == ("ok", True)
    silent = Store(False, parse(HOST), Answer("Connection refused"))
    found = finding(store_checks.check_store, store=silent)
    assert (found.status, "Connection refused" in found.detail) == ("error", True)
    refused = Store(False, parse(HOST), Answer("invalid username-password pair or user is disabled."))
    assert "password in HEADRACE_REDIS_URL" in finding(store_checks.check_store, store=refused).fix
    assert status(store_checks.check_store, store=remote(HOST, Node(version="6.0.16"))) == "error"
    assert status(store_checks.check_store, store=remote(HOST, Node(version="10.0.1"))) == "ok"
    assert status(store_checks.check_store, store=remote(HOST, Node(version="8.0", loading=True))) == "warning"


def test_a_policy_that_throws_tasks_away_is_an_error_and_says_where() -> None:
    assert status(store_checks.check_policy, store=remote()) == "ok"
    nodes = [Node("a:1"), Node("b:2", policy="allkeys-lru")]
    found = finding(store_checks.check_policy, store=remote(HOST, *nodes, cluster=True))
    assert (found.status, "allkeys-lru at b:2" in found.detail) == ("error", True)
    assert status(store_checks.check_policy, store=remote(HOST, Node(policy=""))) == "warning"
    assert status(store_checks.check_policy, store=remote(HOST, Node(used_bytes=95, most_bytes=100))) == "warning"
    assert status(store_checks.check_policy, store=remote(HOST, Node(used_bytes=10, most_bytes=100))) == "ok"


def test_a_store_that_writes_nothing_to_disk_is_a_warning() -> None:
    assert status(store_checks.check_durability, store=remote()) == "ok"
    assert status(store_checks.check_durability, store=remote(HOST, Node(append_only=False))) == "warning"
    assert status(store_checks.check_durability, store=remote(HOST, Node(fsync="no"))) == "warning"
    assert status(store_checks.check_durability, store=remote(HOST, Node(write_problem=True))) == "error"


def test_power_safe_is_what_the_store_does_not_what_the_configuration_says() -> None:
    wanted = Config(durability="power-safe")
    assert status(store_checks.check_durability, wanted, store=remote(HOST, Node(fsync="everysec"))) == "warning"
    assert status(store_checks.check_durability, wanted, store=remote(HOST, Node(fsync="always"))) == "ok"
    ours = Store(address=parse("unix:///run/s"), answer=Answer(nodes=[Node(fsync="no")]), program="/bin/v")
    assert status(store_checks.check_durability, wanted, store=ours) == "info"
    assert status(store_checks.check_durability, store=ours) == "ok"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://10.0.0.5:6379", "error"),
        ("rediss://10.0.0.5:6379", "error"),
        ("redis://user@tasks.example", "error"),
        ("redis+cluster://10.0.0.5:7000", "error"),
        ("redis+sentinel://localhost:1,10.0.0.6:26379/tasks", "error"),
        ("redis://:pw@10.0.0.5:6379", "warning"),
        ("redis://10.0.0.5:6379?password=pw", "warning"),
        ("rediss://:pw@10.0.0.5:6379?ssl_cert_reqs=none", "warning"),
        ("rediss://:pw@10.0.0.5:6379", "ok"),
        ("redis://:pw@localhost:6379", "ok"),
        ("redis://127.0.0.1:6379", "info"),
        ("redis://[::1]:6379", "info"),
        ("rediss://10.0.0.5?ssl_certfile=/c.pem", "info"),
        ("unix:///run/redis.sock", "ok"),
    ],
)
def test_who_can_write_to_the_store_can_run_code_so_it_is_said_who_can(url: str, expected: str) -> None:
    assert status(store_checks.check_access, store=Store(False, parse(url))) == expected


def test_the_url_leads_to_where_one_can_write() -> None:
    assert status(store_checks.check_topology, store=remote(HOST, Node(role="slave"))) == "error"
    assert status(store_checks.check_topology, store=remote(HOST, Node(in_cluster=True))) == "error"
    cluster = remote(HOST, Node("a:1", replicas=1, in_cluster=True), Node("b:2", in_cluster=True), cluster=True)
    found = finding(store_checks.check_topology, store=cluster)
    assert (found.status, found.detail) == ("info", "Cluster of 2 masters, 1 replica")


def test_clocks_may_differ_by_two_seconds_and_by_what_the_question_took() -> None:
    assert status(store_checks.check_clock, store=remote(HOST, Node(clock_s=1.9))) == "ok"
    assert status(store_checks.check_clock, store=remote(HOST, Node(clock_s=2.5, clock_error_s=0.9))) == "ok"
    found = finding(store_checks.check_clock, store=remote(HOST, Node(), Node(clock_s=-2.5, clock_error_s=0.01)))
    assert (found.status, "2.500 s behind" in found.detail) == ("warning", True)


def test_nothing_is_said_of_a_store_that_nobody_could_ask() -> None:
    for store in (Store(program="/bin/v"), Store(False, parse(HOST), Answer("Connection refused"))):
        for check in (
            *(store_checks.check_policy, store_checks.check_durability),
            *(store_checks.check_topology, store_checks.check_clock),
        ):
            assert check(Config(), Machine(store=store)) == []


# The URL.


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://", "redis://localhost:6379"),
        ("redis://h", "redis://h:6379"),
        ("rediss://user:p%40ss@h:1234/3?ssl_ca_certs=/c", "rediss://h:1234"),
        ("redis://:p@ss@h:1", "redis://h:1"),
        ("redis://:x@[fd00::1]:6380", "redis://[fd00::1]:6380"),
        ("redis+sentinel://:x@a,b:1/tasks/0", "redis+sentinel://a:26379,b:1"),
        ("unix://:pw@/run/a%20b.sock?db=1", "unix:///run/a b.sock"),
    ],
)
def test_of_a_url_only_the_place_is_shown(url: str, shown: str) -> None:
    assert parse(url).shown == shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://:se/cret@h:1",
        "redis://:se?cret@h",
        "redis://:12/34@h",
        "redis://u:se#c@h",
        "redis://se/cret@h",
        "redis://:se",
    ],
)
def test_a_password_that_is_not_encoded_is_never_taken_for_a_host(url: str) -> None:
    found = parse(url)
    assert found.problem
    assert not found.shown
    said = finding(store_checks.check_store, store=Store(False, found))
    assert (said.status, "percent-encode" in said.fix) == ("error", True)
    assert not {"se", "cret", "12", "34"} & set(said.detail.replace("'", " ").split())


def test_no_form_of_the_password_is_left_in_what_others_say() -> None:
    url = "redis://user:p%40ss%2F@h:1?sentinel_password=other"
    text = f"cannot reach {url}: AUTH user p@ss/ failed, p%40ss%2F, other"
    left = without_secrets(text, url)
    assert not [word for word in ("p@ss", "p%40ss", "user", "other") if word in left]
    assert HIDDEN in left


# The rest of the network.


@pytest.mark.parametrize(
    ("state", "expected"),
    [("free", "ok"), ("off", "ok"), ("any", "ok"), ("headrace", "info"), ("other", "error"), ("impossible", "error")],
)
def test_a_port_is_free_or_somebody_is_there(state: Any, expected: str) -> None:
    assert status(host_checks.check_ports, ports=[Port("port", state=state)]) == expected


def test_a_server_that_others_can_reach_needs_a_key() -> None:
    assert status(host_checks.check_exposure) == "ok"
    assert status(host_checks.check_exposure, Config(host="0.0.0.0")) == "warning"
    assert status(host_checks.check_exposure, Config(admin_host="0.0.0.0")) == "error"
    assert status(host_checks.check_exposure, Config(admin_host="0.0.0.0", admin_port=-1)) == "ok"
    assert status(host_checks.check_exposure, Config(host="0.0.0.0", admin_host="0.0.0.0", api_keys="k")) == "ok"


def test_programs_are_good_to_know() -> None:
    here, not_here = Program("nginx", "/usr/sbin/nginx", "1.24.0"), Program("promtool")
    found = host_checks.check_programs(Config(), Machine(programs=[here, not_here]))
    assert [each.status for each in found] == ["info", "info"]
    assert found[0].detail == "1.24.0 (/usr/sbin/nginx)"
    assert "not here" in found[1].detail


# What is asked, and how it is shown.


def test_a_program_that_hangs_crashes_or_complains_is_survived() -> None:
    python = [sys.executable, "-c"]
    assert ask([*python, "print(input())"], timeout_s=10, given="x").text == "x\n"
    # What it has started holds its pipes open.
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert ask([*python, hangs], timeout_s=0.5).problem == "no answer within 0.5 s"
    assert ask([*python, "import os; os.abort()"], timeout_s=10).problem == "crashed with SIGABRT"
    assert ask([*python, "raise OSError('no libgomp')"], timeout_s=10).problem == "OSError: no libgomp"
    assert ask([*python, "raise SystemExit(3)"], timeout_s=10).problem == "ended with exit code 3"
    assert "cannot be run" in ask(["/no/such/program"], timeout_s=10).problem


def test_json_has_four_fields_always() -> None:
    document = json.loads(report.as_json([Check("a", "ok", "fine"), Check("b", "error", "bad", "mend it")]))
    assert document == {
        "checks": [
            {"name": "a", "status": "ok", "detail": "fine", "fix": ""},
            {"name": "b", "status": "error", "detail": "bad", "fix": "mend it"},
        ]
    }


def test_the_table_has_the_worst_last_and_does_not_steer_the_terminal() -> None:
    found = [Check("long.name", "error", "bad \x1b[2J", "mend it"), Check("a", "ok", "fine"), Check("b", "info", "so")]
    lines = report.as_text(found).splitlines()
    assert lines == [
        "ok       a          fine",
        "info     b          so",
        "error    long.name  bad \\x1b[2J",
        "                    → mend it",
        "1 error, 0 warnings, 1 info, 1 ok",
    ]
    assert "\x1b[31;1merror" in report.as_text(found, coloured=True)


def test_the_exit_code_is_about_errors_only() -> None:
    assert report.exit_code([Check("a", "warning", "")]) == 0
    assert report.exit_code([Check("a", "ok", ""), Check("b", "error", "")]) == 1


def test_sizes_are_in_words() -> None:
    assert [size(count) for count in (0, 1023, 1536, 200 * GIB, 3 << 40)] == [
        *("0 bytes", "1023 bytes", "1.5 KiB", "200 GiB", "3.0 TiB"),
    ]
