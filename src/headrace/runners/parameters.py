"""How many weights a target has, told by its configuration or its file before any of them is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from headrace.runners import archives, huggingface

_FLOAT_BYTES = 4


class Counted(msgspec.Struct, frozen=True):
    """Weights of a model.

    Args:
        task: as it will be optimised; empty if only its file was looked at.
        parameters: numbers in all of them; one that serves twice counts once.
        products: those of linear layers, which is what 8 and 4 bits are made of.
        shared: of ``products``, those that are a table of embeddings too, which stays as it is.
    """

    task: str
    parameters: int
    products: int
    shared: int = 0


def count(target: str, task: str) -> Counted | None:
    """Count, without loading a weight. ``None`` where that cannot be known; what is wrong is said when it is loaded.

    Of a file of torch's own only the size is known: all is taken for float32, and for weights of linear layers.
    """
    path = Path(target).expanduser()
    if archives.is_archive(target):
        numbers = path.stat().st_size // _FLOAT_BYTES if path.is_file() else 0
        return Counted("", numbers, numbers) if numbers else None
    if path.is_file() or (":" in target and not path.exists()):
        return None
    files = huggingface.Files.read(huggingface.locate(target))
    task = files.optimised_as(task)
    try:
        return of_module(huggingface.empty_model(files, task), task)
    except Exception:  # a configuration that transformers cannot make a model of raises whatever it likes
        return None


def of_module(module: Any, task: str) -> Counted:
    """Count the weights of a module, which may be without any memory of its own, on torch's meta device."""
    import torch

    tables = {each.weight for each in module.modules() if isinstance(each, torch.nn.Embedding)}
    products = {each.weight for each in module.modules() if isinstance(each, torch.nn.Linear)}
    return Counted(
        task, *(sum(each.numel() for each in some) for some in (module.parameters(), products, products & tables))
    )
