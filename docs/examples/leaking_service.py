"""A service that says how urgent a message is.

Its memory grows. docs/profile.md finds out why; mended_service.py is what came of it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

URGENT = re.compile(r"\b(down|lost|urgent|outage|refund|now)\b", re.IGNORECASE)


@dataclass
class Served:
    text: str
    urgency: float
    seconds: float


class Urgency:
    def load(self, device: str) -> None:
        self.served: list[Served] = []

    def run(self, inputs: list[str]) -> list[float]:
        return [self.score(text) for text in inputs]

    def score(self, text: str) -> float:
        began = time.perf_counter()
        urgency = min(1.0, len(URGENT.findall(text)) / 3)
        self.served.append(Served(text, urgency, time.perf_counter() - began))
        return urgency

    def slow_share(self) -> float:
        """The share of messages that took more than a millisecond, for the log."""
        return sum(each.seconds > 0.001 for each in self.served) / max(1, len(self.served))


service = Urgency()
service.load("cpu")


def one_batch() -> None:
    """For `headrace leak`: what a client sends."""
    service.run([f"the shop is down, order {number} is lost " * 20 for number in range(4)])
