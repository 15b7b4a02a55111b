"""What the facts about a machine mean for headrace. Each check is a function of the configuration and of the facts
(`machine.py`); it looks nothing up by itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from headrace.config import Config, device_groups
from headrace.doctor.check import Check, many, size
from headrace.doctor.gpus import Card
from headrace.doctor.host_checks import ALL as HOST
from headrace.doctor.machine import Machine
from headrace.doctor.packages import Package
from headrace.doctor.sizing import cores_of, gpus_of, models_of, threads_of, workers_of
from headrace.doctor.store_checks import ALL as STORE

_GIB = 1 << 30
# headrace sets them for each model worker.
_TOLD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def judge(config: Config, machine: Machine) -> list[Check]:
    """All checks, in the order of `ALL`."""
    found: list[Check] = []
    for check in ALL:
        said = check(config, machine)
        found += [said] if isinstance(said, Check) else said
    return found


# Software.


def check_python(config: Config, machine: Machine) -> Check:
    detail = f"{machine.implementation} {machine.python} ({machine.executable})"
    wanted = machine.installation.python
    if not machine.installation.python_fits:
        return Check("python", "warning", f"{detail}; headrace is made for {wanted}", f"use a Python {wanted}")
    return Check("python", "ok", detail)


def check_platform(config: Config, machine: Machine) -> Check:
    if machine.system not in ("Linux", "Darwin"):
        detail = f"{machine.platform}: headrace runs on Linux, and on macOS for development"
        return Check("platform", "error", detail, "use Linux, a container, or WSL 2")
    return Check("platform", "ok", machine.platform)


def check_headrace(config: Config, machine: Machine) -> Check:
    detail = f"{machine.version} ({machine.source})"
    installed = machine.installation.version
    if machine.installation.problem:
        return Check("headrace", "warning", f"{detail}; {machine.installation.problem}", "pip install headrace")
    if installed != machine.version:
        detail += f"; the installed package says {installed}: two installations are mixed"
        return Check("headrace", "warning", detail, "pip install --force-reinstall headrace")
    return Check("headrace", "ok", detail)


def check_bytecode(config: Config, machine: Machine) -> Check:
    if machine.bytecode_kept:
        return Check("bytecode", "ok", "kept")
    return Check(
        "bytecode",
        "warning",
        "Python compiles headrace anew in each process: a server took 2 s longer to be ready",
        f"unset PYTHONDONTWRITEBYTECODE, or once where it is installed: python -m compileall {machine.source}",
    )


def check_dependencies(config: Config, machine: Machine) -> Check | list[Check]:
    needed = [each for each in machine.installation.packages if not each.extra]
    if not needed:
        return []
    missing, unfit = _faults(needed)
    if missing or unfit:
        detail = "; ".join([*(f"{each.wanted} is missing" for each in missing), *map(_unfit, unfit)])
        return Check("dependencies", "error" if missing else "warning", detail, _install(missing + unfit))
    return Check("dependencies", "ok", f"{many(len(needed), 'package')}, all as declared")


def check_extras(config: Config, machine: Machine) -> list[Check]:
    found = []
    key = lambda each: each.extra  # noqa: E731
    for extra, group in itertools.groupby(sorted(machine.installation.packages, key=key), key):
        packages = list(group)
        missing, unfit = _faults(packages)
        name, fix = f"extra.{extra}", f"pip install 'headrace[{extra}]'"
        if not extra:
            continue
        if unfit:
            found.append(Check(name, "warning", "; ".join(map(_unfit, unfit)), _install(unfit)))
        elif missing:
            found.append(Check(name, "info", f"not installed: {', '.join(each.name for each in missing)}", fix))
        else:
            found.append(Check(name, "ok", ", ".join(f"{each.name} {each.version}" for each in packages)))
    return found


def _faults(packages: Iterable[Package]) -> tuple[list[Package], list[Package]]:
    """Those that are missing, and those of another version than declared."""
    packages = list(packages)
    return [each for each in packages if not each.version], [each for each in packages if not each.fits]


def _unfit(package: Package) -> str:
    return f"{package.name} {package.version} is here, {package.wanted} is wanted"


def _install(packages: Sequence[Package]) -> str:
    return f"pip install {' '.join(repr(each.wanted) for each in packages)}"


def check_variables(config: Config, machine: Machine) -> Check:
    if machine.unknown_variables:
        detail = f"nothing reads {', '.join(machine.unknown_variables)}"
        return Check("variables", "warning", detail, "correct the name, or remove it")
    return Check("variables", "ok", "every HEADRACE_… variable is known")


# Devices.


def check_torch(config: Config, machine: Machine) -> Check | list[Check]:
    torch = machine.torch
    if not torch.version:
        return []  # said as an extra
    if not torch.imports:
        detail = f"torch {torch.version} cannot be imported: {torch.problem}"
        return Check("torch", "error", detail, "python -c 'import torch' shows the whole error")
    return Check("torch", "ok", f"{torch.version}, built for {torch.build}; {many(torch.threads, 'thread')}")


def check_gpus(config: Config, machine: Machine) -> Check:
    driver, torch = machine.driver, machine.torch
    seen = ", ".join(map(_card, torch.gpus))
    if broken := [f"{card.name}: {card.problem}" for card in torch.gpus if card.problem]:
        return Check("gpus", "error", f"torch cannot use {'; '.join(broken)}", _cuda_build(machine))
    if torch.gpus and not driver.cards:
        return Check("gpus", "ok", f"torch sees {seen}" + (f"; {driver.problem}" if driver.problem else ""))
    if driver.problem or (driver.present and not driver.cards):
        detail = f"NVIDIA driver {driver.version} shows no GPU: {driver.problem or 'there is none'}"
        return Check("gpus", "error", detail, "run nvidia-smi; look for NVRM in dmesg")
    if not driver.cards:
        return Check("gpus", "ok", "MPS" if torch.mps else "none: models run on the CPU")
    has = f"NVIDIA driver {driver.version} has {', '.join(map(_card, driver.cards))}"
    if not torch.version or not torch.imports:
        return Check("gpus", "info", f"{has}; there is no torch that could use it", "pip install 'headrace[torch]'")
    if torch.build == "CPU":
        if _on_cpu(config):
            return Check("gpus", "info", f"{has}; this torch is a CPU build, and the configuration says cpu")
        return Check("gpus", "error", f"{has}, but torch {torch.version} is built for the CPU", _cuda_build(machine))
    if len(torch.gpus) < len(driver.cards) and machine.cuda_visible is None:
        why = f": {torch.problem}" if torch.problem else ""
        detail = f"{has}, but torch {torch.version} sees {len(torch.gpus)} of {len(driver.cards)}{why}"
        return Check("gpus", "error", detail, f"update the driver, or {_cuda_build(machine)}")
    if any(card.free_bytes < card.total_bytes / 10 for card in torch.gpus):
        return Check("gpus", "warning", f"{has}; hardly any memory is free", "nvidia-smi shows who has it")
    return Check("gpus", "ok", f"{has}; torch sees {len(torch.gpus)}")


def _card(card: Card) -> str:
    memory = f" ({size(card.free_bytes)} of {size(card.total_bytes)} free)" if card.total_bytes else ""
    return f"{card.name}{memory}"


def _on_cpu(config: Config) -> bool:
    return all(model.device == "cpu" for model in models_of(config))


def _cuda_build(machine: Machine) -> str:
    plain = machine.torch.version.partition("+")[0]
    return f"pip install --force-reinstall torch=={plain}: the plain package for Linux is built for CUDA"


def check_cuda_visible(config: Config, machine: Machine) -> Check | list[Check]:
    visible, cards = machine.cuda_visible, machine.driver.cards
    if visible is None or not cards:
        return []
    named = [word.strip() for word in visible.split(",") if word.strip()]
    unknown = [word for word in named if not _names_card(word, cards)]
    detail = f"CUDA_VISIBLE_DEVICES={visible}"
    if not named or unknown == named:
        fix = "unset CUDA_VISIBLE_DEVICES, or name GPUs by number"
        return Check("cuda_visible_devices", "warning", f"{detail} hides every GPU: {many(len(cards), 'GPU')}", fix)
    if unknown:
        detail += f": there is no GPU {', '.join(unknown)}; CUDA ignores it and all that follow"
        return Check("cuda_visible_devices", "error", detail, f"name some of {', '.join(map(str, range(len(cards))))}")
    return Check("cuda_visible_devices", "ok", f"{detail}: {len(named)} of {many(len(cards), 'GPU')}")


def _names_card(word: str, cards: Sequence[Card]) -> bool:
    # Parts of a card (MIG) have names of their own that the driver's list of cards does not show.
    return (
        int(word) < len(cards)
        if word.isdigit()
        else word.startswith("MIG-") or any(card.uuid.startswith(word) for card in cards)
    )


def check_device(config: Config, machine: Machine) -> Check:
    """What the configuration asks for against what there is."""
    wrong = []
    for model in models_of(config):
        # Binding workers to GPUs needs no torch, computing there by `device` does.
        bound = [number for group in device_groups(model.devices) or [] for number in group]
        wrong += [f"GPU {number}" for number in bound if number >= gpus_of(machine)]
        wrong += ["all GPUs"] if model.devices == "all" and not gpus_of(machine) else []
        if model.device.startswith("cuda") and int(model.device.partition(":")[2] or 0) >= len(machine.torch.gpus):
            wrong.append(model.device)
        wrong += ["mps"] if model.device == "mps" and not machine.torch.mps else []
    if wrong:
        detail = f"the configuration asks for {', '.join(sorted(set(wrong)))}; here: {many(gpus_of(machine), 'GPU')}"
        return Check("device", "error", detail, "device = auto or cpu, and devices by the numbers of what is here")
    return Check("device", "ok", f"device = {', '.join(sorted({model.device for model in models_of(config)}))}")


# Processor and memory.


def check_cores(config: Config, machine: Machine) -> Check:
    flags = f"; {' '.join(machine.processor_flags)}" if machine.processor_flags else ""
    detail = f"{many(machine.cores, 'core')} of {machine.processor or 'this machine'}{flags}"
    if machine.cgroup.cores is not None:
        detail += f"; the control group allows {machine.cgroup.cores:g}"
    if machine.counted_cores > cores_of(machine):
        detail += f", but headrace divides {machine.counted_cores} among its workers"
        return Check("cores", "warning", detail, f"set threads so that workers × threads is {cores_of(machine)}")
    return Check("cores", "ok", detail)


def check_threads(config: Config, machine: Machine) -> Check:
    cores, workers = cores_of(machine), workers_of(config, machine)
    total = threads_of(config, machine)
    found = []
    if total > cores:
        found.append(f"{many(workers, 'model worker')} with {many(total, 'thread')} together")
    for name, value in machine.variables.items():
        threads = _first_number(value)
        # A model worker is told by headrace.
        if name not in _TOLD and threads * workers > cores:
            found.append(f"{name}={value} in each of {many(workers, 'model worker')}")
        if threads * config.task_workers > cores:
            found.append(f"{name}={value} in each of {many(config.task_workers, 'task worker')}")
    if config.task_workers > 1 and not any(name in machine.variables for name in _TOLD):
        found.append(
            f"{config.task_workers} task workers with up to {machine.cores} each, since nothing tells them less"
        )
    if found:
        fix = "lower --workers, --threads or the variable"
        if config.task_workers > 1:
            fix += f"; for task workers OMP_NUM_THREADS={max(1, cores // config.task_workers)}"
        return Check("threads", "warning", f"more threads than the {many(cores, 'core')}: {'; '.join(found)}", fix)
    return Check("threads", "ok", f"{many(workers, 'model worker')}, {many(total, 'thread')}, {many(cores, 'core')}")


def check_memory(config: Config, machine: Machine) -> list[Check]:
    memory, group = machine.memory, machine.cgroup
    free, detail = memory.available_bytes, f"{size(memory.available_bytes)} of {size(memory.total_bytes)} available"
    if group.memory_bytes is not None:
        left = group.memory_bytes - group.memory_used_bytes
        detail += f"; the control group allows {size(group.memory_bytes)}, of which {size(left)} are left"
        free = min(free, left)
    few = free < _GIB
    found = [
        Check("memory", "warning" if few else "ok", detail, "a model needs more; end what is not needed" if few else "")
    ]
    swap = f"{size(memory.swap_used_bytes)} of {size(memory.swap_bytes)} in use" if memory.swap_bytes else "none"
    if memory.swap_used_bytes > max(memory.swap_bytes / 2, _GIB):
        fix = "free some memory: a model that is swapped out answers late"
        return [*found, Check("swap", "warning", swap, fix)]
    return [*found, Check("swap", "ok", swap)]


def _first_number(text: str) -> int:
    """OpenMP allows a list, a number per level."""
    first = text.partition(",")[0].strip()
    return int(first) if first.isdigit() else 0


ALL: Sequence[Callable[[Config, Machine], Check | list[Check]]] = (
    *(check_python, check_platform, check_headrace, check_bytecode, check_dependencies, check_extras, check_variables),
    *(check_torch, check_gpus, check_cuda_visible, check_device),
    *(check_cores, check_threads, check_memory),
    *HOST,
    *STORE,
)
