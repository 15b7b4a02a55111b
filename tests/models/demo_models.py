"""Embeddings without a language model: texts are near when they share words."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from pathlib import Path


class Words:
    """A count of words in 512 places, half a tenth of a second per batch, and a note of each text that was run."""

    width = 512

    def load(self, device: str) -> None:
        self.notes = os.environ.get("EMBED_NOTES")

    def run(self, inputs: list[str]) -> list[list[float]]:
        time.sleep(0.05)
        if self.notes:
            with Path(self.notes).open("a") as file:
                file.writelines(f"{json.dumps(text)}\n" for text in inputs)
        return [self.embed(text) for text in inputs]

    def embed(self, text: str) -> list[float]:
        vector = [0.0] * self.width
        for word in re.findall(r"\w+", text.lower()):
            vector[zlib.crc32(word.encode()) % self.width] += 1.0
        return vector


class Narrow(Words):
    """The same with another width."""

    width = 300


class Mirrored(Words):
    """Another model of the same width."""

    def embed(self, text: str) -> list[float]:
        return super().embed(text)[::-1]
