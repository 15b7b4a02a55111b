"""JSON, copies, a pattern, a log line and a tokeniser off the loop: some of each, much of none."""

from __future__ import annotations

import copy
import json
import logging
import random
import re
import sys

from balanced import round_of_work

_NUMBER = re.compile(r"\d+")
LOG = logging.getLogger("clean")


def stored(values: dict[str, list[float]]) -> str:
    return json.dumps(values)


def found(text: str) -> int:
    return len(_NUMBER.findall(text))


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    total = 0
    for number in range(400 + draw.randrange(40)):
        round_of_work(draw)
        text = stored({"values": [draw.random() for _ in range(40)]})
        total += found(text) + len(copy.deepcopy(json.loads(text))["values"])
        LOG.info("round %d", number)
    print(total)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
