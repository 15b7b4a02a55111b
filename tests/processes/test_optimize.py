"""`headrace optimize` as it is typed, on small modules: every rung has its row, and bad input is said at once."""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from conftest import HEADRACE, MODELS, alive, children, wait_until
from headrace.config import ModelConfig
from headrace.errors import ConfigError
from headrace.optimizing import measure
from headrace.optimizing.child import Items, Job
from headrace.optimizing.ladder import default_work
from headrace.optimizing.library import optimize as optimize_here
from headrace.optimizing.process import Failed, Process
from headrace.runners import open_target

pytestmark = pytest.mark.usefixtures("needs_proc")

# A rung of a library that is not installed here, with the extra that brings it.
ABSENT = {
    "openvino": ("openvino", "openvino"),
    "nf4": ("bitsandbytes", "quant"),
    "torchao-int8-weights": ("torchao", "quant"),
}
SMALL = ("--effort", "0.1", "--threads", "1")


def command(*arguments: str) -> list[str]:
    return [HEADRACE, "optimize", *arguments]


def optimize(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240, cwd=MODELS, **more)


def samples(tmp_path: Path, *lines: Any) -> str:
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def numbers(count: int = 24) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [{"input": [draw.gauss(0, 1) for _ in range(32)]} for _ in range(count)]


@dataclass
class Interrupted:
    """A ladder that was ended with Ctrl-C while a rung did not answer."""

    folder: Path
    arguments: tuple[str, ...]
    env: dict[str, str]
    returncode: int
    log: str
    processes: list[int]

    @property
    def noted(self) -> list[int]:
        """Processes that had the model, and those that the model has started."""
        return [int(line) for line in (self.folder / "notes").read_text().split() if line.isdecimal()]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interrupted]:
    folder = tmp_path_factory.mktemp("interrupted")
    notes = folder / "notes"
    env = {**os.environ, "WAYWARD_NOTES": str(notes)}
    arguments = (
        "ladder_models:Wayward",
        "--samples",
        samples(folder, *numbers()),
        "--out",
        str(folder / "w.hr"),
        *SMALL,
    )
    arguments += ("--drift", "drift_functions:largest", "--max-drift", "largest=0.00001")
    argv = command(*arguments, "--rungs", "torch-int8-dynamic,fp16")
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(argv, cwd=MODELS, env=env, stdout=log, stderr=log) as ladder,
    ):
        wait_until(lambda: notes.exists() and "hangs" in notes.read_text(), 90, "a rung that hangs")
        below = children(ladder.pid)
        ladder.send_signal(signal.SIGINT)
        returncode = ladder.wait(10)
    found = Interrupted(folder, arguments, env, returncode, (folder / "log").read_text(), below)
    yield found
    for pid in filter(alive, found.noted):
        os.kill(pid, signal.SIGKILL)


def test_ctrl_c_leaves_no_process_and_keeps_what_was_found(interrupted: Interrupted) -> None:
    assert interrupted.returncode == 1
    assert "interrupted; --resume goes on from what was found until now" in interrupted.log
    assert "Traceback" not in interrupted.log
    assert len(interrupted.processes) >= 3, "the model as it is, the rung that hangs, and what measures drift"
    wait_until(lambda: not any(map(alive, interrupted.processes)), 5, "its processes are gone")
    assert len(interrupted.noted) >= 8, "the preparation, the model twice, and two rungs have noted two each"
    assert not any(map(alive, interrupted.noted))
    rows = json.loads((default_work(interrupted.folder / "w.hr") / "rows.json").read_bytes())["rows"]
    assert [row["rung"] for row in rows] == ["fp32", "torch-int8-dynamic"]


