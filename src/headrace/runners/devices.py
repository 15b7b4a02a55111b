"""Where a model runs, and what torch may use there."""

from __future__ import annotations

import sys
from pathlib import Path

from headrace.errors import Unavailable


def require_torch() -> None:
    """Raises `Unavailable` with the command to type when torch is not installed."""
    try:
        import torch  # noqa: F401 - only asking
    except ImportError:
        raise Unavailable("this model needs PyTorch", hint="pip install 'headrace[torch]'") from None


def pick_device(wanted: str, index: int, bound_to: int = 0) -> str:
    """Resolve ``auto`` and a bare ``cuda`` for the worker with this index: workers go round the GPUs.

    Args:
        bound_to: how many GPUs the worker was bound to and sees as its only ones; for several the answer is a bare
            ``cuda``, over which a class of the user's spreads its model itself (``device_map="auto"``).

    Raises:
        Unavailable: the device is not on this machine.
    """
    if bound_to > 1:
        return "cuda"
    if wanted == "cpu" or (wanted == "auto" and not _may_have_accelerator()):
        return "cpu"
    try:
        import torch
    except ImportError:
        if wanted == "auto":
            return "cpu"
        require_torch()
        raise
    count = torch.cuda.device_count()
    if wanted == "auto":
        if count:
            return f"cuda:{index % count}"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted == "mps":
        if torch.backends.mps.is_available():
            return wanted
        raise Unavailable("this machine has no MPS device", field="device", hint="use --device cpu or auto")
    number = int(wanted.partition(":")[2] or index % max(count, 1))
    if number < count:
        return f"cuda:{number}"
    raise Unavailable(
        f"{wanted} is not here: torch sees {count} CUDA devices", field="device", hint="use --device cpu or auto"
    )


def _may_have_accelerator() -> bool:
    """A look at the machine that spares torch-free models the import of torch."""
    return sys.platform == "darwin" or any(Path("/dev").glob("nvidia[0-9]*"))


def limit_threads(threads: int) -> None:
    """Bound torch's CPU threads; more threads than cores made a model ten times slower than it was."""
    import torch

    torch.set_num_threads(threads)
