"""Run a batch so that one bad item fails alone, and tell failures of the item from those of the machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from headrace.errors import HeadraceError, OutOfMemory, RunnerError

_log = logging.getLogger(__name__)


class DeviceLost(Exception):
    """The accelerator answers every further call with an error: only a new process helps."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether fewer items at once could have succeeded. Names are compared, so that torch need not be there."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # torch's allocator for CPU memory raises a bare RuntimeError, cuBLAS and cuDNN their own status.
    text = str(error) if isinstance(error, RuntimeError) else ""
    return any(mark in text for mark in ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory"))


def is_device_lost(error: BaseException) -> bool:
    """Whether a CUDA context is beyond use: a device-side assertion, an illegal access, a failed launch."""
    if is_out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def run_batch(
    run: Callable[[list[Any]], list[Any]],
    inputs: list[Any],
    traces: Sequence[str] = (),
    on_out_of_memory: Callable[[list[Any]], None] = lambda inputs: None,
) -> list[Any]:
    """Answers in order; an exception stands where an item failed.

    A failing batch is run again in halves, down to the item that fails by itself: log₂ of its size more runs for one
    bad item. A model with side effects should therefore answer a bad item with an exception instead of raising it.

    Args:
        traces: names of the items for the log.
        on_out_of_memory: called with what did not fit, before its halves run.

    Raises:
        DeviceLost: no further batch can succeed in this process.
    """
    try:
        outputs = list(run(inputs))
        if len(outputs) != len(inputs):
            raise RunnerError(
                f"run returned {len(outputs)} answers for {len(inputs)} inputs", hint="return one answer per input"
            )
        return outputs
    except (Exception, SystemExit) as error:
        if is_device_lost(error):
            raise DeviceLost(str(error)) from error
        full = is_out_of_memory(error)
        if full:
            on_out_of_memory(inputs)
        if len(inputs) > 1:
            _log.warning(
                "a batch of %d %s (%s); running its halves",
                len(inputs),
                "did not fit in memory" if full else "failed",
                error,
            )
            middle = len(inputs) // 2
            return [
                *run_batch(run, inputs[:middle], traces[:middle], on_out_of_memory),
                *run_batch(run, inputs[middle:], traces[middle:], on_out_of_memory),
            ]
        _log.error(
            "the model failed on one item: %s",
            error,
            exc_info=not isinstance(error, HeadraceError),
            extra={"request_id": traces[0]} if traces else None,
        )
        if full:
            return [OutOfMemory("there is not enough memory for this item", hint="send a smaller one, or try later")]
        return [error]
