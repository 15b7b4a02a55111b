"""Models that show what only a GPU can do."""

from __future__ import annotations

import os

import torch


class Lookup:
    """An index outside the table is a device-side assertion: every later call of the process fails."""

    def load(self, device: str) -> None:
        self.device = device
        self.table = torch.arange(10.0, device=device)

    def run(self, inputs: list[int]) -> list[float]:
        return self.table[torch.tensor(inputs, device=self.device)].tolist()


class Hungry:
    """Each item takes a fifth of the device's memory."""

    def load(self, device: str) -> None:
        self.device = device
        self.share = torch.cuda.get_device_properties(device).total_memory // 5

    def run(self, inputs: list[int]) -> list[int]:
        held = torch.empty(len(inputs) * self.share, dtype=torch.uint8, device=self.device)
        del held
        return inputs


class Where:
    def load(self, device: str) -> None:
        self.device = device

    def run(self, inputs: list[str]) -> list[str]:
        return [f"{self.device} of {os.environ.get('CUDA_VISIBLE_DEVICES')}"] * len(inputs)
