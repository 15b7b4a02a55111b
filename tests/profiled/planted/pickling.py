"""A built-in function does the copying: nothing of it is seen in Python's stack."""

from __future__ import annotations

import pickle
import random
import sys


def snapshot(rows: list[dict[str, float]]) -> bytes:
    return pickle.dumps(rows)  # HERE


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    rows = [{f"k{column}": draw.random() for column in range(12)} | {"value": 1.0} for _ in range(1500)]
    print(sum(len(snapshot(rows)) for _ in range(250 + draw.randrange(30))))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
