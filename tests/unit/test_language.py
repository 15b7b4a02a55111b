"""Language models on the ladder: every cache says the same, and what drifts is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace.artifact import Subject, TensorSpec
from headrace.core import TextSpec
from headrace.errors import ConfigError, Unavailable
from headrace.runners import likelihood, way
from headrace.runners.decoder import Decoder, TorchLanguage
from headrace.runners.language import left_padded

SIZE = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = [np.arange(3, 3 + size) for size in (5, 9, 2)]
NEW = 10
SUBJECT = Subject("small", "generate", [TensorSpec("input_ids", "int64", [0])], text=TextSpec("", 64, 101))


def model(kind: str = "Llama", attention: str = "eager") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZE, num_key_value_heads=2)
    config._attn_implementation = attention
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_all_caches_write_what_the_model_itself_does(kind: str, attention: str) -> None:
    made = model(kind, attention)
    wanted = [
        made.generate(torch.tensor(prompt)[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None)[0]
        .numpy()[len(prompt) :]
        .tolist()
        for prompt in PROMPTS
    ]
    for cache in ("kv-off", "kv-dynamic", "kv-static"):
        language = TorchLanguage(Decoder(made), "cpu", cache)
        for _ in range(2):  # a static cache is used again, with what is left in it
            found = language.generate(*left_padded(PROMPTS), NEW)
            assert found.tokens.tolist() == wanted, cache
        assert found.prefill_s > 0
        assert found.decode_s > 0


def test_logits_do_not_depend_on_what_else_is_in_the_batch() -> None:
    made = model()
    language = TorchLanguage(Decoder(made), "cpu", "kv-dynamic")
    together = language.logits(*left_padded(PROMPTS), 2)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = made(torch.tensor(prompt)[None]).logits[0, -2:].detach().numpy()
        np.testing.assert_allclose(row, alone, atol=1e-6)


def test_a_step_reads_all_weights_but_the_table_of_embeddings_unless_it_is_the_head() -> None:
    made = model()
    table = made.get_input_embeddings().weight.numel() * 4
    whole = sum(each.numel() for each in made.parameters()) * 4
    assert TorchLanguage(Decoder(made), "cpu", "kv-off").step_bytes == pytest.approx(whole - table, abs=512)
    made.get_output_embeddings().weight = made.get_input_embeddings().weight
    assert TorchLanguage(Decoder(made), "cpu", "kv-off").step_bytes == pytest.approx(whole - table, abs=512)


def test_an_answer_is_the_distribution_and_what_came() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    found = likelihood.answer(logits + 7, np.array([2, 1]))
    np.testing.assert_allclose(np.exp(found), [[0.5, 0.25, 0.25, 0.25], [0.1, 0.8, 0.1, 0.8]], rtol=1e-6)


def test_drift_of_distributions() -> None:
    wanted = likelihood.answer(np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])), np.array([0, 1]))
    other = likelihood.answer(np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]])), np.array([0, 1]))
    found = likelihood.drift([wanted], [other])
    assert found["kl_mean"] == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, rel=1e-5)
    assert found["top1"] == 0.5
    assert found["perplexity_ratio"] == pytest.approx(np.sqrt(2), rel=1e-5)
    same = likelihood.drift([wanted], [wanted])
    assert same == {"kl_mean": 0, "kl_p99": 0, "top1": 1, "perplexity_ratio": 1}
    assert likelihood.batch_drift([wanted], [other]) == {"batch_kl_mean": found["kl_mean"], "batch_top1": 0.5}


def test_a_text_is_compared_at_its_last_tokens_and_timed_as_it_goes_on() -> None:
    opened = way.of_module(Decoder(model()), [], "cpu", SUBJECT)
    items = [{"input_ids": prompt} for prompt in PROMPTS]
    together = opened.answer(items)
    assert [each.shape for each in together] == [(len(prompt) - 1, 102) for prompt in PROMPTS]
    for item, found in zip(items, together, strict=True):
        np.testing.assert_allclose(found, opened.answer([item])[0], atol=1e-5)
    took = opened.work(items)
    assert took["steps"] > 1
    assert took["prefill_s"] > 0
    assert took["decode_s"] > 0


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (["compile"], "static cache"),
        (["packed"], "models that encode"),
        (["reduce-overhead"], "models that encode"),
        (["kv-static", "graphs"], "NVIDIA GPU"),
    ],
)
def test_what_a_language_model_cannot_be_run_as_is_said(recipe: list[str], said: str) -> None:
    with pytest.raises(Unavailable, match=said):
        way.of_module(Decoder(model()), recipe, "cpu", SUBJECT)


def test_two_caches_exclude_one_another() -> None:
    with pytest.raises(ConfigError, match="kv-off and kv-static"):
        way.of_module(Decoder(model()), ["kv-off", "kv-static"], "cpu", SUBJECT)


def test_a_cache_is_for_language_models() -> None:
    subject = Subject("layer", "logits", [TensorSpec("input", "float32", [4])])
    with pytest.raises(Unavailable, match="language models"):
        way.of_module(torch.nn.Linear(4, 4), ["kv-static"], "cpu", subject)
