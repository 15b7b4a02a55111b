"""Calibrated 8-bit rungs by the real program, on a module whose products are hard to quantise."""

from __future__ import annotations

import importlib.metadata
import json
import random
import subprocess
from pathlib import Path

import pytest

from conftest import HEADRACE, MODELS

pytestmark = pytest.mark.usefixtures("needs_proc")


def is_installed(package: str) -> bool:
    return any(each.metadata["Name"].lower() == package for each in importlib.metadata.distributions())


def test_calibrated_rungs_keep_to_the_budget_or_say_what_they_need(tmp_path: Path) -> None:
    draw = random.Random(0)
    samples = tmp_path / "samples.jsonl"
    lines = [{"x": [[draw.gauss(0, 1) for _ in range(32)] for _ in range(draw.randrange(4, 20))]} for _ in range(24)]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    bounds = ("--max-drift", "batch_cos_min=0.999", "--max-drift", "relative_error=0.6")
    # OpenVINO's quantiser rounds more than products.
    wanted = {
        "ort-int8-static": ("onnxruntime", 0.3),
        "openvino-int8-static": ("openvino", 0.6),
        "torch-int8-static": ("torchao", 0.3),
    }
    done = subprocess.run(
        [
            *(HEADRACE, "optimize", "rung_models:Summed", "--samples", str(samples), *bounds),
            *("--rungs", ",".join(wanted), "--effort", "0.1", "--format", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=MODELS,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["rung"]: row for row in json.loads(done.stdout)["rows"]}
    for rung, (package, most) in wanted.items():
        row = rows[rung]
        if not is_installed(package):
            assert (row["status"], f"{package} is not installed" in row["reason"]) == ("unavailable", True)
            continue
        assert row["status"] in ("ok", "not_faster", "noisy"), row["reason"]
        assert 0 < row["drift"]["relative_error"] < most
        assert row["drift"]["batch_cos_min"] > 0.999
