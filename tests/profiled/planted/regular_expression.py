"""A pattern that tries very many ways before it fails."""

from __future__ import annotations

import random
import re
import sys

PATTERN = re.compile(r"(\w+\s?)+:")


def has_label(line: str) -> bool:
    return PATTERN.match(line) is not None  # HERE


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    lines = ["".join(draw.choices("abcdefg", k=17 + draw.randrange(3))) + "!" for _ in range(25)]
    print(sum(has_label(line) for line in lines))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
