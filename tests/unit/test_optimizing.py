"""What the ladder decides, without building anything: drift, noise, choice, samples, groups of a batch."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import cgroups
from headrace.cgroups import Limits
from headrace.errors import ConfigError
from headrace.optimizing import bounds, drift, measure, process, rungs, summary
from headrace.optimizing.choice import choose, judge, outdone, simplicity
from headrace.optimizing.ladder import Wish, climb
from headrace.optimizing.samples import divide, read
from headrace.optimizing.words import Cell, Noise, Row
from headrace.runners.collate import near_lengths

QUIET = Noise(1.0, (0.99, 1.01), 1.0, noisy=False)
CPU = rungs.Machine("cpu", 2, ["avx2"], {"onnxruntime": "1.32", "onnx": "1.23", "onnxscript": "0.7"})


def cell(ratio: float, low: float, high: float, cpu_ratio: float = 1.0, batch: int = 1) -> Cell:
    return Cell(batch, ratio, (low, high), cpu_ratio, 10.0, 12.0, 100.0, 12)


def row(rung: str, ratio: float = 2.0, low: float = 1.9, high: float = 2.1, **more: Any) -> Row:
    found = {"status": "ok", "speedup": ratio, "speedup_ci": (low, high), "drift": {"cos_mean": 1.0}, "peak_bytes": 100}
    found |= {"batch": 1, "cells": [cell(ratio, low, high, more.pop("cpu_ratio", 1.0))]}
    return Row(rung=rung, **(found | more))


def vectors(count: int = 50, seed: int = 0) -> list[Any]:
    draw = np.random.default_rng(seed)
    return list(draw.normal(size=(count, 16)).astype(np.float32))


def test_the_same_answers_have_not_drifted() -> None:
    same = drift.drift("embed", vectors(), vectors())
    assert {name: round(value, 6) for name, value in same.items()} == dict.fromkeys(same, 1.0)
    logits = drift.drift("classify", vectors(), vectors())
    assert (logits["top1"], logits["kl_mean"], logits["flips"]) == (1.0, pytest.approx(0, abs=1e-9), 0.0)
    assert drift.drift("logits", vectors(), vectors())["relative_error"] == 0


def test_more_noise_is_more_drift() -> None:
    draw = np.random.default_rng(1)
    found = [
        drift.drift("embed", vectors(), [v + scale * draw.normal(size=16).astype(np.float32) for v in vectors()])
        for scale in (0.01, 0.1, 1.0)
    ]
    for name in ("cos_mean", "cos_min", "spearman", "neighbours"):
        values = [each[name] for each in found]
        assert values == sorted(values, reverse=True), name


def test_answers_that_are_no_numbers_are_always_too_far() -> None:
    broken = vectors()
    broken[3] = np.full(16, np.nan, np.float32)
    measured = drift.drift("embed", vectors(), broken)
    assert drift.breaches(measured, drift.budget("embed", "small", {})) == "answers are not finite numbers"


def test_a_budget_is_the_preset_with_what_one_names() -> None:
    assert drift.budget("embed", "balanced", {"cos_mean": 0.999, "batch_cos_min": 0.99}) == {
        "cos_mean": 0.999,
        "spearman": 0.985,
        "batch_cos_min": 0.99,
    }
    with pytest.raises(ConfigError, match="no measure of embed"):
        drift.budget("embed", "balanced", {"kl_mean": 1})
    with pytest.raises(ConfigError, match="no preset"):
        drift.budget("embed", "best", {})


def test_bounds_are_broken_from_the_right_side() -> None:
    assert drift.breaches({"cos_mean": 0.98, "kl_mean": 0.5}, {"cos_mean": 0.99, "kl_mean": 0.1}) == (
        "cos_mean 0.98 is under 0.99, kl_mean 0.5 is over 0.1"
    )
    assert drift.breaches({"cos_mean": 1.0, "kl_mean": 0.0}, {"cos_mean": 0.99, "kl_mean": 0.1}) == ""


@pytest.mark.parametrize("content", ['{"key": "x", "rows": [{"rung": "ort", "sta', '{"key": "x"}', "[1]"])
def test_rows_that_cannot_be_read_are_said_to_be_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "samples.jsonl").write_text('{"input": "a"}\n' * 8)
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ConfigError, match=r"rows\.json cannot be read") as refused:
        climb(Wish("m:f", tmp_path / "samples.jsonl"), tmp_path, resume=True)
    assert refused.value.field == "resume"


def test_measures_that_are_not_known_are_errors() -> None:
    assert drift.breaches({"mine": 0.2}, {"mine": 0.1}) == "mine 0.2 is over 0.1"
    assert drift.breaches({"mine": 0.2}, {"mine": 0.3}) == ""
    assert summary.loss("mine", 0.2) == 0.2
    assert summary.bounds({"mine": 0.3, "top1": 0.98}) == "mine ≤ 0.3, top1 ≥ 0.98"


@pytest.mark.parametrize(
    ("ratio", "low", "high", "status"),
    [(2.0, 1.8, 2.2, "ok"), (1.02, 1.0, 1.04, "not_faster"), (0.5, 0.4, 0.6, "not_faster"), (1.5, 0.9, 2.0, "noisy")],
)
def test_a_rung_is_faster_when_its_whole_interval_is(ratio: float, low: float, high: float, status: str) -> None:
    measured = row("ort", ratio, low, high)
    assert judge(measured, {"cos_mean": 0.99}, "latency", {}, QUIET)[0] == status


def test_a_fast_rung_that_drifts_is_inaccurate() -> None:
    measured = row("ort", drift={"cos_mean": 0.9})
    status, reason = judge(measured, {"cos_mean": 0.99}, "latency", {}, QUIET)
    assert (status, reason) == ("inaccurate", "cos_mean 0.9 is under 0.99")


def test_on_a_busy_machine_processor_time_decides() -> None:
    busy = Noise(1.3, (0.8, 1.9), 1.0, noisy=True)
    assert judge(row("ort", 0.9, 0.8, 1.0, cpu_ratio=2.0), {}, "latency", {}, busy)[0] == "ok"
    assert judge(row("ort", 2.0, 1.8, 2.2, cpu_ratio=1.0), {}, "latency", {}, busy)[0] == "not_faster"

    rows = [row("sdpa", 3.0, 2.9, 3.1, cpu_ratio=1.2), row("ort", 1.0, 0.9, 1.1, cpu_ratio=2.0)]
    assert choose(rows, "latency", busy) == "ort"


def test_a_regression_is_compared_by_its_numbers() -> None:
    wanted = [np.array([value], np.float32) for value in (1.0, 2.0, 3.0)]
    found = [2 * each for each in wanted]
    assert drift.drift("classify", wanted, found, "none")["relative_error"] == 1.0
    assert drift.compared_as("classify", "none") == "logits"
    assert drift.compared_as("classify", "softmax") == "classify"


def test_memory_is_an_objective_of_its_own() -> None:
    base = {"fp32": row("fp32", peak_bytes=200)}
    assert judge(row("nf4", 0.5, 0.4, 0.6, peak_bytes=100), {}, "memory", base, QUIET)[0] == "ok"
    assert judge(row("ort", 3, 2, 4, peak_bytes=199), {}, "memory", base, QUIET)[0] == "not_faster"
    assert choose([row("nf4", peak_bytes=100), row("bf16", peak_bytes=120)], "memory", QUIET) == "nf4"


def test_few_bits_that_are_slower_than_half_precision_are_not_faster() -> None:
    rows = [
        row("bf16", 4.0, 3.8, 4.2),
        row("bf16+compile+graphs", 9.5, 9.0, 9.9),
        row("bf16+torchao-int8+regional+graphs", 5.5, 5.2, 5.9),
        row("ort-int8-dynamic", 8.9, 8.5, 9.1),  # its interval reaches into the other's
        row("nf4", 2.0, 1.9, 2.1, status="inaccurate"),
        row("compile", 2.0, 1.9, 2.1),
    ]
    (slower,) = outdone(rows, "latency", QUIET)
    assert (slower.rung, slower.status) == ("bf16+torchao-int8+regional+graphs", "not_faster")
    assert slower.reason == "5.50 times the baseline's speed, and bf16+compile+graphs is 9.50 times as fast"
    assert outdone(rows, "memory", QUIET) == []
    assert outdone(rows[2:], "latency", QUIET) == []


def test_the_best_is_chosen_and_among_equals_the_simplest() -> None:
    assert choose([], "latency", QUIET) == "fp32"
    assert choose([row("ort", 3.0, status="inaccurate"), row("sdpa", 1.2, 1.1, 1.3)], "latency", QUIET) == "sdpa"
    assert choose([row("sdpa", 1.2, 1.1, 1.3), row("ort", 3.0, 2.9, 3.1)], "latency", QUIET) == "ort"
    assert choose([row("bf16+compile", 3.0, 2.5, 3.4), row("ort", 2.6, 2.5, 2.7)], "latency", QUIET) == "ort"
    assert simplicity("sdpa") < simplicity("ort") < simplicity("bf16+compile")
    assert simplicity("bf16+compile+graphs") < simplicity("reduce-overhead"), "it is compiled anew for each shape"


def test_of_those_that_are_as_fast_and_as_simple_the_one_that_is_ready_soonest_is_chosen() -> None:
    compiled = row("bf16+compile+graphs", 9.2, 9.0, 9.4, load_s=13.0, first_s=10.7)
    ahead = row("bf16+aot+graphs", 9.1, 8.9, 9.3, load_s=3.6, first_s=0.2)
    assert choose([compiled, ahead], "latency", QUIET) == "bf16+aot+graphs"
    slower = row("bf16+aot+graphs", 8.0, 7.9, 8.1, load_s=3.6, first_s=0.2)
    assert choose([compiled, slower], "latency", QUIET) == "bf16+compile+graphs"


def test_the_interval_of_a_median_holds_it() -> None:
    draw = random.Random(0)
    values = [draw.gauss(2.0, 0.1) for _ in range(30)]
    low, high = measure.interval(values)
    assert 1.9 < low < sorted(values)[15] < high < 2.1
    assert measure.interval([1.5] * 5) == (1.5, 1.5)


def test_both_sides_of_a_pair_run_the_same_batches() -> None:
    lengths = dict.fromkeys(range(100), 7)
    one, other = (measure.cells(lengths, dict.fromkeys((1, 8, 32), 4), thirds_of=(1, 32)) for _ in range(2))
    assert one == other
    assert [len(each.batches[0]) for each in one] == [1, 8, 32], "items of like length are not timed apart"


def test_short_and_long_items_are_timed_apart_where_they_are_unlike() -> None:
    lengths = {number: 5 + number for number in range(60)}
    found = measure.cells(lengths, {1: 12, 8: 8, 32: 6}, thirds_of=(1, 32))
    assert [(each.batch, each.lengths, each.length) for each in found] == [
        (1, "all", 34),
        (8, "all", 34),
        (32, "all", 34),
        (1, "short", 14),
        (1, "long", 54),
        (32, "short", 14),
        (32, "long", 54),
    ]
    for each, allowed in zip(found[3:], [range(20), range(40, 60)] * 2, strict=True):
        assert {number for batch in each.batches for number in batch} <= set(allowed)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=3, unique=True), st.integers(1, 512))
def test_operations_of_any_length_between_follow_from_three(lengths: list[int], length: int) -> None:
    def truth(tokens: int) -> float:
        degree = min(len(lengths), 3) - 1
        return sum(factor * tokens**power for power, factor in enumerate((3e3, 7e4, 1.5e3)[: degree + 1]))

    found = bounds.Operations(sorted(lengths), [truth(each) for each in sorted(lengths)])
    length = min(max(length, min(lengths)), max(lengths))
    assert found.of(length) == pytest.approx(truth(length), rel=1e-9)


def test_where_nothing_could_be_counted_no_length_has_operations() -> None:
    assert bounds.Operations().of(7) == 0


def test_items_without_a_length_are_said_to_have_none() -> None:
    assert [each.length for each in measure.cells(dict.fromkeys(range(9), 1), {1: 4})] == [None]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=64))
def test_groups_of_near_lengths_hold_every_item_once_with_little_padding(lengths: list[int]) -> None:
    groups = near_lengths(lengths, 0.1)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert sum(lengths[index] for index in group) >= 0.9 * longest * len(group) - 1e-9


@given(st.integers(8, 2000))
def test_calibration_and_evaluation_have_nothing_in_common(count: int) -> None:
    calibration, evaluation = divide(count)
    assert sorted(calibration + evaluation) == list(range(count))
    assert len(calibration) <= min(64, count // 2)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"input": "a"}\n' * 7, "7 samples; at least 8"),
        ('{"input": "a"}\nnot json\n', "line 2 is not JSON"),
        ('"text"\n', "line 1 is no object"),
    ],
)
def test_a_wrong_file_of_samples_says_where(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=told) as refused:
        read(file, 100)
    assert refused.value.field == "samples"


def test_samples_are_inputs_or_named_tensors(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text('{"input": "text"}\n\n{"input_ids": [1, 2]}\n' * 5)
    assert read(file, 100) == ["text", {"input_ids": [1, 2]}] * 5
    assert len(read(file, 4)) == 4


def test_rungs_join_in_a_sensible_order_or_are_refused() -> None:
    assert rungs.find("compile+bf16").recipe == rungs.find("bf16+compile").recipe == ["sdpa", "bf16", "compile"]
    assert rungs.find("ort-int8-dynamic+packed").recipe == ["sdpa", "packed"]
    with pytest.raises(ConfigError, match="no rung 'bf17'"):
        rungs.find("bf17+compile")
    with pytest.raises(ConfigError, match="two ways to run"):
        rungs.find("ort+openvino")
    with pytest.raises(ConfigError, match="CPU"):
        rungs.find("tf32+torch-int8-dynamic")


def test_what_cannot_be_built_says_what_to_install() -> None:
    assert rungs.find("ort").missing(CPU) == ""
    assert rungs.find("openvino").missing(CPU) == "openvino is not installed: pip install 'headrace[openvino]'"
    assert rungs.find("tf32").missing(CPU) == "runs on an NVIDIA GPU only"
    assert "VNNI" in rungs.find("torchao-int8").missing(rungs.Machine("cpu", 2, ["avx2"], {"torchao": "0.18"}))
    assert set(rungs.usual("cpu", "embed")) >= {"ort", "torch-int8-dynamic", "tensorrt"}
    for ident in (*rungs.usual("cpu", "embed"), *rungs.usual("cuda:0", "embed")):
        rungs.find(ident)


@pytest.mark.parametrize(("allowed", "there"), [(None, 8 << 30), (1 << 60, 8 << 30), (1 << 30, 1 << 30)])
def test_in_a_container_memory_is_what_it_may_use(
    allowed: int | None, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 << 30))
    monkeypatch.setattr(cgroups, "read_limits", lambda: Limits(memory_bytes=allowed))
    assert process.memory_bytes() == there
    assert process.usual_cap() < there
