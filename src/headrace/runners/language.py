"""What every way to run a language model can do: say how likely tokens are, and go on from prompts. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from headrace.runners.collate import Array


@dataclass(frozen=True)
class Generated:
    """Tokens of shape (items, new), int64, and where the time went.

    Args:
        prefill_s: until the first token of all items was there; ``decode_s``: for all the others.
    """

    tokens: Array
    prefill_s: float
    decode_s: float


class Language(Protocol):
    """One way to run a language model. Prompts: token ids of shape (items, slots), filled up at their beginnings.

    Args (of both):
        pads: how many slots of each item are no tokens, shape (items,).
    """

    step_bytes: int  # of weights that one step reads

    def logits(self, ids: Array, pads: Array, last: int) -> Array:
        """Logits of shape (items, last, vocabulary), float32, at the ``last`` slots."""
        ...

    def generate(self, ids: Array, pads: Array, new: int) -> Generated:
        """``new`` tokens for each item, whether or not it would end before."""
        ...


def left_padded(prompts: Sequence[Array]) -> tuple[Array, Array]:
    """Token ids of shape (items, longest) and the number of empty slots before each prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = prompt
    return ids, np.asarray([longest - len(prompt) for prompt in prompts], np.int64)
