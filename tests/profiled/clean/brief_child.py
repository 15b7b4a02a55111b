"""A short process is started once and collected at the end, when it is long done."""

from __future__ import annotations

import random
import subprocess
import sys

from balanced import round_of_work


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "print(sum(range(1_000_000)))"], stdout=subprocess.PIPE
    ) as child:
        total = sum(round_of_work(draw) for _ in range(450 + draw.randrange(40)))
        print(total, child.communicate()[0])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
