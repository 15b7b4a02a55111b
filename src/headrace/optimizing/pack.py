"""From a climbed ladder to an artifact: the chosen rung's files, what they are tested by, and what to fall back to.

It is put together beside its place, opened and tested there in a process of its own, and only then moved: whoever
looks at the place sees a whole artifact or none. Run as a module this is that process:

    python -m headrace.optimizing.pack begin|test TASK.json
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from headrace import artifact
from headrace.artifact import Manifest, Requires, Subject
from headrace.errors import ConfigError, Fault, HeadraceError, LoadError, from_fault, to_fault
from headrace.optimizing import drift, rungs
from headrace.optimizing.child import MACHINE, Items, Job
from headrace.optimizing.ladder import Result
from headrace.optimizing.orphan import end_with_parent
from headrace.optimizing.process import SAID, Failed, Process, usual_cap
from headrace.optimizing.words import Report
from headrace.runners import engines
from headrace.runners.archives import is_archive
from headrace.runners.artifact import MODEL, WEIGHTS, archived, self_test, write_golden
from headrace.runners.drift import is_error
from headrace.runners.recipe_words import PACKED
from headrace.runners.way import of_module
from headrace.version import __version__

_FALLBACK = "fallback"
_TOKENIZER = "tokenizer.json"
_GOLDEN_ITEMS = 16
_CAP_S = 900.0
# Golden items are few: what they drift scatters around what all have drifted, up to this factor and not beyond.
_SCATTER = 3.0
# What these count, they count by the item: of few items one more is a large share.
_COUNTED = frozenset({"top1", "flips", "neighbours"})
# Sums in another order make the last digits differ from machine to machine.
_SLACK = 0.1

_FILES = {
    "onnx": [engines.ONNX_FILE],
    "openvino": [engines.OPENVINO_FILE, Path(engines.OPENVINO_FILE).with_suffix(".bin").name],
    "aot": [engines.AOT_FILE],
}
# Words that any machine with torch can follow, always to the same end.
_PLAIN = {"sdpa", PACKED}
_INTEGERS = {"torch-int8-dynamic", "torchao-int8", "torchao-int8-weights"}
_CAPABILITY = {"tf32": 8.0, "bf16": 8.0, "torchao-int4": 8.0, "fp8": 8.9}
# Instruction sets, as Linux names them: those that kernels of integers are chosen by, and what a compiler uses besides.
_KERNELS = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
_COMPILED = {"fma", "f16c", "amx_tile", "amx_bf16", "bf16", "sve", "sve2"}


@dataclass(frozen=True)
class Way:
    """One way to run the model: a rung that has been built, and its row of the report."""

    rung: str
    row: dict[str, Any] = field(default_factory=dict)


def pack(result: Result, out: Path) -> None:
    """Make an artifact of the rung that a ladder has chosen.

    Raises:
        ConfigError: ``out`` is something else already, or cannot be written; or the rung needs the module's code, and
            the module is an object that nobody has said the factory of.
        LoadError: the artifact does not answer as the rung did when it was measured; ``out`` is as it was.
    """
    report, instance = result.report, result.job.instance
    rows = {row.rung: msgspec.to_builtins(row) for row in report.rows}
    idents = [report.chosen, *fallbacks(report)]
    if instance is not None and not instance.factory:
        if rungs.find(report.chosen).engine == "torch":
            raise ConfigError(
                f"an artifact of {report.chosen} needs the code that makes the module: no object is pickled into it",
                field="factory",
                hint='say factory="module:function", or climb rungs that are exported: ort, openvino, aot',
            )
        idents = [ident for ident in idents if rungs.find(ident).engine != "torch"]
    budget = None if report.compared_by else report.budget
    assemble(result.job, [Way(ident, rows.get(ident, {})) for ident in idents], budget, out)


def fallbacks(report: Report) -> list[str]:
    """The plain ONNX file where another one that needs no torch was chosen, and last the model as it is."""
    chosen = rungs.find(report.chosen)
    built = {row.rung for row in report.rows if row.status in ("ok", "not_faster", "noisy")}
    found = ["ort"] if chosen.engine in ("onnx", "openvino") and chosen.id != "ort" and "ort" in built else []
    return found + [rungs.BASELINE] * (chosen.id != rungs.BASELINE)


def check_out(out: Path) -> None:
    """Refuse a place where something else is. Raises `ConfigError`."""
    if out.exists() and not artifact.is_artifact(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out} is there already and is no artifact",
            field="out",
            hint="name another directory, or an earlier artifact to replace",
        )


def assemble(job: Job, ways: Sequence[Way], budget: Mapping[str, float] | None, out: Path) -> None:
    """Make an artifact of the first way; the others are what it falls back to, in order.

    Args:
        job: of the ladder; its work directory has the samples and what was built.
        budget: bounds of drift by measure. ``None`` where they are for measures that an artifact cannot take: it is
            bounded by how far each way has drifted from the model as it is.

    Raises: as `pack`.
    """
    out = out.resolve()
    check_out(out)
    new = out.with_name(f".{out.name}.{os.getpid()}.new")
    try:
        new.mkdir(parents=True)
        staged = _begin(job)
        directories = [new, *(new / _FALLBACK / way.rung for way in ways[1:])]
        for way, directory in zip(ways, directories, strict=True):
            others = [str(each.relative_to(new)) for each in directories[1:]] if directory == new else []
            _fill(job, way, staged, budget, others, directory)
        _swap(new, out)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}", field="out") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(new: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _begin(job: Job) -> Path:
    """A directory with the golden items and the model as it is."""
    items = Items(Path(job.work))
    evaluated = sorted(set(range(len(items.all))) - set(job.calibration), key=items.lengths.__getitem__)
    staged = Path(job.work) / "packed"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    _child("begin", job, staged, spread(evaluated, _GOLDEN_ITEMS))
    return staged


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """As many of them, evenly, the first and the last among them."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(at * (len(numbers) - 1) / (most - 1))] for at in range(most)]


