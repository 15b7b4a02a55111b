"""How a batch lies in the tensors that a module takes where few shapes are wanted, as each is compiled or captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from headrace.artifact import Subject
from headrace.runners.collate import Array

Shape = tuple[int, ...]
Places = Mapping[str, Array]

_SHORT, _STEP = 16, 32


class Layout(Protocol):
    """How a batch lies in the tensors that a module takes."""

    def shape(self, batch: Mapping[str, Array]) -> Shape:
        """Under which shape the batch is run."""
        ...

    def tensors(self, shape: Shape, batch: Mapping[str, Array]) -> dict[str, tuple[Shape, str]]:
        """Shape and dtype of each tensor, by the name that the module takes it under."""
        ...

    def fill(self, places: Places, batch: Mapping[str, Array]) -> None:
        """Write the batch to its places."""
        ...

    def shorten(self, places: Places) -> None:
        """Make the first item of what lies in the places shorter than the longest it could be, where that shows."""
        ...

    def lengths(self) -> list[int]:
        """To which a batch's items are filled up; none where no longest is known."""
        ...


class Padded:
    """One row per item, filled up: rows to a power of two, lengths to the next of 16, 32, 64, 96, 128, …"""

    def __init__(self, subject: Subject) -> None:
        self._specs = subject.inputs
        self._most = subject.text.max_tokens if subject.text is not None else 0

    def shape(self, batch: Mapping[str, Array]) -> Shape:
        rows = len(next(iter(batch.values())))
        length = next((batch[spec.name].shape[1] for spec in self._specs if spec.ragged), 0)
        return power_of_two(rows), longer(length, self._most)

    def tensors(self, shape: Shape, batch: Mapping[str, Array]) -> dict[str, tuple[Shape, str]]:
        rows, length = shape
        return {
            spec.name: (
                (rows, length, *batch[spec.name].shape[2:]) if spec.ragged else (rows, *batch[spec.name].shape[1:]),
                spec.dtype,
            )
            for spec in self._specs
        }

    def fill(self, places: Places, batch: Mapping[str, Array]) -> None:
        for spec in self._specs:
            value, place = batch[spec.name], places[spec.name]
            items = len(value)
            if spec.ragged:
                size = value.shape[1]
                place[:items, :size] = value
                place[:items, size:] = 0 if spec.mask else spec.pad
            else:
                place[:items] = value
            # The first item again rather than zeros: attention over nothing is no number.
            place[items:] = place[:1]

    def shorten(self, places: Places) -> None:
        for spec in self._specs:
            if spec.mask and places[spec.name].shape[1] > 1:
                places[spec.name][0, -1] = 0

    def lengths(self) -> list[int]:
        return _lengths(self._most)


class Ragged:
    """All tokens of a batch in one row, without padding between them, as `runners.varlen` takes them."""

    def __init__(self, subject: Subject) -> None:
        self._most = subject.text.max_tokens if subject.text is not None else 0

    def shape(self, batch: Mapping[str, Array]) -> Shape:
        rows, length = batch["attention_mask"].shape
        return power_of_two(rows), longer(length, self._most), more_tokens(int(batch["attention_mask"].sum()))

    def tensors(self, shape: Shape, batch: Mapping[str, Array]) -> dict[str, tuple[Shape, str]]:
        rows, length, tokens = shape
        return {
            "input_ids": ((tokens,), "int32"),
            "position_ids": ((tokens,), "int32"),
            "starts": ((rows + 1,), "int32"),
            "rows": ((rows, length), "int32"),
            "attention_mask": ((rows, length), "int32"),
        }

    def fill(self, places: Places, batch: Mapping[str, Array]) -> None:
        mask = batch["attention_mask"].astype(bool)
        items, length = mask.shape
        sizes = mask.sum(1)
        tokens = int(sizes.sum())
        ends = np.cumsum(sizes)
        places["input_ids"][:tokens] = batch["input_ids"][mask]
        places["input_ids"][tokens:] = 0
        positions = np.broadcast_to(np.arange(length), mask.shape)
        places["position_ids"][:tokens] = positions[mask]
        places["position_ids"][tokens:] = 0
        places["starts"][0] = 0
        places["starts"][1 : items + 1] = ends
        places["starts"][items + 1 :] = tokens  # items that are not there have no tokens
        places["attention_mask"][:] = 0
        places["attention_mask"][:items, :length] = mask
        places["rows"][:] = 0
        places["rows"][:items, :length] = np.where(mask, positions + (ends - sizes)[:, None], 0)

    def shorten(self, places: Places) -> None:
        """What is captured looks at no padding."""

    def lengths(self) -> list[int]:
        return _lengths(self._most)


def _lengths(most: int) -> list[int]:
    return sorted({longer(length, most) for length in range(1, most + 1)})


def power_of_two(rows: int) -> int:
    return 1 << (rows - 1).bit_length()


def longer(length: int, most: int = 0) -> int:
    """The next of 16, 32, 64, 96, 128, … tokens, not beyond the ``most`` that a model has positions for."""
    if not length:
        return 0
    wanted = _SHORT if length <= _SHORT else -(-length // _STEP) * _STEP
    return max(length, min(wanted, most)) if most else wanted


def more_tokens(tokens: int) -> int:
    """A number of tokens at most an eighth larger, of few: eight steps between powers of two, and 64 at least."""
    step = max(64, power_of_two(max(tokens, 2)) // 16)
    return -(-tokens // step) * step


def laid_out(layout: Layout, batch: Mapping[str, Array]) -> dict[str, Array]:
    """A batch in places of its own."""
    tensors = layout.tensors(layout.shape(batch), batch)
    places = {name: np.zeros(shape, dtype) for name, (shape, dtype) in tensors.items()}
    layout.fill(places, batch)
    return places
