"""Whether what `torch.compile` was asked for is what runs: what it gives up on, it runs as it is, without a word."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from headrace.errors import LoadError
from headrace.runners.recipe_words import COMPILE, REGIONAL


@contextlib.contextmanager
def watched(recipe: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Around all that a rung does. What it gives is to be called after the first answer.

    Raises:
        LoadError: nothing could be compiled, or so many shapes would have to be that the compiler leaves the rest.
    """
    if {COMPILE, REGIONAL}.isdisjoint(recipe):
        yield lambda: None
        return
    import torch

    config = torch._dynamo.config
    config.fail_on_recompile_limit_hit = True
    try:
        # Of a language model the steps are compiled, which the first answer does without.
        yield _check_compiled if "kv-static" not in recipe else lambda: None
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise LoadError(
            f"compiled {config.recompile_limit} times for different inputs, and the rest would run as it is; "
            "TORCH_LOGS=recompiles says what differs"
        ) from error


def _check_compiled() -> None:
    import torch

    if not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        reasons = torch._dynamo.utils.counters["graph_break"]
        raise LoadError(f"nothing of it could be compiled: {next(iter(reasons), 'no reason is known')}"[:500])
