"""What a worker process is told: its devices and its threads. The processes themselves are in `tests/processes`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from headrace import config, metrics
from headrace.config import Config, ModelConfig
from headrace.errors import ConfigError, LoadError, Unavailable
from headrace.rundir import RunDir
from headrace.runners import open_target
from headrace.runners.devices import pick_device
from headrace.serving import fleet
from headrace.supervisor import Spec


class Recorder:
    """A supervisor that only writes down what it was asked to start."""

    def __init__(self) -> None:
        self.specs: list[Spec] = []

    def start(self, spec: Spec) -> None:
        self.specs.append(spec)

    def is_ready(self, slot: str) -> bool:
        return False

    def restarts(self, slot: str) -> int:
        return 0

    def failures(self, slot: str) -> int:
        return 0


def started(**options: Any) -> list[Spec]:
    async def main() -> list[Spec]:
        settings = Config(models={"m": ModelConfig(name="m", target="t:t", **options)})
        run_dir = RunDir.create(settings)
        try:
            recorder = Recorder()
            fleet.Fleet(settings, run_dir, recorder, metrics.Row()).start()  # type: ignore[arg-type]
            return recorder.specs
        finally:
            run_dir.remove()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("devices", "workers", "bound"),
    [
        ("", 2, [None, None]),
        ("0,1", 1, ["0", "1"]),
        ([0, 1], 2, ["0", "1", "0", "1"]),
        ("0+1,2+3", 1, ["0,1", "2,3"]),
        ([[0, 1], [2, 3]], 1, ["0,1", "2,3"]),
        ("all", 1, ["0", "1", "2"]),
    ],
)
def test_workers_are_bound_to_their_gpus(
    monkeypatch: pytest.MonkeyPatch, devices: Any, workers: int, bound: list[str | None]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(fleet, "_gpu_count", lambda: 3)
    specs = started(devices=devices, workers=workers)
    assert [spec.env.get("CUDA_VISIBLE_DEVICES") for spec in specs] == bound
    assert len({spec.slot for spec in specs}) == len(specs)


def test_numbers_count_within_what_this_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [spec.env["CUDA_VISIBLE_DEVICES"] for spec in started(devices="all")] == ["4", "7"]
    assert fleet.visible_devices([1]) == "7"


def test_cores_are_divided_among_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "usable_cpus", lambda: 8)
    assert {spec.env["OMP_NUM_THREADS"] for spec in started(workers=4)} == {"2"}
    assert {spec.env["OMP_NUM_THREADS"] for spec in started(workers=4, threads=3)} == {"3"}


@pytest.mark.parametrize("devices", ["first", "0,,1", "0+", "0;1"])
def test_devices_that_are_none_are_refused(devices: str) -> None:
    with pytest.raises(ConfigError, match="devices"):
        config.load({"devices": devices}, targets={"m": "t:t"}, environment={})


def test_only_a_class_of_the_users_spans_gpus() -> None:
    assert pick_device("auto", 0, bound_to=2) == "cuda"
    with pytest.raises(LoadError, match="span several GPUs"):
        open_target(ModelConfig(name="m", target="org/model"), "cuda")


def test_a_gpu_that_is_not_there_is_named() -> None:
    pytest.importorskip("torch")
    with pytest.raises(Unavailable, match="cuda"):
        pick_device("cuda:63", 0)
