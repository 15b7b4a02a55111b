"""Every kind of target, behind one server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import HEADRACE, MODELS, Server

sys.path.insert(0, str(MODELS))


def test_a_function(zoo: Server) -> None:
    assert zoo.predict("hello", "/models/shout/predict").json()["prediction"] == "HELLO"
    value = {"any": [1, 2.5, None, {"x": "é"}]}
    assert zoo.predict(value, "/models/echo/predict").json()["prediction"] == value


def test_typed_items_in_and_dataclasses_out(zoo: Server) -> None:
    answer = zoo.predict({"x": 3, "y": 4, "label": "a"}, "/models/norm/predict").json()
    assert answer["prediction"] == {"value": 5.0, "label": "a"}


def test_prepare_cost_finish(zoo: Server) -> None:
    assert zoo.predict("a b c", "/models/stages/predict").json()["prediction"] == {"words": 3, "device": "cpu"}


def test_a_factory_of_a_module(zoo: Server) -> None:
    import torch_models

    module = torch_models.linear()
    rows = [[1, 2, 3, 4], [0.5, 0, 0, 1]]
    body = zoo.client.post("/models/linear/predict", json={"inputs": rows}).json()["predictions"]
    assert np.allclose(body, module(torch.tensor(rows)).detach().numpy(), atol=1e-6)


def test_a_module_with_named_tensors_is_padded_and_masked(zoo: Server) -> None:
    import torch_models

    module = torch_models.WithMask()
    items = [[1, 2, 3, 4, 5], [7], [9, 8]]
    expected = [module(torch.tensor([ids]), torch.ones(1, len(ids)))["logits"][0].tolist() for ids in items]
    body = zoo.client.post("/models/masked/predict", json={"inputs": [{"input_ids": ids} for ids in items]}).json()
    assert np.allclose(body["predictions"], expected, atol=1e-5)
    one = zoo.client.post("/models/masked/predict", json={"token_ids": items[0]}).json()["prediction"]
    assert np.allclose(one, expected[0], atol=1e-5)
    wrong = zoo.client.post("/models/masked/predict", json={"inputs": [{"x": [1]}]})
    assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "input.x")


def test_torchscript(zoo: Server) -> None:
    answer = zoo.predict([1, 2, 3, 4], "/models/scripted/predict")
    assert answer.status_code == 200
    assert len(answer.json()["prediction"]) == 2


def test_a_classifier_and_its_logits(zoo: Server) -> None:
    label = zoo.predict("a text", "/models/classifier/predict").json()["prediction"]
    logits = zoo.predict("a text", "/models/logits/predict").json()["prediction"]
    shares = np.exp(logits) / np.exp(logits).sum()
    assert set(label["scores"]) == {"bad", "fair", "good"}
    assert np.allclose(list(label["scores"].values()), shares, atol=1e-5)
    assert label["score"] == max(label["scores"].values()) == label["scores"][label["label"]]


def test_one_bad_item_fails_alone_and_its_text_stays_in_the_log(zoo: Server) -> None:
    body = zoo.client.post("/models/picky/predict", json={"inputs": ["a", "bad", "sour", "b"]})
    first, bad, sour, last = body.json()["predictions"]
    assert first.startswith("a from")
    assert last.startswith("b from")
    assert bad["error"]["code"] == sour["error"]["code"] == "runner_error"
    assert "secret" not in body.text
    assert "secret text of the model" in zoo.log
    alone = zoo.predict("bad", "/models/picky/predict", headers={"X-Request-Id": "my-id-7"})
    assert alone.status_code == 500
    assert alone.json()["error"]["request_id"] == alone.headers["x-request-id"] == "my-id-7"
    assert "my-id-7" in zoo.log


def test_a_model_that_returns_too_few_answers(zoo: Server) -> None:
    answer = zoo.client.post("/models/short/predict", json={"inputs": ["a", "b"]})
    assert answer.status_code == 500
    assert [each["error"]["code"] for each in answer.json()["predictions"]] == ["runner_error"] * 2


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("models:nothing", "models has no 'nothing'"),
        ("no_such_module:x", "there is no module 'no_such_module'"),
        ("models:FailsToLoad", "no such weights"),
        ("models:wrong", "not async"),
        ("missing.pt", "there is no file"),
        ("zoo.toml", "cannot serve"),
        ("no/such-model", "neither a directory nor a model the hub gives"),
    ],
)
def test_a_target_that_cannot_start_says_why_and_ends(target: str, words: str) -> None:
    done = subprocess.run(
        [HEADRACE, "serve", target, "--port", "0"], cwd=MODELS, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "ready:" not in done.stdout


def test_a_pickled_checkpoint_is_refused(zoo: Server) -> None:
    pickled = next(Path(zoo.log_file).parent.glob("pickled.pt"))
    done = subprocess.run([HEADRACE, "serve", str(pickled), "--port", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pickled checkpoint is never loaded" in done.stderr


def test_a_port_in_use_is_said_before_anything_loads(zoo: Server) -> None:
    done = subprocess.run(
        [HEADRACE, "serve", "models:echo", "--port", str(zoo.port)],
        cwd=MODELS,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {zoo.port}" in done.stderr


def test_no_front_end_holds_torch(zoo: Server, needs_proc: None) -> None:
    """Also not when the user's file begins with ``import torch``."""
    assert zoo.predict(2, "/models/doubler/predict").json()["prediction"] == 4

    def libraries(slot: str) -> str:
        return Path(f"/proc/{zoo.pid_of(slot)}/maps").read_text()

    assert "libtorch" in libraries("worker.doubler.0")
    assert "libtorch" not in libraries("http.0")
    assert "libtorch" not in libraries("worker.shout.0"), "a model without torch is served without torch"
    assert "libtorch" not in Path(f"/proc/{zoo.process.pid}/maps").read_text()
