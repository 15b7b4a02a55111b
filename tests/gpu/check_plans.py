"""On a machine with a GPU: what cuDNN's attention takes to plan a new shape, and what it saves where shapes are few.

    python tests/gpu/check_plans.py [--out FILE.json]

Why `recipes.takes_any_shape` leaves it out where batches come in any shape, and keeps it where few shapes are captured.
With and without it in turns; the model has BERT-base's shape, the decoder a billion parameters, both in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from check_ladder import decoder

from headrace.clock import perf_counter
from headrace.runners.decoder import Decoder, TorchLanguage
from headrace.runners.language import left_padded

TURNS = 2
NEW_SHAPES = 15
PROMPTS = 8
TOKENS = 32
CAPTURED = ((1, 32), (8, 64), (32, 128), (8, 512))


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=4096), add_pooling_layer=False)
    model.set_attn_implementation("sdpa")
    return model.eval().to("cuda", torch.bfloat16)


def batch(items: int, length: int) -> dict[str, torch.Tensor]:
    """With padding: without any, attention takes no mask, and another kernel."""
    mask = torch.ones((items, length), dtype=torch.int64, device="cuda")
    mask[0, -1] = 0
    return {"input_ids": torch.randint(4, 4096, (items, length), device="cuda"), "attention_mask": mask}


def milliseconds(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = perf_counter()
    call()
    torch.cuda.synchronize()
    return (perf_counter() - began) * 1e3


def replayed(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> float:
    """Median milliseconds of a captured call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(**given)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            model(**given)
    return statistics.median(milliseconds(graph.replay) for _ in range(50))


def written(language: TorchLanguage, draw: random.Random) -> tuple[float, float]:
    """Milliseconds until the first token, and tokens a second after it, of one text of a new length."""
    ids, pads = left_padded([torch.randint(4, 32_000, (draw.randint(20, 400),)).to(torch.int32).numpy()])
    made = language.generate(ids, pads, TOKENS)
    return made.prefill_s * 1e3, (TOKENS - 1) / made.decode_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
    }
    draw = random.Random(0)
    model, written_by = encoder(), decoder().to(torch.bfloat16).eval()
    written_by.set_attn_implementation("sdpa")
    language = TorchLanguage(Decoder(written_by), "cuda:0", "kv-dynamic")
    with torch.inference_mode():
        model(**batch(1, 16))
        written(language, draw)
        for turn in range(TURNS):
            for planned in (True, False):
                torch.backends.cuda.enable_cudnn_sdp(planned)
                shapes = [(draw.randint(1, 32), draw.randint(5, 127)) for _ in range(NEW_SHAPES)]
                new = [milliseconds(functools.partial(model, **batch(*shape))) for shape in shapes]
                again = [milliseconds(functools.partial(model, **batch(*shape))) for shape in shapes]
                texts = [written(language, draw) for _ in range(PROMPTS)]
                found = {
                    "encoder, a new shape, ms": statistics.median(new),
                    "encoder, the same shapes again, ms": statistics.median(again),
                    "decoder, first token of a new length, ms": statistics.median(first for first, _ in texts),
                    "decoder, tokens/s after it": statistics.median(rate for _, rate in texts),
                    **{f"encoder, captured, {shape}, ms": replayed(model, batch(*shape)) for shape in CAPTURED},
                }
                found = {name: round(value, 3) for name, value in found.items()}
                result.setdefault("with cuDNN's attention" if planned else "without", []).append(found)
                print(turn, planned, found, flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
