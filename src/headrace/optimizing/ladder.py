"""Climbs the ladder: every rung built, loaded, compared and timed in processes of its own, and the best one chosen.

The baseline is the model as it is, in float32 with plain attention. It runs all the while, so that each rung is timed
beside it (`measure.py`). Whatever becomes of a rung, it has a row that says so.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from headrace import stats
from headrace.clock import perf_counter, wall
from headrace.config import usable_cpus
from headrace.errors import ConfigError, Fault, LoadError, from_fault
from headrace.optimizing import measure, predicted, rungs
from headrace.optimizing.bounds import Operations
from headrace.optimizing.child import MACHINE, Items, Job
from headrace.optimizing.choice import choose, judge, outdone
from headrace.optimizing.comparison import Comparison
from headrace.optimizing.process import Failed, Process, usual_cap
from headrace.optimizing.samples import divide
from headrace.optimizing.words import Cell, Noise, Predicted, Report, Row
from headrace.runners.opened import Instance
from headrace.runners.parameters import Counted
from headrace.runners.way import GENERATE
from headrace.version import __version__

Objective = Literal["latency", "throughput", "memory"]

# An A/A control that is off by more says that the machine is too busy for wall time.
MOST_NOISE = 0.05
# Pairs of runs by batch size. Writing takes long: two sizes, and few texts at whose ends distributions are compared.
_ROUNDS = {1: 12, 8: 8, 32: 6}
_ROUNDS_OF_WRITING = {1: 6, 8: 5}
_CALLS_OF_WRITING = 2
_TEXTS_COMPARED = 16
# Items by which it is seen that the model is the same each time it is loaded.
_CONTROLLED = 4
_ROW_FILE = "rows.json"
_CAP_S = {"cpu": 120.0, "cuda": 600.0}


@dataclass(frozen=True)
class Wish:
    """What is asked of the ladder.

    Args:
        samples: file of samples, see `samples.read`.
        max_drift: bounds by measure, on top of the preset's.
        drift: ``module:function`` that measures drift instead of the task's measures, see `own_drift`; what it gives is
            the less the better, and bounded by ``max_drift`` alone.
        rungs: ids to try; the usual ones of this machine when empty.
        cap_s: of a build and of each measurement; 0 is 120 s on a CPU, 600 s on a GPU.
        instance: the target, where it is an object: then ``target`` names it.
        cap_bytes: memory of each process; 0 is four fifths of the machine's.
        effort: factor on the number of timed pairs.
    """

    target: str
    samples: Path
    task: str = "auto"
    preset: str = "balanced"
    max_drift: Mapping[str, float] = field(default_factory=dict)
    objective: Objective = "latency"
    rungs: Sequence[str] = ()
    device: str = "auto"
    threads: int = 0
    cap_s: float = 0.0
    cap_bytes: int = 0
    drift: str = ""
    instance: Instance | None = None
    most_samples: int = 500
    effort: float = 1.0


@dataclass(frozen=True)
class Result:
    """A climbed ladder: its report, and what an artifact can be packed from."""

    report: Report
    job: Job
    work: Path


def climb(
    wish: Wish,
    work: Path,
    *,
    resume: bool = False,
    tell: Callable[[Row], None] = lambda row: None,
    foresee: Callable[[Predicted], None] = lambda predicted: None,
) -> Result:
    """Try every rung.

    Args:
        work: directory for what is built; rows are kept there as they come.
        resume: keep the rows of an earlier climb with the same wish, but for those that ran out of time.
        tell: called with each row as it is done.
        foresee: called before the model is loaded, where the number of its weights is known by then.

    Raises:
        ConfigError, LoadError, InvalidInput, Unavailable: the target or the samples cannot be used; before any rung.
    """
    return _Climb(wish, work, resume, tell, foresee).run()


class _Climb:
    def __init__(
        self,
        wish: Wish,
        work: Path,
        resume: bool,
        tell: Callable[[Row], None],
        foresee: Callable[[Predicted], None],
    ) -> None:
        self.wish = wish
        self.work = work
        self.tell = tell
        self.foresee = foresee
        self.predicted: Predicted | None = None
        self.began = perf_counter()
        self.wanted = [rungs.find(each) for each in dict.fromkeys(wish.rungs)]
        work.mkdir(parents=True, exist_ok=True)
        device = _device(wish.device)
        threads = wish.threads or (usable_cpus() if device == "cpu" else min(4, usable_cpus()))
        self.cap_s = wish.cap_s or _CAP_S[device.partition(":")[0]]
        self.most_bytes = wish.cap_bytes or usual_cap()
        self.job = Job(str(work), wish.target, wish.task, device, threads, samples=str(wish.samples.resolve()))
        self.job = msgspec.structs.replace(self.job, most_samples=wish.most_samples, instance=wish.instance)
        self.rows: dict[str, Row] = {}
        self.seen: dict[tuple[int, str], list[measure.Call]] = {}
        self.step_bytes = 0
        self.operations = Operations()
        self._key = _digest(wish, self.job)
        if resume:
            self._read_rows()

    def run(self) -> Result:
        self._prepare()
        items = Items(self.work)
        self.subject = items.subject
        self.comparison = Comparison(
            items.subject,
            self.wish.preset,
            self.wish.max_drift,
            self.wish.drift,
            self.work,
            cap_s=self.cap_s,
            most_bytes=self.most_bytes,
            threads=self.job.threads,
        )
        self.budget = self.comparison.budget
        self.calibration, self.evaluation = divide(len(items.all))
        self.job = msgspec.structs.replace(self.job, calibration=self.calibration)
        self.machine = msgspec.json.decode((self.work / MACHINE).read_bytes(), type=rungs.Machine)
        if not self.wanted:
            self.wanted = [rungs.find(each) for each in rungs.usual(self.machine.device, self.subject.task)]
        writing = items.subject.task == GENERATE
        rounds = _ROUNDS_OF_WRITING if writing else _ROUNDS
        rounds = {batch: max(4, round(pairs * self.wish.effort)) for batch, pairs in rounds.items()}
        self.largest = max(rounds)
        self.lengths = {index: items.lengths[index] for index in self.evaluation}
        self.first_length = items.lengths[0]  # of the item that every process answers first
        if writing:
            self.cells = measure.cells(self.lengths, rounds, thirds_of=(1,), most_calls=_CALLS_OF_WRITING)
        else:
            self.cells = measure.cells(self.lengths, rounds, thirds_of=(1, self.largest))
        self.compared = self.evaluation[:_TEXTS_COMPARED] if writing else self.evaluation
        baseline = self._start("run", self.job)
        try:
            row = self._baseline(baseline)
            self._keep(row)
            noise = self._noise(baseline)
            self._time_baseline()
            for rung in self.wanted:
                if rung.id != rungs.BASELINE and not self._is_done(rung.id):
                    self._keep(self._try(rung, baseline, noise))
            for row in outdone(list(self.rows.values()), self.wish.objective, noise):
                self._keep(row)
            self._time_baseline()
        except Failed as failed:
            raise LoadError(
                f"the model as it is did not run to the end: {failed.reason}",
                field="target",
                hint="--resume goes on from what was found until then",
            ) from None
        finally:
            baseline.end()
            self.comparison.end()
        return Result(self._report(items, noise), self.job, self.work)

    def _prepare(self) -> None:
        process = self._start("prepare", self.job)
        try:
            self._predict(process.ask())
            process.finish()
        except Failed as failed:
            if failed.said is not None:
                raise from_fault(msgspec.convert(failed.said, Fault)) from None
            raise LoadError(f"the target cannot be read: {failed.reason}", field="target") from None
        finally:
            process.end()

    def _predict(self, told: dict[str, Any]) -> None:
        """Say what the weights will take, before they are loaded. Raises `LoadError` where that cannot be had."""
        if told["counted"] is None:
            return
        counted = msgspec.convert(told["counted"], Counted)
        usual = [rungs.find(each) for each in rungs.usual(self.job.device, counted.task)]
        self.predicted = predicted.predict(
            counted, self.wanted or usual, self.job.device, told["memory_bytes"], self.most_bytes
        )
        self.foresee(self.predicted)
        predicted.check(self.predicted)

    def _start(self, role: str, job: Job) -> Process:
        folder = self.work / "processes" / (job.rung if role != "prepare" else role)
        return Process(role, job, folder, cap_s=self.cap_s, most_bytes=self.most_bytes)

    def _baseline(self, process: Process) -> Row:
        try:
            loaded = process.ask()
            new_shape_ms = measure.new_shape_ms(process, self.lengths, self.first_length)
            wanted = self._outputs(process, 1)
            batched = self._outputs(process, self.largest)
        except Failed as failed:
            raise LoadError(f"the model cannot be run as it is: {failed.reason}", field="target") from None
        self.step_bytes = loaded["step_bytes"]
        peak = process.ask({"do": "peak"})["peak_bytes"]
        if self.machine.operations_per_s:
            self.operations = msgspec.convert(process.ask({"do": "operations"}), Operations)
        return Row(
            rung=rungs.BASELINE,
            status="baseline",
            speedup=1.0,
            speedup_ci=(1.0, 1.0),
            drift=self.comparison.begin(wanted, batched),
            size_bytes=loaded["size_bytes"],
            load_s=round(loaded["load_s"], 3),
            build_s=0.0,
            first_s=round(loaded["first_s"], 3),
            new_shape_ms=new_shape_ms,
            peak_bytes=peak,
            batch=self._objective_cell().batch,
            length=self._objective_cell().length,
        )

    def _noise(self, baseline: Process) -> Noise:
        """The baseline beside itself: what is found then is the machine's. And its own times, of every cell."""
        twin = self._start("run", self.job)
        try:
            twin.ask()
            self.comparison.check_same(self._outputs(twin, 1, _CONTROLLED))
            timed = self._main([self._compare(baseline, twin, cell, 0) for cell in self.cells])
        finally:
            twin.end()
        return Noise(timed.ratio, timed.interval, timed.cpu_ratio, abs(timed.ratio - 1) > MOST_NOISE)

    def _compare(self, baseline: Process, candidate: Process, cell: measure.Cell, step_bytes: int) -> Cell:
        return measure.compare(
            baseline,
            candidate,
            cell,
            self.seen.setdefault((cell.batch, cell.lengths), []),
            self._bound(cell, step_bytes),
        )

    def _bound(self, cell: measure.Cell, step_bytes: int) -> measure.Bound:
        needed = [sum(self.operations.of(self.lengths[number]) for number in batch) for batch in cell.batches]
        return measure.Bound(
            steps_per_s=self.machine.bandwidth / step_bytes if step_bytes else 0.0,
            calls_per_s=self.machine.operations_per_s * len(needed) / sum(needed) if sum(needed) else 0.0,
        )

    def _time_baseline(self) -> None:
        """Give the baseline's row the times that it had beside all the others."""
        row = self.rows[rungs.BASELINE]
        cells = [
            measure.alone(cell, self.seen[cell.batch, cell.lengths], self._bound(cell, self.step_bytes))
            for cell in self.cells
        ]
        main = self._main(cells)
        self.rows[rungs.BASELINE] = msgspec.structs.replace(
            row,
            cells=cells,
            latency_ms={"p50": main.p50_ms, "p95": main.p95_ms},
            throughput=main.throughput,
        )

    def _try(self, rung: rungs.Rung, baseline: Process, noise: Noise) -> Row:
        reason = rung.missing(self.machine)
        if reason:
            return Row(rung=rung.id, status="unavailable", reason=reason)
        # What is asked for by name is measured however slow it looks; so is what may take less memory.
        gated = not self.wish.rungs and self.wish.objective != "memory"
        job = msgspec.structs.replace(self.job, rung=rung.id, layer_first=gated)
        built = perf_counter()
        try:
            if rung.engine != "torch":
                self._start("build", job).finish()
            build_s = perf_counter() - built
            process = self._start("run", job)
        except Failed as failed:
            return Row(
                rung=rung.id, status=failed.status, reason=failed.reason, build_s=round(perf_counter() - built, 2)
            )
        try:
            return self._measure(rung, process, baseline, noise, build_s)
        except Failed as failed:
            if baseline.ended:  # it is not the rung that failed
                raise
            reason = failed.reason + (rungs.after_crash(rung) if failed.status == "crashed" else "")
            return Row(rung=rung.id, status=failed.status, reason=reason, build_s=round(build_s, 2))
        finally:
            process.end()

    def _measure(self, rung: rungs.Rung, process: Process, baseline: Process, noise: Noise, build_s: float) -> Row:
        loaded = process.ask()
        new_shape_ms = measure.new_shape_ms(process, self.lengths, self.first_length)
        found = self._outputs(process, 1)
        batched = self._outputs(process, self.largest)
        measured = self.comparison.measure(found, batched)
        cells = [self._compare(baseline, process, cell, loaded["step_bytes"]) for cell in self.cells]
        peak = process.ask({"do": "peak"})["peak_bytes"]
        row = self._row(rung.id, "ok", cells, loaded, peak)
        row = msgspec.structs.replace(row, drift=measured, build_s=round(build_s, 2), new_shape_ms=new_shape_ms)
        status, reason = judge(row, self.budget, self.wish.objective, self.rows, noise)
        return msgspec.structs.replace(row, status=status, reason=reason)

    def _row(self, rung: str, status: str, cells: list[Cell], loaded: dict[str, Any], peak: int) -> Row:
        main = self._main(cells)
        return Row(
            rung=rung,
            status=status,
            speedup=main.ratio,
            speedup_ci=main.interval,
            latency_ms={"p50": main.p50_ms, "p95": main.p95_ms},
            throughput=main.throughput,
            size_bytes=loaded["size_bytes"],
            load_s=round(loaded["load_s"], 3),
            first_s=round(loaded["first_s"], 3),
            peak_bytes=peak,
            batch=main.batch,
            length=main.length,
            cells=cells,
        )

    def _objective_cell(self) -> measure.Cell:
        batch = 1 if self.wish.objective == "latency" else self.largest
        return next(cell for cell in self.cells if cell.batch == batch and cell.lengths == "all")

    def _main(self, timed: Sequence[Cell]) -> Cell:
        """What was timed of the objective's cell."""
        return timed[self.cells.index(self._objective_cell())]

    def _outputs(self, process: Process, batch: int, most: int | None = None) -> list[Any]:
        numbers = self.compared[:most]
        batches = [numbers[at : at + batch] for at in range(0, len(numbers), batch)]
        file = str(self.work / "outputs.npz")
        process.ask({"do": "outputs", "batches": batches, "file": file})
        with np.load(file) as found:
            return [found[str(number)] for number in numbers]

    def _report(self, items: Items, noise: Noise) -> Report:
        lengths = sorted(items.lengths[index] for index in self.evaluation)
        rows = list(self.rows.values())
        return Report(
            baseline=rungs.BASELINE,
            rows=rows,
            chosen=choose(rows, self.wish.objective, noise),
            preset=self.wish.preset,
            objective=self.wish.objective,
            task=self.subject.task,
            target=self.wish.target,
            budget=self.budget,
            environment=msgspec.to_builtins(self.machine) | {"date": _today(), "cap_s": self.cap_s},
            noise=noise,
            samples={
                "count": len(items.all),
                "evaluation": len(self.evaluation),
                "calibration": len(self.calibration),
                **{f"length_p{share}": stats.percentile(lengths, share / 100) for share in (10, 50, 90)},
            },
            seconds=round(perf_counter() - self.began, 1),
            headrace=__version__,
            compared_by=self.wish.drift,
            predicted=self.predicted,
        )

    def _is_done(self, ident: str) -> bool:
        return ident in self.rows and self.rows[ident].status not in ("timeout", "noisy", "unavailable")

    def _keep(self, row: Row) -> None:
        self.rows[row.rung] = row
        self.tell(row)
        content = msgspec.json.encode({"key": self._key, "rows": list(self.rows.values())})
        new = self.work / f"{_ROW_FILE}.new"
        new.write_bytes(content)
        new.replace(self.work / _ROW_FILE)  # whoever is interrupted leaves whole rows

    def _read_rows(self) -> None:
        try:
            kept = msgspec.json.decode((self.work / _ROW_FILE).read_bytes(), type=_Kept)
        except OSError:
            return
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"{self.work / _ROW_FILE} cannot be read: {error}",
                field="resume",
                hint="leave --resume out to begin anew",
            ) from None
        if kept.key != self._key:
            raise ConfigError(
                f"{self.work} has the rows of another target, other samples or another machine",
                field="resume",
                hint="leave --resume out to begin anew",
            )
        self.rows = {row.rung: row for row in kept.rows}


class _Kept(msgspec.Struct):
    key: str
    rows: list[Row]


def default_work(out: Path) -> Path:
    """Where a ladder keeps what it builds: beside the artifact."""
    return out.parent / f".{out.name}.work"


def _device(wanted: str) -> str:
    if wanted != "auto":
        return "cuda:0" if wanted == "cuda" else wanted
    return "cuda:0" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _digest(wish: Wish, job: Job) -> str:
    """What must be the same for rows to stand side by side."""
    try:
        samples = wish.samples.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {wish.samples}: {error.strerror}", field="samples") from None
    parts = [wish.target, wish.task, wish.preset, sorted(wish.max_drift.items()), wish.objective, wish.most_samples]
    parts += [wish.drift] * bool(wish.drift)
    if wish.instance is not None:
        with open(wish.instance.file, "rb") as file:
            parts.append(hashlib.file_digest(file, "sha256").hexdigest())
    here = [platform.node(), platform.machine(), job.device, job.threads]
    return hashlib.sha256(samples + repr([parts, here]).encode()).hexdigest()


def _today() -> str:
    return datetime.datetime.fromtimestamp(wall(), datetime.UTC).date().isoformat()
