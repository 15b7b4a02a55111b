"""Text and token ids on their way to a transformer: what is refused before it reaches the model."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from headrace.core import TextSpec
from headrace.errors import InvalidInput, LoadError
from headrace.runners.text import TextPreparer

HELLO, WORLD = 7592, 2088


@pytest.fixture(scope="module")
def spec(minilm: Path) -> TextSpec:
    return TextSpec(str(minilm / "tokenizer.json"), 8, 30522, token_types=2)


@pytest.fixture
def bare(tmp_path: Path) -> TextSpec:
    """A tokenizer of four words that adds no special tokens and tells upper from lower case."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "query:": 1, "hello": 2, "Hello": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TextSpec(str(tmp_path / "tokenizer.json"), 8, 4)


def refused(preparer: TextPreparer, named: dict[str, list[int]]) -> tuple[str | None, str]:
    with pytest.raises(InvalidInput) as caught:
        preparer.tensors(named, "input")
    return caught.value.field, caught.value.message


def test_token_types_without_an_embedding_are_refused(spec: TextSpec) -> None:
    item = {"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 2]}
    place = "input.token_type_ids"
    assert refused(TextPreparer(spec), item) == (place, "token types go from 0 to 1")
    one = TextPreparer(msgspec.structs.replace(spec, token_types=1))
    assert refused(one, {**item, "token_type_ids": [0, 1, 0]}) == (place, "token types go from 0 to 0")
    none = TextPreparer(msgspec.structs.replace(spec, token_types=0))
    assert refused(none, {**item, "token_type_ids": [0, 0, 0]}) == (place, "this model takes no token_type_ids")
    assert refused(TextPreparer(spec), {**item, "token_type_ids": [0, -1, 0]})[0] == place


def test_as_many_token_types_as_the_model_has_are_taken(spec: TextSpec) -> None:
    three = TextPreparer(msgspec.structs.replace(spec, token_types=3))
    made = three.tensors({"input_ids": [5, 6, 7], "token_type_ids": [0, 1, 2]})
    assert isinstance(made, dict)
    assert made["token_type_ids"].tolist() == [0, 1, 2]


def test_an_attention_mask_is_still_zeros_and_ones(spec: TextSpec) -> None:
    item = {"input_ids": [5, 6], "attention_mask": [1, 2]}
    assert refused(TextPreparer(spec), item) == ("input.attention_mask", "values are 0 or 1")


def test_a_token_that_only_the_tokenizer_knows_is_refused(spec: TextSpec) -> None:
    small = TextPreparer(msgspec.structs.replace(spec, vocabulary=HELLO))
    assert WORLD in small.text("world")
    with pytest.raises(InvalidInput, match="more tokens than the model") as caught:
        small.text("hello", "input")
    assert caught.value.field == "input"


def test_a_text_without_tokens_is_refused(bare: TextSpec) -> None:
    assert TextPreparer(bare).text("hello").tolist() == [2]
    with pytest.raises(InvalidInput, match="has no tokens") as caught:
        TextPreparer(bare).text(" ", "inputs[2]")
    assert caught.value.field == "inputs[2]"


def test_a_limit_that_special_tokens_fill_is_refused(spec: TextSpec) -> None:
    for max_tokens in (1, 2):  # [CLS] and [SEP]
        with pytest.raises(LoadError, match="no room for a text beside 2 special ones"):
            TextPreparer(msgspec.structs.replace(spec, max_tokens=max_tokens))
    assert len(TextPreparer(msgspec.structs.replace(spec, max_tokens=3)).text("hello world")) == 3


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match=r"cannot read .*tokenizer\.json"):
        TextPreparer(TextSpec(str(tmp_path / "tokenizer.json"), 8, 4))


def test_prefix_and_lower_case(bare: TextSpec) -> None:
    preparer = TextPreparer(msgspec.structs.replace(bare, prefix="Query: ", lower=True))
    assert preparer.text("Hello").tolist() == [1, 2]
    assert TextPreparer(bare).text("Hello").tolist() == [3]
    ids = preparer.tensors({"input_ids": [3]})
    assert np.array_equal(ids, [3]), "ids of the client's own have no prefix"  # type: ignore[arg-type]