def test_whatever_a_rung_does_it_has_a_row_and_the_ladder_goes_on(interrupted: Interrupted) -> None:
    """Goes on from where it was interrupted, with rungs that end their processes."""
    absent = next(rung for rung, (package, _) in ABSENT.items() if not installed(package))
    ids = ["torch-int8-dynamic", "bf16", "ort", "sdpa", "tf32", absent]
    done = optimize(
        *interrupted.arguments,
        *("--resume", "--rungs", ",".join(ids), "--cap-bytes", str(1500 << 20), "--format", "json"),
        env=interrupted.env,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rows = {row["rung"]: row for row in report["rows"]}
    assert list(rows) == ["fp32", *ids]
    assert (rows["fp32"]["status"], rows["fp32"]["latency_ms"]["p50"] > 0) == ("baseline", True)
    assert 0 < rows["fp32"]["cells"][-1]["share_of_peak"] < 1

    kept = rows["torch-int8-dynamic"]
    assert (kept["status"], kept["reason"].startswith("largest 0.0")) == ("inaccurate", True)
    assert kept["speedup_ci"][0] <= kept["speedup"] <= kept["speedup_ci"][1]
    assert kept["drift"].keys() >= {"largest", "batch_cos_min"}
    assert "torch-int8-dynamic  " not in done.stderr, "rows of an earlier climb are not told again"

    found = {rung: (rows[rung]["status"], rows[rung]["reason"]) for rung in ids[1:]}
    assert found["bf16"][0] == "crashed"
    assert "killed by SIGABRT" in found["bf16"][1]
    assert found["ort"][0] == "out_of_memory", found["ort"]
    assert "more than the cap of 1500 MiB" in found["ort"][1]
    assert found["sdpa"][0] == "unavailable"
    assert "no attention" in found["sdpa"][1]
    assert found["tf32"] == ("unavailable", "runs on an NVIDIA GPU only")
    package, extra = ABSENT[absent]
    assert found[absent] == ("unavailable", f"{package} is not installed: pip install 'headrace[{extra}]'")

    assert report["chosen"] == "fp32"
    assert report["budget"] == {"largest": 0.00001}
    assert report["compared_by"] == "drift_functions:largest"
    assert (interrupted.folder / "w.hr" / "headrace.json").exists()
    assert len(interrupted.noted) >= 18
    wait_until(lambda: not any(map(alive, interrupted.noted)), 5, "nothing of it is left")


def test_a_rung_that_does_not_answer_is_ended_in_time(
    interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ladder makes the row of, with a shorter cap than all of a ladder can have."""
    monkeypatch.chdir(MODELS)
    monkeypatch.setenv("WAYWARD_NOTES", str(interrupted.folder / "notes"))
    work = str(default_work(interrupted.folder / "w.hr"))
    job = Job(work, "ladder_models:Wayward", "auto", "cpu", 1, "fp16", str(interrupted.folder / "samples.jsonl"))
    process = Process("run", job, interrupted.folder / "late", cap_s=5, most_bytes=1 << 40)
    with pytest.raises(Failed) as failed:
        process.ask()
    assert (failed.value.status, failed.value.reason) == ("timeout", "not done within 5 s")
    wait_until(lambda: not any(map(alive, interrupted.noted)), 5, "what the model has started is gone, too")


def test_a_rung_whose_layer_is_much_slower_is_given_up_with_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(MODELS)
    job = Job(str(tmp_path), "ladder_models:slow_halves", "auto", "cpu", 1, "bf16", samples(tmp_path, *numbers()))
    Process("prepare", job, tmp_path / "prepare", cap_s=60, most_bytes=1 << 40).finish()
    gated = Process("run", replace(job, layer_first=True), tmp_path / "gated", cap_s=60, most_bytes=1 << 40)
    with pytest.raises(Failed, match=r"one layer of 32 × 512 takes 9\.0 times as long with 16") as failed:
        gated.ask()
    assert failed.value.status == "not_faster"
    asked_for = Process("run", job, tmp_path / "asked", cap_s=60, most_bytes=1 << 40)
    try:
        assert asked_for.ask()["size_bytes"] > 0
    finally:
        asked_for.end()


def test_what_a_length_takes_that_was_not_met_before_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MODELS)
    words = [{"input": {"input_ids": [7] * size, "attention_mask": [1] * size}} for size in (3, 5, 5, 9, 3, 4, 6, 8)]
    job = Job(str(tmp_path), "ladder_models:Planning", "auto", "cpu", 1, samples=samples(tmp_path, *words))
    Process("prepare", job, tmp_path / "prepare", cap_s=60, most_bytes=1 << 40).finish()
    lengths = dict(enumerate(Items(tmp_path).lengths))
    assert list(lengths.values()) == [3, 5, 5, 9, 3, 4, 6, 8]
    process = Process("run", job, tmp_path / "run", cap_s=60, most_bytes=1 << 40)
    try:
        process.ask()
        assert 45 < (measure.new_shape_ms(process, lengths, met=3) or 0) < 500
        assert (measure.new_shape_ms(process, lengths, met=3) or 0) < 20, "they are met by now"
        assert measure.new_shape_ms(process, {0: 3, 4: 3}, met=3) is None, "there is no other length"
    finally:
        process.end()


@pytest.mark.long
def test_a_module_in_memory_is_optimised_and_nothing_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It takes named tensors of any length; its weights are not those that its factory makes."""
    import torch

    monkeypatch.syspath_prepend(str(MODELS))
    monkeypatch.chdir(MODELS)  # where the factory is imported from
    import ladder_models

    module = ladder_models.Words()
    with torch.no_grad():
        module.out.weight.mul_(3)
    draw = random.Random(0)
    inputs = [{"input_ids": torch.tensor([draw.randrange(100) for _ in range(length)])} for length in range(3, 27)]
    told: list[str] = []
    ladder = optimize_here(
        module,
        inputs,
        rungs=["ort"],
        effort=0.1,
        threads=1,
        out=tmp_path / "words.hr",
        factory=ladder_models.Words,
        tell=lambda row: told.append(row.rung),
    )
    assert told == [row.rung for row in ladder.rows] == ["fp32", "ort"]
    row = ladder.rows[1]
    assert row.status in ("ok", "not_faster", "noisy"), row.reason
    assert row.drift["cos_min"] > 0.9999
    assert row.length is not None
    assert 3 <= row.length <= 26
    assert ladder.chosen in ("fp32", "ort")
    assert ladder.report.target == "ladder_models.Words"
    assert capfd.readouterr() == ("", "")

    assert ladder.artifact == tmp_path / "words.hr"
    for directory in filter(None, [ladder.artifact, *(tmp_path / "words.hr" / "fallback").glob("*")]):
        loaded = open_target(ModelConfig(name="words", target=str(directory)), "cpu")
        answer = loaded.finish(loaded.runner.run([loaded.prepare({"input_ids": [1, 2, 3]})])[0])
        with torch.no_grad():
            wanted = module(torch.tensor([[1, 2, 3]]), torch.ones(1, 3))[0]
        assert answer.tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
    with pytest.raises(ConfigError, match="is there already and is no artifact"):
        ladder.save(tmp_path)


def installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("ladder_models:Missing", "has no 'Missing'"),
        ("no_such_module:Rows", "no module 'no_such_module'"),
        ("/nowhere/at/all", "neither a directory"),
        ("ladder_models:crash", "SIGABRT"),
        ("ladder_models:by_chance", "answers otherwise each time it is loaded"),
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


def test_an_option_that_cannot_be_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    file = samples(tmp_path, *numbers())
    done = optimize("ladder_models:Rows", "--samples", file, "--rungs", "packed+bf16,nf5")
    assert (done.returncode, "no rung 'nf5'" in done.stderr) == (2, True), done.stderr
    done = optimize("ladder_models:Rows", "--samples", file, "--resume")
    assert (done.returncode, "give --out DIR" in done.stderr) == (2, True), done.stderr


def test_a_model_that_is_too_large_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    """There are no weights at all: what is looked at is the configuration."""
    sizes = {"hidden_size": 8192, "num_hidden_layers": 2000, "num_attention_heads": 64, "vocab_size": 128256}
    described = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": 28672, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(described))
    done = optimize(str(tmp_path), "--samples", samples(tmp_path, *[{"input": "a text"}] * 8), "--rungs", "bf16,nf4")
    assert done.returncode != 0
    told = " ".join(done.stderr.split())
    assert "parameters, weights in memory about: fp32 7.09 TiB; bf16 3.54 TiB; nf4 940 GiB" in told
    assert "more than the cap of" in told
    assert "raise --cap-bytes" in told
    assert "Traceback" not in told
