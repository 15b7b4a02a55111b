"""Artifacts served by the real program: answers, a worker without torch, and what happens when a byte is broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from conftest import HEADRACE, MODELS, Server, serving
from headrace import artifact
from headrace.config import ModelConfig
from headrace.optimizing import export, rungs
from headrace.optimizing.child import Job
from headrace.optimizing.pack import Way, assemble
from headrace.optimizing.process import Process
from headrace.optimizing.samples import divide
from headrace.runners import drift, open_target
from headrace.runners.artifact import read_golden, write_golden
from headrace.runners.subject import open_subject
from headrace.runners.text import TextPreparer
from headrace.runners.way import of_module

BUDGET = {"cos_mean": 0.99, "spearman": 0.98, "batch_cos_min": 0.95}
TEXTS = [
    "A headrace brings water to the wheel." + " Requests come to the model at full flow." * (number % 6) + f" {number}"
    for number in range(40)
]


def made(
    work: Path, target: str, ids: Sequence[str], inputs: Sequence[Any] = TEXTS, budget: dict[str, float] = BUDGET
) -> Path:
    """An artifact of the first rung that falls back to the others, built as the ladder does."""
    samples = work / "samples.jsonl"
    samples.write_text("".join(json.dumps({"input": value}) + "\n" for value in inputs))
    job = Job(str(work), target, "auto", "cpu", 2, samples=str(samples))

    def run(role: str, job: Job) -> None:
        Process(role, job, work / "processes" / job.rung, cap_s=300, most_bytes=8 << 30).finish()

    run("prepare", job)
    job = msgspec.structs.replace(job, calibration=divide(len(inputs))[0])
    for ident in ids:
        if rungs.find(ident).engine != "torch":
            run("build", msgspec.structs.replace(job, rung=ident))
    assemble(job, [Way(ident, {"rung": ident}) for ident in ids], budget, work / "model.hr")
    return work / "model.hr"


def small_encoder(directory: Path, tokenizer: Path) -> str:
    """A model with made-up weights: it is exported in a moment."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(**size)).save_pretrained(directory)
    shutil.copy(tokenizer, directory)
    return str(directory)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> list[Path]:
    """Both are made at once: most of the time is spent in one thread."""
    one, other = (tmp_path_factory.mktemp(name) for name in ("small", "quantised"))
    with ThreadPoolExecutor() as pool:
        quantised = pool.submit(made, other, str(minilm), ["ort-int8-dynamic"])
        source = small_encoder(one / "source", minilm / "tokenizer.json")
        return [made(one, source, ["ort", "fp32"]), quantised.result()]


@pytest.fixture
def small(artifacts: list[Path]) -> Path:
    """ONNX of a small encoder, and the model as it is behind it."""
    return artifacts[0]


@pytest.fixture
def quantised(artifacts: list[Path]) -> Path:
    """The real embedding model in 8 bits, and nothing else."""
    return artifacts[1]


