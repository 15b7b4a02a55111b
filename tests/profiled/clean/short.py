"""A run of a moment: a hot loop, too short to be worth anybody's time."""

from __future__ import annotations

import sys


def main(seed: int = 0) -> None:
    print(sum(each * seed for each in range(100_000)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
