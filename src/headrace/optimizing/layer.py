"""One layer of a model by itself, in float32 and as a rung would run it: less than a second that saves minutes.

Some ways to compute have no fast kernels on some processors: without its own instructions bfloat16 takes 4 to 8 times
as long as float32, torchao's integers 6 to 26 times. One layer shows that. What it does not show is a gain: a rung whose
layer is not much slower is built and measured as a whole.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from headrace.clock import perf_counter
from headrace.runners import recipes

# Words that change how a layer computes, and nothing else.
WORDS = frozenset({"bf16", "fp16", "torch-int8-dynamic", "torchao-int8", "torchao-int8-weights", "nf4"})
# Rows of the layer's input, from one token to a batch of long texts. Few come first: where that is not slower, all is.
ROWS = (1, 16, 512)
MOST_SLOWER = 2.0
_TIMES = 5


def too_slow(module: torch.nn.Module, recipe: Sequence[str], rows: Sequence[int] = ROWS) -> str:
    """Why the recipe cannot make the module faster on this CPU; empty if it could, or if one layer cannot tell.

    Args:
        module: in float32; it is not changed.
    """
    words = [word for word in recipe if word in WORDS]
    layer = _commonest(module)
    if layer is None or not words or "compile" in recipe:  # compiled, the same steps become others
        return ""
    changed = recipes.apply(words, torch.nn.Sequential(copy.deepcopy(layer)), "cpu")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(words[0], torch.float32)
    found = []
    for count in rows:
        given = torch.randn(count, layer.in_features)
        ratio = _ratio(layer, changed, given, given.to(kind))
        if ratio < MOST_SLOWER:
            return ""
        found.append(f"{ratio:.1f} times as long with {count}")
    size = f"{layer.in_features} × {layer.out_features}"
    return f"nothing was built: one layer of {size} takes {', '.join(found)} rows as in float32"


def _commonest(module: torch.nn.Module) -> Any:
    """A linear layer of the shape that has most of the module's weights."""
    linear = [part for part in module.modules() if type(part) is torch.nn.Linear]
    weights: Counter[torch.Size] = Counter()
    for part in linear:
        weights[part.weight.shape] += part.weight.numel()
    most = weights.most_common(1)
    return next(part for part in linear if part.weight.shape == most[0][0]) if most else None


def _ratio(one: Callable[[Any], Any], other: Callable[[Any], Any], of_one: Any, of_other: Any) -> float:
    """Time of the other over that of the one, each the best of several in turns."""
    best = [float("inf"), float("inf")]
    with torch.inference_mode():
        for _ in range(_TIMES):
            for side, (layer, given) in enumerate(((one, of_one), (other, of_other))):
                began = perf_counter()
                layer(given)
                best[side] = min(best[side], perf_counter() - began)
    return best[1] / best[0]
