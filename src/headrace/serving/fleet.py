"""The model workers of a server: how many of each model, on which devices, and how they are replaced.

A reload is rolling: a new worker is started and warmed up beside the old one, front ends find it, then the old one
takes nothing new, answers what it has, and ends. A model that cannot be loaded changes nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headrace import metrics
from headrace.clock import monotonic
from headrace.config import Config, ModelConfig, device_groups, usable_cpus
from headrace.errors import InvalidInput, LoadError, ModelNotFound
from headrace.rundir import RunDir
from headrace.serving.names import worker_slot
from headrace.supervisor import Spec, Supervisor

_log = logging.getLogger(__name__)

# Front ends look for new sockets ten times a second; an old worker stays until they have found its successor.
_HANDOVER_S = 0.3
# A model is broken, not unlucky, when each of its workers has ended so often without living for half a minute.
CIRCUIT_FAILURES = 3
_MOST_WORKERS = 256


@dataclass(eq=False)
class _Member:
    """A worker process slot that is in use."""

    slot: str
    index: int
    model: str
    group: list[int]
    stopping: bool = False


class Fleet:
    """Starts, counts, replaces and stops the workers of all models.

    Args:
        config: says how many of each model there are; `reload` brings a new one.
        supervisor: keeps the processes running.
        row: where their number is counted.
    """

    def __init__(self, config: Config, run_dir: RunDir, supervisor: Supervisor, row: metrics.Row) -> None:
        self._config = config
        self._run_dir = run_dir
        self._supervisor = supervisor
        self._row = row
        self._members: list[_Member] = []
        self._past_restarts: dict[str, int] = {}
        self._numbers = itertools.count()
        self._changing = asyncio.Lock()

    @property
    def slots(self) -> list[str]:
        return [member.slot for member in self._members]

    def start(self) -> None:
        """Start every worker of the configuration."""
        for model in self._config.models.values():
            groups = visible_groups(model)
            for number in range(model.workers * len(groups)):
                self._start(model, groups[number % len(groups)])

    async def scale(self, name: str, workers: int) -> None:
        """Change how many workers a model has; returns when they are ready, or gone.

        Raises:
            ModelNotFound, InvalidInput: there is no such model, or the number is out of bounds.
            LoadError: a new worker did not become ready; as many as before are left.
        """
        async with self._changing:
            model = self._config.models.get(name)
            if model is None:
                raise ModelNotFound(f"there is no model {name!r}", field="model")
            if not 1 <= workers <= _MOST_WORKERS:
                raise InvalidInput(f"must be from 1 to {_MOST_WORKERS}", field="workers")
            members = self._of(name)
            if len(members) > workers:
                await self._stop(members[workers:])
            else:
                await self._grow(model, workers - len(members))
            _log.info("%s has %d workers now", name, workers)

    async def reload(self, config: Config) -> dict[str, Any]:
        """Replace every worker by one of the new configuration, one at a time, without dropping a request.

        Returns:
            For each model the number of its workers and the seconds it took.

        Raises:
            LoadError: a new worker did not become ready; the models that come before it have been replaced.
        """
        async with self._changing:
            report: dict[str, Any] = {}
            before = self._config
            self._set_config(config)
            try:
                for model in config.models.values():
                    started = monotonic()
                    await self._roll(model)
                    report[model.name] = {
                        "workers": len(self._of(model.name)),
                        "seconds": round(monotonic() - started, 3),
                    }
            except LoadError:
                # What was replaced stays; what was not goes on with the options it was started with.
                kept = {name: before.models[name] for name in before.models if name not in report and self._of(name)}
                done = {name: config.models[name] for name in report}
                order = [*config.models, *before.models]
                models = {name: (done | kept)[name] for name in order if name in done or name in kept}
                self._set_config(msgspec.structs.replace(config, models=models))
                raise
            await self._stop([member for member in self._members if member.model not in config.models])
            return report

    def count(self) -> None:
        """Bring the figures on workers, and the circuits, up to date."""
        for name in {*self._config.models, *self._past_restarts}:
            states = dict.fromkeys(metrics.WORKER_STATES, 0)
            members = self._of(name, stopping=True)
            for member in members:
                states[self._state(member)] += 1
            for state, count in states.items():
                self._row.gauge(metrics.WORKERS, model=name, state=state).set(count)
            restarts = sum(self._supervisor.restarts(member.slot) for member in members)
            total = restarts + self._past_restarts.get(name, 0)
            self._row.counter(metrics.WORKER_RESTARTS, model=name).advance_to(total)
            self._run_dir.set_circuit(name, bool(members) and all(map(self._is_broken, members)))

    def describe(self) -> list[dict[str, Any]]:
        """Every worker as the admin port shows it."""
        return [
            {
                "slot": member.slot,
                "model": member.model,
                "state": self._state(member),
                "pid": self._supervisor.pid(member.slot),
                "restarts": self._supervisor.restarts(member.slot),
                "devices": member.group,
            }
            for member in self._members
        ]

    def _set_config(self, config: Config) -> None:
        self._config = config
        self._run_dir.write_config(config)

    def _of(self, name: str, *, stopping: bool = False) -> list[_Member]:
        return [member for member in self._members if member.model == name and (stopping or not member.stopping)]

    def _state(self, member: _Member) -> str:
        if member.stopping:
            return "stopping"
        if self._supervisor.is_ready(member.slot):
            return "ready"
        return "restarting" if self._supervisor.restarts(member.slot) else "starting"

    def _is_broken(self, member: _Member) -> bool:
        return self._supervisor.failures(member.slot) >= CIRCUIT_FAILURES and not self._supervisor.is_ready(member.slot)

    async def _roll(self, model: ModelConfig) -> None:
        old = self._of(model.name)
        groups = visible_groups(model)
        wanted = model.workers * len(groups)
        for number, member in enumerate(old):
            if number < wanted:
                await self._add(model, groups[number % len(groups)])
                await asyncio.sleep(_HANDOVER_S)
            await self._stop([member])
        await self._grow(model, wanted - len(old))

    async def _grow(self, model: ModelConfig, count: int) -> None:
        for _ in range(count):
            groups = visible_groups(model)
            taken = [member.group for member in self._of(model.name)]
            await self._add(model, min(groups, key=taken.count))

    async def _add(self, model: ModelConfig, group: list[int]) -> None:
        member = self._start(model, group)
        if not await self._supervisor.wait_ready(member.slot):
            await self._stop([member])
            raise LoadError(f"a new worker of {model.name} did not start", hint="the server's log says why")

    def _start(self, model: ModelConfig, group: list[int]) -> _Member:
        taken = {member.index for member in self._of(model.name, stopping=True)}
        index = next(number for number in itertools.count() if number not in taken)
        member = _Member(worker_slot(model.name, index), index, model.name, group)
        self._members.append(member)
        self._supervisor.start(self._spec(member, model))
        self.count()
        return member

    async def _stop(self, members: list[_Member]) -> None:
        for member in members:
            member.stopping = True
        self.count()
        past = {member.slot: self._supervisor.restarts(member.slot) for member in members}
        await self._supervisor.stop([member.slot for member in members], self._config.shutdown_grace_s)
        for member in members:
            self._members.remove(member)
            self._past_restarts[member.model] = self._past_restarts.get(member.model, 0) + past[member.slot]
        self.count()

    def _spec(self, member: _Member, model: ModelConfig) -> Spec:
        path = self._run_dir.socket(number := next(self._numbers))
        file = self._run_dir.metrics_file(member.slot)

        def on_end() -> None:
            path.unlink(missing_ok=True)
            metrics.Row(file).close()  # which sets what was true of the process only to 0

        return Spec(
            slot=member.slot,
            argv=(sys.executable, "-P", "-m", "headrace.serving.worker_process", str(number)),
            env=self._environment(member, model),
            start_timeout_s=model.load_timeout_s,
            step_timeout_s=model.step_timeout_s,
            on_end=on_end,
        )

    def _environment(self, member: _Member, model: ModelConfig) -> dict[str, str]:
        workers = sum(each.workers * len(visible_groups(each)) for each in self._config.models.values())
        threads = str(model.threads or max(1, usable_cpus() // workers))
        # A tokenizer's own thread pool would compete with the model for the cores.
        values = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if member.group:
            values["CUDA_VISIBLE_DEVICES"] = visible_devices(member.group)
        return values


def visible_groups(model: ModelConfig) -> list[list[int]]:
    """GPU numbers for each worker of a round; one empty group where workers are not bound to GPUs."""
    groups = device_groups(model.devices)
    if groups is None:
        groups = [[number] for number in range(_gpu_count())]
    return groups or [[]]


def visible_devices(group: Iterable[int]) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a worker; numbers count within this process's own value of it."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = own.split(",") if own else None
    return ",".join(names[number] if names and number < len(names) else str(number) for number in group)


def _gpu_count() -> int:
    """GPUs that workers will see. Without torch, which a supervisor does not import."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES")
    if own is not None:
        return len([name for name in own.split(",") if name.strip()])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
