"""A language model through the ladder by its command, and its artifact behind HTTP without torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import HEADRACE, serving

SENTENCES = [
    f"Water that has turned wheel number {number} comes to the next one, and turns it too." for number in range(12)
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A small Llama of random weights, with the tokenizer of another model."""
    import torch
    import transformers

    directory = tmp_path_factory.mktemp("language") / "source"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30_522,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=102,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((minilm / "tokenizer.json").read_bytes())
    return directory


@pytest.fixture(scope="module")
def climbed(source: Path) -> tuple[Path, dict[str, Any]]:
    samples, out = source.parent / "samples.jsonl", source.parent / "fast.hr"
    samples.write_text("".join(json.dumps({"input": each}) + "\n" for each in SENTENCES))
    # Memory is what does not depend on how busy the machine is: the choice is among all that were measured.
    rungs = ("kv-static", "ort-int8-weights", "packed", "compile")
    arguments = ["--samples", str(samples), "--rungs", ",".join(rungs), "--threads", "1", "--effort", "0.1"]
    done = subprocess.run(
        [HEADRACE, "optimize", str(source), *arguments, "--objective", "memory", "--out", str(out), "--format", "json"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_every_way_is_measured_with_prefill_and_decode_apart(climbed: tuple[Path, dict[str, Any]]) -> None:
    _, report = climbed
    assert report["task"] == "generate"
    rows = {row["rung"]: row for row in report["rows"]}
    for rung in ("fp32", "kv-static", "ort-int8-weights"):
        assert rows[rung]["status"] not in ("unavailable", "build_failed", "crashed", "timeout"), rows[rung]
        for cell in rows[rung]["cells"]:
            assert 0 < cell["prefill_ms"] < cell["p95_ms"]
            assert cell["tokens_per_s"] > 0
            assert 0 < cell["share_of_bandwidth"] < 1
    assert rows["kv-static"]["drift"]["kl_mean"] < 1e-5  # the same sums in another order
    assert rows["kv-static"]["drift"]["top1"] > 0.99
    assert rows["ort-int8-weights"]["drift"]["kl_mean"] < 0.02
    assert rows["packed"]["status"] == rows["compile"]["status"] == "unavailable"
    assert "kv-static+compile" in rows["compile"]["reason"]


def test_the_artifact_goes_on_with_a_text(climbed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = climbed
    with serving(tmp_path, str(out), "--name", "writer") as server:
        answer = httpx.post(f"{server.url}/predict", json={"input": SENTENCES[0]}, timeout=30)
        assert answer.status_code == 200, answer.text
        found = answer.json()["prediction"]
        assert found["tokens"] > 0
        assert found["text"]
        again = httpx.post(f"{server.url}/predict", json={"input": SENTENCES[0]}, timeout=30)
        assert again.json()["prediction"] == found