def copied(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy.hr"))


def break_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def golden(directory: Path, server: Server) -> dict[str, float]:
    """Drift of a server's answers to the golden items, asked for one by one and all at once."""
    items, wanted = read_golden(directory)
    ids = [item["input_ids"].tolist() for item in items]
    alone = [server.client.post("/predict", json={"input_ids": each}).json()["prediction"] for each in ids]
    body = server.client.post("/v1/embeddings", json={"model": model_of(server), "input": ids}).json()
    together = [np.asarray(each["embedding"]) for each in body["data"]]
    found = [np.asarray(each) for each in alone]
    return drift.drift("embed", wanted, found) | drift.batch_drift(found, together)


def model_of(server: Server) -> str:
    return str(server.client.get("/v1/models").json()["data"][0]["id"])


def libraries(server: Server) -> str:
    """What the model's worker has mapped."""
    return Path(f"/proc/{server.pid_of(f'worker.{model_of(server)}.0')}/maps").read_text()


def test_the_real_model_in_8_bits_answers_within_its_budget_without_torch(
    quantised: Path, tmp_path: Path, needs_proc: None
) -> None:
    with serving(tmp_path, str(quantised)) as server:
        assert "runs as ort-int8-dynamic, by onnx" in server.log
        measured = golden(quantised, server)
        assert not drift.breaches(measured, artifact.parse(quantised).budget), measured
        assert "onnxruntime" in libraries(server)
        assert "libtorch" not in libraries(server)

        pair = server.client.post("/v1/embeddings", json={"model": model_of(server), "input": TEXTS[:2]}).json()
        near, far = (np.asarray(each["embedding"]) for each in pair["data"])
        assert near.shape == (384,)
        assert np.isclose(np.linalg.norm(near), 1, atol=1e-5)
        assert near @ far > 0.5
        types = server.predict({"input_ids": [101, 102], "token_type_ids": [0, 1]})
        assert (types.status_code, types.json()["error"]["field"]) == (422, "input.token_type_ids")


def test_it_answers_texts_as_the_model_that_it_was_made_of(small: Path) -> None:
    info, source = [], Path(artifact.parse(small).subject.target)
    answers = []
    for directory in (source, small, small / "fallback" / "fp32"):
        loaded = open_target(ModelConfig(name="m", target=str(directory)), "cpu")
        assert loaded.info.text is not None
        preparer = TextPreparer(loaded.info.text)
        outputs = loaded.runner.run([preparer.text(text) for text in TEXTS[:5]])
        answers.append([loaded.finish(output) for output in outputs])
        info.append(msgspec.structs.replace(loaded.info, text=None, platform=""))
    assert info[0] == info[1] == info[2]
    assert np.allclose(answers[0], answers[1], atol=1e-5)
    assert np.allclose(answers[0], answers[2], atol=1e-6)


def test_a_broken_byte_makes_the_server_fall_back_with_a_warning(small: Path, tmp_path: Path, needs_proc: None) -> None:
    directory = copied(small, tmp_path)
    break_byte(directory / "model.onnx")
    with serving(tmp_path, str(directory)) as server:
        assert "model.onnx is not the file that was made" in server.log
        assert "using its fallback fallback/fp32" in server.log
        measured = golden(small, server)
        assert measured["cos_min"] > 0.99999
        assert "libtorch" in libraries(server)


def test_where_nothing_is_left_the_server_says_why_and_ends(quantised: Path, small: Path, tmp_path: Path) -> None:
    alone, both = copied(quantised, tmp_path / "alone"), copied(small, tmp_path / "both")
    break_byte(alone / "model.onnx")
    break_byte(both / "model.onnx")
    break_byte(both / "fallback" / "fp32" / "model" / "model.safetensors")
    for directory, words in [
        (alone, ["model.onnx is not the file that was made", "copy the whole directory again"]),
        (both, ["nothing of", "model.onnx is not the file", "model.safetensors is not the file"]),
    ]:
        done = subprocess.run(
            [HEADRACE, "serve", str(directory), "--port", "0"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 1
        assert all(word in done.stderr for word in words), done.stderr
        assert "ready:" not in done.stdout


@pytest.mark.long
def test_an_exported_program_is_a_target_and_becomes_an_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(MODELS))
    import torch
    import torch_models

    module = torch_models.WithMask().eval()
    example = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    sizes = {0: torch.export.Dim("items", min=1, max=64), 1: torch.export.Dim("length", min=1, max=64)}
    program = torch.export.export(module, (), example, dynamic_shapes=dict.fromkeys(example, sizes))
    torch.export.save(program, tmp_path / "mine.pt2")
    inputs = [{"input_ids": [(number * step) % 50 for step in range(1 + number % 7)]} for number in range(16)]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in inputs))
    done = subprocess.run(
        [
            *(HEADRACE, "optimize", "mine.pt2", "--samples", str(file), "--rungs", "bf16", "--out", "mine.hr"),
            *("--format", "json", "--effort", "0.1", "--threads", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["rows"][1]
    assert (row["status"], "it was made in float32" in row["reason"]) == ("unavailable", True)
    names = {str(path.relative_to(tmp_path / "mine.hr")) for path in (tmp_path / "mine.hr").rglob("*.*")}
    assert names >= {"headrace.json", "golden.npz", "report.json", "model/archive.pt2"}
    (tmp_path / "mine.pt2").unlink()
    loaded = open_target(ModelConfig(name="mine", target=str(tmp_path / "mine.hr")), "cpu")
    assert (loaded.info.platform, loaded.info.tensors) == ("pytorch", True)
    for item in inputs[:7]:
        ids = item["input_ids"]
        wanted = module(torch.tensor([ids]), torch.ones(1, len(ids)))["logits"][0].tolist()
        answer = loaded.finish(loaded.runner.run([loaded.prepare(item)])[0])
        assert answer.tolist() == pytest.approx(wanted, abs=1e-5)


def classifier(directory: Path, minilm: Path, **options: Any) -> str:
    """One whose labels depend on the text, though its weights are made up."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(**size, initializer_range=0.2, **options))
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, directory)
    return str(directory)


WORDS = ["water", "wheel", "river", "stone", "model", "request", "batch", "memory", "light", "answer", "garden"]
PHRASES = [
    " ".join(WORDS[(number * step + step * step) % len(WORDS)] for step in range(2 + number % 9))
    for number in range(40)
]


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A folder with a classifier and what `headrace optimize` has made of it."""
    folder = tmp_path_factory.mktemp("classified")
    source = classifier(folder / "source", minilm, num_labels=3, id2label=dict(enumerate(["bad", "fair", "good"])))
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps({"input": text}) + "\n" for text in PHRASES))
    done = subprocess.run(
        [
            *(HEADRACE, "optimize", source, "--samples", str(file), "--rungs", "ort-int8-dynamic"),
            *("--out", str(folder / "model.hr"), "--preset", "balanced", "--effort", "0.1", "--threads", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.long
def test_a_classifier_is_as_sure_of_the_same_labels(classified: Path, tmp_path: Path) -> None:
    out = classified / "model.hr"
    report = json.loads((out / "report.json").read_bytes())
    assert (report["task"], report["budget"]) == ("classify", {"top1": 0.98, "kl_mean": 0.02})
    row = report["rows"][1]
    assert row["status"] in ("ok", "not_faster", "noisy"), row["reason"]
    assert row["drift"]["top1"] >= 0.98
    assert 0 < row["drift"]["kl_mean"] <= 0.02
    assert row["speedup_ci"][0] <= row["speedup"] <= row["speedup_ci"][1]

    model = open_target(ModelConfig(name="m", target=str(classified / "source")), "cpu")
    assert model.info.text is not None
    preparer = TextPreparer(model.info.text)
    wanted = [model.finish(model.runner.run([preparer.text(text)])[0]) for text in PHRASES]
    assert len({each["label"] for each in wanted}) > 1, "they depend on the text"
    with serving(tmp_path, str(out)) as server:
        alone = [server.predict(text).json()["prediction"] for text in PHRASES]
        together = server.client.post("/predict", json={"inputs": PHRASES}).json()["predictions"]
    for found in (alone, together):
        for a, b in zip(wanted, found, strict=True):
            assert b["score"] == max(b["scores"].values()) == b["scores"][b["label"]]
            first, second = sorted(a["scores"].values())[:-3:-1]
            assert a["label"] == b["label"] or first - second < 0.1, "only where the model itself is not sure"
        here, there = ([np.log(list(each["scores"].values())) for each in some] for some in (wanted, found))
        measured = drift.drift("classify", here, there)
        assert not drift.breaches(measured, {"kl_mean": report["budget"]["kl_mean"], "flips": 0.0}), measured


@pytest.mark.long
def test_a_regression_gives_the_same_numbers(tmp_path: Path, minilm: Path) -> None:
    """Built here as the ladder's processes do it."""
    source = classifier(tmp_path / "source", minilm, num_labels=1, problem_type="regression")
    opened = open_subject(source, "auto", [])
    assert drift.compared_as(opened.subject.task, opened.subject.activation) == "logits"
    items = [opened.prepare(text) for text in PHRASES[:8]]
    wanted = of_module(opened.module, [], "cpu", opened.subject).answer(items)
    assert np.ptp(wanted) > 0.1, "they depend on the text"
    directory = tmp_path / "model.hr"
    directory.mkdir()
    export.export(rungs.find("ort"), opened.subject, opened.module, items[:2], [], directory)
    write_golden(directory, items, wanted)
    shutil.copy(minilm / "tokenizer.json", directory)
    assert opened.subject.text is not None
    text = msgspec.structs.replace(opened.subject.text, tokenizer="tokenizer.json")
    subject = msgspec.structs.replace(opened.subject, text=text)
    artifact.write(
        directory, artifact.Manifest(rung="ort", engine="onnx", subject=subject, budget={"relative_error": 1e-3})
    )
    answers = []
    for target in (source, directory):
        loaded = open_target(ModelConfig(name="m", target=str(target)), "cpu")
        assert loaded.info.text is not None
        preparer = TextPreparer(loaded.info.text)
        answers.append([loaded.finish(loaded.runner.run([preparer.text(text)])[0]) for text in PHRASES[:8]])
    assert [each["label"] for each in answers[0]] == [each["label"] for each in answers[1]]
    scores = [[each["score"] for each in some] for some in answers]
    assert np.allclose(*scores, atol=1e-3 * np.abs(scores[0]).max())


def test_no_file_of_an_artifact_is_a_pickle(small: Path, quantised: Path) -> None:
    kinds = {file.suffix for directory in (small, quantised) for file in directory.rglob("*") if file.is_file()}
    assert kinds == {".json", ".npz", ".onnx", ".safetensors"}
    for file in [*small.rglob("*.npz"), *quantised.rglob("*.npz")]:
        with np.load(file, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype.kind in "if" for name in arrays.files)


def test_a_module_of_ones_own_is_served_from_its_factory_and_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(MODELS))
    import torch
    import torch_models

    monkeypatch.chdir(MODELS)  # where the factory is imported from
    inputs = [{"input_ids": [(number * step) % 50 for step in range(1 + number % 7)]} for number in range(16)]
    earlier = tmp_path / "model.hr"
    earlier.mkdir()
    (earlier / artifact.MANIFEST).write_text("{}")
    (earlier / "weights-of-old").touch()
    directory = made(tmp_path, "torch_models:WithMask", ["fp32"], inputs, {"relative_error": 1e-3})
    assert directory == earlier
    assert sorted(path.name for path in directory.iterdir()) == ["golden.npz", "headrace.json", "model"]
    assert not list(tmp_path.glob(".model.hr*"))
    module = torch_models.WithMask()
    wanted = [module(torch.tensor([ids]), torch.ones(1, len(ids)))["logits"][0].tolist() for ids in ([1, 2, 3], [7])]
    with serving(tmp_path, str(directory), "--name", "mine") as server:
        body = server.client.post("/predict", json={"inputs": [{"input_ids": [1, 2, 3]}, {"input_ids": [7]}]}).json()
        assert np.allclose(body["predictions"], wanted, atol=1e-5)
        wrong = server.predict({"x": [1]})
        assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "input")
        tensor = {"name": "input_ids", "datatype": "INT64", "shape": [1, 3], "data": [1, 2, 3]}
        inference = server.client.post("/v2/models/mine/infer", json={"inputs": [tensor]}).json()
        assert np.allclose(inference["outputs"][0]["data"], wanted[0], atol=1e-5)
