"""GPUs as the driver and as torch see them, each asked in a process of its own: a broken driver hangs or crashes who
asks, and torch is no part of this process."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from headrace.doctor.ask import ask

# Importing torch from a cold disk takes its time.
_TORCH_TIMEOUT_S = 60.0
_DRIVER_TIMEOUT_S = 10.0
_MIB = 1024 * 1024

# Runs in a process of its own. A kernel is run on each device: a build without kernels for it is seen by nothing else.
_ASK_TORCH = """
import json, warnings
def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    found = {"version": torch.__version__, "threads": torch.get_num_threads(), "gpus": []}
    found["build"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" \
        if getattr(torch.version, "hip", None) else "CPU"
    found["mps"] = bool(hasattr(torch.backends, "mps") and torch.backends.mps.is_available())
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:
        count, found["problem"] = 0, first_line(error)
    for index in range(count):
        card = {"name": f"cuda:{index}"}
        try:
            card["name"] = torch.cuda.get_device_name(index)
            card["free_bytes"], card["total_bytes"] = torch.cuda.mem_get_info(index)
            if torch.ones(1, device=f"cuda:{index}").add_(1).item() != 2.0:
                card["problem"] = "it computes 1 + 1 wrongly"
        except Exception as error:
            card["problem"] = first_line(error)
        found["gpus"].append(card)
if not count and said and found["build"] != "CPU":
    found.setdefault("problem", first_line(said[-1].message))
print()
print(json.dumps(found))
"""


class Card(msgspec.Struct, frozen=True):
    """One GPU. Sizes are 0 where they are not known.

    Args:
        problem: why it cannot be used.
    """

    name: str
    total_bytes: int = 0
    free_bytes: int = 0
    uuid: str = ""
    problem: str = ""


class Driver(msgspec.Struct, frozen=True):
    """The NVIDIA driver.

    Args:
        present: whether this machine has one.
        problem: why it does not say what it has.
    """

    present: bool = False
    version: str = ""
    cards: Sequence[Card] = ()
    problem: str = ""


class Torch(msgspec.Struct, frozen=True):
    """What torch says of itself.

    Args:
        version: empty when it is not installed.
        build: ``CPU``, or for example ``CUDA 12.8``.
        threads: how many it would use here.
        problem: why it cannot be used, or sees no GPU.
        imports: whether it can be imported at all.
    """

    version: str = ""
    build: str = "CPU"
    gpus: Sequence[Card] = ()
    mps: bool = False
    threads: int = 0
    problem: str = ""
    imports: bool = True


def read_torch() -> Torch:
    """Ask torch, if it is installed."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Torch()
    reply = ask([sys.executable, "-P", "-c", _ASK_TORCH], timeout_s=_TORCH_TIMEOUT_S)
    if reply.problem:
        return Torch(version, problem=reply.problem, imports=False)
    return msgspec.json.decode(reply.text.splitlines()[-1], type=Torch)


def read_driver(root: Path = Path("/")) -> Driver:
    """Ask the driver, if there is one.

    Args:
        root: where ``proc`` and ``dev`` are.
    """
    version = ""
    try:
        words = re.search(r"Kernel Module.*? (\d[\d.]+) ", (root / "proc/driver/nvidia/version").read_text())
        version = words[1] if words else "of unknown version"
    except OSError:
        if not list((root / "dev").glob("nvidia[0-9]*")):
            return Driver()
    query = "--query-gpu=name,uuid,memory.total,memory.free"
    reply = ask(["nvidia-smi", query, "--format=csv,noheader,nounits"], timeout_s=_DRIVER_TIMEOUT_S)
    if reply.problem:
        return Driver(True, version, problem=f"nvidia-smi: {reply.problem}")
    return Driver(True, version, cards_of(reply.text))


def cards_of(text: str) -> list[Card]:
    """The cards in the output of ``nvidia-smi``: name, uuid, memory in MiB and how much of it is free, one a line."""
    cards = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            total, free = (int(part) * _MIB if part.isdigit() else 0 for part in parts[2:])
            cards.append(Card(parts[0], total, free, parts[1]))
    return cards
