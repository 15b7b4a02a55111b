"""How far a language model's next tokens are from those of the model as it is, on texts that are given.

An answer is an array of shape (positions, vocabulary + 1), float32: at each of a text's last positions the logarithms
of the probabilities of all tokens, and in the last column that of the token that did come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def answer(logits: Array, next_ids: Array) -> Array:
    """An answer, of logits of shape (positions, vocabulary) and the tokens that came next, (positions,)."""
    moved = logits.astype(np.float32) - logits.max(-1, keepdims=True).astype(np.float32)
    logs = moved - np.log(np.exp(moved).sum(-1, keepdims=True))
    came = np.take_along_axis(logs, next_ids[:, None].astype(np.int64), axis=1)
    return np.concatenate([logs, came], axis=1)


def drift(wanted: Sequence[Array], found: Sequence[Array]) -> dict[str, float]:
    """Measures over all positions.

    Returns:
        ``kl_mean``, ``kl_p99``: divergence from the wanted distribution, in nats (Kullback and Leibler).
        ``top1``: share of positions with the same likeliest token. ``perplexity_ratio``: of the text, over that of the
        model as it is.
    """
    divergences, same, worse = [], [], []
    for a, b in zip(wanted, found, strict=True):
        here, there = a[:, :-1], b[:, :-1]
        divergences.append((np.exp(here) * (here - there)).sum(-1, dtype=np.float64))
        same.append(here.argmax(-1) == there.argmax(-1))
        worse.append(a[:, -1] - b[:, -1])
    every = np.maximum(np.concatenate(divergences), 0.0)  # below zero it is rounding
    return {
        "kl_mean": float(every.mean()),
        "kl_p99": float(np.percentile(every, 99)),
        "top1": float(np.concatenate(same).mean()),
        "perplexity_ratio": float(np.exp(np.concatenate(worse).mean(dtype=np.float64))),
    }


def batch_drift(alone: Sequence[Array], batched: Sequence[Array]) -> dict[str, float]:
    """How far an answer depends on what else is in its batch."""
    found = drift(alone, batched)
    return {"batch_kl_mean": found["kl_mean"], "batch_top1": found["top1"]}
