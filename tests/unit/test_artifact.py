"""Artifacts: what is refused, with what to do; what is fallen back to; what a front end learns of them."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace import artifact
from headrace.artifact import Manifest, Requires, Subject, TensorSpec
from headrace.config import ModelConfig
from headrace.core import TextSpec
from headrace.errors import ConfigError, InvalidInput, LoadError, Unavailable
from headrace.runners import Loaded, collate, drift, engines, open_target
from headrace.runners.artifact import prepare, read_golden, write_golden
from headrace.serving.protocols.tensors import forms_of

TABLE = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
IDS = TensorSpec("input_ids", "int64", [0], below=64)
MASK = TensorSpec("attention_mask", "int64", [0], mask=True)
TOKENS = Subject("module:factory", "logits", [IDS, MASK], activation="none")
ITEMS = [{"input_ids": np.arange(1, 2 + number % 5) * (number + 1) % 64} for number in range(8)]


def answer(item: dict[str, Any]) -> np.ndarray[Any, Any]:
    mask = item.get("attention_mask", np.ones(len(item["input_ids"])))
    return np.asarray((TABLE[item["input_ids"]] * mask[:, None]).sum(0), np.float32)


def onnx_model(path: Path) -> None:
    """Sums the rows of a table that the ids name, those that are masked left out."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["weights"]),
        helper.make_node("Mul", ["rows", "weights"], ["real"]),
        helper.make_node("ReduceSum", ["real", "first"], ["output"], keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["items", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["items", 3])
    constants = {"table": TABLE, "last": np.array([2]), "first": np.array([1])}
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "sum", inputs, [output], weights)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), path)


def make(directory: Path, subject: Subject = TOKENS, golden_error: float = 0.0, **manifest: Any) -> Path:
    """A whole artifact of the model above."""
    directory.mkdir(parents=True, exist_ok=True)
    onnx_model(directory / engines.ONNX_FILE)
    write_golden(directory, ITEMS, [answer(item) + golden_error for item in ITEMS])
    known: dict[str, Any] = {
        "requires": Requires(packages=artifact.installed(["onnxruntime"]), device="cpu"),
        "budget": {"relative_error": 1e-3} if subject.task == "logits" else {},
    }
    artifact.write(directory, Manifest(rung="ort", engine="onnx", subject=subject, **(known | manifest)))
    return directory


def load(directory: Path, found: str = "cpu", **options: Any) -> Loaded:
    """Args: found: the device that the worker was given."""
    return open_target(ModelConfig(name="m", target=str(directory), **options), found)


def refusal(directory: Path, **options: Any) -> LoadError:
    with pytest.raises(LoadError) as caught:
        load(directory, **options)
    assert caught.value.hint, "says what to do"
    return caught.value


def rewrite(directory: Path, **changes: Any) -> None:
    """Change the manifest and nothing else."""
    path = directory / artifact.MANIFEST
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | changes))


def test_an_artifact_answers_as_the_model_did(tmp_path: Path) -> None:
    loaded = load(make(tmp_path))
    items = [{"input_ids": [3, 4, 5]}, {"input_ids": [9]}, {"input_ids": [1, 2], "attention_mask": [1, 0]}, [7, 8]]
    prepared = [loaded.prepare(item) for item in items]
    assert [loaded.cost(item) for item in prepared] == [3, 1, 2, 2]
    found = [loaded.finish(output) for output in loaded.runner.run(prepared)]
    assert np.allclose(found, [answer(item) for item in prepared], atol=1e-6)
    assert loaded.example is not None
    assert loaded.cost(loaded.example(4)) == 4


@pytest.mark.parametrize("name", [engines.ONNX_FILE, artifact.GOLDEN])
def test_one_changed_byte_is_refused(tmp_path: Path, name: str) -> None:
    file = make(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    error = refusal(tmp_path)
    assert f"{name} is not the file that was made" in error.message
    assert "copy the whole directory again" in (error.hint or "")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (make(tmp_path) / engines.ONNX_FILE).unlink()
    assert f"lacks its file {engines.ONNX_FILE}" in refusal(tmp_path).message


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    rewrite(make(tmp_path), schema=2)
    error = refusal(tmp_path)
    assert "is of schema 2, this headrace reads 1" in error.message
    assert "make the artifact again" in (error.hint or "")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"schema": 1, "rung": 7}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (make(tmp_path) / artifact.MANIFEST).write_bytes(content)
    assert "is no manifest" in refusal(tmp_path).message


@pytest.mark.parametrize(
    "changes", [{"fallback": ["../elsewhere"]}, {"files": {"/etc/hostname": {"sha256": "0", "size": 1}}}]
)
def test_an_artifact_stays_within_its_directory(tmp_path: Path, changes: dict[str, Any]) -> None:
    rewrite(make(tmp_path), **changes)
    assert "outside its directory" in refusal(tmp_path).message


