"""Work in child processes: of a pool, of an executor, forked by hand, a program of its own. As it is told."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor


def work(seconds: float) -> int:
    until = time.process_time() + seconds
    while time.process_time() < until:
        sum(range(100))  # WORK
    return os.getpid()


def main(how: str) -> None:
    if how in ("fork", "spawn"):
        with multiprocessing.get_context(how).Pool(2) as pool:
            pool.map(work, [0.15] * 4)
    elif how == "executor":
        with ProcessPoolExecutor(2) as executor:
            list(executor.map(work, [0.15] * 4))
    elif how == "by_hand":
        if os.fork() == 0:
            work(0.3)
            sys.exit(0)
        os.wait()
    elif how == "program":
        code = "import families, os, sys; families.work(0.3); sys.exit(os.environ.get('PYTHONPATH') is None)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    elif how == "killed":
        code = "import families; print(0, flush=True); families.work(60)"
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout
        child.stdout.readline()
        time.sleep(0.4)
        child.kill()
        child.wait()


if __name__ == "__main__":
    main(sys.argv[1])
