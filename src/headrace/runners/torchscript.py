"""TorchScript archives (`torch.jit.save`) as models to serve."""

from __future__ import annotations

from pathlib import Path

from headrace.config import ModelConfig
from headrace.runners import Loaded
from headrace.runners.devices import require_torch


def open_torchscript(config: ModelConfig, path: Path, device: str) -> Loaded:
    """Raises `LoadError` for any other file: a pickled checkpoint can run code when it is loaded."""
    require_torch()
    from headrace.runners.archives import read_scripted
    from headrace.runners.module import open_module

    return open_module(config, read_scripted(path), device, platform="torchscript")