def _fill(
    job: Job, way: Way, staged: Path, budget: Mapping[str, float] | None, fallback: list[str], directory: Path
) -> None:
    """One artifact, tested: its bounds are for the golden items, on which drift differs a little from that of all."""
    rung = rungs.find(way.rung)
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(staged / artifact.GOLDEN, directory)
    subject = Items(Path(job.work)).subject
    if rung.engine == "torch":
        shutil.copytree(staged / MODEL, directory / MODEL)
    for name in _FILES.get(rung.engine, []):
        built = rungs.directory_of(Path(job.work), rung.id) / name
        if not built.is_file():
            raise LoadError(f"{rung.id} has not been built: there is no {built}", field="target")
        shutil.copy(built, directory)
    if subject.text is not None:
        tokenizer = f"{MODEL}/{_TOKENIZER}" if rung.engine == "torch" else _TOKENIZER
        if rung.engine != "torch":
            shutil.copy(subject.text.tokenizer, directory / _TOKENIZER)
        subject = msgspec.structs.replace(subject, text=msgspec.structs.replace(subject.text, tokenizer=tokenizer))
    wanted = budget or drift.PRESETS["exact"][drift.compared_as(subject.task, subject.activation)]
    manifest = Manifest(
        rung=rung.id,
        engine=rung.engine,
        subject=subject,
        recipe=rung.run_by,
        threads=job.threads,
        requires=requires(rung, job, subject),
        budget=dict(wanted),
        measured=way.row,
        fallback=fallback,
        headrace=__version__,
    )
    artifact.write(directory, manifest)
    measured = _child("test", job, directory)
    count = min(_GOLDEN_ITEMS, len(Items(Path(job.work)).all) - len(job.calibration))
    found = bounds(rung.id, wanted, measured, items=count, scattered=budget is not None)
    artifact.write(directory, msgspec.structs.replace(manifest, budget=found))


def requires(rung: rungs.Rung, job: Job, subject: Subject) -> Requires:
    """What a machine must have to run a rung that was built on this one."""
    here = msgspec.json.decode((Path(job.work) / MACHINE).read_bytes(), type=rungs.Machine)
    runtime = {"onnx": "onnxruntime", "openvino": "openvino"}.get(rung.engine)
    names = [runtime] if runtime else ["torch", *(name for name, _ in rung.needs)]
    plain = rung.engine == "torch" and set(rung.recipe) <= _PLAIN
    packages = {name: "" if plain else version for name, version in artifact.installed(names).items()}
    if rung.engine == "torch" and not is_archive(job.target):
        packages |= {"transformers" if subject.text else "safetensors": ""}
    kind = job.device.partition(":")[0]
    integers = "quantize" in rung.options or not _INTEGERS.isdisjoint(rung.recipe)
    least = max((_CAPABILITY.get(word, 0.0) for word in rung.recipe), default=0.0)
    capability = here.capability if rung.engine == "aot" else least
    return Requires(
        isa=_instructions(here.flags, rung.engine == "aot", integers) if kind == "cpu" else [],
        packages=packages,
        device="" if plain else kind,
        capability=f"{capability:.1f}" if kind == "cuda" and capability else "",
    )


