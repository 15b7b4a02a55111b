"""What bounds a model: operations that torch counts on real modules, and what this device delivers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from headrace.artifact import Subject, TensorSpec
from headrace.optimizing import bounds
from headrace.runners.subject import TextEncoder
from headrace.runners.way import of_module

IDS = TensorSpec("input_ids", "int64", [0], 0)
MASK = TensorSpec("attention_mask", "int64", [0], mask=True)


def of_linear(module: torch.nn.Module, width: int) -> bounds.Operations:
    subject = Subject(target="t", task="logits", inputs=[TensorSpec("input", "float32", [width])])
    items = [{"input": np.zeros(width, np.float32)}] * 3
    return bounds.operations(of_module(module, (), "cpu", subject), items, [1, 1, 1])


def test_a_product_and_its_sum_are_two_operations() -> None:
    found = of_linear(torch.nn.Sequential(torch.nn.Linear(32, 10), torch.nn.ReLU(), torch.nn.Linear(10, 4)), 32)
    assert (found.lengths, found.counted) == ([1], [2 * (32 * 10 + 10 * 4)])


def test_what_an_encoder_does_at_three_lengths_tells_what_it_does_at_any() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config._attn_implementation = "eager"
    encoder = TextEncoder(BertModel(config).eval(), lambda output, mask: output.last_hidden_state[:, 0])
    subject = Subject(target="t", task="embed", inputs=[IDS, MASK], width=32)
    way = of_module(encoder, (), "cpu", subject)

    def counted(*lengths: int) -> bounds.Operations:
        items: list[Any] = [{"input_ids": np.ones(length, np.int64)} for length in lengths]
        return bounds.operations(way, items, lengths)

    found = counted(4, 30, 9, 60, 12)
    assert found.lengths == [4, 12, 60]
    for length in (9, 30, 45):
        assert found.of(length) == pytest.approx(counted(length).counted[0])


def test_what_has_nothing_to_count_or_breaks_under_the_counter_is_not_known() -> None:
    class Breaks(torch.nn.Module):
        def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("an operator of one's own")

    assert of_linear(torch.nn.Identity(), 8) == bounds.Operations()
    assert of_linear(Breaks(), 8) == bounds.Operations()


def test_rates_are_in_operations_and_bytes_a_second() -> None:
    """Of any processor: neither a thousandth of that nor a thousand times as much."""
    assert 1e9 < bounds.operations_per_s("cpu", 1) < 1e13
    assert 1e8 < bounds.bytes_per_s("cpu", 1) < 1e13
