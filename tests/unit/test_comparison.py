"""What a rung's answers are compared by: what cannot be is said at once, and functions of users run apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import MODELS, alive, children, wait_until
from headrace.artifact import Subject, TensorSpec
from headrace.errors import ConfigError, HeadraceError, LoadError
from headrace.optimizing import drift
from headrace.optimizing.comparison import Comparison
from headrace.optimizing.own_drift import OwnDrift, write
from headrace.optimizing.process import Failed, Process

ANSWERS = list(np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32))
NEAR = [each + np.float32(0.001) for each in ANSWERS]
OWN = "headrace.optimizing.own_drift"


def comparison(
    work: Path, task: str = "logits", bounds: dict[str, float] | None = None, function: str = "", **caps: Any
) -> Comparison:
    subject = Subject(
        "m:f", task, [TensorSpec("x", "float32", [4])], activation="none" if task == "logits" else "softmax"
    )
    usual: dict[str, Any] = {"cap_s": 60, "most_bytes": 1 << 40, "threads": 1}
    return Comparison(subject, "balanced", bounds or {}, function, work, **(usual | caps))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions are imported from the current directory."""
    monkeypatch.chdir(MODELS)


def test_a_rung_is_compared_with_the_model_as_it_is(tmp_path: Path) -> None:
    found = comparison(tmp_path)
    assert found.budget == {"relative_error": 0.05}
    assert found.begin(ANSWERS, ANSWERS) == pytest.approx({"batch_cos_mean": 1.0, "batch_cos_min": 1.0})
    measured = found.measure(NEAR, NEAR)
    assert 0 < measured["relative_error"] < 0.001
    assert measured["batch_cos_min"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("task", "answers", "batched", "field", "told"),
    [
        ("embed", [np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32)], None, "task", "shapes [2, 3], [4, 3]"),
        ("classify", [np.float32(1.0), np.float32(2.0)], None, "task", "classify compares one vector for each item"),
        ("logits", [np.array([1, np.inf], np.float32)], None, "target", "its answers are not finite numbers"),
        (
            "logits",
            [np.zeros(3, np.float32)],
            [np.zeros(5, np.float32)],
            "target",
            "its answers have other shapes in a batch",
        ),
    ],
)
def test_what_can_never_be_compared_is_said_before_any_rung(
    tmp_path: Path, task: str, answers: list[Any], batched: list[Any] | None, field: str, told: str
) -> None:
    answers = [np.asarray(each) for each in answers]
    with pytest.raises((ConfigError, LoadError)) as refused:
        comparison(tmp_path, task).begin(answers, batched or answers)
    assert told in refused.value.message
    assert refused.value.field == field


@pytest.mark.parametrize("task", ["embed", "classify", "logits"])
def test_every_measure_that_may_be_bounded_is_measured(tmp_path: Path, task: str) -> None:
    names = {"embed": "cos_p1 neighbours cos_min", "classify": "flips max_logit_diff", "logits": "cos_mean cos_min"}[
        task
    ]
    bounds = dict.fromkeys([*names.split(), "batch_cos_mean"], 0.5)
    found = comparison(tmp_path, task, bounds)
    found.begin(ANSWERS, ANSWERS)
    assert found.budget.keys() <= found.measure(NEAR, NEAR).keys()


def test_answers_of_another_shape_break_every_bound(tmp_path: Path) -> None:
    found = comparison(tmp_path)
    found.begin(ANSWERS, ANSWERS)
    other = [each[:4] for each in ANSWERS]
    assert drift.breaches(found.measure(other, other), found.budget).startswith("answers have other shapes than")
    unlike_in_a_batch = drift.breaches(found.measure(ANSWERS, other), found.budget)
    assert unlike_in_a_batch == "answers have other shapes in a batch than alone"


def test_what_is_not_a_number_is_not_kept(tmp_path: Path) -> None:
    """It could not be read again from JSON."""
    found = comparison(tmp_path)
    found.begin(ANSWERS, ANSWERS)
    broken = [np.full(8, np.nan, np.float32) for _ in ANSWERS]
    assert found.measure(broken, broken) == {"not_finite": 1.0}


def test_a_model_that_is_another_one_each_time_is_refused(tmp_path: Path) -> None:
    found = comparison(tmp_path)
    found.begin(ANSWERS, ANSWERS)
    found.check_same(NEAR[:4])
    with pytest.raises(LoadError, match="answers otherwise each time") as refused:
        found.check_same(ANSWERS[4:8])
    assert "manual_seed" in (refused.value.hint or "")


def test_a_function_of_the_users_measures_instead(tmp_path: Path, here: None) -> None:
    bounds = {"largest": 0.01, "batch_cos_min": 0.99}
    found = comparison(tmp_path, bounds=bounds, function="drift_functions:largest")
    assert found.budget == bounds
    try:
        assert found.begin(ANSWERS, ANSWERS)["batch_cos_min"] == pytest.approx(1.0)
        measured = found.measure(NEAR, NEAR)
        assert measured["largest"] == pytest.approx(0.001, rel=0.01)
        assert "relative_error" not in measured
        assert drift.breaches(measured, {"largest": 0.0001}) == "largest 0.001 is over 0.0001"
        other = [each[:4] for each in ANSWERS]
        assert found.measure(other, other)["other_shape"], "it is not called with what has other shapes"
    finally:
        found.end()


