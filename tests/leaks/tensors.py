"""Programs with torch: three that leak, and some that do not.

As a command: search all of them in one process, because torch takes long to import, and write a report for each.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from typing import Any

import torch

torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.Adam(model.parameters())


def _loss() -> Any:
    return (model(torch.randn(4, 8)) ** 2).mean()  # LEAK loss_list


def make_losses() -> Any:
    losses: list[Any] = []

    def step() -> None:
        loss = _loss()
        losses.append(loss)

    return step


loss_list = make_losses()


class Trainer:
    def __init__(self) -> None:
        self.total: Any = torch.zeros(())

    def step(self) -> None:
        self.total = self.total + _loss()  # LEAK loss_sum


trainer = Trainer()
loss_sum = trainer.step

outputs: list[Any] = []


def tensor_list() -> None:
    with torch.no_grad():
        outputs.append(torch.ones(1000))  # LEAK tensor_list


recent: deque[Any] = deque(maxlen=5000)


def bounded_outputs() -> None:
    recent.append(torch.ones(100))


def training_step() -> None:
    loss = _loss()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


totals: list[float] = [0.0]


def detached_sum() -> None:
    totals[0] += _loss().item()


def inference() -> None:
    with torch.inference_mode():
        model(torch.randn(16, 8)).tolist()


HOLDERS = {
    "loss_list": ("graph", "list: closure variable `losses` of make_losses.step"),
    "loss_sum": ("graph", "Tensor: attribute `total` of Trainer"),
    "tensor_list": ("tensors", "list: global `outputs` of __main__"),
}
CLEAN = ("training_step", "detached_sum", "inference")


if __name__ == "__main__":
    from headrace.profiling.leak import find_leak
    from headrace.profiling.leaking.report import as_json

    # What leaks comes last: it is looked at in every later search.
    for name in (*CLEAN, "bounded_outputs", "tensor_list", "loss_sum", "loss_list"):
        report = find_leak(globals()[name], iterations=40)
        print(json.dumps({"name": name, **json.loads(as_json(report))}))
        sys.stdout.flush()
