"""A small job behind a large import."""

from __future__ import annotations

import sys

import fastapi  # HERE


def main(seed: int = 0) -> None:
    print(fastapi.__name__, sum(each * seed for each in range(100_000)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
