"""A module for the ladder whose products are hard to quantise."""

from __future__ import annotations

import torch


class Attending(torch.nn.Module):
    """Attention over rows of 32 numbers, two columns of which are far larger than the others and weigh little."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (torch.nn.Linear(32, 32) for _ in range(3))
        self.out = torch.nn.Linear(32, 32)
        self.unused = torch.nn.Linear(32, 32)
        size = torch.ones(32)
        size[3], size[17] = 60.0, 25.0
        self.register_buffer("size", size)
        for layer in (self.query, self.key, self.value):
            layer.weight.data /= size

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x * self.size
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 10
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, float("-inf"))
        return self.out(torch.softmax(scores, -1) @ self.value(x))


class Summed(Attending):
    """One vector for all rows."""

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        weights = attention_mask[..., None].float()
        return (super().forward(x, attention_mask) * weights).sum(1) / weights.sum(1)
