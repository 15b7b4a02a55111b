"""Nothing of the user's own takes long: the time is spent some calls below, deep in a library."""

from __future__ import annotations

import difflib
import random
import sys


def closest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.0)  # HERE
    return found[0]


def corrected(names: list[str], known: list[str]) -> list[str]:
    return [closest(name, known) for name in names]


def imported(names: list[str], known: list[str]) -> int:
    return len(set(corrected(names, known)))


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefgh", k=40)) for _ in range(60)]
    names = ["".join(draw.choices("abcdefgh", k=40)) for _ in range(50 + draw.randrange(10))]
    print(imported(names, known))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
