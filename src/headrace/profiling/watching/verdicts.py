"""Makes findings of what was counted: one plain function for each pitfall, and the bounds it goes by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from headrace.profiling.finding import Finding, Severity
from headrace.profiling.watching.forwards import LEAST, Forwards, Site
from headrace.profiling.watching.loading import Loading
from headrace.profiling.watching.patches import Place
from headrace.profiling.watching.syncs import Syncs

# A sync in every other step is in the loop; one in ten steps is a log.
_SHARE_OF_STEPS = 0.5
# An inference fetches its result once in a step.
_RESULTS = 1.5
_LEAST_FORWARDS = 3
# A step that waits a third of its time for data is worth more workers. Below two milliseconds little is won: a batch
# of 16 KiB from a worker process, with nothing to compute, took 0.9 ms (torch 2.13, two cores).
_INPUT_SHARE = 0.3
_INPUT_S = 0.002


@dataclass(frozen=True)
class Seen:
    """What was counted.

    Args:
        seconds: how long it was watched.
        retries: of the CUDA allocator, meanwhile.
        reserved_bytes, allocated_bytes: of the CUDA allocator, at the end.
        min_calls: fewer syncs at a line are not worth a word.
        min_share: of the time, waited at a line that syncs many times a step, makes it a warning.
    """

    syncs: Syncs
    forwards: Forwards
    loading: Loading
    seconds: float
    retries: int = 0
    reserved_bytes: int = 0
    allocated_bytes: int = 0
    min_calls: int = 20
    min_share: float = 0.05

    @property
    def trains(self) -> bool:
        return self.forwards.backward_calls > 0

    @property
    def steps(self) -> int:
        """Backwards, or forwards where there are none."""
        return self.forwards.backward_calls or self.forwards.forward_calls


def judge(seen: Seen) -> list[Finding]:
    """All findings, warnings first, in the order of the program's lines."""
    found = [
        *graphs_kept(seen),
        *forwards_with_grad(seen),
        *forwards_in_train_mode(seen),
        *cycles(seen),
        *syncs(seen),
        *caches_emptied(seen),
        *fragmentation(seen),
        *input_bound(seen),
    ]
    return sorted(found, key=lambda each: (each.severity == "info", each.file, each.line, each.code))


def _finding(code: str, severity: Severity, place: Place, title: str, evidence: str, advice: str) -> Finding:
    return Finding(code, severity, title, evidence, advice, *place)


def graphs_kept(seen: Seen) -> Iterator[Finding]:
    """Graphs that outlive their step: of losses, else of outputs."""
    kept: list[tuple[Place, Site]] = [(place, site) for place, site in seen.forwards.backwards.items() if site.kept]
    kept = kept or [(place, site) for (place, _), site in seen.forwards.forwards.items() if site.kept]
    for place, site in kept:
        assert site.kept is not None
        yield _kept(place, site, *site.kept, "after their backward")
    for (place, _), site in seen.forwards.forwards.items():
        if site.waiting is not None and site.ran == 0:
            yield _kept(place, site, *site.waiting, "with no backward in sight")


def _kept(place: Place, site: Site, alive: int, made: int, when: str) -> Finding:
    what = "loss" if site.name == "backward" else f"output of {site.name}"
    return _finding(
        "graph_kept",
        "warning",
        place,
        f"the graph of every {what} is kept",
        f"{alive} of {made} graphs were still in memory {when}; held by {site.holder}",
        "keep the number (`loss.item()`, every so many steps) or `.detach()`",
    )


def forwards_with_grad(seen: Seen) -> Iterator[Finding]:
    """Forwards that build a graph at a line from which no backward ever came."""
    for (place, name), site in seen.forwards.forwards.items():
        if site.ran == 0 and site.unused >= _LEAST_FORWARDS:
            yield _finding(
                "grad_in_inference",
                "warning",
                place,
                f"{name} runs with gradients on where nothing calls backward",
                f"{site.made} of {site.calls} forwards built a graph, 0 were used",
                "run it under `torch.inference_mode()` (or `torch.no_grad()`)",
            )


