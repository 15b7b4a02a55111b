"""Files, streams, the Open Inference Protocol and what HTTP offers beside: by the clients that people use."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import Server, serving, wait_until

RAW = {"Content-Type": "application/octet-stream"}


def events(server: Server, path: str, body: Any) -> list[tuple[str, Any]]:
    """Name and decoded data of each server-sent event."""
    found = []
    with server.client.stream("POST", path, json=body, headers={"Accept": "text/event-stream"}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                found.append((name, json.loads(line[6:])))
                name = ""
    return found


def test_raw_bytes_are_an_item(zoo: Server) -> None:
    content = bytes(range(256)) * 4
    answer = zoo.client.post("/models/sizes/predict", content=content, headers=RAW)
    assert answer.json()["prediction"] == 1024


def test_base64_is_an_item(zoo: Server) -> None:
    body = {"inputs": [base64.b64encode(b"hello").decode(), "not base64!"]}
    predictions = zoo.client.post("/models/sizes/predict", json=body).json()["predictions"]
    assert predictions[0] == 5
    assert predictions[1]["error"]["field"] == "inputs[1]" or "base64" in predictions[1]["error"]["message"]


def test_each_part_of_a_form_is_an_item(zoo: Server) -> None:
    files = [("a", ("a.bin", b"12345")), ("b", ("b.bin", b"\r\n--x" * 100))]
    answer = zoo.client.post("/models/sizes/predict", files=files)
    assert answer.json()["predictions"] == [5, 500]
    one = zoo.client.post("/models/sizes/predict", files={"file": b"12"})
    assert one.json()["prediction"] == 2


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=x", b"no form", 400),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400),
        ("text/plain", b"x", 415),
        ("application/octet-stream", b"", 422),
    ],
)
def test_a_form_that_is_none_is_refused(zoo: Server, kind: str, content: bytes, status: int) -> None:
    answer = zoo.client.post("/models/sizes/predict", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text


def test_a_form_from_another_site_is_refused(zoo: Server) -> None:
    answer = zoo.client.post("/models/sizes/predict", files={"f": b"x"}, headers={"Origin": "https://evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


def test_a_model_of_texts_takes_no_files(zoo: Server) -> None:
    answer = zoo.client.post("/models/shout/predict", content=b"x", headers=RAW)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_bytes_come_back_raw_if_asked_for(zoo: Server) -> None:
    answer = zoo.client.post(
        "/models/mirror/predict", content=b"\x00\xff", headers={**RAW, "Accept": "application/octet-stream"}
    )
    assert answer.content == b"\xff\x00"
    assert zoo.client.post("/models/mirror/predict", content=b"ab", headers=RAW).json()["prediction"] == "YmE="


def test_chunks_come_as_events(zoo: Server) -> None:
    found = events(zoo, "/models/words/predict", {"input": "one two three"})
    assert found[:-1] == [("", "one"), ("", "two"), ("", "three")]
    name, last = found[-1]
    assert name == "done"
    assert last["timings"]["batch_size"] == 1
    assert last["latency_ms"] > 40


def test_a_failure_inside_a_stream_is_its_last_event(zoo: Server) -> None:
    found = events(zoo, "/models/words/predict", {"input": "one fail three"})
    assert found[0] == ("", "one")
    assert found[1][0] == "error"
    assert found[1][1]["error"]["code"] == "runner_error"
    assert "secret" not in str(found)
    assert len(found) == 2


def test_a_wrong_request_for_a_stream_is_an_ordinary_error(zoo: Server) -> None:
    headers = {"Accept": "text/event-stream"}
    assert zoo.client.post("/models/words/predict", json={"input": 3}, headers=headers).status_code == 422
    assert zoo.client.post("/models/words/predict", json={"inputs": ["a", "b"]}, headers=headers).status_code == 422
    failed = zoo.client.post("/models/words/predict", json={"input": "fail"}, headers=headers)
    assert failed.status_code == 500


def test_a_model_that_does_not_stream_answers_with_one_event(zoo: Server) -> None:
    assert [data for name, data in events(zoo, "/models/shout/predict", {"input": "a"}) if not name] == ["A"]


def test_a_streaming_model_answers_without_a_stream_too(zoo: Server) -> None:
    assert zoo.predict("one two", "/models/words/predict").json()["prediction"] == ["one", "two"]


def test_a_stream_ends_when_its_reader_leaves(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(tmp_path, "models:Endless", env={"ENDLESS_LOG": str(log)}) as server:
        headers = {"Accept": "text/event-stream"}
        with server.client.stream("POST", "/predict", json={"input": "x"}, headers=headers) as answer:
            assert next(answer.iter_lines()) == 'data: "more"'
        wait_until(log.exists)
        late = server.client.post("/predict", json={"input": "x"}, headers={**headers, "X-Request-Deadline-Ms": "300"})
        assert late.text.rstrip().rpartition("data: ")[2].startswith('{"error":{"code":"deadline_exceeded"')


def test_a_compressed_body_is_read_and_a_large_answer_compressed(zoo: Server) -> None:
    body = gzip.compress(json.dumps({"input": {"text": ["x" * 900] * 100}}).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    answer = zoo.client.post("/models/echo/predict", content=body, headers=headers)
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.json()["prediction"] == {"text": ["x" * 900] * 100}
    assert "content-encoding" not in zoo.predict("small", "/models/echo/predict").headers


@pytest.mark.parametrize(
    ("content", "encoding", "status"),
    [
        (gzip.compress(b"0" * 50_000_000), "gzip", 413),
        (b"not gzip", "gzip", 400),
        (gzip.compress(b'{"input": 1}')[:-9], "gzip", 400),
        (b"x", "br", 415),
    ],
    ids=["a bomb", "not what it says", "cut", "unknown"],
)
def test_a_body_that_cannot_be_unpacked_is_refused(zoo: Server, content: bytes, encoding: str, status: int) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    assert zoo.client.post("/models/echo/predict", content=content, headers=headers).status_code == status


def test_timings_stand_in_a_header_too(zoo: Server) -> None:
    value = zoo.predict("x", "/models/echo/predict").headers["server-timing"]
    assert [part.partition(";dur=")[0] for part in value.split(", ")] == ["queue", "run", "total"]


def test_an_image_as_numbers_is_answered(zoo: Server) -> None:
    image = np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8)
    answer = zoo.client.post("/models/echo/predict", json={"input": image.tolist()})
    assert np.array_equal(np.array(answer.json()["prediction"], np.uint8), image)


class TestTriton:
    """The Open Inference Protocol by its best-known client."""

    @pytest.fixture
    def client(self, zoo: Server) -> Any:
        triton = pytest.importorskip("tritonclient.http")
        client = triton.InferenceServerClient(f"127.0.0.1:{zoo.port}")
        yield client
        client.close()

    def test_health_and_metadata(self, client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("shout")
        assert not client.is_model_ready("nope")
        assert client.get_server_metadata()["name"] == "headrace"
        about = client.get_model_metadata("shout", "1")
        assert about["inputs"] == [{"name": "input", "datatype": "BYTES", "shape": [-1]}]

    @pytest.mark.parametrize("binary", [True, False])
    def test_texts(self, client: Any, binary: bool) -> None:
        from tritonclient.http import InferInput, InferRequestedOutput

        given = InferInput("input", [2], "BYTES")
        given.set_data_from_numpy(np.array(["one", "zwei ä"], dtype=object), binary_data=binary)
        result = client.infer(
            "shout", [given], outputs=[InferRequestedOutput("output", binary_data=binary)], request_id="r1"
        )
        found = result.as_numpy("output").tolist()
        assert [each.decode() if isinstance(each, bytes) else each for each in found] == ["ONE", "ZWEI Ä"]
        assert result.get_response()["id"] == "r1"

    @pytest.mark.parametrize("binary", [True, False])
    def test_token_tensors(self, client: Any, zoo: Server, binary: bool) -> None:
        from tritonclient.http import InferInput

        ids = np.array([[5, 6, 7], [7, 8, 9]], dtype=np.int64)
        given = InferInput("input_ids", list(ids.shape), "INT64")
        given.set_data_from_numpy(ids, binary_data=binary)
        result = client.infer("classifier", [given])
        ours = zoo.client.post("/models/classifier/predict", json={"input_ids": ids.tolist()}).json()["predictions"]
        answers = [json.loads(text) for text in result.as_numpy("output").tolist()]
        assert [answer["label"] for answer in answers] == [prediction["label"] for prediction in ours]

    def test_a_megabyte_image(self, client: Any) -> None:
        from tritonclient.http import InferInput

        image = np.random.default_rng(0).integers(0, 256, (1, 512, 683, 3), dtype=np.uint8)
        given = InferInput("input", list(image.shape), "UINT8")
        given.set_data_from_numpy(image)
        result = client.infer("echo", [given])
        assert np.array_equal(result.as_numpy("output"), image)

    def test_an_error_is_its_clients_exception(self, client: Any) -> None:
        from tritonclient.http import InferInput
        from tritonclient.utils import InferenceServerException

        given = InferInput("input", [1], "INT64")
        given.set_data_from_numpy(np.array([1]))
        with pytest.raises(InferenceServerException, match="input"):
            client.infer("shout", [given])
        with pytest.raises(InferenceServerException, match="nope"):
            client.get_model_metadata("nope")


def test_the_protocol_s_errors_have_its_shape(zoo: Server) -> None:
    answer = httpx.post(f"{zoo.url}/v2/models/echo/infer", json={"inputs": 3})
    assert answer.status_code == 422
    assert set(answer.json()) == {"error"}
    assert isinstance(answer.json()["error"], str)
