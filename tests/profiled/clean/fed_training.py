"""Training whose DataLoader has its batches ready long before they are wanted."""

from __future__ import annotations

import random
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def train(network: nn.Module, data: TensorDataset) -> float:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    total = torch.zeros(())
    for items, wanted in DataLoader(data, batch_size=128, shuffle=True):
        loss = nn.functional.cross_entropy(network(items), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total)


def main(seed: int = 0) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    number = 128 * (50 + random.Random(seed).randrange(10))
    network = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 8))
    print(train(network, TensorDataset(torch.randn(number, 256), torch.randint(8, (number,)))))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
