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
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import asdict

from headrace.artifact import Subject, processor_flags
from headrace.clock import perf_counter
from headrace.errors import HeadraceError, to_fault
from headrace.optimizing import bounds, compiled, rungs
from headrace.optimizing.orphan import end_with_parent
from headrace.optimizing.process import SAID, memory_bytes
from headrace.runners import collate
from headrace.runners.opened import Instance
from headrace.runners.way import GENERATE, Way, of_files, of_module

ITEMS, SUBJECT, MACHINE = "items.npz", "subject.json", "machine.json"


class Job(msgspec.Struct, frozen=True):
    """What a process has to do.

    Args:
        work: directory of the whole ladder.
        samples: file of samples, one JSON object with ``input`` a line.
        calibration: numbers of the items that static quantisation may look at.
        instance: of a target that is an object.
        layer_first: give up a rung whose single layers are much slower than float32, see `layer.py`.
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
    instance: Instance | None = None
    layer_first: bool = False


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
    end_with_parent()
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
    from headrace.runners import parameters
    from headrace.runners.subject import open_subject

    samples = read(Path(job.samples), job.most_samples)
    counted = None if job.instance else parameters.count(job.target, job.task)
    # Said before anything is loaded: that may be what takes all memory.
    tell(answers, counted=msgspec.to_builtins(counted), memory_bytes=_memory_bytes(job.device))
    opened = open_subject(job.target, job.task, samples, job.instance)
    items = [opened.prepare(sample) for sample in samples]
    work = Path(job.work)
    arrays = {f"{number}.{name}": array for number, item in enumerate(items) for name, array in item.items()}
    np.savez(work / ITEMS, **arrays)  # type: ignore[arg-type]  # numpy's own names for its options come first
    (work / SUBJECT).write_bytes(msgspec.json.encode(opened.subject))
    (work / MACHINE).write_bytes(msgspec.json.encode(_machine(job, opened.subject.task)))


def _memory_bytes(device: str) -> int:
    """Of what the weights lie in."""
    if device == "cpu":
        return memory_bytes()
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


def _machine(job: Job, task: str) -> rungs.Machine:
    """What this process can see of the machine it runs on."""
    import torch

    writes = task == GENERATE
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
        memory_bytes=memory_bytes(),
        bandwidth=bounds.bytes_per_s(job.device, job.threads) if writes else 0.0,
        operations_per_s=0.0 if writes else bounds.operations_per_s(job.device, job.threads),
    )


def _build(job: Job, answers: Any) -> None:
    rung = rungs.find(job.rung)
    if rung.engine == "torch":
        return
    from headrace.optimizing import export
    from headrace.runners import recipes

    items = Items(Path(job.work))
    directory = rungs.directory_of(Path(job.work), job.rung)
    directory.mkdir(parents=True, exist_ok=True)
    opened = _opened(job)
    module = recipes.apply(list(rung.recipe), opened.module, job.device)
    example = [items.all[index] for index in job.calibration[:2] or [0, 1 % len(items.all)]]
    export.export(rung, opened.subject, module, example, [items.all[index] for index in job.calibration], directory)


def _opened(job: Job) -> Any:
    import torch

    from headrace.optimizing.samples import read
    from headrace.runners.subject import open_subject

    torch.set_num_threads(job.threads)
    opened = open_subject(job.target, job.task, read(Path(job.samples), job.most_samples), job.instance)
    rung = rungs.find(job.rung)
    opened.make_ready(rung.engine, rung.recipe)
    return opened


def _run(job: Job, answers: Any) -> None:
    began = perf_counter()
    items = Items(Path(job.work))
    with compiled.watched(rungs.find(job.rung).recipe) as check_compiled:
        way = _open(job, items)
        first = perf_counter()
        way.answer([items.all[0]])
        check_compiled()
        loaded = {"load_s": first - began, "first_s": perf_counter() - first}
        tell(answers, **loaded, size_bytes=way.size_bytes, step_bytes=way.step_bytes)
        asked = _Asked(items, way)
        for line in sys.stdin:
            tell(answers, **asked.answer(json.loads(line)))


def _open(job: Job, items: Items) -> Way:
    rung = rungs.find(job.rung)
    if rung.engine == "torch":
        module = _opened(job).module
        _check_worth(job, rung, module, writes=items.subject.task == GENERATE)
        return of_module(module, rung.run_by, job.device, items.subject)
    directory = rungs.directory_of(Path(job.work), job.rung)
    return of_files(rung.engine, directory, rung.run_by, job.device, job.threads, items.subject)


def _check_worth(job: Job, rung: rungs.Rung, module: Any, writes: bool) -> None:
    """Raises `layer.NotFaster`."""
    if job.layer_first and job.device == "cpu":
        from headrace.optimizing import layer

        layer.check(module, rung.recipe, layer.ROWS_OF_WRITING if writes else layer.ROWS)


class _Asked:
    """Answers the ladder's commands; items are named by their numbers."""

    def __init__(self, items: Items, way: Way) -> None:
        self._items = items
        self._way = way

    def _of(self, numbers: list[int]) -> list[collate.Item]:
        return [self._items.all[number] for number in numbers]

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "time":
            return self._time([self._of(numbers) for numbers in command["batches"]], command["least_s"])
        if command["do"] == "outputs":
            outputs = {}
            for numbers in command["batches"]:
                for number, output in zip(numbers, self._way.answer(self._of(numbers)), strict=True):
                    outputs[str(number)] = np.asarray(output, np.float32)
            np.savez(command["file"], **outputs)  # type: ignore[arg-type]
            return {"file": command["file"]}
        if command["do"] == "meet":
            return {"longer_s": [self._longer(number) for number in command["items"]]}
        if command["do"] == "operations":
            return asdict(bounds.operations(self._way, self._items.all, self._items.lengths))
        return {"peak_bytes": _peak_bytes()}

    def _longer(self, number: int) -> float:
        """Seconds that an item takes longer than the same once more."""
        item = self._of([number])
        first = perf_counter()
        self._way.answer(item)
        again = perf_counter()
        self._way.answer(item)
        return (again - first) - (perf_counter() - again)

    def _time(self, batches: list[list[collate.Item]], least_s: float) -> dict[str, Any]:
        """Run all batches again and again until the time is over, once at least; wall and CPU time are of one pass."""
        wall, cpu = perf_counter(), _cpu_s()
        calls = []
        passes = 0
        while not passes or perf_counter() - wall < least_s:
            for batch in batches:
                start = perf_counter()
                apart = self._way.work(batch)
                calls.append({"s": perf_counter() - start} | apart)
            passes += 1
        return {"wall_s": (perf_counter() - wall) / passes, "cpu_s": (_cpu_s() - cpu) / passes, "calls": calls}


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
