"""How often the diagnosis is wrong: every program of this folder, several times over, with other seeds.

    python tests/profiled/soak.py --out soak.json [--seeds 5] [--first-seed 0] [--only NAME,…]

Prints which finding came first in each planted program (the confusion table), and what was found in clean ones. Rates
stand with the upper end of their 95 % interval (Clopper and Pearson, one-sided).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from headrace.profiling.diagnose import diagnose
from headrace.profiling.record import Record

sys.path.insert(0, str(Path(__file__).parent))

import runs


def trial(name: str, seed: int, record: Record) -> dict[str, Any]:
    findings = diagnose(record)
    first = findings[0] if findings else None
    row: dict[str, Any] = {"program": name, "seed": seed, "found": [each.code for each in findings]}
    row |= {"wall_s": round(record.wall_s, 2), "cpu_s": round(record.cpu_s, 2), "load": round(os.getloadavg()[0], 1)}
    if name in runs.PLANTED:
        row["right"] = first is not None and first.code == runs.PLANTED[name]
        row["line"] = first is not None and (Path(first.file).name, first.line) == (
            f"{name}.py",
            runs.planted_line(name),
        )
    else:
        row["right"] = first is None
    if not row["right"]:
        row["evidence"] = [f"{each.code} {Path(each.file).name}:{each.line} {each.evidence}" for each in findings]
    return row


def trials(names: list[str], seed: int) -> list[dict[str, Any]]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            if name not in runs.WITH_TORCH:
                place = Path(folder) / name
                place.mkdir()
                found.append(trial(name, seed, runs.profiled(name, place, seed)))
        together = [name for name in names if name in runs.WITH_TORCH]
        if together:
            records = runs.profiled_with_torch(together, Path(folder), seed)
            found += [trial(name, seed, record) for name, record in records.items()]
    return found


def upper_bound(wrong: int, number: int, confidence: float = 0.95) -> float:
    """The largest rate at which so few would still be wrong with a chance of 5 %."""
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        chance = sum(math.comb(number, k) * rate**k * (1 - rate) ** (number - k) for k in range(wrong + 1))
        low, high = (rate, high) if chance > 1 - confidence else (low, rate)
    return high


def rate(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    wrong = sum(not row[key] for row in rows)
    return {"trials": len(rows), "wrong": wrong, "upper_95": round(upper_bound(wrong, len(rows)), 4) if rows else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    names = list(filter(None, options.only.split(","))) or [*runs.PLANTED, *runs.CLEAN]
    rows: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        rows += trials(names, seed)
        summary = summarised(rows)
        options.out.write_text(json.dumps(summary, indent=1))  # a long run that is ended early has something to show
        print(f"seed {seed}: {sum(not row['right'] for row in rows)} wrong of {len(rows)}", file=sys.stderr)
    print_table(rows, names)
    print(json.dumps({key: value for key, value in summary.items() if key != "trials"}))


def summarised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    planted = [row for row in rows if row["program"] in runs.PLANTED]
    return {
        "conditions": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
        },
        "planted_found_first": rate(planted, "right"),
        "planted_with_their_line": rate(planted, "line"),
        "clean_without_finding": rate([row for row in rows if row["program"] not in runs.PLANTED], "right"),
        "trials": rows,
    }


def print_table(rows: list[dict[str, Any]], names: list[str]) -> None:
    for name in names:
        mine = [row for row in rows if row["program"] == name]
        first = Counter(row["found"][0] if row["found"] else "nothing" for row in mine)
        also = Counter(code for row in mine for code in row["found"][1:])
        lines = f"{sum(row['line'] for row in mine)} of {len(mine)} lines" if name in runs.PLANTED else ""
        print(
            f"{name:20} {runs.PLANTED.get(name, '-'):20} {dict(first)} {lines} {f'also {dict(also)}' if also else ''}"
        )


if __name__ == "__main__":
    main()
