"""How batches lie in few shapes: nothing lost, nothing that could be looked at left undefined."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from headrace.artifact import Subject, TensorSpec
from headrace.core import TextSpec
from headrace.runners import graphs
from headrace.runners.layouts import Padded, Ragged, laid_out, longer, more_tokens
from headrace.runners.way import of_module

TEXT = Subject(
    "encoder",
    "embed",
    [TensorSpec("input_ids", "int64", [0], pad=7), TensorSpec("attention_mask", "int64", [0], mask=True)],
    text=TextSpec("", 100, 1000),
)


def batch(*lengths: int) -> dict[str, Any]:
    mask = (np.arange(max(lengths)) < np.asarray(lengths)[:, None]).astype(np.int64)
    ids = np.arange(mask.size).reshape(mask.shape) + 10
    return {"input_ids": np.where(mask, ids, 7), "attention_mask": mask}


def test_rows_and_lengths_are_filled_up() -> None:
    found = laid_out(Padded(TEXT), batch(20, 3, 11))
    assert found["input_ids"].shape == (4, 32)
    np.testing.assert_array_equal(found["input_ids"][:3, :20], batch(20, 3, 11)["input_ids"])
    assert (found["input_ids"][:3, 20:] == 7).all()
    assert (found["attention_mask"][:3].sum(1) == [20, 3, 11]).all()
    # Attention over nothing would be no number.
    np.testing.assert_array_equal(found["input_ids"][3], found["input_ids"][0])
    assert found["attention_mask"][3].sum() == 20


def test_what_lay_there_before_is_gone() -> None:
    layout = Padded(TEXT)
    places = laid_out(layout, batch(31, 30, 29, 28))
    layout.fill(places, batch(18, 17, 1))
    np.testing.assert_array_equal(places["input_ids"], laid_out(layout, batch(18, 17, 1))["input_ids"])
    ragged = Ragged(TEXT)
    places = laid_out(ragged, batch(18, 17, 9, 9))
    ragged.fill(places, batch(18, 17, 1))
    for name, value in laid_out(ragged, batch(18, 17, 1)).items():
        np.testing.assert_array_equal(places[name], value)


def test_lengths_are_those_that_batches_are_filled_up_to() -> None:
    lengths = Padded(TEXT).lengths()
    assert lengths == [16, 32, 64, 96, 100]
    assert all(Padded(TEXT).shape(batch(length))[1] in lengths for length in range(1, 101))
    assert Ragged(TEXT).lengths() == lengths
    assert Padded(msgspec.structs.replace(TEXT, text=None)).lengths() == []


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of the compiler's own modules
def test_a_model_that_is_compiled_by_shape_says_for_which_lengths() -> None:
    assert of_module(torch.nn.Identity(), ["reduce-overhead"], "cpu", TEXT).lengths == Padded(TEXT).lengths()
    assert of_module(torch.nn.Identity(), ["sdpa"], "cpu", TEXT).lengths == ()


def test_of_more_graphs_than_are_kept_the_one_not_used_for_longest_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which graphs there are, without a GPU: what one of them does is checked on one (tests/gpu)."""
    made: list[tuple[int, ...]] = []

    class Graph:
        pool = None

        def __init__(self, *given: Any) -> None:
            layout, batch = given[4:6]
            self.shape = layout.shape(batch)
            self.places = laid_out(layout, batch)
            made.append(self.shape)

        def run(self, items: int) -> Any:
            return np.zeros((items, 2), np.float32)

    monkeypatch.setattr(graphs, "_Graph", Graph)
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    captured = graphs.Captured(None, "cuda:0", Padded(TEXT))
    for length in (10, 30, 10, 60, 10, 30):
        assert captured(batch(length)).shape == (1, 2)
    assert made == [(1, 16), (1, 32), (1, 64), (1, 32)]


@pytest.mark.parametrize("lengths", [(32, 31), (20, 3), (1,), (64,)])
def test_a_shortened_batch_has_padding_and_no_item_without_tokens(lengths: tuple[int, ...]) -> None:
    layout = Padded(TEXT)
    places = laid_out(layout, batch(*lengths))
    layout.shorten(places)
    assert places["attention_mask"][0, -1] == 0
    assert (places["attention_mask"].sum(1) > 0).all()
    layout.fill(places, batch(*lengths))
    np.testing.assert_array_equal(places["attention_mask"], laid_out(layout, batch(*lengths))["attention_mask"])


@pytest.mark.parametrize("lengths", [(5,), (20, 3, 11), (1, 1, 1, 1, 1), (97, 64, 2)])
def test_a_ragged_batch_holds_each_token_once_and_finds_it_again(lengths: tuple[int, ...]) -> None:
    given = batch(*lengths)
    found = laid_out(Ragged(TEXT), given)
    total = sum(lengths)
    assert found["input_ids"].shape[0] >= total
    assert found["starts"][0] == 0
    assert np.diff(found["starts"])[: len(lengths)].tolist() == list(lengths)
    assert (np.diff(found["starts"])[len(lengths) :] == 0).all()
    for row, size in enumerate(lengths):
        own = found["rows"][row, :size]
        assert found["input_ids"][own].tolist() == given["input_ids"][row, :size].tolist()
        assert found["position_ids"][own].tolist() == list(range(size))
        assert found["attention_mask"][row].sum() == size
    assert found["attention_mask"].sum() == total


def test_lengths_stop_where_the_model_has_no_positions() -> None:
    assert [longer(size) for size in (0, 1, 16, 17, 33, 97)] == [0, 16, 16, 32, 64, 128]
    assert longer(97, 100) == 100
    assert longer(101, 100) == 101


def test_numbers_of_tokens_are_few_and_little_larger() -> None:
    sizes = {more_tokens(tokens) for tokens in range(1, 4097)}
    assert len(sizes) < 64
    assert all(tokens <= more_tokens(tokens) <= max(tokens * 1.15, tokens + 64) for tokens in range(1, 4097))
