"""What the limits of the operating system, folders, ports and programs mean for headrace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace.config import Config
from headrace.doctor.check import Check, Status, many, size
from headrace.doctor.folders import LONGEST_SOCKET, Folder
from headrace.doctor.machine import Machine
from headrace.doctor.ports import Port
from headrace.doctor.sizing import models_of, threads_of, workers_of
from headrace.serving.server import is_loopback

_NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs", "9p", "virtiofs"),
    *("fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs"),
}
_IN_MEMORY = {"tmpfs", "ramfs"}
_IN_CONTAINER = {"overlay", "aufs"}
_GIB = 1 << 30
# With less the embedded store does not start; with less than that it is time to look.
_LEAST_DISK, _LITTLE_DISK = 1_000_000, _GIB
_LITTLE_FILES = 1_000
# A front end's own descriptors, and a task worker's.
_OWN_FILES = 256
# Threads of a process that computes nothing.
_OWN_THREADS = 16
_PURPOSES = {
    "nginx": "several gateways behind one address",
    "prometheus": "metrics over time, and alerts",
    "promtool": "trying alert rules",
    "amtool": "trying where alerts go",
    "valkey-server": "a task store that is started by hand",
}


# Limits of the operating system.


def check_open_files(config: Config, machine: Machine) -> Check:
    soft, hard = machine.open_files.soft, machine.open_files.hard
    waiting = sum(model.max_queue for model in models_of(config))
    needed = waiting + _OWN_FILES
    detail = f"soft {_limit(soft)}, hard {_limit(hard)}"
    # A front end raises its own to the hard one.
    if hard is not None and hard < needed:
        detail += f"; {waiting:,} waiting requests need up to {needed:,} in a front end"
        return Check("open_files", "warning", detail, f"LimitNOFILE={needed} in systemd, or --ulimit nofile={needed}")
    held = 2 * config.concurrency + _OWN_FILES
    if soft is not None and soft < held:
        detail += f"; {config.concurrency:,} tasks at once need up to {held:,} in a task worker"
        return Check("open_files", "warning", detail, f"ulimit -n {held}")
    return Check("open_files", "ok", f"{detail}; a front end needs up to {needed:,}")


def check_processes(config: Config, machine: Machine) -> Check:
    processes = 1 + machine.front_ends + workers_of(config, machine) + config.task_workers
    needed = processes * _OWN_THREADS + threads_of(config, machine)
    limit, group = machine.user_processes.soft, machine.cgroup
    left = [] if limit is None else [limit]
    left += [] if group.processes is None else [group.processes - group.processes_used]
    detail = f"{_limit(min(left, default=None))} processes and threads"
    if left and min(left) < needed:
        detail += f"; {processes} processes of headrace need about {needed}"
        return Check("processes", "warning", detail, "raise ulimit -u, TasksMax= in systemd, or --pids-limit")
    return Check("processes", "ok", f"{detail}; headrace needs about {needed}")


def check_backlog(config: Config, machine: Machine) -> Check | list[Check]:
    if machine.somaxconn is None:
        return []
    detail = f"net.core.somaxconn = {machine.somaxconn:,}; headrace asks for {machine.backlog:,}"
    if machine.somaxconn < machine.backlog:
        fix = f"sysctl -w net.core.somaxconn={machine.backlog}: a burst of connections is dropped otherwise"
        return Check("backlog", "warning", detail, fix)
    return Check("backlog", "ok", detail)


def check_core_dumps(config: Config, machine: Machine) -> Check:
    soft = machine.core_bytes.soft
    if soft == 0:
        return Check("core_dumps", "info", "off", "ulimit -c unlimited, to look into a worker that crashes")
    return Check("core_dumps", "info", "on" if soft is None else f"up to {size(soft)}")


def check_shared_memory(config: Config, machine: Machine) -> Check | list[Check]:
    total = machine.shared_memory_bytes
    if total is None:
        return []
    if total < _GIB:
        detail = f"/dev/shm has {size(total)}: too little for data loaders and models that share tensors"
        return Check("shared_memory", "info", detail, "docker run --shm-size=1g")
    return Check("shared_memory", "ok", f"/dev/shm has {size(total)}")


def _limit(value: int | None) -> str:
    return "unlimited" if value is None else f"{value:,}"


# Places.


def check_runtime_dir(config: Config, machine: Machine) -> Check:
    runtime, folder = machine.runtime, machine.runtime.folder
    detail = f"{_place(folder)}; the longest socket takes {runtime.longest_socket} of {LONGEST_SOCKET} bytes"
    fix = "set XDG_RUNTIME_DIR to a short path on this machine that this user may write to"
    if runtime.problem:
        return Check("runtime_dir", "error", f"{folder.path} cannot be used: {runtime.problem}", fix)
    longest = max(runtime.longest_socket, len(runtime.store_socket.encode()))
    if longest > LONGEST_SOCKET:
        return Check("runtime_dir", "error", f"{folder.path} is too long for sockets", fix)
    if runtime.wanted and runtime.wanted.rstrip("/") != folder.path:
        detail = f"XDG_RUNTIME_DIR={runtime.wanted} is too long or not writable, so that it is {detail}"
        return Check("runtime_dir", "warning", detail, fix)
    if folder.file_system in _NETWORK:
        return Check("runtime_dir", "warning", f"{detail}: processes share memory there, which no network can", fix)
    return Check("runtime_dir", "ok", detail)


def check_data_dir(config: Config, machine: Machine) -> Check:
    folder, used = machine.data, not config.redis_url
    fix = "name a folder on a local disk with --data-dir"
    bad: Status = "error" if used else "warning"
    if folder.problem:
        return Check("data_dir", bad, f"{folder.path} cannot be used: {folder.problem}", fix)
    if not folder.writable:
        return Check("data_dir", bad, f"this user may not write to {folder.parent}, for {folder.path}", fix)
    if used and folder.open_to_all:
        return Check("data_dir", "error", f"anybody may write to {folder.path}", f"chmod o-w {folder.path}, or {fix}")
    detail = _place(folder) + ("" if folder.exists else "; it is made when it is needed")
    if not used:
        return Check("data_dir", "ok", f"{detail}; tasks are kept elsewhere")
    if folder.file_system in _IN_MEMORY:
        return Check("data_dir", "warning", f"{detail}: tasks are gone when the machine restarts", fix)
    if folder.file_system in _IN_CONTAINER:
        detail += ": if this is a container, tasks go with it"
        return Check("data_dir", "warning", detail, "mount a volume there")
    if folder.file_system in _NETWORK:
        return Check("data_dir", "warning", f"{detail}: locks and what is written last are not safe there", fix)
    return Check("data_dir", "ok", detail)


def check_disk(config: Config, machine: Machine) -> Check | list[Check]:
    folder = machine.data
    if folder.problem:
        return []
    detail = f"{size(folder.free_bytes)} of {size(folder.total_bytes)} free below {folder.parent}"
    fix = "free some space: a store that cannot write accepts no task"
    if folder.free_bytes < _LEAST_DISK and not config.redis_url:
        return Check("disk", "error", detail, fix)
    if folder.free_bytes < _LITTLE_DISK:
        return Check("disk", "warning", detail, fix)
    if folder.free_files is not None and folder.free_files < _LITTLE_FILES:
        return Check(
            "disk", "warning", f"{detail}, but only {many(folder.free_files, 'file')} more", "remove some files"
        )
    return Check("disk", "ok", detail)


def _place(folder: Folder) -> str:
    return f"{folder.path} ({folder.file_system or 'unknown'}, {size(folder.free_bytes)} free)"


# The network, and programs.


def check_ports(config: Config, machine: Machine) -> list[Check]:
    return [_port(each) for each in machine.ports]


def _port(port: Port) -> Check:
    where = f"{port.host}:{port.number}"
    flag = f"--{port.option.replace('_', '-')}"
    if port.state in ("off", "any"):
        return Check(port.option, "ok", "off" if port.state == "off" else "a free one is picked")
    if port.state == "free":
        return Check(port.option, "ok", f"{where} is free")
    if port.state == "headrace":
        version = f" {port.version}" if port.version else ""
        return Check(port.option, "info", f"headrace{version} answers at {where}", f"for another one: {flag} 0")
    if port.state == "other":
        fix = f"{flag} 0 picks a free one; ss -ltnp 'sport = :{port.number}' says who it is"
        return Check(port.option, "error", f"another program uses {where}", fix)
    return Check(port.option, "error", f"cannot listen on {where}: {port.problem}", f"choose another {flag}")


def check_exposure(config: Config, machine: Machine) -> Check:
    if config.api_keys:
        return Check("exposure", "ok", "a key is needed")
    if config.admin_port >= 0 and not is_loopback(config.admin_host):
        detail = f"the admin port is open to others on {config.admin_host} without a key; it will not start"
        return Check("exposure", "error", detail, "set api_keys, or leave admin_host at 127.0.0.1")
    if not is_loopback(config.host):
        detail = f"everybody who can reach {config.host} may ask models and start tasks"
        return Check("exposure", "warning", detail, "set api_keys (HEADRACE_API_KEYS), or listen on 127.0.0.1")
    return Check("exposure", "ok", f"only this machine can reach {config.host}")


def check_programs(config: Config, machine: Machine) -> list[Check]:
    found = []
    for program in machine.programs:
        name = f"program.{program.name}"
        if program.path:
            found.append(Check(name, "info", f"{program.version or 'of unknown version'} ({program.path})"))
        else:
            found.append(Check(name, "info", f"not here; it is for {_PURPOSES[program.name]}"))
    return found


ALL: Sequence[Callable[[Config, Machine], Check | list[Check]]] = (
    *(check_open_files, check_processes, check_backlog, check_core_dumps, check_shared_memory),
    *(check_runtime_dir, check_data_dir, check_disk),
    *(check_ports, check_exposure, check_programs),
)
