"""A process of the ladder: reads the target and its samples, builds one rung, or runs one.

    python -m headrace.optimizing.child prepare|build|run JOB.json

Whatever a rung does to its process (a crash, a leak, a setting that stays) ends with it. `run` answers commands, one
JSON document a line, on the descriptor that was its standard output; what the libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil

from headrace.artifact import Subject, processor_flags
from headrace.clock import perf_counter
from headrace.errors import HeadraceError, to_fault
from headrace.optimizing import rungs
from headrace.runners import collate

ITEMS, SUBJECT, MACHINE = "items.npz", "subject.json", "machine.json"
SAID = 3


class Job(msgspec.Struct, frozen=True):
    """What a process has to do.

    Args:
        work: directory of the whole ladder.
        samples: file of samples, one JSON object with ``input`` a line.
        calibration: numbers of the items that static quantisation may look at.
    """

    work: str
    target: str
    task: str
    device: str
    threads: int
    rung: str = rungs.BASELINE
    samples: str = ""
    most_samples: int = 1000
    calibration: list[int] = []


class Items:
    """The prepared samples, as `prepare` has written them."""

    def __init__(self, work: Path) -> None:
        self.subject = msgspec.json.decode((work / SUBJECT).read_bytes(), type=Subject)
        with np.load(work / ITEMS) as file:
            arrays = {name: file[name] for name in file.files}
        count = 1 + max(int(name.partition(".")[0]) for name in arrays)
        self.all: list[collate.Item] = [{} for _ in range(count)]
        for name, array in arrays.items():
            number, _, tensor = name.partition(".")
            self.all[int(number)][tensor] = array
        self.lengths = [collate.length(item, self.subject) for item in self.all]


def main(argv: list[str]) -> int:
    """Exit status `SAID` for an error that is the last line of standard error, as a `Fault` in JSON."""
    role, path = argv
    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(job.threads)
    try:
        {"prepare": _prepare, "build": _build, "run": _run}[role](job, answers)
    except HeadraceError as error:
        print(msgspec.json.encode(to_fault(error)).decode())
        return SAID
    return 0


def _prepare(job: Job, answers: Any) -> None:
    from headrace.optimizing.samples import read
    from headrace.runners.subject import open_subject

    samples = read(Path(job.samples), job.most_samples)
    opened = open_subject(job.target, job.task, samples)
    items = [opened.prepare(sample) for sample in samples]
    work = Path(job.work)
    arrays = {f"{number}.{name}": array for number, item in enumerate(items) for name, array in item.items()}
    np.savez(work / ITEMS, **arrays)  # type: ignore[arg-type]  # numpy's own names for its options come first
    (work / SUBJECT).write_bytes(msgspec.json.encode(opened.subject))
    (work / MACHINE).write_bytes(msgspec.json.encode(_machine(job)))


def _machine(job: Job) -> rungs.Machine:
    """What this process can see of the machine it runs on."""
    import torch

    gpu, capability = "", 0.0
    if job.device != "cpu":
        properties = torch.cuda.get_device_properties(job.device)
        gpu, capability = properties.name, properties.major + properties.minor / 10
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    names = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    return rungs.Machine(
        device=job.device,
        threads=job.threads,
        flags=sorted(processor_flags()),
        packages={name.lower().replace("-", "_"): version for name, version in names.items() if name},
        capability=capability,
        gpu=gpu,
        processor=processor,
        python=platform.python_version(),
        memory_bytes=psutil.virtual_memory().total,
    )


def _build(job: Job, answers: Any) -> None:
    rung = rungs.find(job.rung)
    if rung.engine == "torch":
        return
    from headrace.optimizing import export

    items = Items(Path(job.work))
    directory = rungs.directory_of(Path(job.work), job.rung)
    directory.mkdir(parents=True, exist_ok=True)
    opened, module = _module(job, list(rung.recipe))
    example = [items.all[index] for index in job.calibration[:2] or [0, 1 % len(items.all)]]
    export.export(rung, opened.subject, module, example, [items.all[index] for index in job.calibration], directory)


def _module(job: Job, recipe: list[str]) -> tuple[Any, Any]:
    import torch

    from headrace.optimizing.samples import read
    from headrace.runners import recipes
    from headrace.runners.subject import open_subject

    torch.set_num_threads(job.threads)
    opened = open_subject(job.target, job.task, read(Path(job.samples), job.most_samples))
    return opened, recipes.apply([word for word in recipe if word != recipes.PACKED], opened.module, job.device)


def _run(job: Job, answers: Any) -> None:
    began = perf_counter()
    items = Items(Path(job.work))
    engine, size = _open(job, items)
    packed = "packed" in rungs.find(job.rung).recipe
    runner = _Runner(items, engine, packed)
    first = perf_counter()
    runner.run([0])
    tell(answers, load_s=first - began, first_s=perf_counter() - first, size_bytes=size)
    for line in sys.stdin:
        command = json.loads(line)
        tell(answers, **runner.answer(command))


def _open(job: Job, items: Items) -> tuple[Callable[[dict[str, Any]], Any], int]:
    from headrace.runners import engines

    rung = rungs.find(job.rung)
    directory = rungs.directory_of(Path(job.work), job.rung)
    if rung.engine == "torch":
        from headrace.runners import recipes

        _, module = _module(job, list(rung.recipe))
        by_shape = not recipes.GRAPHS.isdisjoint(rung.recipe)
        engine = engines.module_engine(module, job.device, buckets=items.subject if by_shape else None)
        return engine, recipes.bytes_of(module)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return engines.open_exported(rung.engine, directory, job.device, job.threads, items.subject), size


class _Runner:
    """Runs batches of the items, given as lists of their numbers."""

    def __init__(self, items: Items, engine: Callable[[dict[str, Any]], Any], packed: bool) -> None:
        self._items = items
        self._engine = engine
        self._packed = packed

    def run(self, numbers: list[int]) -> list[Any]:
        items = [self._items.all[number] for number in numbers]
        return collate.run(self._engine, items, self._items.subject, self._packed)

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "time":
            wall, cpu = perf_counter(), _cpu_s()
            each = []
            for numbers in command["batches"]:
                start = perf_counter()
                self.run(numbers)
                each.append(perf_counter() - start)
            return {"wall_s": perf_counter() - wall, "cpu_s": _cpu_s() - cpu, "each_s": each}
        if command["do"] == "outputs":
            outputs = {}
            for numbers in command["batches"]:
                for number, output in zip(numbers, self.run(numbers), strict=True):
                    outputs[str(number)] = np.asarray(output, np.float32)
            np.savez(command["file"], **outputs)  # type: ignore[arg-type]
            return {"file": command["file"]}
        return {"peak_bytes": _peak_bytes(), "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _peak_bytes() -> int:
    """The most memory that was used at once: the GPU's where there is one in use, else this process's."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_s() -> float:
    """Processor time of this process, all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def tell(answers: Any, **fields: Any) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
