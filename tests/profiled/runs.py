"""Programs of this folder, run under the real profiler, each in a process of its own.

Those with torch share one process: importing it takes longer than all that is to be seen of them.

    python tests/profiled/runs.py FOLDER SEED PROGRAM…      # of those with torch; writes FOLDER/NAME.json
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from headrace.profiling import record as records
from headrace.profiling.cpu import launch
from headrace.profiling.cpu.program import Job
from headrace.profiling.cpu.recording import Recording
from headrace.profiling.record import Record

HERE = Path(__file__).parent
# Of each planted program what must be found first, at the line that ends with ``# HERE``.
PLANTED = {
    "blocked_by_sleep": "blocked_loop",
    "blocked_loop": "blocked_loop",
    "child_processes": "child_processes",
    "cpu_hot_spot": "cpu_hot_spot",
    "data_loading": "input_bound",
    "deep_chain": "look_into_children",
    "differing_calls": "called_often",
    "generated_batches": "input_bound",
    "gil_threads": "gil_contention",
    "imports": "slow_imports",
    "io_await": "io_wait",
    "io_socket": "io_wait",
    "lock_contention": "lock_contention",
    "lock_of_tasks": "lock_contention",
    "pickling": "serialisation",
    "process_waits": "process_wait",
    "regular_expression": "regular_expressions",
    "repeated_calls": "cache_it",
    "serialisation": "serialisation",
    "sleeping": "sleep_wait",
    "sleeping_tasks": "sleep_wait",
    "slow_call": "slow_call",
    "slow_first_call": "slow_call",
    "small_batches": "small_batches",
    "tokenising": "tokenising_on_loop",
}
CLEAN = sorted(path.stem for path in (HERE / "clean").glob("*.py") if path.stem != "balanced")
WITH_TORCH = {
    "batched_inference",
    "data_loading",
    "fed_training",
    "generated_batches",
    "larger_batches",
    "small_batches",
}
_ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def path_of(name: str) -> Path:
    return next(HERE.glob(f"*/{name}.py"))


def planted_line(name: str) -> int:
    """Where the thing to be found was planted."""
    lines = path_of(name).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith("# HERE"))


def profiled(name: str, folder: Path, seed: int = 0) -> Record:
    """A program that needs no torch, run as `headrace profile` runs it."""
    os.environ.update(_ALONE)
    return launch.run(Job(str(path_of(name)), False, [str(seed)], str(folder)), quiet_output=True)


def profiled_with_torch(names: list[str], folder: Path, seed: int = 0) -> dict[str, Record]:
    """Programs that need torch, one after the other in one process."""
    command = [sys.executable, __file__, str(folder), str(seed), *names]
    subprocess.run(command, env={**os.environ, **_ALONE}, check=True, stdout=subprocess.DEVNULL, timeout=120)
    return {name: records.read(folder / f"{name}.json") for name in names}


def main(folder: Path, seed: int, names: list[str]) -> None:
    import torch

    _warm_up(torch)
    for name in names:
        spec = importlib.util.spec_from_file_location(name, path_of(name))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)

        def run(call: Any = module.main) -> None:
            call(seed)

        recording = Recording()
        recording.places.set_floor(run.__code__)
        recording.start()
        try:
            run()
        finally:
            recording.stop_tracing()
        recording.stop()
        records.write(recording.record(name), folder / f"{name}.json")


def _warm_up(torch: Any) -> None:
    """An optimizer imports a compiler when the first one is made."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