def test_missing_instructions_are_named_before_anything_runs(tmp_path: Path) -> None:
    make(tmp_path, requires=Requires(isa=["avx2", "avx9000"]))
    error = refusal(tmp_path)
    assert "needs a processor with" in error.message
    assert "avx9000" in error.message
    assert "run headrace optimize on this machine" in (error.hint or "")


@pytest.mark.parametrize(
    ("version", "words", "hint"),
    [
        ("1.5.0+cpu", "made with onnxruntime 1.5.0+cpu, here is", "pip install 'onnxruntime==1.5.0'"),
        (None, "needs no_such_package", "pip install 'no_such_package==1.0'"),
    ],
)
def test_other_packages_are_refused(tmp_path: Path, version: str | None, words: str, hint: str) -> None:
    make(tmp_path, requires=Requires(packages={"onnxruntime": version} if version else {"no_such_package": "1.0"}))
    error = refusal(tmp_path)
    assert words in error.message
    assert hint in (error.hint or "")


def test_a_later_patch_or_any_version_will_do() -> None:
    needs = Requires(packages={"onnxruntime": "1.20.0", "torch": ""})
    manifest = Manifest(rung="ort", engine="onnx", subject=TOKENS, requires=needs)
    artifact.check_machine(manifest, packages={"onnxruntime": "1.20.3", "torch": "9.9"})


def test_packages_are_found_by_the_name_they_are_imported_by() -> None:
    found = artifact.installed(["msgspec", "ag_ui", "no_such_package"])
    assert found.keys() == {"msgspec", "ag_ui"}, "ag_ui comes with ag-ui-protocol"
    assert found["msgspec"] == msgspec.__version__


@pytest.mark.parametrize(
    ("engine", "needed", "here", "fits"),
    [
        ("torch", "8.9", "9.0", True),
        ("torch", "8.9", "8.0", False),
        ("torch", "9.0", "10.0", True),
        ("torch", "8.0", "", False),
        ("aot", "9.0", "9.0", True),
        ("aot", "8.0", "9.0", False),
    ],
)
def test_compiled_code_wants_the_very_gpu_and_others_one_that_can(
    engine: Any, needed: str, here: str, fits: bool
) -> None:
    manifest = Manifest(rung="x", engine=engine, subject=TOKENS, requires=Requires(device="cuda", capability=needed))

    def check() -> None:
        artifact.check_machine(manifest, packages={}, device="cuda:1", capability=here)

    if fits:
        check()
    else:
        with pytest.raises(LoadError, match=f"compute capability {needed}"):
            check()


def test_an_artifact_for_a_gpu_is_refused_on_a_cpu(tmp_path: Path) -> None:
    make(tmp_path, requires=Requires(device="cuda"))
    error = refusal(tmp_path)
    assert "made for cuda and is to run on cpu" in error.message
    assert error.field == "device"


def test_an_artifact_for_a_cpu_does_not_mind_a_gpu_unless_that_is_asked_for(tmp_path: Path) -> None:
    make(tmp_path)
    assert load(tmp_path, "cuda:0").info.device == "cpu"
    with pytest.raises(LoadError, match="made for cpu and is to run on cuda:0"):
        load(tmp_path, "cuda:0", device="cuda")


def test_onnx_runtime_without_gpus_says_so(tmp_path: Path) -> None:
    """By itself it would run on the CPU without a word."""
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this one has GPUs")
    make(tmp_path)
    with pytest.raises(Unavailable, match="runs on a CPU only"):
        engines.open_onnx(tmp_path, "cuda:0", 1)


def test_another_task_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ConfigError, match="made for logits, not for embed"):
        load(tmp_path, task="embed")


def test_golden_answers_out_of_their_bounds_are_refused(tmp_path: Path) -> None:
    make(tmp_path, golden_error=1.0)
    error = refusal(tmp_path)
    assert "does not answer here as it did: relative_error" in error.message
    assert "run headrace optimize on this machine" in (error.hint or "")


def test_bounds_of_batches_are_tested_too(tmp_path: Path) -> None:
    make(tmp_path, budget={"relative_error": 1e-3, "batch_cos_min": 0.999})
    load(tmp_path)
    rewrite(tmp_path, budget={"batch_cos_min": 1.1})
    assert "batch_cos_min" in refusal(tmp_path).message


def test_what_was_not_measured_breaks_its_bound() -> None:
    assert drift.breaches({"cos_mean": 1.0}, {"kl_mean": 0.1}) == "kl_mean could not be measured"


