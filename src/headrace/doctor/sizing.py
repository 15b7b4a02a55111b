"""How many workers and threads a configuration makes of a machine, by the rules of those who start them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from headrace.config import Config, ModelOptions, device_groups
from headrace.doctor.machine import Machine


def models_of(config: Config) -> Sequence[ModelOptions]:
    """The models; without any, one with the options at the top level."""
    return list(config.models.values()) or [config]


def cores_of(machine: Machine) -> int:
    """Cores that are really to be had: a part of one counts as one."""
    return min(machine.cores, max(1, math.ceil(machine.cgroup.cores or machine.cores)))


def _groups(model: ModelOptions, machine: Machine) -> int:
    """Workers per replica: one for each GPU or group of GPUs."""
    groups = device_groups(model.devices)
    return max(1, gpus_of(machine) if groups is None else len(groups))


def workers_of(config: Config, machine: Machine) -> int:
    return sum(model.workers * _groups(model, machine) for model in models_of(config))


def threads_of(config: Config, machine: Machine) -> int:
    """Computing threads of all model workers, as headrace sets them."""
    share = max(1, machine.counted_cores // workers_of(config, machine))
    return sum(model.workers * _groups(model, machine) * (model.threads or share) for model in models_of(config))


def gpus_of(machine: Machine) -> int:
    """GPUs that workers can be bound to."""
    return len(machine.torch.gpus) or (len(machine.driver.cards) if machine.cuda_visible is None else 0)
