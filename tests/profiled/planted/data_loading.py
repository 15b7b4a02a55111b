"""Training steps that are quick, on items that take long to make, made in the same process."""

from __future__ import annotations

import random
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Pictures(Dataset[torch.Tensor]):
    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, at: int) -> torch.Tensor:
        value, row = at, []
        for _ in range(1024):
            value = (value * 1103515245 + 12345) % 2**31
            row.append(value / 2**31)
        return torch.tensor(row)


def train(network: nn.Module, number: int) -> float:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loss = torch.zeros(())
    for batch in DataLoader(Pictures(number), batch_size=32):  # HERE
        loss = network(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def main(seed: int = 0) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    print(
        train(
            nn.Sequential(nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 1)), 1600 + random.Random(seed).randrange(200)
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
