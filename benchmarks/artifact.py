"""An artifact beside the model that it was made of, through the server: what the ladder measured, as clients see it.

    python benchmarks/ladder.py --keep minilm.hr
    python benchmarks/artifact.py minilm.hr [--model TARGET] [--rounds 5] [--seconds 6] [--out FILE.json]

Both are served at once, each by one worker on the same threads; load goes to one at a time, in turns (A B A B), by one
client and by 16 on the same cores. The sentences are those of the ladder. The bound is the speed-up that the artifact's
own row tells: of batches of one for one client; a client and HTTP take the same time whatever the model does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import orjson

from beside import load, ours
from headrace import stats
from headrace.artifact import read
from headrace.up import demo_model
from ladder import sentences
from peers import free_port
from serving import THREADS

CLIENTS = (1, 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", default="", help="what it was made of; the demo's where not said")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bodies = [orjson.dumps({"input": each}) for each in sentences()]
    measured: dict[int, dict[str, list[Any]]] = {clients: {"model": [], "artifact": []} for clients in CLIENTS}
    threads = ("--threads", str(THREADS))
    ports = {"model": free_port(), "artifact": free_port()}
    with (
        ours(options.model or str(demo_model()), ports["model"], *threads),
        ours(str(options.artifact), ports["artifact"], *threads),
    ):
        for number in range(options.rounds):
            for clients in CLIENTS:
                for name, port in ports.items():
                    found = load(f"http://127.0.0.1:{port}", bodies, clients, options.seconds, seed=number)
                    measured[clients][name].append(found)
                    print(
                        f"{clients:3} {name:9} {found.achieved_rate:8.1f}/s  p50 {found.p50_ms:7.2f} ms",
                        file=sys.stderr,
                    )
    report = {
        "conditions": {
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            "threads": THREADS,
            "python": platform.python_version(),
            "rounds": options.rounds,
            "rung": read(options.artifact).rung,
        },
        "clients": {str(clients): summed(found) for clients, found in measured.items()},
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def summed(found: dict[str, list[Any]]) -> dict[str, Any]:
    """Medians of each side, and the median of the rounds' ratios with the least and the most."""
    ratios = [
        artifact.achieved_rate / model.achieved_rate
        for model, artifact in zip(found["model"], found["artifact"], strict=True)
    ]
    return {
        **{
            name: {
                "per_s": round(stats.median([each.achieved_rate for each in levels]), 1),
                "p50_ms": round(stats.median([each.p50_ms for each in levels]), 2),
                "errors": sum(sum(each.errors.values()) for each in levels),
            }
            for name, levels in found.items()
        },
        "times_as_fast": [round(each, 2) for each in (stats.median(ratios), min(ratios), max(ratios))],
    }


if __name__ == "__main__":
    sys.exit(main())
