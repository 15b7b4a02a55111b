"""How a rung's answers are compared with the model's own: by the task's measures, or by a function of the user's.

What could not be compared whatever a rung answers is said before any rung is tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from headrace.artifact import Subject
from headrace.errors import ConfigError, Fault, HeadraceError, LoadError, from_fault
from headrace.optimizing import drift
from headrace.optimizing.own_drift import OwnDrift, write
from headrace.optimizing.process import Failed, Process
from headrace.runners.collate import Array

# Two processes that load the same model differ by the order of sums at most.
_SAME = 1e-2


class Comparison:
    """Bounds of drift, and what measures it.

    Args:
        bounds: by measure, on top of the preset's; with a function all that there are.
        function: ``module:function`` of the user's, or empty.
        work: directory for what the function reads.
        cap_s, most_bytes, threads: of the function's process.

    Raises:
        ConfigError: a bound is for a measure that there is not for the task, or a function has none.
    """

    def __init__(
        self,
        subject: Subject,
        preset: str,
        bounds: Mapping[str, float],
        function: str,
        work: Path,
        *,
        cap_s: float,
        most_bytes: int,
        threads: int,
    ) -> None:
        self._subject = subject
        self._kind = drift.compared_as(subject.task, subject.activation)
        self._function = function
        self._work = work
        self._caps = {"cap_s": cap_s, "most_bytes": most_bytes}
        self._threads = threads
        self._process: Process | None = None
        self._wanted: list[Array] = []
        if function and not bounds:
            raise ConfigError(
                f"nothing bounds what {function} gives", field="max_drift", hint="--max-drift MEASURE=NUMBER, the most"
            )
        self.budget = dict(bounds) if function else drift.budget(self._kind, preset, bounds)

    def begin(self, wanted: Sequence[Array], batched: Sequence[Array]) -> dict[str, float]:
        """Take the model's own answers, of items alone and in a batch, and say how far these are from one another.

        Raises:
            LoadError: the model's answers are no numbers, or their shapes depend on the batch.
            ConfigError: they are not what the task compares, or one of the bounds is for a measure that there is not.
        """
        try:
            return self._begin(list(wanted), batched)
        except HeadraceError:
            self.end()
            raise

    def _begin(self, wanted: list[Array], batched: Sequence[Array]) -> dict[str, float]:
        self._wanted = wanted
        found = drift.batch_drift(wanted, batched, self._subject.task)
        if broken := drift.breaches(found, {}):
            raise LoadError(f"the model cannot be optimised as it is: its {broken}", field="target")
        drift.check_shapes(self._kind, wanted)
        if self._function:
            found |= self._first_of_function()
        else:
            found |= drift.drift(self._subject.task, wanted, wanted, self._subject.activation)
        if missing := [name for name in self.budget if name not in found]:
            raise ConfigError(
                f"{missing[0]!r} cannot be had of this model's answers",
                field="max_drift",
                hint=", ".join(sorted(found)),
            )
        return {name: value for name, value in found.items() if name.startswith("batch_")}

    def check_same(self, found: Sequence[Array]) -> None:
        """Answers of another process that has loaded the model, to the first of the items.

        Raises:
            LoadError: they are other ones: a rung could not be told from chance.
        """
        for a, b in zip(self._wanted, found, strict=False):
            if a.shape != b.shape or float(np.abs(a - b).max()) > _SAME * max(float(np.abs(a).max()), 1e-12):
                raise LoadError(
                    "the model answers otherwise each time it is loaded",
                    field="target",
                    hint="let the factory load its weights, or seed them: torch.manual_seed(0); and leave chance out",
                )

    def measure(self, found: Sequence[Array], batched: Sequence[Array]) -> dict[str, float]:
        """Drift of a rung's answers. Raises `Failed` where the user's function does not measure it."""
        measured = drift.batch_drift(found, batched, self._subject.task)
        standard = drift.drift(self._subject.task, self._wanted, found, self._subject.activation)
        if not self._function:
            measured |= standard
        elif drift.breaches(standard | measured, {}):
            measured |= standard  # there is nothing that a function could compare
        else:
            measured |= self._by_function(found)
        return {name: value for name, value in measured.items() if math.isfinite(value)}

    def end(self) -> None:
        """End the function's process."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def _first_of_function(self) -> dict[str, float]:
        """What it says of the model beside itself. Raises `ConfigError`."""
        try:
            return self._by_function(self._wanted)
        except Failed as failed:
            if failed.said is not None:
                raise from_fault(msgspec.convert(failed.said, Fault)) from None
            raise ConfigError(failed.reason, field="drift", hint=_SIGNATURE) from None

    def _by_function(self, found: Sequence[Array]) -> dict[str, float]:
        try:
            if self._process is None:
                folder = self._work / "processes" / "drift"
                self._process = Process(
                    "drift",
                    OwnDrift(self._function, self._threads),
                    folder,
                    **self._caps,  # type: ignore[arg-type]  # each of its own type
                    program="headrace.optimizing.own_drift",
                )
                self._process.ask()
                write(self._work / "own-wanted.npz", self._wanted)
            here = write(self._work / "own-found.npz", list(found))
            answer = self._process.ask({"wanted": str(self._work / "own-wanted.npz"), "found": here})
        except Failed as failed:
            self.end()
            raise Failed("inaccurate", f"{self._function}: {failed.reason}", failed.said) from None
        if "error" in answer:
            raise Failed("inaccurate", f"{self._function}: {answer['error']}")
        return dict(answer["measures"])


_SIGNATURE = "function(wanted: list[np.ndarray], found: list[np.ndarray]) -> dict[str, float]"
