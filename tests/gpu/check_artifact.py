"""On a machine with a GPU: artifacts of the ladder beside the model they were made of, through the server.

    CXX=g++ python tests/gpu/check_artifact.py [--rungs A,B] [--rounds 3] [--seconds 4] [--out FILE.json]

Each rung is measured, packed and served; all are served at once on one GPU, and load goes to one at a time, in turns.
The first round meets shapes that were not captured, or compiled, yet: it is told apart. Answers are those of the model.
It fails unless every artifact answers more requests than its model in the rounds after the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from check_serving import PORT, Asked, make_encoder, serving

from headrace.clock import perf_counter

CLIENTS = (1, 64)


def optimized(model: Path, samples: Path, rung: str, artifact: Path) -> dict[str, Any]:
    """Let the ladder try one rung and keep it: its row of the report."""
    command = [sys.executable, "-m", "headrace", "optimize", str(model), "--samples", str(samples), "--rungs", rung]
    command += ["--device", "cuda:0", "--out", str(artifact), "--effort", "0.1", "--cap-s", "200", "--format", "json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=400)
    report = json.loads((artifact / "report.json").read_text())
    row = next(row for row in report["rows"] if row["rung"] == rung)
    assert report["chosen"] == rung, (row["status"], row["reason"], row["speedup_ci"])
    return {name: row[name] for name in ("speedup", "speedup_ci", "drift", "build_s", "load_s", "first_s")}


def rate_of(result: dict[str, Any], name: str, level: str) -> float:
    """Median of the rounds after the first, where there are any."""
    rounds = result["load"][name][level]
    return statistics.median(row["per_s"] for row in rounds[1:] or rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", default="bf16+graphs,bf16+compile+graphs,bf16+aot+graphs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "BERT-base's shape, random weights, 400 texts of 5 to 60 words",
        "rungs": {},
        "ready_s": {},
        "load": {},
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        model, samples = Path(folder) / "model", Path(folder) / "samples.jsonl"
        make_encoder(model)
        asked = Asked(model)
        samples.write_text("".join(json.dumps({"input": text}) + "\n" for text in asked.texts[:200]))
        urls = {}

        def serve(name: str, target: Path) -> None:
            began = perf_counter()
            server = serving(str(target), "--name", "bert", "--http-workers", "2", port=PORT + len(urls))
            urls[name] = servers.enter_context(server)
            result["ready_s"][name] = round(perf_counter() - began, 2)
            print(name, "ready after", result["ready_s"][name], "s", flush=True)

        serve("model", model)
        for rung in options.rungs.split(","):
            artifact = Path(folder) / f"{rung}.hr"
            result["rungs"][rung] = optimized(model, samples, rung, artifact)
            print(rung, result["rungs"][rung], flush=True)
            serve(rung, artifact)
        for number in range(options.rounds):
            for clients in CLIENTS:
                for name, url in urls.items():
                    level = asked.load(url, clients, options.seconds)
                    row = {"per_s": level.achieved_rate, "p50_ms": level.p50_ms, "p99_ms": level.p99_ms}
                    row["batch_mean"] = level.batch_size_mean
                    result["load"].setdefault(name, {}).setdefault(f"{clients} clients", []).append(row)
                    print(number, clients, name, row, flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    slower = [
        f"{name}, {level}: {rate} requests/s, its model {plain}"
        for level in result["load"]["model"]
        for name in result["rungs"]
        if (rate := rate_of(result, name, level)) <= (plain := rate_of(result, "model", level))
    ]
    assert not slower, slower


if __name__ == "__main__":
    main()
