"""`headrace optimize` as it is typed, on small modules: every rung has its row, and bad input is said at once."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import HEADRACE, MODELS

pytestmark = pytest.mark.usefixtures("needs_proc")


def optimize(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [HEADRACE, "optimize", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=100, cwd=MODELS)


def samples(tmp_path: Path, *lines: Any) -> str:
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def numbers(count: int = 24) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [{"input": [draw.gauss(0, 1) for _ in range(32)]} for _ in range(count)]


def test_every_rung_has_a_row_with_its_reason(tmp_path: Path) -> None:
    done = optimize(
        "ladder_models:Rows",
        *("--samples", samples(tmp_path, *numbers()), "--format", "json", "--effort", "0.1"),
        *("--rungs", "sdpa,torch-int8-dynamic,tf32", "--max-drift", "relative_error=0.0001"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["rung"]: row for row in report["rows"]}
    assert list(rows) == ["fp32", "sdpa", "torch-int8-dynamic", "tf32"]
    assert rows["fp32"]["status"] == report["baseline"].replace("fp32", "baseline")
    assert rows["fp32"]["latency_ms"]["p50"] > 0
    assert (rows["sdpa"]["status"], "no attention" in rows["sdpa"]["reason"]) == ("unavailable", True)
    assert rows["torch-int8-dynamic"]["status"] == "inaccurate"
    assert rows["torch-int8-dynamic"]["reason"].startswith("relative_error")
    assert rows["torch-int8-dynamic"]["speedup_ci"][0] <= rows["torch-int8-dynamic"]["speedup"]
    assert (rows["tf32"]["status"], rows["tf32"]["reason"]) == ("unavailable", "runs on an NVIDIA GPU only")
    assert report["chosen"] == "fp32"
    assert report["environment"]["device"] == "cpu"
    assert "torch-int8-dynamic" in done.stderr, "rows are told as they come"


def test_a_module_that_takes_named_tensors_of_any_length(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines = [{"input_ids": [draw.randrange(100) for _ in range(draw.randrange(3, 30))]} for _ in range(24)]
    done = optimize(
        "ladder_models:Words",
        *("--samples", samples(tmp_path, *lines), "--format", "json", "--effort", "0.1", "--rungs", "packed+bf16,nf5"),
    )
    assert (done.returncode, "no rung 'nf5'" in done.stderr) == (2, True), done.stderr
    done = optimize(
        "ladder_models:Words",
        *(
            "--samples",
            samples(tmp_path, *lines),
            "--format",
            "json",
            "--effort",
            "0.1",
            "--rungs",
            "torch-int8-dynamic,ort",
        ),
    )
    assert done.returncode == 0, done.stderr
    row, exported = json.loads(done.stdout)["rows"][-2:]
    assert row["drift"]["batch_cos_min"] > 0.99
    assert exported["status"] in ("ok", "not_faster", "noisy"), exported["reason"]
    assert exported["drift"]["cos_min"] > 0.9999
    assert 3 <= row["length"] <= 30


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("ladder_models:Missing", "has no 'Missing'"),
        ("no_such_module:Rows", "no module 'no_such_module'"),
        ("/nowhere/at/all", "neither a directory"),
        ("ladder_models:crash", "SIGABRT"),
    ],
)
def test_a_target_that_cannot_be_read_ends_it_with_the_reason(tmp_path: Path, target: str, told: str) -> None:
    done = optimize(target, "--samples", samples(tmp_path, *numbers()))
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sample_that_does_not_fit_is_named(tmp_path: Path) -> None:
    lines = numbers()
    lines[7] = {"input": "words"}
    done = optimize("ladder_models:Rows", "--samples", samples(tmp_path, *lines))
    assert (done.returncode, "samples[7]" in done.stderr) == (2, True), done.stderr