def test_front_ends_learn_that_items_are_tensors_and_what_runs_them(tmp_path: Path) -> None:
    info = load(make(tmp_path)).info
    assert (info.platform, info.tensors) == ("onnxruntime", True)
    (form, named) = forms_of(info)
    assert form.slots["input"].tensor.datatype == "FP32"
    assert named.named


def test_a_measure_that_is_no_number_breaks_its_bound() -> None:
    assert drift.breaches({"spearman": float("nan")}, {"spearman": 0.9})
    assert drift.breaches({"kl_mean": float("nan")}, {"kl_mean": 0.1})
    assert not drift.breaches({"spearman": 0.9, "kl_mean": 0.1}, {"spearman": 0.9, "kl_mean": 0.1})


def test_what_an_engine_cannot_read_is_refused_in_its_words(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / engines.ONNX_FILE).write_bytes(b"no model")
    artifact.write(tmp_path, artifact.parse(tmp_path))  # the digests fit
    assert "cannot be run here: InvalidProtobuf" in refusal(tmp_path).message


def test_a_fallback_takes_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path / "fallback" / "old", requires=Requires(packages={"onnxruntime": "1.5.0"}))
    make(tmp_path / "fallback" / "plain")
    make(tmp_path, fallback=["fallback/old", "fallback/plain"])
    with caplog.at_level(logging.INFO):
        load(tmp_path)
        assert "WARNING" not in caplog.text
        with (tmp_path / engines.ONNX_FILE).open("ab") as file:
            file.write(b"x")
        loaded = load(tmp_path)
    assert np.allclose(loaded.runner.run([ITEMS[3]])[0], answer(ITEMS[3]), atol=1e-6)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "model.onnx is not the file that was made" in warning
    assert "made with onnxruntime 1.5.0" in warning
    assert "using its fallback fallback/plain" in warning


def test_where_nothing_is_left_each_reason_is_given(tmp_path: Path) -> None:
    make(tmp_path / "fallback" / "old", requires=Requires(packages={"onnxruntime": "1.5.0"}))
    make(tmp_path / "fallback" / "wrong", golden_error=1.0)
    make(tmp_path, requires=Requires(isa=["avx9000"]), fallback=["fallback/old", "fallback/wrong", "fallback/none"])
    message = refusal(tmp_path).message
    for words in ("avx9000", "pip install 'onnxruntime==1.5.0'", "relative_error", "cannot read"):
        assert words in message


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        ({"x": [1]}, "input.x", "the model takes input_ids, attention_mask"),
        ({"attention_mask": [1]}, "input.input_ids", "missing"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "input.attention_mask", "has 1 entries where others have 2"),
        ({"input_ids": [1.5]}, "input.input_ids", "must be whole numbers"),
        ({"input_ids": ["a"]}, "input.input_ids", "must be whole numbers"),
        ({"input_ids": []}, "input.input_ids", "is empty"),
        ({"input_ids": 3}, "input.input_ids", "has shape []"),
        ({"input_ids": [[1], [2, 3]]}, "input.input_ids", "rows differ in length"),
        ({"input_ids": [[1, 2], [3, 4]]}, "input.input_ids", "has shape [2, 2]"),
        ([[1, 2], [3, 4]], "input", "has shape [2, 2]"),
        ({"input_ids": [64]}, "input.input_ids", "ids go from 0 to 63"),
        ({"input_ids": [-1]}, "input.input_ids", "ids go from 0 to 63"),
        ({"input_ids": [2**63]}, "input.input_ids", "64 bits"),
    ],
)
def test_a_wrong_item_is_named(value: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        prepare(TOKENS, value)
    assert caught.value.field == field
    assert words in caught.value.message


def test_items_of_several_tensors_and_of_fixed_shapes() -> None:
    pair = Subject("m:f", "logits", [TensorSpec("a", "float32", [2]), TensorSpec("b", "float32", [])])
    item = prepare(pair, {"a": [1, 2.5], "b": 3})
    assert (item["a"].tolist(), item["b"].tolist(), item["a"].dtype) == ([1, 2.5], 3, np.float32)
    with pytest.raises(InvalidInput, match="must be an object of a, b"):
        prepare(pair, [1, 2])
    with pytest.raises(InvalidInput, match=r"has shape \[3\], the model takes \[2\]"):
        prepare(pair, {"a": [1, 2, 3], "b": 3})


def test_packed_batches_run_in_groups_of_near_lengths() -> None:
    sizes: list[tuple[int, int]] = []

    def engine(batch: dict[str, Any]) -> Any:
        sizes.append(batch["input_ids"].shape)
        return (TABLE[batch["input_ids"]] * batch["attention_mask"][..., None]).sum(1)

    items = [{"input_ids": np.full(length, number)} for number, length in enumerate([20, 2, 19, 2, 20])]
    for packed, expected in [(False, [(5, 20)]), (True, [(3, 20), (2, 2)])]:
        found = collate.run(engine, items, TOKENS, packed)
        assert np.allclose(found, [answer(item) for item in items], atol=1e-4)
        assert sizes == expected
        sizes.clear()


@pytest.mark.parametrize(("recipe", "widths"), [([], [20] * 5), (["packed"], [20, 2, 20, 2, 20])])
def test_an_artifact_is_run_packed_where_its_manifest_says_so(
    tmp_path: Path, recipe: list[str], widths: list[int]
) -> None:
    """The model answers how many columns it was given."""
    nodes = [
        helper.make_node("Equal", ["input_ids", "input_ids"], ["always"]),
        helper.make_node("Cast", ["always"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ones", "columns"], ["output"], keepdims=0),
    ]
    make(tmp_path)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["items", "length"])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["items"])
    columns = numpy_helper.from_array(np.array([1]), "columns")
    graph = helper.make_graph(nodes, "width", [ids], [output], [columns])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / engines.ONNX_FILE)
    write_golden(tmp_path, ITEMS, [len(item["input_ids"]) for item in ITEMS])
    artifact.write(tmp_path, msgspec.structs.replace(artifact.parse(tmp_path), recipe=recipe))
    items = [{"input_ids": np.full(width, 1)} for width in (20, 2, 20, 2, 20)]
    assert load(tmp_path).runner.run(items) == widths


