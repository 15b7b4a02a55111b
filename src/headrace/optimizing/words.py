"""What a ladder found, as plain data: `report.json` is a `Report`. Knows not how it was measured, nor how it looks."""

from __future__ import annotations

from typing import Any

import msgspec

STATUSES = (
    "baseline",
    "ok",
    "unavailable",
    "build_failed",
    "crashed",
    "out_of_memory",
    "timeout",
    "inaccurate",
    "not_faster",
    "noisy",
)


class Cell(msgspec.Struct, frozen=True):
    """A rung beside the baseline at one batch size, with items of some lengths.

    Args:
        batch: items of one call.
        ratio: how many times as fast as the baseline; ``interval`` holds it with 95 % confidence.
        cpu_ratio: the same of processor time.
        p50_ms, p95_ms: of one call.
        throughput: items per second.
        pairs: of runs, one of each side; the ratio is the median of theirs.
        prefill_ms, tokens_per_s: of a language model: until the first token of all items, and what it writes after it.
        share_of_bandwidth: of what the memory could deliver, if a step read the weights and nothing else.
        share_of_peak: of the operations per second that large products of matrices reach, those of padding not counted;
            of a model that encodes.
        lengths: which items: ``all``, the ``short`` third of the samples or the ``long`` one.
        length: median tokens of these, where there are tokens.
    """

    batch: int
    ratio: float
    interval: tuple[float, float]
    cpu_ratio: float
    p50_ms: float
    p95_ms: float
    throughput: float
    pairs: int
    prefill_ms: float | None = None
    tokens_per_s: float | None = None
    share_of_bandwidth: float | None = None
    share_of_peak: float | None = None
    lengths: str = "all"
    length: int | None = None


class Row(msgspec.Struct, frozen=True):
    """What became of one rung. What was not measured is ``None``.

    Args:
        status: one of `STATUSES`.
        reason: why it has its status, in words, with what to do where something can be done.
        speedup, speedup_ci: over the baseline at the objective's batch, with its 95 % interval.
        latency_ms: ``p50`` and ``p95`` of one call at that batch.
        throughput: items per second at that batch.
        drift: measures of `drift.drift`; which of them mean an error, `drift.is_error` says.
        size_bytes: of the files, or of the weights in memory for a torch rung.
        first_s: the first call after loading.
        new_shape_ms: what one item of a length that was not met before takes longer, that once; the median of a few
            lengths, ``None`` where all items have the same.
        peak_bytes: the most memory that was used at once.
        batch, length: items of one call and median tokens of an item, where there are tokens.
        cells: every batch size and group of lengths that was timed.
    """

    rung: str
    status: str
    reason: str = ""
    speedup: float | None = None
    speedup_ci: tuple[float, float] | None = None
    latency_ms: dict[str, float] | None = None
    throughput: float | None = None
    drift: dict[str, float] = {}
    size_bytes: int | None = None
    load_s: float | None = None
    build_s: float | None = None
    first_s: float | None = None
    new_shape_ms: float | None = None
    peak_bytes: int | None = None
    batch: int | None = None
    length: int | None = None
    cells: list[Cell] = []


class Noise(msgspec.Struct, frozen=True):
    """The baseline beside itself, timed like a rung: what this machine makes of no difference at all."""

    ratio: float
    interval: tuple[float, float]
    cpu_ratio: float
    noisy: bool


class Predicted(msgspec.Struct, frozen=True):
    """Memory for the weights alone, from their number, before any of them is loaded.

    Args:
        parameters: numbers in all weights.
        weights_bytes: by rung, about; of those that were to be tried and of the baseline, which comes first.
        memory_bytes: of the device, a GPU's own where it is one; ``cap_bytes``: what a process may use.
    """

    parameters: int
    weights_bytes: dict[str, int]
    device: str
    memory_bytes: int
    cap_bytes: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A whole ladder.

    Args:
        chosen: rung of the row that won; the baseline's where none did.
        budget: bounds of drift by measure: the most of `drift.is_error`, the least of others.
        environment: machine, versions and settings that the numbers belong to.
        noise: ``None`` if the control was not run.
        samples: ``count``, and how many of them were for ``evaluation`` and ``calibration``; ``length_p10``,
            ``length_p50``, ``length_p90`` in tokens, where items have a length.
        seconds: the whole ladder took.
        headrace: version.
        compared_by: function of the user's that has measured drift; empty where the task's own measures were taken.
        predicted: ``None`` where the number of weights was not known before they were loaded.
    """

    baseline: str
    rows: list[Row]
    chosen: str
    preset: str
    objective: str
    task: str
    target: str
    budget: dict[str, float]
    environment: dict[str, Any]
    noise: Noise | None
    samples: dict[str, float]
    seconds: float
    headrace: str
    compared_by: str = ""
    predicted: Predicted | None = None
