"""A plain generator makes batches more slowly than the model takes them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import torch
from torch import nn


def batches(number: int) -> Iterator[torch.Tensor]:
    for at in range(number):
        rows = [[((at * 31 + row) * (column + 7) % 97) / 97 for column in range(256)] for row in range(64)]
        yield torch.tensor(rows)


def infer(network: nn.Module, number: int) -> float:
    total = 0.0
    with torch.inference_mode():
        for batch in batches(number):  # HERE
            total += float(network(batch).mean())
    return total


def main(seed: int = 0) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 16)).eval()
    print(infer(network, 130 + random.Random(seed).randrange(20)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
