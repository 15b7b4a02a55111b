"""On a machine with a GPU: what `watch_torch` sees only there, and what it costs.

    python tests/gpu/check_watch.py [--out FILE.json]

Under a minute. A script of its own, since time on a GPU is dear: one call checks everything.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headrace.profiling.finding import Finding
from headrace.profiling.watch import watch_torch

STEPS = 50


class Training:
    """A model in training on the GPU."""

    def __init__(self, width: int = 512) -> None:
        self.net = nn.Sequential(*[nn.Linear(width, width) for _ in range(8)]).cuda()
        self.x = torch.randn(64, width, device="cuda")
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01)

    def step(self) -> torch.Tensor:
        loss = self.net(self.x).pow(2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def watched(loop: Callable[[], Any]) -> list[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning that gets through would end the user's program
        with watch_torch() as watch:
            loop()
    assert torch.cuda.get_sync_debug_mode() == 0
    return watch.findings


def clean(training: Training) -> None:
    total = torch.zeros((), device="cuda")
    for _ in range(STEPS):
        total += training.step()
    print(f"loss {total.item() / STEPS:.4f}")


def every_step(training: Training) -> float:
    return sum(training.step().item() for _ in range(STEPS))


def number_by_number(training: Training) -> list[float]:
    found = []
    for _ in range(STEPS):
        training.step()
        found += [float(each) for each in training.x[0, :20]]
    return found


def masks(training: Training) -> None:
    for _ in range(STEPS):
        training.step()
        training.x[training.x > 3.0].sum()


def results(training: Training) -> None:
    training.net.eval()
    with torch.inference_mode():
        for _ in range(STEPS):
            training.net(training.x).argmax(-1).cpu()


def in_pieces(_: Training) -> None:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(2 * 2**30, free) / total)
    try:
        blocks = [torch.empty(100 * 2**20, dtype=torch.uint8, device="cuda") for _ in range(18)]
        del blocks[::2]
        torch.empty(500 * 2**20, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def overhead() -> dict[str, float]:
    training = Training(1024)

    def seconds() -> float:
        start = time.perf_counter()
        clean(training)
        return time.perf_counter() - start

    seconds()
    pairs = []
    for _ in range(5):
        plain = seconds()
        with watch_torch():
            pairs.append(seconds() / plain)
    return {"least": min(pairs), "median": sorted(pairs)[2], "most": max(pairs)}


EXPECTED: dict[Callable[[Training], Any], list[tuple[str, str]]] = {
    clean: [],
    results: [],
    every_step: [("sync_in_loop", ".item()")],
    number_by_number: [("sync_in_loop", "float()")],
    masks: [("sync_in_loop", "a mask")],
    in_pieces: [("fragmentation", "")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    wrong = []
    Training().step()
    for loop, expected in EXPECTED.items():
        training = Training()
        findings = watched(lambda loop=loop, training=training: loop(training))
        seen = [(each.code, each.severity, each.line, each.title, each.evidence) for each in findings]
        report[loop.__name__] = seen
        print(loop.__name__, *seen, sep="\n  ")
        matches = [
            code == each.code and words in each.title for (code, words), each in zip(expected, findings, strict=False)
        ]
        if len(findings) != len(expected) or not all(matches):
            wrong.append(loop.__name__)
    report["overhead"] = overhead()
    print("overhead", report["overhead"])
    if given.out:
        given.out.write_text(json.dumps(report, indent=1))
    assert not wrong, f"not as expected: {wrong}"


if __name__ == "__main__":
    main()
