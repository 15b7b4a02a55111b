"""Hugging Face directories: what their files ask for is done, or refused at load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from headrace.config import ModelConfig
from headrace.errors import LoadError
from headrace.runners import Loaded
from headrace.runners.huggingface import _collate, _mean, open_huggingface
from headrace.runners.text import TextPreparer

WORDS = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "?": 3, "query:": 4, "hello": 5, "Hello": 6, "world": 7}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


def save(model: Any, directory: Path, special: bool = True, **files: Any) -> Path:
    """A model directory with a tokenizer of eight words; ``files`` are JSON files by their stems."""
    torch.manual_seed(0)
    model.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def pooled(directory: Path, **options: Any) -> None:
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True, **options}))


def bert(**options: Any) -> BertModel:
    return BertModel(BertConfig(vocab_size=8, max_position_embeddings=16, **SMALL, **options))


def gpt2(**options: Any) -> GPT2ForSequenceClassification:
    config = GPT2Config(
        vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, **options
    )
    return GPT2ForSequenceClassification(config)


def load(directory: Path, **options: Any) -> Loaded:
    return open_huggingface(ModelConfig(name="m", target=str(directory), **options), "cpu")


def ids(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


def test_a_batch_is_padded_with_the_models_own_padding() -> None:
    mask = ids(1, 0, 1)
    batch = _collate([ids(1), {"input_ids": ids(1, 2, 3), "token_type_ids": ids(0, 1, 1), "attention_mask": mask}], 7)
    assert batch["input_ids"].tolist() == [[1, 7, 7], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 0, 1]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 1]]


def test_a_decoder_classifies_a_batch_as_it_does_each_item(tmp_path: Path) -> None:
    loaded = load(save(gpt2(pad_token_id=7), tmp_path), task="logits")
    items = [ids(1, 5), ids(1, 4, 6, 5, 2), ids(5)]
    together = loaded.runner.run(items)
    assert np.allclose(together, [loaded.runner.run([item])[0] for item in items], atol=1e-5)


@pytest.mark.parametrize("padding", [None, -1, 8])
def test_a_classifier_without_padding_is_refused(tmp_path: Path, padding: int | None) -> None:
    directory = save(gpt2(), tmp_path)
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": padding}))
    with pytest.raises(LoadError, match="no pad_token_id") as caught:
        load(directory)
    assert "set pad_token_id in config.json" in (caught.value.hint or "")


def test_an_encoder_without_padding_is_masked(tmp_path: Path) -> None:
    loaded = load(save(bert(pad_token_id=None), tmp_path))
    items = [ids(5), ids(1, 4, 6, 5, 2)]
    assert np.allclose(loaded.runner.run(items), [loaded.runner.run([item])[0] for item in items], atol=1e-5)


def test_token_types_are_those_that_the_model_takes(tmp_path: Path, minilm: Path) -> None:
    def token_types(directory: Path) -> int:
        text = load(directory).info.text
        assert text is not None
        return text.token_types

    assert token_types(save(bert(type_vocab_size=3), tmp_path / "bert")) == 3
    size = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "type_vocab_size": 2}
    distil = DistilBertConfig(vocab_size=8, max_position_embeddings=16, **size)
    assert token_types(save(DistilBertModel(distil), tmp_path / "distil")) == 0
    assert token_types(save(gpt2(pad_token_id=0), tmp_path / "gpt2")) == 0, "looks token types up among the tokens"
    assert token_types(minilm) == 2


def test_lower_case_and_prompt_of_sentence_transformers_are_applied(tmp_path: Path) -> None:
    pooled(tmp_path)
    loaded = load(
        save(
            bert(),
            tmp_path,
            modules=[TRANSFORMER, POOLING],
            sentence_bert_config={"max_seq_length": 16, "do_lower_case": True},
            config_sentence_transformers={"prompts": {"q": "query: ", "d": ""}, "default_prompt_name": "q"},
        )
    )
    assert loaded.info.text is not None
    assert TextPreparer(loaded.info.text).text("Hello").tolist() == [1, 4, 5, 2]


@pytest.mark.parametrize(
    "settings", [{}, {"prompts": {"q": "query: "}}, {"prompts": {"q": ""}, "default_prompt_name": "q"}]
)
def test_no_prompt_where_none_is_the_default(tmp_path: Path, settings: dict[str, Any]) -> None:
    pooled(tmp_path, include_prompt=False)
    files: dict[str, Any] = {"modules": [TRANSFORMER, POOLING], "config_sentence_transformers": settings}
    text = load(save(bert(), tmp_path, **files)).info.text
    assert text is not None
    assert (text.prefix, text.lower) == ("", False)


@pytest.mark.parametrize(
    ("prompts", "words"), [({"q": "query: "}, "out of the pooling"), ({"other": "x"}, "has no prompt 'q'")]
)
def test_a_prompt_that_cannot_be_applied_is_refused(tmp_path: Path, prompts: dict[str, str], words: str) -> None:
    pooled(tmp_path, include_prompt=False)
    settings = {"prompts": prompts, "default_prompt_name": "q"}
    directory = save(bert(), tmp_path, modules=[TRANSFORMER, POOLING], config_sentence_transformers=settings)
    with pytest.raises(LoadError, match=words):
        load(directory)


def test_a_classifier_has_no_prompt(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=8, max_position_embeddings=16, **SMALL)
    settings = {"prompts": {"q": "query: "}, "default_prompt_name": "q"}
    text = load(save(BertForSequenceClassification(config), tmp_path, config_sentence_transformers=settings)).info.text
    assert text is not None
    assert text.prefix == ""


def test_the_mean_of_nothing_is_nothing() -> None:
    states = torch.ones(2, 3, 4)
    means = _mean(states, torch.tensor([[0, 0, 0], [1, 1, 0]]))
    assert torch.equal(means, torch.tensor([[0.0] * 4, [1.0] * 4]))


def test_too_few_tokens_for_a_text_are_refused_at_load(tmp_path: Path) -> None:
    directory = save(bert(), tmp_path)
    with pytest.raises(LoadError, match="no room for a text beside 2 special ones"):
        load(directory, max_batch_tokens=1)
    assert load(save(bert(), tmp_path, special=False), max_batch_tokens=1).info.text is not None


def test_the_real_model_answers_a_batch_as_it_does_each_text(minilm: Path) -> None:
    loaded = load(minilm)
    assert loaded.info.text is not None
    preparer = TextPreparer(loaded.info.text)
    items = [preparer.text(text) for text in ("a", "Pumped storage turns a river into a battery.")]
    together = loaded.runner.run(items)
    assert np.allclose(together, [loaded.runner.run([item])[0] for item in items], atol=1e-5)
