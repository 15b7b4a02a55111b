"""Names of process slots: how a worker knows which model it serves."""

from __future__ import annotations


def worker_slot(model: str, index: int) -> str:
    return f"worker.{model}.{index}"


def http_slot(index: int) -> str:
    return f"http.{index}"


def parse_worker(slot: str) -> tuple[str, int]:
    """Model and index of a worker's slot."""
    name, _, index = slot.removeprefix("worker.").rpartition(".")
    return name, int(index)
