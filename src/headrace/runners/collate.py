"""Items of a batch into arrays, and an array of answers back into items, without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.artifact import Subject, TensorSpec

Array = npt.NDArray[Any]
Item = dict[str, Array]


def as_item(subject: Subject, item: Any) -> Item:
    """One prepared item as named arrays: token ids alone, a bare tensor and named tensors are written alike."""
    if isinstance(item, dict):
        return {name: np.asarray(value) for name, value in item.items()}
    return {subject.inputs[0].name: np.asarray(item)}


def length(item: Item, subject: Subject) -> int:
    """Length of the dimension along which items differ; 1 where they do not."""
    ragged = next((each.name for each in subject.inputs if each.ragged and not each.mask and each.name in item), None)
    return max(1, len(item[ragged])) if ragged else 1


def collate(items: Sequence[Item], subject: Subject) -> dict[str, Array]:
    """One array per input, each of shape (items, …), ragged ones filled up at their ends to the longest item."""
    lengths = [length(item, subject) for item in items]
    return {spec.name: _stack(items, spec, lengths) for spec in subject.inputs}


def _stack(items: Sequence[Item], spec: TensorSpec, lengths: list[int]) -> Array:
    if not spec.ragged:
        return np.stack([np.asarray(item[spec.name], spec.dtype) for item in items])
    filled = np.full((len(items), max(lengths), *spec.shape[1:]), 0 if spec.mask else spec.pad, spec.dtype)
    for row, (item, size) in enumerate(zip(items, lengths, strict=True)):
        if spec.name in item:
            filled[row, : len(item[spec.name])] = item[spec.name]
        elif spec.mask:
            filled[row, :size] = 1
    return filled


def split(output: Array, items: Sequence[Item], subject: Subject) -> list[Array]:
    """Answers by item; of one row per token only those of the item's own tokens."""
    lengths = [length(item, subject) for item in items]
    if output.ndim > 2 and any(spec.ragged for spec in subject.inputs) and output.shape[1] == max(lengths):
        return [row[:size] for row, size in zip(output, lengths, strict=True)]
    return list(output)


def near_lengths(lengths: Sequence[int], most_padding: float = 0.1) -> list[list[int]]:
    """Indices of a batch in groups of items of nearly one length.

    Each group, filled up to its longest, has at most this share of padding more than its items.
    """
    groups: list[list[int]] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and 1 - (real + lengths[index]) / (longest * (len(groups[-1]) + 1)) <= most_padding:
            groups[-1].append(index)
            real += lengths[index]
        else:
            groups.append([index])
            real = lengths[index]
    return groups


def run(
    engine: Callable[[dict[str, Array]], Array], items: Sequence[Item], subject: Subject, packed: bool
) -> list[Any]:
    """Answers of an engine in the order of the items.

    Args:
        packed: run groups of nearly one length one after the other, instead of filling all up to the longest.
    """
    everything = [list(range(len(items)))]
    groups = near_lengths([length(item, subject) for item in items]) if packed else everything
    answers: list[Any] = [None] * len(items)
    for group in groups:
        some = [items[index] for index in group]
        for index, answer in zip(group, split(engine(collate(some, subject)), some, subject), strict=True):
            answers[index] = answer
    return answers
