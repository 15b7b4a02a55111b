"""On a machine with a GPU: an encoder's layers in 8 bits beside bfloat16, compiled one for all or as a whole, captured.

    python tests/gpu/check_eight_bits.py [--bits bf16|fp8|int8] [--compiled whole|layers|none] [--search] [--out FILE]

One way a process, since what torch has compiled for one changes what it does for the next. Times are of the graph
alone, without copies; the ladder (`check_ladder.py`) counts those.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torchao
import transformers
from torchao import quantization as ao

LENGTH = 128
SIZES = (32, 8, 1)


def make(bits: str, compiled: str, search: bool) -> tuple[Any, Any]:
    """The model as it is, and in another way."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30_522)
    plain = transformers.BertModel(config).eval().cuda()
    model = transformers.BertModel(config)
    model.load_state_dict(plain.state_dict())
    model = model.eval().cuda().to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    if bits == "fp8":
        by_row = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=search)
        ao.quantize_(model.encoder, by_row)
    elif bits == "int8":
        torch._inductor.config.force_fuse_int_mm_with_mul = True
        ao.quantize_(model.encoder, ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=search))
    if compiled == "layers":
        for layer in model.encoder.layer:
            layer.compile(dynamic=False)
    elif compiled == "whole":
        model = torch.compile(model, dynamic=False)
    return plain, model


def measure(plain: Any, model: Any, size: int) -> dict[str, float]:
    ids = torch.randint(3, 30_000, (size, LENGTH), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a mask that masks nothing is left out, but not of what is captured
    began = time.perf_counter()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(input_ids=ids, attention_mask=mask)
        stream.synchronize()
        compiled_s = time.perf_counter() - began
        with torch.cuda.graph(graph, stream=stream):
            found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    graph.replay()
    wanted = plain(input_ids=ids, attention_mask=mask).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(found.float().mean(1), wanted.mean(1), dim=-1).min()
    times = []
    for _ in range(60):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return {
        "ms": round(statistics.median(times), 3),
        "compiled_in_s": round(compiled_s, 1),
        "cos_min": round(float(cosine), 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", choices=["bf16", "fp8", "int8"], default="bf16")
    parser.add_argument("--compiled", choices=["whole", "layers", "none"], default="layers")
    parser.add_argument("--search", action="store_true", help="torchao's search for block sizes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    plain, model = make(arguments.bits, arguments.compiled, arguments.search)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "torchao": torchao.__version__,
        "transformers": transformers.__version__,
        "bits": arguments.bits,
        "compiled": arguments.compiled,
        "block_sizes_searched": arguments.search,
    }
    with torch.inference_mode():
        for size in SIZES:
            result[str(size)] = measure(plain, model, size)
            print(size, result[str(size)], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
