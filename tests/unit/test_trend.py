"""Judging a series by its numbers alone: made-up series whose right answer is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.profiling.leaking.trend import Trend, drifts, levelled_at, mann_kendall, teeth, theil_sen, thin, trend


def judge(make: Callable[[int], float], count: int = 100, *, floor: float = 0.0, least: float = 0.0) -> Trend:
    return trend(range(count), [make(index) for index in range(count)], floor=floor, least=least)


def noise(seed: int, size: float) -> Callable[[int], float]:
    draw = random.Random(seed)
    return lambda index: draw.gauss(0, size)


def test_a_line_grows_by_its_slope_and_nothing_else_is_possible() -> None:
    found = judge(lambda index: 1000 + 48 * index)
    assert found.shape == "growing"
    assert (found.slope, found.interval) == (48, (48, 48))


def test_what_stays_is_flat() -> None:
    assert judge(lambda index: 7).shape == "flat"


def test_a_staircase_of_every_fifth_call_grows() -> None:
    found = judge(lambda index: 1000 * (index // 5), 40)
    assert found.shape == "growing"
    assert found.slope == pytest.approx(200, rel=0.1)


def test_a_list_that_takes_room_in_advance_grows() -> None:
    kept: list[int] = []
    sizes = []
    for index in range(100):
        kept.append(index)
        sizes.append(float(kept.__sizeof__() + 32 * index))
    assert trend(range(100), sizes).shape == "growing"


def test_a_cache_that_is_full_levels_off() -> None:
    assert judge(lambda index: 500 * min(index, 40)).shape == "level"


def test_a_cache_that_meets_new_keys_less_and_less_does_not_grow() -> None:
    assert judge(lambda index: 10_000 * (1 - math.exp(-index / 30))).shape in ("slowing", "level", "unsure")


def test_one_step_late_in_the_run_is_no_growth() -> None:
    assert judge(lambda index: 5000.0 * (index > 80)).shape != "growing"


def test_a_leak_that_speeds_up_grows() -> None:
    assert judge(lambda index: index * index).shape == "growing"


def test_growth_below_the_floor_or_too_little_in_all_does_not_count() -> None:
    assert judge(lambda index: 0.5 * index, floor=2).shape != "growing"
    assert judge(lambda index: 0.5 * index, least=100).shape == "flat"


def test_ten_values_are_needed() -> None:
    assert judge(lambda index: index, 9).shape == "short"


@pytest.mark.parametrize("period", [10, 25, 40])
def test_a_saw_tooth_is_no_growth(period: int) -> None:
    assert not judge(lambda index: 100 * (index % period)).rises


def test_a_saw_tooth_on_a_slope_grows_by_that_slope() -> None:
    found = judge(lambda index: 100 * (index % 10) + 20 * index)
    assert found.shape == "growing"
    assert found.slope == pytest.approx(20, rel=0.1)


def test_noise_that_falls_as_often_as_it_jumps_is_no_saw_tooth() -> None:
    draw = random.Random(1)
    assert teeth([draw.choice([0.0, 100.0]) for _ in range(100)]) == []
    assert teeth([float(index % 20) for index in range(60)]) == [20, 40]


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_under_noise_is_found(seed: int) -> None:
    wave = noise(seed, 300)
    assert judge(lambda index: 100 * index + wave(index)).rises


def test_noise_alone_hardly_ever_grows() -> None:
    waves = [noise(seed, 100) for seed in range(200)]
    assert sum(judge(wave, 40).shape == "growing" for wave in waves) <= 2


def test_a_random_walk_seldom_passes_for_growth() -> None:
    walks = []
    for seed in range(200):
        draw = random.Random(seed)
        walks.append(list(accumulate(draw.gauss(0, 1) for _ in range(100))))
    by_ranks = sum(mann_kendall(walk) < 0.005 for walk in walks)
    found = sum(trend(range(100), walk).shape == "growing" for walk in walks)
    assert by_ranks > 60, "the ranks alone are fooled"
    assert found <= 8


def test_even_steps_drift_and_uneven_ones_do_not() -> None:
    assert drifts([float(index) for index in range(40)])
    assert not drifts([0.0] * 39 + [100.0])
    assert not drifts([float(-index) for index in range(40)])


def test_a_third_of_outliers_does_not_move_the_slope() -> None:
    found = theil_sen(range(90), [10.0 * index + (5000 if index % 4 == 0 else 0) for index in range(90)])
    assert found[0] == pytest.approx(10, rel=0.05)


def test_the_interval_holds_the_slope_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        wave = noise(seed, 20)
        _, low, high = theil_sen(range(40), [3 * index + wave(index) for index in range(40)])
        held += low <= 3 <= high
    assert held >= 180


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1000), min_size=10, max_size=60), st.integers(-50, 50), st.integers(-1000, 1000))
def test_a_line_that_is_added_adds_its_slope(values: list[int], slope: int, start: int) -> None:
    xs = range(len(values))
    plain = theil_sen(xs, values)[0]
    tilted = theil_sen(xs, [start + slope * x + y for x, y in zip(xs, values, strict=True)])[0]
    assert tilted == pytest.approx(plain + slope, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=60))
def test_the_slope_lies_in_its_interval_and_a_rise_read_backwards_is_a_fall(values: list[int]) -> None:
    xs = range(len(values))
    slope, low, high = theil_sen(xs, values)
    assert low <= slope <= high
    assert theil_sen(xs, values[::-1])[0] == pytest.approx(-slope, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e9), min_size=10, max_size=300), st.floats(0, 1e6))
def test_any_series_gets_a_judgement_and_a_falling_one_never_grows(values: list[float], least: float) -> None:
    xs = range(len(values))
    trend(xs, values, floor=1, least=least)
    assert trend(xs, sorted(values, reverse=True)).shape in ("flat", "saw")


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(10, 120))
def test_thinning_keeps_order_and_bound(count: int, most: int) -> None:
    xs, ys = thin(range(count), [2 * x for x in range(count)], most)
    assert len(xs) == len(ys) <= most
    assert xs == sorted(xs)
    assert ys == [2 * x for x in xs]


def test_ties_weaken_a_rise() -> None:
    assert mann_kendall([1, 1, 1, 1, 1]) == 1
    assert mann_kendall([1, 2, 3, 4, 5]) < mann_kendall([1, 1, 1, 2, 2])


def test_where_a_series_levels_off() -> None:
    assert levelled_at([float(min(index, 30)) for index in range(100)], 10) == 30
    assert levelled_at([5.0] * 100, 1) is None, "it never rose"
    assert levelled_at([0.0, 5.0, 5.0], 1) is None, "too few"
