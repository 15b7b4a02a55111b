"""What an artifact asks of a machine, how its bounds are set, and where it may be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from headrace import artifact
from headrace.artifact import Requires, Subject, TensorSpec
from headrace.core import TextSpec
from headrace.errors import ConfigError, LoadError
from headrace.optimizing import rungs
from headrace.optimizing.child import ITEMS, MACHINE, SUBJECT, Job
from headrace.optimizing.ladder import Result
from headrace.optimizing.pack import Way, assemble, bounds, check_out, fallbacks, pack, requires, spread
from headrace.optimizing.words import Report, Row
from headrace.runners.opened import Instance

TENSORS = Subject("module:factory", "logits", [TensorSpec("x", "float32", [2])], activation="none")
TEXTS = msgspec.structs.replace(TENSORS, task="embed", text=TextSpec("tokenizer.json", 16, 100))
FLAGS = ["avx2", "avx512_bitalg", "avx512_vnni", "fma", "sse4_2", "x86_64"]


def job(folder: Path, device: str = "cpu", capability: float = 0.0) -> Job:
    machine = rungs.Machine(device=device, threads=2, flags=FLAGS, packages={}, capability=capability)
    (folder / MACHINE).write_bytes(msgspec.json.encode(machine))
    return Job(str(folder), "module:factory", "auto", device, 2)


def needed(folder: Path, rung: str, subject: Subject = TEXTS, **options: Any) -> Requires:
    return requires(rungs.find(rung), job(folder, **options), subject)


def test_the_model_as_it_is_runs_wherever_torch_does(tmp_path: Path) -> None:
    for rung in ("fp32", "sdpa", "packed"):
        assert needed(tmp_path, rung) == Requires(packages={"torch": "", "transformers": ""})
    assert needed(tmp_path, "fp32", TENSORS).packages == {"torch": "", "safetensors": ""}
    archive = msgspec.structs.replace(job(tmp_path), target="model.pt2")
    assert requires(rungs.find("fp32"), archive, TENSORS).packages == {"torch": ""}


def test_quantised_and_compiled_rungs_name_their_instructions_and_versions(tmp_path: Path) -> None:
    versions = artifact.installed(["onnxruntime", "torch"])
    plain = needed(tmp_path, "ort")
    assert plain == Requires(packages={"onnxruntime": versions["onnxruntime"]}, device="cpu")
    kernels = ["avx2", "avx512_vnni"]
    for rung in ("ort-int8-dynamic", "ort-int8-dynamic+packed", "torch-int8-dynamic"):
        assert needed(tmp_path, rung).isa == kernels
    compiled = needed(tmp_path, "aot")
    assert compiled.isa == ["avx2", "avx512_bitalg", "avx512_vnni", "fma"]
    assert compiled.packages == {"torch": versions["torch"]}
    assert needed(tmp_path, "bf16").isa == []
    wanted = artifact.installed(
        ["torch", "transformers", "bitsandbytes"]
    )  # the last may be missing, then nobody has nf4
    assert needed(tmp_path, "nf4").packages.keys() == wanted.keys()


def test_gpus_are_asked_for_what_a_rung_computes_with(tmp_path: Path) -> None:
    gpu: dict[str, Any] = {"device": "cuda:1", "capability": 9.0}
    for rung, capability in [("fp16", ""), ("bf16", "8.0"), ("fp8", "8.9"), ("bf16+aot", "9.0")]:
        found = needed(tmp_path, rung, **gpu)
        assert (found.device, found.capability, found.isa) == ("cuda", capability, [])
    assert needed(tmp_path, "fp32", **gpu).device == "", "it can fall back to a CPU"


def test_bounds_are_the_budget_or_a_little_more_than_the_golden_items_drift() -> None:
    budget = {"cos_mean": 0.99, "kl_mean": 0.02}
    assert bounds("x", budget, {"cos_mean": 0.995, "kl_mean": 0.001}) == pytest.approx(budget)
    wider = bounds("x", budget, {"cos_mean": 0.98, "kl_mean": 0.03})
    assert wider == pytest.approx({"cos_mean": 0.978, "kl_mean": 0.033})


@pytest.mark.parametrize(
    "measured",
    [
        {"cos_mean": 0.9, "kl_mean": 0.0},
        {"cos_mean": 1.0, "kl_mean": 0.1},
        {"cos_mean": float("nan"), "kl_mean": 0.0},
        {"not_finite": 1.0},
    ],
)
def test_golden_items_that_drift_far_are_no_reason_for_wide_bounds(measured: dict[str, float]) -> None:
    with pytest.raises(LoadError, match="does not answer as its rung did"):
        bounds("ort", {"cos_mean": 0.99, "kl_mean": 0.02}, measured)


def test_one_item_of_few_that_flips_is_no_drift() -> None:
    budget = {"top1": 0.98, "kl_mean": 0.02}
    found = bounds("ort", budget, {"top1": 15 / 16, "kl_mean": 0.01})
    assert found["top1"] == pytest.approx(1 - 1.1 / 16)
    assert bounds("ort", budget, {"top1": 1.0, "kl_mean": 0.01})["top1"] == pytest.approx(1 - 1 / 16), (
        "elsewhere one may"
    )
    with pytest.raises(LoadError, match="does not answer as its rung did: top1"):
        bounds("ort", budget, {"top1": 0.5, "kl_mean": 0.01})
    with pytest.raises(LoadError, match="does not answer as its rung did: top1"):
        bounds("fp32", {"top1": 1.0}, {"top1": 15 / 16})


def test_the_fewer_golden_items_the_more_they_scatter() -> None:
    measured = {"spearman": 0.94}
    assert bounds("ort", {"spearman": 0.985}, measured, items=4)["spearman"] == pytest.approx(1 - 1.1 * 0.06)
    with pytest.raises(LoadError, match="spearman"):
        bounds("ort", {"spearman": 0.985}, measured, items=16)


def test_where_a_function_of_the_users_was_the_judge_each_way_is_bounded_by_its_own_drift() -> None:
    exact = {"relative_error": 1e-3}
    assert bounds("ort", exact, {"relative_error": 0.3}, scattered=False) == {"relative_error": pytest.approx(0.33)}
    assert bounds("ort", exact, {"relative_error": 1e-7}, scattered=False) == exact
    with pytest.raises(LoadError, match="does not answer as its rung did"):
        bounds("ort", exact, {"not_finite": 1.0}, scattered=False)


@pytest.mark.parametrize("count", [1, 7, 16, 17, 31, 500])
def test_golden_items_are_of_every_length(count: int) -> None:
    chosen = spread(range(count), 16)
    assert len(set(chosen)) == len(chosen) == min(count, 16)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    assert chosen == sorted(chosen)


def test_a_module_in_memory_without_a_factory_is_no_torch_artifact(tmp_path: Path) -> None:
    begun = msgspec.structs.replace(job(tmp_path), instance=Instance("instance.pt"))
    with pytest.raises(ConfigError, match="needs the code that makes the module") as refused:
        pack(Result(report("fp32"), begun, tmp_path), tmp_path / "out")
    assert refused.value.field == "factory"
    assert "ort, openvino, aot" in (refused.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_only_an_artifact_is_written_over(tmp_path: Path) -> None:
    check_out(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / artifact.MANIFEST).write_text("{}")
    check_out(tmp_path / "earlier")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for place in ("mine", "mine/thesis.tex"):
        with pytest.raises(ConfigError, match="no artifact") as caught:
            check_out(tmp_path / place)
        assert caught.value.field == "out"


def test_what_cannot_be_packed_leaves_the_place_as_it_was(tmp_path: Path) -> None:
    """The model cannot be imported: no half of an artifact, nothing beside it."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    (out / artifact.MANIFEST).write_text("{}")
    arrays = {f"{number}.x": np.zeros(2, np.float32) for number in range(8)}
    np.savez(work / ITEMS, **arrays)  # type: ignore[arg-type]
    (work / SUBJECT).write_bytes(msgspec.json.encode(TENSORS))
    samples = work / "samples.jsonl"
    samples.write_text('{"input": [0, 0]}\n' * 8)
    begun = msgspec.structs.replace(job(work), target="no_such_module:make", samples=str(samples))
    with pytest.raises(LoadError, match="there is no module 'no_such_module'"):
        assemble(begun, [Way("fp32")], {"relative_error": 0.1}, out)
    assert sorted(os.listdir(tmp_path)) == ["out", "work"]
    assert (out / artifact.MANIFEST).read_text() == "{}"


def report(chosen: str, **statuses: str) -> Report:
    rows = [Row("fp32", "baseline"), *(Row(name.replace("_", "-"), status) for name, status in statuses.items())]
    empty: dict[str, Any] = {"budget": {}, "environment": {}, "noise": None, "samples": {}, "seconds": 1.0}
    return Report(
        **empty, baseline="fp32", rows=rows, chosen=chosen, preset="", objective="", task="", target="", headrace=""
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (report("fp32", ort="ok"), []),
        (report("ort", ort="ok"), ["fp32"]),
        (report("ort-int8-dynamic", ort="not_faster", ort_int8_dynamic="ok"), ["ort", "fp32"]),
        (report("ort-int8-dynamic+packed", ort="build_failed"), ["fp32"]),
        (report("ort-int8-dynamic", ort="inaccurate"), ["fp32"]),
        (report("openvino", ort="ok", openvino="ok"), ["ort", "fp32"]),
        (report("aot", ort="ok", aot="ok"), ["fp32"]),
    ],
)
def test_fallbacks_are_what_was_built_and_exact(found: Report, expected: list[str]) -> None:
    assert fallbacks(found) == expected
