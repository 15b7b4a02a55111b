"""Modules for the ladder: one that takes a tensor, one that takes named ones, one whose import ends the process."""

from __future__ import annotations

import os
import subprocess
import time

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


class Planning(Words):
    """Thinks for a while about each length that is new to it."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[int] = set()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] not in self.met:
            self.met.add(input_ids.shape[1])
            time.sleep(0.05)
        return super().forward(input_ids, attention_mask)


def crash() -> torch.nn.Module:
    os.abort()


def layer() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(32, 8)


def slow_halves() -> torch.nn.Module:
    """Made where a layer of any other kind takes nine times as long as in float32."""
    from headrace.optimizing import layer

    layer.ratio = lambda *_: 9.0
    return Rows()


def by_chance() -> torch.nn.Module:
    """Other weights each time."""
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    return torch.nn.Linear(32, 8)


class Wayward(Rows):
    """In bfloat16 it ends its process, in float16 it never answers, and where it is exported it takes all memory.

    Each process that has one writes its number down, and starts another one besides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        other = subprocess.Popen(["sleep", "600"])
        with open(os.environ["WAYWARD_NOTES"], "a") as notes:
            notes.write(f"{os.getpid()}\n{other.pid}\n")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            held = []
            while True:
                held.append(b"x" * (1 << 26))
                time.sleep(0.01)
        if self.scale.dtype == torch.bfloat16:
            os.abort()
        if self.scale.dtype == torch.float16:
            with open(os.environ["WAYWARD_NOTES"], "a") as notes:
                notes.write("hangs\n")
            time.sleep(600)
        return super().forward(x) * self.scale
