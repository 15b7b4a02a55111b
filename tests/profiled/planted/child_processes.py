"""The work is done by short processes, started one after the other."""

from __future__ import annotations

import random
import subprocess
import sys

_WORK = "import sys; print(sum(each * each % 7 for each in range(int(sys.argv[1]))))"


def convert(size: int) -> int:
    return int(subprocess.run([sys.executable, "-S", "-c", _WORK, str(size)], capture_output=True).stdout)  # HERE


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    print(sum(convert(1_200_000 + draw.randrange(300_000)) for _ in range(5)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