def text_artifact(directory: Path, minilm: Path, task: str, **subject: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(minilm / "tokenizer.json", directory)
    spec = TextSpec("tokenizer.json", 12, 64)
    return make(directory, Subject("a model", task, [IDS, MASK], text=spec, **subject))


@pytest.mark.parametrize(
    ("activation", "scores"),
    [
        ("softmax", lambda row: np.exp(row) / np.exp(row).sum()),
        ("sigmoid", lambda row: 1 / (1 + np.exp(-row))),
        ("none", lambda row: row),
    ],
)
def test_a_classifier_answers_with_labels(tmp_path: Path, minilm: Path, activation: str, scores: Any) -> None:
    labels = ["bad", "fair", "good"]
    loaded = load(text_artifact(tmp_path, minilm, "classify", labels=labels, activation=activation))
    found = loaded.finish(loaded.runner.run([np.array([5, 6], np.int32)])[0])
    wanted = scores(answer({"input_ids": np.array([5, 6])}))
    assert list(found["scores"]) == labels
    assert np.allclose(list(found["scores"].values()), wanted, atol=1e-5)
    assert (found["label"], found["score"]) == (labels[int(wanted.argmax())], max(found["scores"].values()))
    assert b'"label"' in loaded.info.output_schema


def test_front_ends_learn_how_to_read_texts(tmp_path: Path, minilm: Path) -> None:
    directory = text_artifact(tmp_path, minilm, "embed", width=3)
    loaded = load(directory, max_input_chars=99)
    assert loaded.info.text == TextSpec(str(directory / "tokenizer.json"), 12, 64)
    assert (loaded.info.task, loaded.info.width, loaded.info.platform) == ("embed", 3, "onnxruntime")
    assert msgspec.json.decode(loaded.info.item_schema) == {"type": "string", "maxLength": 99}
    assert loaded.example is not None
    assert loaded.cost(loaded.example(8)) == 8
    shorter = load(directory, max_batch_tokens=5).info.text
    assert shorter is not None
    assert shorter.max_tokens == 5


def test_nothing_of_torch_is_imported_for_onnx(tmp_path: Path, minilm: Path) -> None:
    code = (
        "import sys; from headrace.config import ModelConfig; from headrace.runners import open_target\n"
        "import headrace.serving.worker_process, numpy\n"
        "loaded = open_target(ModelConfig(name='m', target=sys.argv[1]), 'cpu')\n"
        "assert len(loaded.runner.run([numpy.array([5, 6], numpy.int32)])) == 1\n"
        "print(*sys.modules)"
    )
    directory = text_artifact(tmp_path, minilm, "embed", width=3)
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "onnxruntime" in loaded
    assert not {"torch", "transformers", "safetensors", "openvino", "onnx"} & loaded


def test_golden_items_come_back_as_they_went(tmp_path: Path) -> None:
    items = [{"a": np.arange(3), "b.c": np.ones((2, 2), np.float32)} for _ in range(11)]
    write_golden(tmp_path, items, [np.float32(number) for number in range(11)])
    found, outputs = read_golden(tmp_path)
    assert [output.item() for output in outputs] == list(range(11))
    assert all(np.array_equal(item[name], items[0][name]) for item in found for name in items[0])
