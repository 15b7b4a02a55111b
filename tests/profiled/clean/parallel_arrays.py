"""Two threads in NumPy, which lets go of the interpreter's lock: they run side by side, or would with two cores."""

from __future__ import annotations

import sys
import threading

import numpy as np


def products(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.dot(left[:200], right)[0, 0])


def solutions(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.linalg.solve(left[:180, :180], right[:180, :180])[0, 0])


def sorts(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.sort(left[:120], axis=0)[0, 0] + np.sort(right[:120], axis=1)[0, 0])


def waves(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(np.fft.fft2(left[:, :200])).max() + right[0, 0])


def roots(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.sqrt(np.exp(np.sin(left[:180])) + np.cos(right[:180])).sum())


def sums(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.cumsum(left, axis=1).max() + np.tanh(right).sum())


def spans(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.partition(left[:200], 5, axis=1).max() - np.percentile(right[:100], 5))


def kinds(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.unique((left[:60] * 50).astype(int)).size + np.histogram(right[:100], bins=20)[0][0])


def work(seed: int, out: list[float]) -> None:
    draw = np.random.default_rng(seed)
    left, right = draw.random((350, 350)), draw.random((350, 350))
    for _ in range(55):
        out.append(products(left, right) + solutions(left, right))
        out.append(sorts(left, right) + waves(left, right) + roots(left, right) + sums(left, right))
        out.append(spans(left, right) + kinds(left, right))


def main(seed: int = 0) -> None:
    out: list[float] = []
    threads = [threading.Thread(target=work, args=(seed + number, out)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(len(out))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
