"""mosec's side of `peers.py`, run by the peers' own interpreter: `python peer_mosec.py --port PORT --path DIR …`.

WORKLOAD names what to serve (mosec reads the command line itself), MODEL the model directory, THREADS torch's
threads. The model is the one of `plain_batcher.py`.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
from mosec import Server, Worker


class Base(Worker):
    wait_ms = 1  # the least that mosec takes: 0 means its default, 10

    def serialize(self, data: Any) -> bytes:
        # mosec's own is an indented `json.dumps`, slow for a vector.
        return msgspec.json.encode({"prediction": data})


class MiniLM(Base):
    wait_ms = 20

    def __init__(self) -> None:
        super().__init__()
        from plain_batcher import Batcher

        self.embed = Batcher(os.environ["MODEL"]).embed
        self.embed(["warm up"])

    def forward(self, data: list[Any]) -> list[list[float]]:
        return self.embed([each["input"] for each in data])


class Noop(Base):
    def forward(self, data: list[Any]) -> list[str]:
        return ["ok"] * len(data)


class Image(Base):
    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[int]:
        return [len(each) for each in data]


if __name__ == "__main__":
    worker = {"minilm": MiniLM, "noop": Noop, "image": Image}[os.environ["WORKLOAD"]]
    server = Server()
    server.append_worker(worker, num=1, max_batch_size=32, max_wait_time=worker.wait_ms, route="/predict")
    server.run()
