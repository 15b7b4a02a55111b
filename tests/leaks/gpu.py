"""On a machine with an NVIDIA GPU: programs whose memory is the GPU's, each with the verdict that it must get.

    python tests/leaks/gpu.py

By hand, like `tests/gpu/`. One JSON document a line; exit status 1 if a verdict is wrong.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from headrace.profiling.leak import find_leak
from headrace.profiling.leaking.report import as_json

model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1)).cuda()
optimizer = torch.optim.Adam(model.parameters())
kept: list[Any] = []
losses: list[Any] = []
sizes = [1]


def kept_outputs() -> None:
    with torch.inference_mode():
        kept.append(model(torch.randn(500, 64, device="cuda")))


def kept_losses() -> None:
    losses.append(model(torch.randn(16, 64, device="cuda")).mean())


def trains() -> None:
    loss = model(torch.randn(16, 64, device="cuda")).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def infers() -> None:
    with torch.inference_mode():
        model(torch.randn(16, 64, device="cuda")).tolist()


def ever_larger() -> None:
    """No block that is free is large enough for the next one."""
    sizes[0] += 1
    torch.empty(sizes[0] << 21, dtype=torch.uint8, device="cuda")


EXPECTED = {
    kept_outputs: ("leak", "tensors"),
    kept_losses: ("leak", "graph"),
    trains: ("no_leak", None),
    infers: ("no_leak", None),
    ever_larger: ("fragmentation", None),
}


def main() -> int:
    wrong = 0
    for function, expected in EXPECTED.items():
        report = find_leak(function, iterations=40)
        found = (report.verdict.replace("warm_up", "no_leak"), report.kind)
        wrong += found != expected
        print(json.dumps({"program": function.__name__, "right": found == expected, **json.loads(as_json(report))}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
