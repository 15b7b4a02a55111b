"""Models that tests serve. None of them is real work; each shows one behaviour."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field


def echo(inputs: list[Any]) -> list[Any]:
    return inputs


def shout(inputs: list[str]) -> list[str]:
    return [text.upper() for text in inputs]


class Point(BaseModel):
    x: float
    y: float = Field(ge=0)
    label: str = ""


@dataclass
class Distance:
    value: float
    label: str


class Norm:
    """Typed items in, dataclasses out."""

    def run(self, inputs: list[Point]) -> list[Distance]:
        return [Distance(math.hypot(point.x, point.y), point.label) for point in inputs]


class Picky:
    """Fails as a whole on ``bad``; answers ``sour`` with an exception; dies on ``die``; sleeps on ``sleep S``."""

    def run(self, inputs: list[str]) -> list[Any]:
        if "bad" in inputs:
            raise ValueError("secret text of the model")
        if "die" in inputs:
            os.kill(os.getpid(), 9)
        for text in inputs:
            if text.startswith("sleep "):
                time.sleep(float(text.split()[1]))
        return [KeyError(text) if text == "sour" else f"{text} from {os.getpid()}" for text in inputs]


class Slow:
    """A fiftieth of a second per batch, and a note of each item that was run."""

    def load(self, device: str) -> None:
        self.log = os.environ.get("SLOW_LOG")
        self.pause_s = float(os.environ.get("SLOW_PAUSE_S", "0.02"))

    def run(self, inputs: list[Any]) -> list[Any]:
        time.sleep(self.pause_s)
        if self.log:
            with Path(self.log).open("a") as file:
                file.writelines(f"{item}\n" for item in inputs)
        return inputs


class Short:
    """Returns too few answers."""

    def run(self, inputs: list[str]) -> list[str]:
        return inputs[1:]


class Stages:
    """All optional parts of a runner."""

    def load(self, device: str) -> None:
        self.device = device

    def prepare(self, item: str) -> list[str]:
        return item.split()

    def cost(self, prepared: list[str]) -> int:
        return max(1, len(prepared))

    def run(self, inputs: list[str]) -> list[int]:
        return [len(words) for words in inputs]

    def finish(self, output: int) -> dict[str, Any]:
        return {"words": output, "device": self.device}


class FailsToLoad:
    def load(self, device: str) -> None:
        raise RuntimeError("no such weights")

    def run(self, inputs: list[str]) -> list[str]:
        return inputs


async def wrong(inputs: list[str]) -> list[str]:
    return inputs


class Versioned:
    """Answers with the text of a file as it was at the start, and with the number of its batch."""

    def load(self, device: str) -> None:
        self.version = Path(os.environ["VERSION_FILE"]).read_text().strip()
        if self.version == "broken":
            raise RuntimeError("this version cannot be loaded")
        self.batches = 0

    def run(self, inputs: list[str]) -> list[dict[str, Any]]:
        self.batches += 1
        time.sleep(0.005)
        return [{"item": item, "version": self.version, "batch": f"{os.getpid()}.{self.batches}"} for item in inputs]


class Words:
    """Streams the words of a text; ``fail`` fails."""

    def stream(self, inputs: list[str]) -> Iterator[list[Any]]:
        texts = [text.split() for text in inputs]
        for step in range(max(map(len, texts))):
            words = [text[step] if step < len(text) else None for text in texts]
            yield [ValueError("secret") if word == "fail" else word for word in words]
            time.sleep(0.02)


class Endless:
    """Streams until nobody listens, and says so in a file."""

    def stream(self, inputs: list[str]) -> Iterator[list[Any]]:
        try:
            while True:
                time.sleep(0.01)
                yield ["more"] * len(inputs)
        finally:
            Path(os.environ["ENDLESS_LOG"]).write_text("closed")


def sizes(inputs: list[bytes]) -> list[int]:
    return [len(content) for content in inputs]


def mirror(inputs: list[bytes]) -> list[bytes]:
    return [content[::-1] for content in inputs]


class CrashLoop:
    """Dies at its first batch, in every life."""

    def run(self, inputs: list[str]) -> list[str]:
        os.kill(os.getpid(), 9)
        return inputs
