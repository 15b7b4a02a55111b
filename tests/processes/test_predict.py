"""The demo as a newcomer starts it: the real model behind HTTP."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from conftest import ROOT, Server

NAME = "all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def direct(minilm: Path) -> Any:
    """MiniLM as its authors describe it: mean over the tokens, unit length. Nothing of headrace is in it."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModel.from_pretrained(minilm).eval()

    def embed(text: str) -> np.ndarray:
        tokens = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            states = model(**tokens).last_hidden_state[0]
        vector = states.mean(0)
        return (vector / vector.norm()).numpy()

    return embed


def sentences(count: int) -> list[str]:
    words = (ROOT / "LICENSE").read_text().split()
    pick = random.Random(3)
    cuts = [(pick.randrange(1000), pick.randint(5, 60)) for _ in range(count)]
    return [" ".join(words[start : start + length]) for start, length in cuts]


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_first_request_of_the_readme(demo: Server, direct: Any) -> None:
    answer = demo.client.post(
        "/predict", content='{"input":"hello world"}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200
    body = answer.json()
    assert len(body["prediction"]) == 384
    assert cosine(body["prediction"], direct("hello world")) >= 0.9999
    assert body["latency_ms"] >= body["timings"]["run_ms"] > 0
    assert body["timings"]["batch_size"] == 1
    assert answer.headers["x-request-id"]


def test_64_clients_get_their_own_answers(demo: Server, direct: Any) -> None:
    texts = sentences(48)
    expected = [direct(text) for text in texts]

    def client(number: int) -> list[float]:
        with httpx.Client(base_url=demo.url, timeout=60) as http:
            found = []
            for step in range(6):
                index = (number * 7 + step) % len(texts)
                answer = http.post("/predict", json={"input": texts[index]})
                assert answer.status_code == 200, answer.text
                found.append(cosine(answer.json()["prediction"], expected[index]))
            return found

    with ThreadPoolExecutor(64) as pool:
        cosines = [each for found in pool.map(client, range(64)) for each in found]
    assert len(cosines) == 64 * 6
    assert min(cosines) >= 0.9999


def test_a_list_is_answered_in_order_with_errors_in_their_place(demo: Server, direct: Any) -> None:
    texts = ["one", "two words", 3, "four"]
    body = demo.client.post("/predict", json={"inputs": texts}).json()["predictions"]
    assert [cosine(body[i], direct(texts[i])) > 0.9999 for i in (0, 1, 3)] == [True] * 3
    assert body[2]["error"]["code"] == "invalid_input"
    assert body[2]["error"]["field"] == "inputs[2]"


def test_named_tensors_and_their_alias(demo: Server, direct: Any, minilm: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    ids = tokenizer.encode("hello world").ids
    one = demo.client.post(f"/models/{NAME}/predict", json={"token_ids": ids}).json()["prediction"]
    padded = {"input_ids": [[*ids, 0, 0]], "attention_mask": [[1] * len(ids) + [0, 0]]}
    (two,) = demo.client.post("/predict", json=padded).json()["predictions"]
    assert cosine(one, direct("hello world")) >= 0.9999
    assert cosine(two, direct("hello world")) >= 0.9999


def test_a_text_longer_than_the_model_is_cut_not_refused(demo: Server, direct: Any) -> None:
    text = " ".join(sentences(40))
    assert cosine(demo.predict(text).json()["prediction"], direct(text)) >= 0.9999


def test_the_openai_client_works_unchanged(demo: Server, direct: Any) -> None:
    client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="unused")
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    answer = client.embeddings.create(model=NAME, input=["hello world", "good bye"])
    assert [each.index for each in answer.data] == [0, 1]
    assert cosine(answer.data[0].embedding, direct("hello world")) >= 0.9999
    assert cosine(answer.data[1].embedding, direct("good bye")) >= 0.9999
    assert answer.usage.prompt_tokens == 8
    plain = client.embeddings.create(model=NAME, input="hello world", encoding_format="float")
    assert cosine(plain.data[0].embedding, direct("hello world")) >= 0.9999
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="gpt-x", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="dimensions"):
        client.embeddings.create(model=NAME, input="a", dimensions=7)
    client.close()


def test_health_metrics_and_docs(demo: Server) -> None:
    assert demo.client.get("/health/live").json() == {"status": "live"}
    expected = {"status": "ready", "models": {NAME: "ready"}, "agents": "ready"}
    assert demo.client.get("/health/ready").json() == expected
    before = demo.metric(f'headrace_requests_total{{model="{NAME}",endpoint="predict",status="success"}}')
    demo.predict("count me")
    after = demo.metric(f'headrace_requests_total{{model="{NAME}",endpoint="predict",status="success"}}')
    assert after == before + 1
    assert demo.metric(f'headrace_workers{{model="{NAME}",state="ready"}}') == 1
    page = demo.client.get("/docs").text
    for asset in ("docs/assets/swagger-ui-bundle.js", "docs/assets/swagger-ui.css", "openapi.json"):
        assert asset in page
        assert demo.client.get(asset).status_code == 200
    assert "http" not in page.replace("headrace API", ""), "the page works without the internet"
