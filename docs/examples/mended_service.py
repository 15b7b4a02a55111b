"""leaking_service.py as docs/profile.md mends it: it counts, and keeps no message."""

from __future__ import annotations

import re
import time

URGENT = re.compile(r"\b(down|lost|urgent|outage|refund|now)\b", re.IGNORECASE)


class Urgency:
    def load(self, device: str) -> None:
        self.served = self.slow = 0

    def run(self, inputs: list[str]) -> list[float]:
        return [self.score(text) for text in inputs]

    def score(self, text: str) -> float:
        began = time.perf_counter()
        urgency = min(1.0, len(URGENT.findall(text)) / 3)
        self.served += 1
        self.slow += time.perf_counter() - began > 0.001
        return urgency

    def slow_share(self) -> float:
        """The share of messages that took more than a millisecond, for the log."""
        return self.slow / max(1, self.served)


service = Urgency()
service.load("cpu")


def one_batch() -> None:
    """For `headrace leak`: what a client sends."""
    service.run([f"the shop is down, order {number} is lost " * 20 for number in range(4)])
