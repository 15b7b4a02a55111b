"""A process that does nothing for a while is waited for."""

from __future__ import annotations

import random
import subprocess
import sys


def convert(delay_s: float) -> int:
    return subprocess.run(["sleep", str(delay_s)], check=True).returncode  # HERE


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    print(sum(convert(0.2 + 0.1 * draw.random()) for _ in range(5)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
