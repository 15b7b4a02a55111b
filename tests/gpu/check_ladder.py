"""On a machine with a GPU: the ladder by itself beside a hand-written bf16 + CUDA graphs, and the metrics of the card.

    python tests/gpu/check_ladder.py [--rungs A,B] [--out FILE.json]

The model has BERT-base's shape and random weights: speed depends on shapes alone. The tokenizer is made here. A script
of its own, since time on a GPU is dear: one call checks and measures everything.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from headrace import metrics
from headrace.machine import find_gpus
from headrace.optimizing.ladder import Wish, climb

LENGTH = 128


def make_model(directory: Path) -> None:
    """A BERT-base of random weights as a Hugging Face directory."""
    make_tokenizer(directory)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=30_522)).save_pretrained(directory)


def make_tokenizer(directory: Path) -> None:
    words = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(30_000))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[SEP]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))


def make_samples(file: Path, count: int = 200) -> None:
    draw = random.Random(0)
    lines = [" ".join(f"w{draw.randrange(30_000)}" for _ in range(LENGTH - 2)) for _ in range(count)]
    file.write_text("".join(json.dumps({"input": line}) + "\n" for line in lines))


def decoder() -> Any:
    """A decoder of Llama's shape with a billion parameters, random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
    )
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM(config)


def make_decoder(directory: Path) -> None:
    make_tokenizer(directory)
    model = decoder()
    print(sum(each.numel() for each in model.parameters()) / 1e9, "billion parameters")
    model.save_pretrained(directory)


def by_hand(directory: Path) -> dict[str, float]:
    """Milliseconds per batch of what an engineer would write: bf16, compiled with CUDA graphs, fixed shapes."""
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = torch.compile(model.eval().cuda(), mode="reduce-overhead")
    found = {}
    for batch in (1, 8, 32):
        ids = torch.randint(3, 30_000, (batch, LENGTH))
        mask = torch.ones_like(ids)

        def run(ids: Any = ids, mask: Any = mask) -> Any:
            with torch.inference_mode():
                hidden = model(input_ids=ids.cuda(), attention_mask=mask.cuda()).last_hidden_state
                return torch.nn.functional.normalize(hidden.mean(1), dim=-1).float().cpu()

        for _ in range(10):
            run()
        times = []
        for _ in range(50):
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
        found[str(batch)] = round(statistics.median(times), 3)
    return found


def card() -> dict[str, Any]:
    """The metrics of the card while something runs on it."""
    row = metrics.Row()
    gpus = find_gpus(row, None)
    assert gpus is not None
    ballast = torch.ones(1 << 28, device="cuda")  # 1 GiB
    for _ in range(20):
        ballast = ballast * 1.0
    gpus.sample()
    values = metrics.Reader(rows=[row]).values()
    found = {name: cells[0] for (name, labels), cells in values.items() if labels == ("cuda:0",)}
    assert found["gpu_memory_used_bytes"] > 1 << 30
    assert found["gpu_memory_total_bytes"] > found["gpu_memory_used_bytes"]
    assert found["headrace_gpu_power_watts"] > 10
    return found


def tell(row: Any) -> None:
    cells = {
        cell.batch: [
            round(cell.p50_ms, 2),
            *([round(cell.tokens_per_s), round(cell.share_of_bandwidth or 0, 3)] if cell.tokens_per_s else []),
            *([round(cell.share_of_peak, 3)] if cell.share_of_peak else []),
        ]
        for cell in row.cells
    }
    drift = {name: round(value, 6) for name, value in row.drift.items() if name in ("cos_min", "kl_mean", "top1")}
    speed = row.speedup and round(row.speedup, 2)
    print(row.rung, row.status, speed, cells, drift, "first", row.first_s, "s", row.reason[-300:], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["encoder", "decoder"], default="encoder")
    parser.add_argument("--rungs", default="")
    parser.add_argument("--objective", default="throughput")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cap-s", type=float, default=240.0)
    parser.add_argument("--effort", type=float, default=1.0)
    arguments = parser.parse_args()
    writes = arguments.model == "decoder"
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "model": "Llama's shape, 1.05 B parameters" if writes else f"BERT-base's shape, {LENGTH} tokens",
        "weights": "random",
        "card": card(),
    }
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        directory, samples = Path(folder) / "model", Path(folder) / "samples.jsonl"
        (make_decoder if writes else make_model)(directory)
        make_samples(samples)
        wish = Wish(
            str(directory),
            samples,
            objective=arguments.objective,
            rungs=[each for each in arguments.rungs.split(",") if each],
            device="cuda:0",
            cap_s=arguments.cap_s,
            effort=arguments.effort,
        )
        if not writes:
            result["by_hand_ms"] = by_hand(directory)
            print("by hand", result["by_hand_ms"], flush=True)
        torch.cuda.empty_cache()

        def keep(row: Any) -> None:
            """Told, and written at once: a run may be cut off before the last rung."""
            tell(row)
            result.setdefault("rows", []).append(msgspec.to_builtins(row))
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=2) + "\n")

        climbed = climb(wish, Path(folder) / "work", tell=keep)
        del result["rows"]
        result["report"] = msgspec.to_builtins(climbed.report)
        result["report"]["environment"]["packages"] = {}
        result["report"]["target"] = "model"  # the folder it was made in is gone by then
        tell(climbed.report.rows[0])
        print("chosen", climbed.report.chosen, climbed.report.noise, climbed.report.environment["bandwidth"] / 1e12)
        if not writes:
            best = next(row for row in climbed.report.rows if row.rung == climbed.report.chosen)
            shares = {cell.batch: result["by_hand_ms"][str(cell.batch)] / cell.p50_ms for cell in best.cells}
            result["of_by_hand"] = {batch: round(share, 3) for batch, share in shares.items()}
            print("of the speed by hand:", result["of_by_hand"])
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
