"""How far answers are from those that are wanted, by task, and which bounds that breaks.

No labels are needed: the model as it is, in float32, says what is wanted. Inputs are arrays of shape (items, …),
float32, of the same items in the same order. Knows no presets: an artifact tests itself with these as it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.runners import likelihood

Array = npt.NDArray[Any]
# Measures where 1 is perfect and more is better. Of all others, those of users' functions among them, less is better.
AGREEMENTS = frozenset({"cos_mean", "cos_p1", "cos_min", "spearman", "neighbours", "top1"}) | {
    "batch_cos_mean",
    "batch_cos_min",
    "batch_top1",
}
# Instead of any measure, where answers cannot be compared.
_INCOMPARABLE = {
    "not_finite": "answers are not finite numbers",
    "other_shape": "answers have other shapes than those of the model as it is",
    "batch_other_shape": "answers have other shapes in a batch than alone",
}
# A flip counts only where the model itself was sure: its best class led by this much probability.
_SURE = 0.1
_NEIGHBOURS = 5


def drift(task: str, wanted: Sequence[Array], found: Sequence[Array], activation: str = "softmax") -> dict[str, float]:
    """Measures for a task, of answers beside those that are wanted.

    Returns:
        embed: ``cos_mean``, ``cos_p1``, ``cos_min`` of the vectors, ``spearman`` of all similarities of pairs,
        ``neighbours``: share of the five nearest that are the same. classify: ``top1`` agreement, ``kl_mean``,
        ``max_logit_diff``, ``flips``: share of sure answers that changed. Others: ``relative_error``, the largest
        difference over the largest value, and ``cos_mean``, ``cos_min``. generate: see `likelihood.drift`.
    """
    if any(not np.isfinite(each).all() for each in found):
        return {"not_finite": 1.0}
    if [each.shape for each in wanted] != [each.shape for each in found]:
        return {"other_shape": 1.0}
    kind = compared_as(task, activation)
    if kind == "embed":
        return _embeddings(np.stack(wanted), np.stack(found))
    if kind == "generate":
        return likelihood.drift(wanted, found)
    if kind == "classify":
        return _classes(np.stack(wanted), np.stack(found), activation)
    return _others(wanted, found)


def is_error(measure: str) -> bool:
    """Whether less of a measure is better."""
    return measure not in AGREEMENTS


def compared_as(task: str, activation: str) -> str:
    """The task whose measures say something: a regression has no classes that could agree."""
    return "logits" if task == "classify" and activation == "none" else task


def _others(wanted: Sequence[Array], found: Sequence[Array]) -> dict[str, float]:
    flat = [(a.ravel(), b.ravel()) for a, b in zip(wanted, found, strict=True)]
    scale = max(float(np.abs(a).max()) for a, _ in flat)
    cosines = np.array([_cosine(a, b) for a, b in flat])
    worst = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in flat)
    return {
        "relative_error": worst / max(scale, 1e-12),
        "cos_mean": float(cosines.mean()),
        "cos_min": float(cosines.min()),
    }


def batch_drift(alone: Sequence[Array], batched: Sequence[Array], task: str = "") -> dict[str, float]:
    """How far an answer depends on what else is in its batch."""
    if any(not np.isfinite(each).all() for each in (*alone, *batched)):
        return {"not_finite": 1.0}
    if [each.shape for each in alone] != [each.shape for each in batched]:
        return {"batch_other_shape": 1.0}
    if task == "generate":
        return likelihood.batch_drift(alone, batched)
    cosines = np.array([_cosine(a.ravel(), b.ravel()) for a, b in zip(alone, batched, strict=True)])
    return {"batch_cos_mean": float(cosines.mean()), "batch_cos_min": float(cosines.min())}


def breaches(measured: Mapping[str, float], bounds: Mapping[str, float]) -> str:
    """Which bounds are broken, in words; empty if none is."""
    for name, words in _INCOMPARABLE.items():
        if name in measured:
            return words
    said = []
    for name, bound in bounds.items():
        if name not in measured:
            said.append(f"{name} could not be measured")
            continue
        value = measured[name]
        if not (value <= bound if is_error(name) else value >= bound):  # also where it is no number
            said.append(f"{name} {value:.4g} is {'over' if is_error(name) else 'under'} {bound:g}")
    return ", ".join(said)


def _embeddings(wanted: Array, found: Array) -> dict[str, float]:
    cosines = np.array([_cosine(a, b) for a, b in zip(wanted, found, strict=True)])
    here, there = _similarities(wanted), _similarities(found)
    upper = np.triu_indices(len(wanted), 1)
    return {
        "cos_mean": float(cosines.mean()),
        "cos_p1": float(np.percentile(cosines, 1)),
        "cos_min": float(cosines.min()),
        "spearman": _spearman(here[upper], there[upper]),
        "neighbours": _overlap(here, there, min(_NEIGHBOURS, len(wanted) - 1)),
    }


def _classes(wanted: Array, found: Array, activation: str) -> dict[str, float]:
    p, q = shares(wanted, activation), shares(found, activation)
    if activation == "softmax":
        kl = (p * (np.log(p + 1e-12) - np.log(q + 1e-12))).sum(-1)
    else:  # each class by itself
        kl = (p * np.log((p + 1e-12) / (q + 1e-12)) + (1 - p) * np.log((1 - p + 1e-12) / (1 - q + 1e-12))).sum(-1)
    same = wanted.argmax(-1) == found.argmax(-1) if wanted.shape[-1] > 1 else (p[:, 0] > 0.5) == (q[:, 0] > 0.5)
    ordered = np.sort(p, -1)
    sure = ordered[:, -1] - ordered[:, -2] > _SURE if wanted.shape[-1] > 1 else np.abs(p[:, 0] - 0.5) > _SURE / 2
    return {
        "top1": float(same.mean()),
        "kl_mean": float(kl.mean()),
        "max_logit_diff": float(np.abs(wanted.astype(np.float64) - found).max()),
        "flips": float((~same & sure).sum() / max(1, sure.sum())),
    }


def shares(logits: Array, activation: str) -> Array:
    """Scores of logits of shape (…, classes) by softmax, sigmoid or none."""
    if activation == "none":
        return logits
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-logits.astype(np.float64)))
    moved = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    found: Array = moved / moved.sum(-1, keepdims=True)
    return found


def _cosine(a: Array, b: Array) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))


def _similarities(vectors: Array) -> Array:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found: Array = unit @ unit.T
    return found


def _spearman(a: Array, b: Array) -> float:
    """Correlation of ranks. Ties are as good as none among products of floats."""
    if len(a) < 2:  # of two items there is one similarity: nothing that could be in another order
        return 1.0
    ranks_a, ranks_b = a.argsort().argsort(), b.argsort().argsort()
    return float(np.corrcoef(ranks_a, ranks_b)[0, 1])


def _overlap(here: Array, there: Array, count: int) -> float:
    agreements = []
    for row, (a, b) in enumerate(zip(here, there, strict=True)):
        first, second = ({int(i) for i in order[: count + 1] if i != row} for order in (np.argsort(-a), np.argsort(-b)))
        agreements.append(len(first & second) / max(1, len(first)))
    return float(np.mean(agreements))
