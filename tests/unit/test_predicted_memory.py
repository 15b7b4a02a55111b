"""What weights will take is said before they are loaded, and is what they take when they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headrace.errors import LoadError
from headrace.optimizing import predicted, report, rungs
from headrace.optimizing.words import Predicted
from headrace.runners import huggingface, parameters, recipes
from headrace.runners.parameters import Counted
from headrace.up import demo_model

SIZE = {"vocab_size": 2000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {
    "tied": transformers.LlamaConfig(**SIZE, intermediate_size=256, tie_word_embeddings=True),
    "apart": transformers.Qwen2Config(**SIZE, intermediate_size=256, tie_word_embeddings=False),
    # Its layers are no `torch.nn.Linear`, but for the head: nothing else is made of fewer bits.
    "other layers": transformers.GPT2Config(vocab_size=2000, n_embd=128, n_layer=2, n_head=4, n_positions=64),
}
BILLION = Counted("generate", 1_000_000_000, 900_000_000, 100_000_000)


def directory(config: Any, folder: Path) -> str:
    config.architectures = [f"{type(config).__name__.removesuffix('Config').replace('GPT2', 'GPT2LMHead')}ForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def loaded(target: str) -> Any:
    """The model with weights, as the ladder loads it."""
    config = transformers.AutoConfig.from_pretrained(target)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return huggingface.load_model(huggingface.Files.read(Path(target)), "generate", target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rung", ["fp32", "bf16", "torch-int8-dynamic"])
def test_what_is_predicted_without_weights_is_what_they_take(kind: str, rung: str, tmp_path: Path) -> None:
    target = directory(KINDS[kind], tmp_path)
    counted = parameters.count(target, "auto")
    assert counted is not None
    assert counted.task == "generate"
    model = loaded(target)
    assert counted.parameters == sum(each.numel() for each in model.parameters())
    found = rungs.find(rung)
    took = recipes.bytes_of(recipes.apply([word for word in found.recipe if word != "sdpa"], model, "cpu"))
    assert predicted.weights_bytes(counted, found) == pytest.approx(took, rel=0.02)


def test_an_encoder_is_counted_as_the_model_it_will_be() -> None:
    target = str(demo_model())
    counted = parameters.count(target, "auto")
    model = huggingface.load_model(huggingface.Files.read(Path(target)), "embed", target)
    assert counted is not None
    assert counted.parameters == sum(each.numel() for each in model.parameters())
    # Files of this model in 8 bits, as they were measured: tables as floats, and in 8 bits too.
    assert predicted.weights_bytes(counted, rungs.find("ort-int8-dynamic")) / 1e6 == pytest.approx(56.4, rel=0.05)
    assert predicted.weights_bytes(counted, rungs.find("openvino-int8-static")) / 1e6 == pytest.approx(21.9, rel=0.05)


@pytest.mark.parametrize(
    ("rung", "gigabytes"),
    [
        ("fp32", 4.0),
        ("kv-static", 4.0),
        ("fp16", 2.0),
        ("bf16+kv-static+compile+graphs", 2.0),
        ("torchao-int8-weights", 0.9 + 0.2 * 4),
        ("bf16+torchao-int8-weights", 0.9 + 0.2 * 2),
        ("torchao-int4", 0.9 * 4.25 / 8 + 0.2 * 2),
        ("nf4", 0.9 * 4.127 / 8 + 0.2 * 4),
        ("ort-int8-weights", 0.9 * 9 / 8 + 0.2 * 4),
        ("ort-int4-weights", 0.9 * 5 / 8 + 0.2 * 4),
        ("ort-int8-static", 1.1),
        ("torch-int8-static", 0.9 + 0.2 * 4),
    ],
)
def test_linear_layers_have_the_bits_of_the_rung_and_a_table_that_serves_twice_is_kept_twice(
    rung: str, gigabytes: float
) -> None:
    assert predicted.weights_bytes(BILLION, rungs.find(rung)) / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def test_of_a_file_of_torchs_own_the_size_is_known_and_of_a_factory_nothing(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    file.write_bytes(bytes(4000))
    assert parameters.count(str(file), "auto") == Counted("", 1000, 1000)
    assert parameters.count(str(tmp_path / "none.pt"), "auto") is None
    assert parameters.count("ladder_models:Rows", "auto") is None


def test_a_model_that_transformers_does_not_know_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard of", "architectures": ["UnheardModel"]}')
    assert parameters.count(str(tmp_path), "auto") is None


def foreseen(**more: Any) -> Predicted:
    usual: dict[str, Any] = {"device": "cpu", "memory_bytes": 64 << 30, "cap_bytes": 50 << 30}
    wanted = [rungs.find(each) for each in ("sdpa", "bf16", "nf4")]
    return predicted.predict(BILLION, wanted, **(usual | more))


def test_what_will_be_taken_is_said_rung_by_rung() -> None:
    told = report.foreseen(foreseen())
    assert " ".join(told.split()) == (
        "1 B parameters, weights in memory about: fp32, sdpa 3.73 GiB; bf16 1.86 GiB; nf4 1.18 GiB; "
        "this machine has 64 GiB"
    )
    usual = [rungs.find(each) for each in rungs.usual("cpu", "embed")]
    long = report.foreseen(predicted.predict(BILLION, usual, "cpu", 1 << 30, 1 << 30))
    assert max(map(len, long.splitlines())) <= report.WIDTH
    assert "warning: two processes hold the model at a time, about 7.45 GiB where this machine has 1 GiB" in long
    assert "warning" not in told


def test_a_model_that_cannot_be_held_in_float32_is_refused() -> None:
    predicted.check(foreseen())
    with pytest.raises(LoadError, match=r"1 B parameters take about 3\.73 GiB in float32, more than the cap of 3 GiB"):
        predicted.check(foreseen(cap_bytes=3 << 30))
    with pytest.raises(LoadError, match=r"side by side, is more than the 6 GiB of the GPU"):
        predicted.check(foreseen(device="cuda:0", memory_bytes=6 << 30))
    predicted.check(foreseen(memory_bytes=6 << 30))  # a CPU's memory may be shared by what is read from one file


def test_counting_takes_no_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    big = transformers.LlamaConfig(**sizes, num_attention_heads=64, num_key_value_heads=8)
    counted = parameters.count(directory(big, tmp_path), "auto")
    assert counted is not None
    assert counted.parameters == pytest.approx(70.6e9, rel=0.01)
    files = huggingface.Files.read(tmp_path)
    assert {each.device for each in huggingface.empty_model(files, "generate").parameters()} == {torch.device("meta")}