@pytest.mark.parametrize(
    ("function", "bounds", "field", "told"),
    [
        ("largest", {}, "max_drift", "nothing bounds what drift_functions:largest gives"),
        ("largest", {"smallest": 1.0}, "max_drift", "'smallest' cannot be had of this model's answers"),
        ("missing", {"x": 1.0}, "drift", "has no 'missing'"),
        ("NO_FUNCTION", {"x": 1.0}, "drift", "is of type int, and no function"),
        ("raises", {"x": 1.0}, "drift", "drift_functions:raises: ValueError: these cannot be compared"),
        ("gives_a_list", {"x": 1.0}, "drift", "it gave [1.0], and not a dictionary"),
    ],
)
def test_a_function_that_measures_nothing_is_refused_before_any_rung(
    tmp_path: Path, here: None, function: str, bounds: dict[str, float], field: str, told: str
) -> None:
    with pytest.raises(HeadraceError) as refused:
        comparison(tmp_path, bounds=bounds, function=f"drift_functions:{function}").begin(ANSWERS, ANSWERS)
    assert told in refused.value.message
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("function", "told"),
    [("raises_at_other_answers", "KeyError: 'other'"), ("aborts_at_other_answers", "killed by SIGABRT")],
)
def test_a_function_that_fails_at_a_rung_makes_it_inaccurate_and_goes_on(
    tmp_path: Path, here: None, needs_proc: None, function: str, told: str
) -> None:
    found = comparison(tmp_path, bounds={"largest": 1.0}, function=f"drift_functions:{function}")
    try:
        found.begin(ANSWERS, ANSWERS)
        for _ in range(2):
            with pytest.raises(Failed) as failed:
                found.measure(NEAR, NEAR)
            assert failed.value.status == "inaccurate"
            assert f"drift_functions:{function}: {told}" in failed.value.reason
        assert found.measure(ANSWERS, ANSWERS)["largest"] == 0
    finally:
        found.end()


def test_a_measure_that_is_no_number_keeps_no_bound(tmp_path: Path, here: None) -> None:
    found = comparison(tmp_path, bounds={"largest": 1.0}, function="drift_functions:no_number_at_other_answers")
    try:
        found.begin(ANSWERS, ANSWERS)
        assert drift.breaches(found.measure(NEAR, NEAR), found.budget) == "largest could not be measured"
    finally:
        found.end()


def asked(work: Path, function: str, **caps: Any) -> tuple[Process, dict[str, str]]:
    """A process of the ladder that runs nothing but a function, and a question for it."""
    usual: dict[str, Any] = {"cap_s": 60, "most_bytes": 1 << 40}
    process = Process("drift", OwnDrift(f"drift_functions:{function}", 1), work, **(usual | caps), program=OWN)
    return process, dict.fromkeys(("wanted", "found"), write(work / "answers.npz", ANSWERS))


def test_a_process_that_hangs_is_ended_in_time(tmp_path: Path, here: None) -> None:
    process, question = asked(tmp_path, "hangs", cap_s=1.5)

    def ask() -> None:
        process.ask()  # it is there; on a busy machine that takes too long as well
        process.ask(question)

    with pytest.raises(Failed) as failed:
        ask()
    assert (failed.value.status, failed.value.reason) == ("timeout", "not done within 1.5 s")
    assert process.ended


def test_a_process_that_takes_all_memory_is_ended(tmp_path: Path, here: None) -> None:
    process, question = asked(tmp_path, "takes_all_memory", most_bytes=256 << 20)
    process.ask()
    with pytest.raises(Failed) as failed:
        process.ask(question)
    assert failed.value.status == "out_of_memory"
    assert "more than the cap of 256 MiB" in failed.value.reason


def test_processes_end_with_a_ladder_that_is_killed(tmp_path: Path, needs_proc: None) -> None:
    """Also one that hangs, and does not look whether anybody is there."""
    code = (
        "import sys; from pathlib import Path\n"
        "from headrace.optimizing.own_drift import OwnDrift\n"
        "from headrace.optimizing.process import Process\n"
        "job, work = OwnDrift('drift_functions:hangs', 1), Path(sys.argv[1])\n"
        f"process = Process('drift', job, work, cap_s=600, most_bytes=1 << 40, program={OWN!r})\n"
        "print(process.ask(), flush=True)\n"
        "process.ask(dict.fromkeys(('wanted', 'found'), sys.argv[2]))\n"
    )
    answers = write(tmp_path / "answers.npz", ANSWERS)
    argv = [sys.executable, "-c", code, str(tmp_path), answers]
    with subprocess.Popen(argv, cwd=MODELS, stdout=subprocess.PIPE) as ladder:
        assert ladder.stdout is not None
        assert ladder.stdout.readline() == b"{}\n"
        (child,) = children(ladder.pid)
        ladder.kill()
    wait_until(lambda: not alive(child), 5, "its process is gone")
