"""Facts about this machine, read without changing anything. What they mean is said in `checks.py`.

A `Machine` as it is made by default has nothing wrong with it, so that a test names only what it is about. Sizes are
bytes; a limit of ``None`` is none. What cannot be read is left as if it were well.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from headrace import config as configuration
from headrace.cgroups import Limits, read_limits
from headrace.config import Config
from headrace.doctor.ask import ask
from headrace.doctor.folders import Folder, Runtime, read_folder, read_runtime
from headrace.doctor.gpus import Driver, Torch, read_driver, read_torch
from headrace.doctor.packages import Installation, read_installation
from headrace.doctor.ports import Port, read_port
from headrace.doctor.store import Store, read_store
from headrace.serving import server
from headrace.tasks import embedded
from headrace.version import __version__

_PROGRAM_S = 10.0
# What a model's arithmetic can be much faster with.
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "bf16", "sve")
# Program → the option that makes it tell its version.
PROGRAMS = {
    "nginx": "-v",
    "prometheus": "--version",
    "promtool": "--version",
    "amtool": "--version",
    "valkey-server": "--version",
}
THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    *("NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"),
)


class Limit(msgspec.Struct, frozen=True):
    """A limit of the operating system for each process."""

    soft: int | None = None
    hard: int | None = None


class Memory(msgspec.Struct, frozen=True):
    total_bytes: int = 64 << 30
    available_bytes: int = 32 << 30
    swap_bytes: int = 0
    swap_used_bytes: int = 0


class Program(msgspec.Struct, frozen=True):
    """A program that headrace works with. ``path`` is empty when it is not here."""

    name: str
    path: str = ""
    version: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the checks look at.

    Args:
        source: where the running headrace lies.
        bytecode_kept: Python has what it compiled of headrace, and need not compile it at each start.
        cores: that this process may use by its affinity.
        counted_cores: that headrace divides among its workers.
        front_ends: HTTP processes that there would be.
        processor: its name.
        processor_flags: instructions that models profit from.
        variables: those of `THREAD_VARIABLES` that are set.
        cuda_visible: `CUDA_VISIBLE_DEVICES`; ``None`` when it is not set.
        backlog: connections that may wait to be accepted, by the system (``somaxconn``) and as headrace asks for.
        unknown_variables: named ``HEADRACE_…``, and read by nothing.
    """

    system: str = "Linux"
    platform: str = "Linux-6.1-x86_64"
    python: str = "3.12.0"
    implementation: str = "CPython"
    executable: str = "/usr/bin/python3"
    version: str = __version__
    source: str = ""
    bytecode_kept: bool = True
    installation: Installation = Installation(__version__)
    torch: Torch = Torch()
    driver: Driver = Driver()
    cuda_visible: str | None = None
    cores: int = 8
    counted_cores: int = 8
    front_ends: int = 2
    processor: str = ""
    processor_flags: Sequence[str] = ()
    variables: Mapping[str, str] = {}
    memory: Memory = Memory()
    cgroup: Limits = Limits()
    open_files: Limit = Limit(65_536, 65_536)
    user_processes: Limit = Limit()
    core_bytes: Limit = Limit(0, None)
    shared_memory_bytes: int | None = None
    somaxconn: int | None = None
    backlog: int = 2048
    runtime: Runtime = Runtime()
    data: Folder = Folder("/var/lib/headrace")
    store: Store = Store(program="/usr/bin/valkey-server", program_version="9.1")
    ports: Sequence[Port] = ()
    programs: Sequence[Program] = ()
    unknown_variables: Sequence[str] = ()


def read(config: Config) -> Machine:
    """Look at everything; what takes time is asked at the same time."""
    # Not through what the gateways use: that needs all of what may be missing here.
    data = Path(config.data_dir).expanduser() if config.data_dir else embedded.default_data_dir()
    processor, flags = processor_of(_text(Path("/proc/cpuinfo")))
    with ThreadPoolExecutor(16) as pool:
        torch = pool.submit(read_torch)
        driver = pool.submit(read_driver)
        kept = pool.submit(read_store, config, data)
        listening = pool.map(
            read_port,
            ("port", "admin_port"),
            (config.host, config.admin_host),
            (config.port, config.admin_port),
        )
        programs = pool.map(_program, PROGRAMS.items())
        return Machine(
            system=platform.system(),
            platform=platform.platform(),
            python=platform.python_version(),
            implementation=platform.python_implementation(),
            executable=sys.executable,
            source=str(Path(configuration.__file__).parent),
            bytecode_kept=Path(importlib.util.cache_from_source(configuration.__file__)).exists(),
            installation=read_installation(),
            torch=torch.result(),
            driver=driver.result(),
            cuda_visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            counted_cores=configuration.usable_cpus(),
            front_ends=config.http_worker_count(),
            processor=processor,
            processor_flags=flags,
            variables={name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
            memory=memory_of(_text(Path("/proc/meminfo"))),
            cgroup=read_limits(),
            open_files=_limit(resource.RLIMIT_NOFILE),
            user_processes=_limit(resource.RLIMIT_NPROC) if os.geteuid() else Limit(),
            core_bytes=_limit(resource.RLIMIT_CORE),
            shared_memory_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
            somaxconn=int(_text(Path("/proc/sys/net/core/somaxconn")) or 0) or None,
            backlog=server._BACKLOG,
            runtime=read_runtime(data),
            data=read_folder(data),
            store=kept.result(),
            ports=list(listening),
            programs=list(programs),
            unknown_variables=configuration.unknown_variables(),
        )


def memory_of(text: str) -> Memory:
    """Memory from the text of ``/proc/meminfo``; without one, what little the system tells."""
    found = {name: int(number) * 1024 for name, number in re.findall(r"^(\w+): *(\d+) kB", text, re.MULTILINE)}
    if "MemTotal" not in found:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(total, total)
    swap = found.get("SwapTotal", 0)
    free = found.get("MemAvailable", found.get("MemFree", 0))
    return Memory(found["MemTotal"], free, swap, swap - found.get("SwapFree", 0))


def processor_of(text: str) -> tuple[str, list[str]]:
    """Name and instructions from the text of ``/proc/cpuinfo``."""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return name[1].strip() if name else platform.processor(), [flag for flag in _FLAGS if flag in known]


def _limit(which: int) -> Limit:
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))
    return Limit(soft, hard)


def _program(named: tuple[str, str]) -> Program:
    name, option = named
    path = shutil.which(name)
    if path is None:
        return Program(name)
    said = ask([path, option], timeout_s=_PROGRAM_S, merged=True).text
    version = re.search(r"\d+(?:\.\d+)+", said)
    return Program(name, path, version[0] if version else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
