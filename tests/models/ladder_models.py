"""Modules for the ladder: one that takes a tensor, one that takes named ones, one whose import ends the process."""

from __future__ import annotations

import os

import torch


class Rows(torch.nn.Module):
    """Takes 32 numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 512), torch.nn.GELU(), torch.nn.Linear(512, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Words(torch.nn.Module):
    """Takes token ids of any number and their mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(100, 16)
        self.out = torch.nn.Linear(16, 4)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        weights = attention_mask.unsqueeze(-1).float()
        return self.out((self.table(input_ids) * weights).sum(1) / weights.sum(1))


def crash() -> torch.nn.Module:
    os.abort()