def forwards_in_train_mode(seen: Seen) -> Iterator[Finding]:
    """Inference with dropout or batch statistics on, of a model that is not trained here."""
    for (place, name), site in seen.forwards.forwards.items():
        if site.training >= _LEAST_FORWARDS and site.ran == 0 and not site.trained:
            parts = ", ".join(f"{count} {kind}" for kind, count in sorted(site.modes.items()))
            yield _finding(
                "train_mode_in_inference",
                "warning",
                place,
                f"{name} is in train mode while it only infers",
                f"{site.training} of {site.calls} forwards ran with gradients off and these on: {parts}",
                "call `model.eval()` once, after the weights are loaded",
            )


def cycles(seen: Seen) -> Iterator[Finding]:
    """What a forward made is freed by the garbage collector alone."""
    for (place, name), site in seen.forwards.forwards.items():
        if site.freed_by_gc >= LEAST and site.freed_by_gc >= site.calls / 2:
            yield _finding(
                "cycle_holds_tensors",
                "warning",
                place,
                f"outputs of {name} are part of reference cycles",
                f"{site.freed_by_gc} of {site.calls} were freed by the garbage collector alone, late",
                "break the cycle: no `self` in stored functions and hooks, or hold it by `weakref.ref`",
            )


def syncs(seen: Seen) -> Iterator[Finding]:
    """Lines that wait for the device in most steps of a training, or more than once in each of an inference.

    How long they wait says less than how often: a sync now and then waits for all that was asked for before it.
    """
    on_device = any(site.on_device for site in seen.syncs.sites.values())
    for place, site in seen.syncs.sites.items():
        counts: Mapping[str, int] = site.on_device if on_device else site.on_host
        calls = max(counts.values(), default=0)
        many = calls > _RESULTS * seen.steps
        if calls < seen.min_calls or not (many or (seen.trains and calls >= _SHARE_OF_STEPS * seen.steps)):
            continue
        share = site.waited_s / seen.seconds if seen.seconds else 0.0
        words = ", ".join(sorted(counts, key=lambda each: -counts[each]))
        evidence = f"{calls} calls in {seen.steps} steps"
        evidence += f", {site.waited_s:.3g} s waited: {share:.0%} of the time" if on_device else ", on the CPU"
        yield _finding(
            "sync_in_loop",
            "warning" if on_device and many and share >= seen.min_share else "info",
            place,
            f"{words} in a loop" + (" waits for the device" if on_device else ": on a GPU each waits for the device"),
            evidence,
            "sum up on the device and fetch every so many steps, whole tensors at a time (`.tolist()`)",
        )


def caches_emptied(seen: Seen) -> Iterator[Finding]:
    for place, calls in seen.loading.emptied.items():
        if calls >= LEAST and calls >= _SHARE_OF_STEPS * seen.steps:
            yield _finding(
                "empty_cache_in_loop",
                "warning",
                place,
                "empty_cache() gives the memory pool back in every step",
                f"{calls} calls in {seen.steps} steps",
                "leave it out: the pool is used again; see `fragmentation` if memory runs short",
            )


def fragmentation(seen: Seen) -> Iterator[Finding]:
    """The allocator had to empty its pool to find room."""
    if seen.retries:
        share = 1 - seen.allocated_bytes / seen.reserved_bytes if seen.reserved_bytes else 0.0
        yield Finding(
            "fragmentation",
            "warning",
            "GPU memory is short or in pieces",
            f"{seen.retries} times the allocator gave its pool back to find room; now {share:.0%} of "
            f"{seen.reserved_bytes / 2**20:.0f} MiB reserved is not in use",
            "smaller batches, like shapes, or `PYTORCH_ALLOC_CONF=expandable_segments:True`",
        )


def input_bound(seen: Seen) -> Iterator[Finding]:
    for place, site in seen.loading.loaders.items():
        share = site.waited_s / site.seconds if site.seconds else 0.0
        if site.batches >= LEAST and share >= _INPUT_SHARE and site.waited_s >= _INPUT_S * site.batches:
            yield _finding(
                "input_bound",
                "warning",
                place,
                "the loop waits for its data",
                f"{share:.0%} of the time: {site.waited_s * 1e3 / site.batches:.2g} ms a batch, "
                f"{site.batches} batches, {site.workers} workers",
                "more `num_workers`, `persistent_workers=True`, less work per item, or batches made beforehand",
            )
