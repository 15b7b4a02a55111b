"""From a TARGET to something that answers batches, with all that a front end must know of it.

`open_target` is called in a model worker only. A target that needs no torch is served without importing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.artifact import is_artifact
from headrace.config import ModelConfig
from headrace.core import ModelInfo, Runner
from headrace.errors import LoadError


def _same(value: Any) -> Any:
    return value


def _unit_cost(_: Any) -> int:
    return 1


@dataclass(frozen=True)
class Loaded:
    """A loaded model.

    Args:
        runner: answers batches of prepared items.
        info: what front ends learn of the model.
        prepare: turns a decoded item into what `run` takes; raises `InvalidInput`.
        cost: length of a prepared item, at least 1.
        finish: turns one output into a value that can be sent.
        example: makes a prepared item of about the given length, for warm-up; ``None`` if nobody knows one.
        lengths: to which batches are filled up, of a model that is compiled or captured by shape.
        stream: answers a batch in steps, see `core.Runner`; ``None`` if the model cannot.
    """

    runner: Runner
    info: ModelInfo
    prepare: Callable[[Any], Any] = _same
    cost: Callable[[Any], int] = _unit_cost
    finish: Callable[[Any], Any] = _same
    example: Callable[[int], Any] | None = None
    lengths: Sequence[int] = ()
    stream: Callable[[list[Any]], Iterable[list[Any]]] | None = None


def open_target(config: ModelConfig, device: str) -> Loaded:
    """Load a model onto a device.

    Raises:
        LoadError: the target cannot be found, imported or read; says what was tried.
        Unavailable: it needs an extra that is not installed.
    """
    target = config.target
    path = Path(target).expanduser()
    if device == "cuda" and (path.exists() or ":" not in target):
        raise LoadError(
            f"{target} cannot span several GPUs by itself",
            field="devices",
            hint='serve a class of your own: its load() gets "cuda" and sees the GPUs of its group (device_map="auto")',
        )
    if is_artifact(path):
        from headrace.runners.artifact import open_artifact

        return open_artifact(config, device)
    if path.suffix in {".pt", ".ts"} and (path.exists() or ":" not in target):
        from headrace.runners.torchscript import open_torchscript

        return open_torchscript(config, path, device)
    if not path.exists() and ":" in target:
        from headrace.runners.user import open_user

        return open_user(config, device)
    if path.is_file():
        raise LoadError(
            f"{target} is a file headrace cannot serve",
            field="target",
            hint="give module:callable, a Hugging Face directory or id, or a TorchScript .pt file",
        )
    from headrace.runners.huggingface import open_huggingface

    return open_huggingface(config, device)
