from __future__ import annotations

from typing import Any

import pytest

from headrace import calibration
from headrace.calibration import calibrate, meet_shapes


class Device:
    """A device whose time is computed, not spent: the clock of the module under test reads it.

    Args:
        first_s: what the first batch of a shape takes longer.
    """

    def __init__(self, fixed_s: float, per_token_s: float, first_s: float = 0.0) -> None:
        self.now, self.fixed_s, self.per_token_s, self.first_s = 0.0, fixed_s, per_token_s, first_s
        self.batches: list[tuple[int, int]] = []

    def run(self, inputs: list[Any]) -> list[Any]:
        shape = len(inputs), max(map(len, inputs))
        self.now += self.first_s * (shape not in self.batches)
        self.now += self.fixed_s + self.per_token_s * shape[0] * shape[1]
        self.batches.append(shape)
        return inputs


def measure(device: Device, monkeypatch: pytest.MonkeyPatch, size: int = 32) -> calibration.Calibration:
    monkeypatch.setattr(calibration, "perf_counter", lambda: device.now)
    return calibrate(device.run, lambda length: [0] * length, len, max_batch_size=size, max_batch_tokens=1000)


def test_the_overhead_of_a_batch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(Device(fixed_s=0.007, per_token_s=0.0001), monkeypatch)
    assert found.overhead_tokens == pytest.approx(70, rel=0.01)


def test_a_device_without_overhead_wants_small_batches_and_one_with_much_large_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert measure(Device(1e-6, 1e-4), monkeypatch).batch_size == 1
    assert measure(Device(5e-3, 1e-6), monkeypatch).batch_size == 32


def test_the_token_budget_holds_during_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(1e-3, 1e-6)
    measure(device, monkeypatch)
    assert all(size == 1 or size * longest <= 1000 for size, longest in device.batches)


def test_a_slow_model_is_not_measured_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(2.0, 1e-3)
    found = measure(device, monkeypatch)
    assert device.now < 20
    assert found.batch_size == 32, "what was not measured stays open"


def test_what_is_done_once_for_a_shape_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(Device(fixed_s=0.0006, per_token_s=1e-6, first_s=0.3), monkeypatch)
    assert found.batch_size == 32
    assert found.overhead_tokens == pytest.approx(600, rel=0.01)


def test_shapes_that_take_minutes_to_compile_are_not_all_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(fixed_s=0.0006, per_token_s=1e-6, first_s=25.0)
    found = measure(device, monkeypatch)
    assert device.now < 25 * 7
    assert found.batch_size == 32, "what was not measured stays open"


def test_each_shape_is_met_once_the_largest_first_and_the_token_budget_holds() -> None:
    device = Device(0, 0)
    met = meet_shapes(device.run, lambda length: [0] * length, (16, 64), batch_size=6, max_batch_tokens=200)
    assert met == (6, 6)
    assert device.batches == [(2, 64), (1, 16), (1, 64), (2, 16), (4, 16), (6, 16)]


def test_shapes_are_met_for_half_a_minute_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0, 0, first_s=12.0)
    monkeypatch.setattr(calibration, "perf_counter", lambda: device.now)
    met = meet_shapes(device.run, lambda length: [0] * length, (16, 32, 64), batch_size=8, max_batch_tokens=1000)
    assert met == (3, 12)
    assert device.now == 36


def test_a_shape_that_does_not_fit_is_left_out() -> None:
    def run(inputs: list[Any]) -> list[Any]:
        if len(inputs) > 2:
            raise MemoryError
        return inputs

    assert meet_shapes(run, lambda length: [0], (16,), batch_size=8, max_batch_tokens=1000) == (2, 4)


def test_a_model_that_fails_its_warm_up_is_not_served() -> None:
    def run(inputs: list[Any]) -> list[Any]:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        calibrate(run, lambda length: [0], len, max_batch_size=4, max_batch_tokens=100)
