"""Modules of torch as runners: bad items are refused, and only they."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from headrace.config import ModelConfig
from headrace.errors import InvalidInput
from headrace.isolation import run_batch
from headrace.runners import Loaded
from headrace.runners.module import open_module, prepare
from headrace.runners.torchscript import open_torchscript

VOCABULARY = 50


class Words(torch.nn.Module):
    """One embedding; the sum of its vectors, times an optional scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 4)

    def forward(self, input_ids: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        vectors = self.embedding(input_ids).sum(1)
        return vectors if scale is None else vectors * scale.unsqueeze(-1)


class Pairs(Words):
    """Two embeddings: nobody can tell which of them tokens are looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.other = torch.nn.Embedding(7, 4)


class Named(Pairs):
    def get_input_embeddings(self) -> torch.nn.Module:
        return self.other


class Shy(Words):
    def get_input_embeddings(self) -> torch.nn.Module:
        raise NotImplementedError


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 4)

    def forward(
        self, attention_mask: torch.Tensor, input_ids: torch.Tensor | None = None, states: torch.Tensor | None = None
    ) -> torch.Tensor:
        vectors = self.embedding(input_ids) if states is None else states
        return (vectors * attention_mask.unsqueeze(-1)).sum(1)


def load(module: torch.nn.Module) -> Loaded:
    return open_module(ModelConfig(name="m", target="t:t"), module, "cpu")


def refused(loaded: Loaded, item: Any) -> tuple[str | None, str]:
    with pytest.raises(InvalidInput) as caught:
        loaded.prepare(item)
    return caught.value.field, caught.value.message


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_a_token_id_without_an_embedding_is_refused(wrong: int) -> None:
    loaded = load(Words())
    place, words = refused(loaded, {"input_ids": [0, wrong]})
    assert (place, words) == ("input.input_ids", "token ids go from 0 to 49")
    assert refused(loaded, {"input_ids": np.array([[0, wrong]])})[0] == "input.input_ids"
    item = loaded.prepare({"input_ids": [0, VOCABULARY - 1]})
    assert loaded.runner.run([item])[0].shape == (4,)


def test_token_ids_that_are_no_integers_are_refused() -> None:
    assert refused(load(Words()), {"input_ids": [0.5, 1]}) == ("input.input_ids", "token ids are whole numbers")


def test_the_vocabulary_is_that_of_the_input_embedding() -> None:
    assert refused(load(Named()), {"input_ids": [7]})[1] == "token ids go from 0 to 6"
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = load(BertModel(BertConfig(vocab_size=20, **size)))
    assert refused(bert, {"input_ids": [20]})[1] == "token ids go from 0 to 19"
    assert load(Pairs()).prepare({"input_ids": [VOCABULARY]})["input_ids"].tolist() == [VOCABULARY]
    assert load(Shy()).prepare({"input_ids": [VOCABULARY]})
    vision = load(ViTModel(ViTConfig(image_size=8, patch_size=4, **size)))  # its input embedding is a convolution
    assert vision.prepare({"input_ids": [9]})


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_vocabulary_of_a_script_is_known(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(Words().eval(), torch.zeros(1, 3, dtype=torch.long)), tmp_path / "words.pt")
    loaded = open_torchscript(ModelConfig(name="m", target="t:t"), tmp_path / "words.pt", "cpu")
    assert refused(loaded, {"input_ids": [VOCABULARY]})[0] == "input.input_ids"


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids"])
def test_a_number_where_a_sequence_is_needed_is_refused(name: str) -> None:
    assert refused(load(Words()), {"input_ids": [1], name: 3}) == (f"input.{name}", "must be a list")


def test_a_number_elsewhere_is_taken() -> None:
    loaded = load(Words())
    items = [loaded.prepare({"input_ids": [1, 2], "scale": scale}) for scale in (1.0, 3.0)]
    one, three = loaded.runner.run(items)
    assert torch.allclose(three, 3 * one)


@pytest.mark.parametrize("value", [2**63, [2**64 - 1], np.array([2**63], np.uint64)])
def test_integers_that_do_not_fit_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInput, match="must fit in 64 bits") as caught:
        prepare({"x": value})
    assert caught.value.field == "input.x"


def test_unsigned_integers_that_fit_are_taken() -> None:
    assert prepare(np.array([2**63 - 1], np.uint64)).tolist() == [2**63 - 1]
    assert prepare(np.array([], np.uint64)).shape == (0,)


@pytest.mark.parametrize("first", [{"input_ids": [1]}, {"input_ids": [1], "scale": 2.0}])
def test_items_that_name_other_tensors_run_apart(first: dict[str, Any]) -> None:
    loaded = load(Words())
    items = [loaded.prepare(item) for item in (first, {"input_ids": [1], "scale": 2.0}, {"input_ids": [1]})]
    with pytest.raises(InvalidInput, match="must name the same tensors"):
        loaded.runner.run(items)
    outputs = run_batch(loaded.runner.run, items)
    assert [torch.allclose(outputs[2] * 2, each) for each in outputs] == ["scale" in item for item in items]


@pytest.mark.parametrize("order", [1, -1])
def test_named_items_and_bare_ones_run_apart(order: int) -> None:
    loaded = load(Words())
    items = [loaded.prepare({"input_ids": [1]}), loaded.prepare([2])][::order]
    with pytest.raises(InvalidInput, match="must name the same tensors"):
        loaded.runner.run(items)
    assert all(isinstance(each, torch.Tensor) for each in run_batch(loaded.runner.run, items))


def test_a_mask_may_be_missing_where_there_are_ids() -> None:
    loaded = load(Masked())
    items = [{"input_ids": [1, 2], "attention_mask": [1, 0]}, {"input_ids": [1]}, {"input_ids": [1, 2]}]
    first, second, third = loaded.runner.run([loaded.prepare(item) for item in items])
    assert torch.allclose(first, second)
    assert not torch.allclose(first, third)


def test_a_mask_that_nothing_can_be_made_from_must_be_there() -> None:
    loaded = load(Masked())
    states = np.ones((2, 4)).tolist()
    items = [loaded.prepare({"states": states, "attention_mask": [1, 0]}), loaded.prepare({"states": states})]
    with pytest.raises(InvalidInput, match="must name the same tensors"):
        loaded.runner.run(items)
    first, second = run_batch(loaded.runner.run, items)
    assert torch.equal(first, torch.ones(4))
    assert isinstance(second, TypeError), "forward needs its mask"