def _instructions(flags: Sequence[str], compiled: bool, integers: bool) -> list[str]:
    if compiled and set(flags) >= rungs.PORTABLE:
        return sorted(rungs.PORTABLE | (_KERNELS & set(flags) if integers else set()))
    if compiled:
        return sorted(flag for flag in flags if flag in _KERNELS | _COMPILED or flag.startswith("avx512"))
    return sorted(_KERNELS & set(flags)) if integers else []


def bounds(
    rung: str,
    budget: Mapping[str, float],
    measured: Mapping[str, float],
    *,
    items: int = _GOLDEN_ITEMS,
    scattered: bool = True,
) -> dict[str, float]:
    """The budget, wider where the golden items by themselves have drifted as far or a little farther.

    Args:
        items: how many golden ones there are: the fewer, the more they scatter.
        scattered: they belong to those that the budget was kept with, so that they cannot be far beyond it.

    Raises:
        LoadError: they have drifted much farther: these are not the files that were measured.
    """
    found = {}
    most_scatter = _SCATTER * max(1.0, math.sqrt(_GOLDEN_ITEMS / items)) if scattered else math.inf
    for name, bound in budget.items():
        value = measured.get(name, math.nan)
        distance, most = (value, bound) if is_error(name) else (1 - value, 1 - bound)
        room = max(most, 1 / items) if name in _COUNTED and most > 0 else most
        if drift.breaches(measured, {}) or not distance <= most_scatter * room + 1e-9:
            raise LoadError(
                f"the artifact of {rung} does not answer as its rung did: {name} is {value:.4g}, allowed is {bound:g}",
                field="target",
                hint="run headrace optimize again, without --resume",
            )
        widened = max(room, distance * (1 + _SLACK))
        found[name] = widened if is_error(name) else 1 - widened
    return found


class _Task(msgspec.Struct, frozen=True):
    """What this file's other half has to do.

    Args:
        directory: where it is done.
        numbers: of the golden items.
    """

    job: Job
    directory: str
    numbers: list[int]

    @property
    def threads(self) -> int:
        return self.job.threads


def _child(role: str, job: Job, directory: Path, numbers: Sequence[int] = ()) -> dict[str, Any]:
    """Run this file's other half, and what it said. Raises the error that it met."""
    folder = Path(job.work) / "processes" / "pack"
    task = _Task(job, str(directory), list(numbers))
    process = None
    try:
        process = Process(role, task, folder, cap_s=_CAP_S, most_bytes=usual_cap(), program="headrace.optimizing.pack")
        return process.ask()
    except Failed as failed:
        if failed.said is not None:
            raise from_fault(msgspec.convert(failed.said, Fault)) from None
        raise LoadError(f"packing failed: {failed.reason}", field="target") from None
    finally:
        if process is not None:
            process.end()


def main(argv: list[str]) -> int:
    """Exit status `SAID` for an error that is the last line of standard error, as a `Fault` in JSON."""
    end_with_parent()
    role, file = argv
    task = msgspec.json.decode(Path(file).read_bytes(), type=_Task)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        answer: dict[str, float] = {}
        if role == "begin":
            _stage(task.job, Path(task.directory), task.numbers)
        else:
            answer = self_test(Path(task.directory), task.job.device)
    except HeadraceError as error:
        print(msgspec.json.encode(to_fault(error)).decode(), file=sys.stderr)
        return SAID
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
    return 0


def _stage(job: Job, directory: Path, numbers: list[int]) -> None:
    import torch

    from headrace.optimizing.samples import read
    from headrace.runners.subject import open_subject

    torch.set_num_threads(job.threads)
    opened = open_subject(job.target, job.task, read(Path(job.samples), job.most_samples), job.instance)
    (directory / MODEL).mkdir()
    if opened.archive is not None:
        shutil.copy(opened.archive, directory / archived(opened.archive))
    elif opened.directory is not None:
        _save_text(opened.directory, opened.module.model, directory / MODEL)
    else:
        from safetensors.torch import save_model

        save_model(opened.module, str(directory / MODEL / WEIGHTS))
    items = [Items(Path(job.work)).all[number] for number in numbers]
    way = of_module(opened.module, [], job.device, opened.subject)
    outputs = [way.answer([item])[0] for item in items]
    write_golden(directory, items, outputs)


def _save_text(source: Path, model: Any, directory: Path) -> None:
    """A Hugging Face directory with all that is looked at: weights as they lie there, unless they are pickled."""
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        model.save_pretrained(directory)
    for file in [*weights, *source.glob("*.json"), *source.glob("*/config.json")]:
        target = directory / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        if not file.name.endswith(".bin.index.json"):  # of the pickled ones
            shutil.copy(file, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
