"""Ways to run an encoder of BERT-base's shape on an NVIDIA GPU, timed in turns: what `runners/graphs.py` was chosen by.

    python benchmarks/gpu_encoder.py [--out FILE.json] [--only NAME,NAME]

Every way gets arrays of the host and gives arrays of the host: copies and waiting are in its time. The bound is what
the card does in bf16 on the model's matrix products alone. Random weights: speed depends on shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from headrace.artifact import Subject, TensorSpec
from headrace.core import TextSpec
from headrace.runners import engines, graphs, layouts, varlen
from headrace.runners.subject import TextEncoder

Way = Callable[[dict[str, Any]], Any]

DEVICE = "cuda:0"
LENGTH = 128
BATCHES = ((1, False), (32, False), (32, True))
SUBJECT = Subject(
    "bert",
    "embed",
    [TensorSpec("input_ids", "int64", [0]), TensorSpec("attention_mask", "int64", [0], mask=True)],
    text=TextSpec("", 512, 30_522, 0),
)
# Multiply-adds of one token in the products with weights, and per pair of tokens in attention.
PARAMETERS = 12 * (4 * 768 * 768 + 2 * 768 * 3072)
PAIRS = 12 * 2 * 768


def encoder(dtype: Any = torch.bfloat16, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30_522, attn_implementation=attention)
    model = transformers.BertModel(config, add_pooling_layer=False).eval().to(dtype).to(DEVICE)

    def finish(output: Any, mask: Any) -> Any:
        weights = mask.unsqueeze(-1).float()
        vectors = (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(vectors, dim=-1)

    return TextEncoder(model, finish).eval()


def batch_of(items: int, mixed: bool, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(16, LENGTH, items, endpoint=True) if mixed else np.full(items, LENGTH)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    return {"input_ids": draw.integers(3, 30_000, mask.shape) * mask, "attention_mask": mask}


def by_hand() -> Way:
    model = torch.compile(encoder(), mode="reduce-overhead")

    def run(batch: dict[str, Any]) -> Any:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(value).cuda() for name, value in batch.items()}
            return model(**tensors).cpu().numpy()

    return run


def captured(change: Callable[[Any], Any], layout: Any = layouts.Padded) -> Callable[[], Way]:
    return lambda: graphs.Captured(change(encoder()), DEVICE, layout(SUBJECT))


def ragged(**options: Any) -> Callable[[Any], Any]:
    return lambda text: torch.compile(varlen.exchange(text, DEVICE), **options)


def fp8(text: Any) -> Any:
    import torchao.quantization as ao

    ao.quantize_(text, ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()))
    return text


WAYS: dict[str, Callable[[], Way]] = {
    "fp32 eager": lambda: engines.module_engine(encoder(torch.float32, "eager"), DEVICE),
    "by hand": by_hand,
    "bf16+graphs": captured(lambda text: text),
    "bf16+compile+graphs": captured(lambda text: torch.compile(text, dynamic=False)),
    "bf16+compile(dynamic)+graphs": captured(lambda text: torch.compile(text, dynamic=True)),
    "varlen+compile+graphs": captured(ragged(dynamic=False), layouts.Ragged),
    "varlen+compile(dynamic)+graphs": captured(ragged(dynamic=True), layouts.Ragged),
    "varlen+fp8+graphs": captured(lambda text: fp8(varlen.exchange(text, DEVICE)), layouts.Ragged),
}


def bound_ms(batch: dict[str, Any], peak: float) -> float:
    lengths = batch["attention_mask"].sum(1).astype(float)
    return float(2 * (PARAMETERS * lengths.sum() + PAIRS * (lengths**2).sum()) / peak * 1e3)


def peak_flops() -> float:
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(3):
        a @ a
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        a @ a
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (begin.elapsed_time(end) / 1e3)


def timed(run: Way, batch: dict[str, Any], least_s: float = 0.15) -> float:
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < least_s or len(times) < 5:
        start = time.perf_counter()
        run(batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    batches = {each: batch_of(*each) for each in BATCHES}
    peak = peak_flops()
    wanted = [each for each in arguments.only.split(",") if each] or list(WAYS)
    runs, answers, built = {}, {}, {}
    for name in ["fp32 eager", *(each for each in wanted if each != "fp32 eager")]:
        began = time.perf_counter()
        try:
            run = WAYS[name]()
            answers[name] = {key: run(batch) for key, batch in batches.items()}
        except Exception as error:
            print(name, "failed:", type(error).__name__, str(error)[:400], flush=True)
            continue
        runs[name], built[name] = run, round(time.perf_counter() - began, 1)
        print(name, "built in", built[name], "s", flush=True)
    times: dict[str, dict[Any, list[float]]] = {name: {key: [] for key in batches} for name in runs}
    for _ in range(arguments.rounds):
        for key, batch in batches.items():
            for name, run in runs.items():
                times[name][key].append(timed(run, batch))
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peak_bf16_tflops": round(peak / 1e12, 1),
        "rounds": arguments.rounds,
        "ways": {},
    }
    for name in runs:
        cells = {}
        for key, batch in batches.items():
            ms = statistics.median(times[name][key])
            a, b = answers["fp32 eager"][key], answers[name][key]
            cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            cells[f"{key[0]}{'-mixed' if key[1] else ''}"] = {
                "ms": round(ms, 3),
                "share_of_peak": round(bound_ms(batch, peak) / ms, 3),
                "cos_min": round(float(cosine.min()), 6),
            }
        result["ways"][name] = {"build_s": built[name], "cells": cells}
        print(f"{name:34}", *(f"{key}:{cell['ms']:.2f}" for key, cell in cells.items()), flush=True)
        print(f"{'':34}", *(f"{cell['share_of_peak']:.0%}/{cell['cos_min']:.4f}" for cell in cells.values()))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
