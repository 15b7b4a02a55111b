"""LitServe's side of `peers.py`, run by the peers' own interpreter: `python peer_litserve.py WORKLOAD PORT`.

MODEL names the model directory, THREADS torch's threads. The model is the one of `plain_batcher.py`.
"""

# No `from __future__ import annotations`: LitServe reads the annotation of `decode_request` as a type.

import os
import sys
from typing import Annotated, Any

import litserve
from fastapi import Body


class MiniLM(litserve.LitAPI):
    wait_s = 0.020

    def setup(self, device: str) -> None:
        from plain_batcher import Batcher

        self.embed = Batcher(os.environ["MODEL"]).embed
        self.embed(["warm up"])

    def decode_request(self, request):  # noqa: ANN001, ANN201, RUF100 - an annotation would change what LitServe does
        return request["input"]

    def predict(self, x: list[str]) -> list[list[float]]:
        return self.embed(x)

    def encode_response(self, output: Any):  # noqa: ANN201, RUF100 - likewise
        return {"prediction": output}


class Noop(litserve.LitAPI):
    wait_s = 0.0  # take what waits

    def predict(self, x: list[Any]) -> list[str]:
        return ["ok"] * len(x)

    def encode_response(self, output: str):  # noqa: ANN201, RUF100 - likewise
        return {"prediction": output}


class Image(Noop):
    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> bytes:
        return request

    def predict(self, x: list[bytes]) -> list[int]:
        return [len(each) for each in x]


if __name__ == "__main__":
    api = {"minilm": MiniLM, "noop": Noop, "image": Image}[sys.argv[1]]
    litserve.LitServer(
        api(max_batch_size=32, batch_timeout=api.wait_s), accelerator="cpu", devices=1, workers_per_device=1, timeout=60
    ).run(host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=1, log_level="error", generate_client_file=False)
