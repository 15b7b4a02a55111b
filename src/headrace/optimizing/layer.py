"""One layer of a model by itself, in float32 and as a rung would run it: less than a second that saves minutes.

Some ways to compute have no fast kernels on some processors: without its own instructions bfloat16 takes 4 to 8 times
as long as float32, torchao's integers 6 to 26 times. One layer shows that. What it does not show is a gain: a rung
whose layer is not much slower is built and measured as a whole.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from headrace.clock import perf_counter
from headrace.errors import SetupError
from headrace.runners import recipes
from headrace.runners.recipe_words import COMPILE, REGIONAL

# Words that change how a layer computes, and nothing else.
WORDS = frozenset({"bf16", "fp16", "torch-int8-dynamic", "torchao-int8", "torchao-int8-weights", "nf4"})
# Rows of the layer's input: a short text and a batch of long ones; of a language model that writes, one token too.
ROWS = (16, 512)
ROWS_OF_WRITING = (1, *ROWS)
MOST_SLOWER = 2.0
_TIMES = 5


class NotFaster(SetupError):
    """A rung cannot win; says by what that was seen."""

    code = "not_faster"


def check(module: torch.nn.Module, recipe: Sequence[str], rows: Sequence[int] = ROWS) -> None:
    """Raises `NotFaster` where `too_slow` has a reason."""
    reason = too_slow(module, recipe, rows)
    if reason:
        raise NotFaster(reason)


def too_slow(
    module: torch.nn.Module, recipe: Sequence[str], rows: Sequence[int] = ROWS, most_slower: float = MOST_SLOWER
) -> str:
    """Why the recipe cannot make the module faster on this CPU; empty if it could, or if one layer cannot tell.

    Args:
        module: in float32; it is not changed.
        rows: of the layer's input; it must be much slower with each of these.
        most_slower: how many times as long a layer may take.
    """
    words = [word for word in recipe if word in WORDS]
    if not {COMPILE, REGIONAL}.isdisjoint(recipe):  # compiled, the same steps become others
        return ""
    layer = _commonest(module)
    if layer is None or not words:
        return ""
    changed = recipes.apply(words, torch.nn.Sequential(copy.deepcopy(layer)), "cpu")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(words[0], torch.float32)
    found = []
    for count in rows:
        given = torch.randn(count, layer.in_features)
        slower = ratio(layer, changed, given, given.to(kind))
        if slower < most_slower:
            return ""
        found.append(f"{slower:.1f} times as long with {count}")
    size = f"{layer.in_features} × {layer.out_features}"
    return f"nothing was built: one layer of {size} takes {', '.join(found)} rows as in float32"


def _commonest(module: torch.nn.Module) -> Any:
    """A linear layer of the shape that has most of the module's weights; of several such shapes the largest layer."""
    linear = [part for part in module.modules() if type(part) is torch.nn.Linear]
    weights: Counter[torch.Size] = Counter()
    for part in linear:
        weights[part.weight.shape] += part.weight.numel()
    return max(linear, key=lambda part: (weights[part.weight.shape], part.weight.numel()), default=None)


def ratio(one: Callable[[Any], Any], other: Callable[[Any], Any], of_one: Any, of_other: Any) -> float:
    """Time of the other over that of the one, each the best of several in turns."""
    best = [float("inf"), float("inf")]
    with torch.inference_mode():
        for _ in range(_TIMES):
            for side, (layer, given) in enumerate(((one, of_one), (other, of_other))):
                began = perf_counter()
                layer(given)
                best[side] = min(best[side], perf_counter() - began)
    return best[1] / best[0]
