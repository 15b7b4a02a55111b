"""The whole state is copied and written as JSON after every small change."""

from __future__ import annotations

import json
import random
import sys
from typing import Any


def change(state: dict[str, Any], draw: random.Random) -> None:
    state["rows"][draw.randrange(len(state["rows"]))]["value"] = draw.random()


def save(state: dict[str, Any]) -> int:
    return len(json.dumps(state, indent=1))  # HERE


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    state = {"rows": [{"id": number, "value": 0.0, "tags": ["a", "b", "c"]} for number in range(300)]}
    written = 0
    for _ in range(90 + draw.randrange(20)):
        change(state, draw)
        written += save(state)
    print(written)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
