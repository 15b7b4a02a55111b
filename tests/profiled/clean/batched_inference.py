"""A model that gets large batches: what is left is the model's own work."""

from __future__ import annotations

import random
import sys

import torch
from torch import nn


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512), nn.GELU(), nn.Linear(512, 16)).eval()


def classify(network: nn.Module, items: torch.Tensor) -> list[int]:
    found: list[int] = []
    with torch.inference_mode():
        for batch in items.split(256):
            found += network(batch).argmax(-1).tolist()
    return found


def main(seed: int = 0) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    print(sum(classify(model(), torch.randn(256 * (50 + random.Random(seed).randrange(10)), 512))))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
