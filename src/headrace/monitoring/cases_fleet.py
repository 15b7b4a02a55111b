"""Scenarios about servers, processes, cards, the task store, and error budgets of days."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from headrace import metrics
from headrace.monitoring.alert import AGENTS, SERVING
from headrace.monitoring.budget import HOUR, MINUTE, burns
from headrace.monitoring.cases_requests import MODEL, outcomes
from headrace.monitoring.scenarios import INSTANCE, Check, Firing, Scenario, Script, fires, silent
from headrace.monitoring.thresholds import Thresholds
from headrace.monitoring.words import duration

GIB = 2**30


def cases(t: Thresholds) -> dict[str, list[Scenario]]:
    """By group of rules."""
    return {
        "targets": [*_targets(t)],
        "processes": [*_workers(t), *_restarts(t), *_memory(t), *_cards(t)],
        "tasks": [*_store(t), *_progress(t), *_leases(t)],
        "slo": [*_budgets(t)],
    }


def _targets(t: Thresholds) -> Iterator[Scenario]:
    seconds = 4 * t.target_down_for_s
    step_s = t.target_down_for_s / 4
    down = Firing("TargetDown", {"instance": "b:8000"})

    def play() -> Script:
        script = Script(seconds, step_s)
        script.put("up", script.hold(1))
        return script

    script = play()
    script.put("up", "1+0x3 0+0x12", "b:8000")
    yield fires("a server is gone", script, down, not_yet_s=1.5 * t.target_down_for_s)

    script = play()
    script.put("up", "1+0x11 0+0x0 1+0x3", "b:8000")
    yield Scenario("one scrape fails", script, [Check(12 * step_s), Check(script.end_s)])

    script = play()
    script.put("up", "1+0x3 0+0x1 1+0x3 0+0x1 1+0x7", "b:8000")
    yield silent("servers are restarted one after the other", script)

    script = Script(seconds, step_s)
    script.put(metrics.BUILD_INFO.name, script.hold(1), version="1")
    yield fires("no server is known", script, Firing("TargetMissing", {"job": ""}))


def _workers(t: Thresholds) -> Iterator[Scenario]:
    seconds = 2 * max(t.worker_down_for_s, t.no_worker_for_s)
    down = Firing("WorkerDown", {"part": "serving", "instance": INSTANCE, "model": MODEL}, 1)

    def play(instance: str = INSTANCE, script: Script | None = None, **states: int) -> Script:
        script = script or Script(seconds, seconds / 16)
        for state in metrics.WORKER_STATES:
            script.put(metrics.WORKERS.name, script.hold(states.get(state, 0)), instance, model=MODEL, state=state)
        return script

    yield silent("workers start for the first time and take long", play(starting=2))
    yield silent("a worker is stopped while its successor is ready", play(ready=1, stopping=1))
    yield fires("one of two workers does not come back", play(ready=1, restarting=1), down)
    both = play("b:8000", play(restarting=1), ready=1)
    yield fires("the only worker of one of two servers does not come back", both, down)
    none = Firing("NoWorkerReady", {"part": "serving", "model": MODEL})
    yield fires("no worker comes back", play(restarting=1), down, none, not_yet_s=t.no_worker_for_s / 2)


def _restarts(t: Thresholds) -> Iterator[Scenario]:
    seconds = t.restart_window_s + 2 * t.restart_for_s
    often, step_s = t.restarts + 1, t.window_s / 20

    def play(process: str, model: str, times: int) -> tuple[Script, Firing]:
        script = Script(seconds, step_s)
        apart = script.samples_in(t.restart_window_s) // (often + 1)
        values = " ".join(f"{count}+0x{apart - 1}" for count in range(times))
        values += f" {times}+0x{script.steps - times * apart}"
        name = {"model worker": metrics.WORKER_RESTARTS, "front end": metrics.HTTP_RESTARTS}.get(
            process, metrics.TASK_WORKER_RESTARTS
        )
        labels = {"model": model} if model else {}
        script.put(name.name, values, **labels)
        return script, Firing("RestartLoop", {"instance": INSTANCE, "process": process, **labels})

    for process, model in (("model worker", MODEL), ("front end", ""), ("task worker", "")):
        script, firing = play(process, model, often)
        yield fires(f"a {process} dies again and again", script, firing)
        yield silent(f"a {process} dies once", play(process, model, 1)[0])


def _memory(t: Thresholds) -> Iterator[Scenario]:
    seconds, name = t.memory_window_s + t.memory_for_s + 2 * MINUTE, metrics.PROCESS_MEMORY.name
    step_s = t.memory_window_s / 60
    begin = (t.memory_limit_bytes or GIB) // 2
    # Grows by so much that a straight line meets the limit, or doubles what is there at the end.
    per_s = begin / t.memory_horizon_s if t.memory_limit_bytes else 2 * begin / (t.memory_horizon_s - seconds)
    labels = {"process": "worker.m.0"}

    script = Script(seconds, step_s)
    script.put(name, script.grow(per_s * step_s, begin), **labels)
    script.put(name, script.hold(begin), process="http.0")
    predicted = begin + per_s * (script.end_s + t.memory_horizon_s)
    leak = Firing("MemoryGrowth", {"instance": INSTANCE, **labels}, predicted)
    yield fires("a process grows without end", script, leak, not_yet_s=0.9 * t.memory_window_s)

    script = Script(seconds, step_s)
    script.put(name, f"{begin // 10}+{begin // 10}x9 {begin}+0x{script.steps}", **labels)
    yield silent("a process grows while it warms up", script)

    script = Script(seconds, step_s)
    half = script.steps // 2
    script.put(name, f"{begin}+0x{half} {begin // 5}+{begin // 5}x3 {begin}+0x{half}", **labels)
    yield silent("a process begins again", script)

    script = Script(seconds, step_s)
    script.put(name, script.grow(per_s * step_s, begin))
    yield silent("an exporter of others grows", script)


def _cards(t: Thresholds) -> Iterator[Scenario]:
    def play(*cards: tuple[str, str, float, float]) -> Script:
        script = Script(t.gpu_memory_for_s + t.window_s, t.window_s / 20)
        for instance, device, total, share in cards:
            script.put(metrics.GPU_MEMORY_TOTAL.name, script.hold(total), instance, device=device)
            script.put(metrics.GPU_MEMORY_USED.name, script.hold(total * share), instance, device=device)
        return script

    low, high = t.gpu_memory_ratio / 3, 1 - (1 - t.gpu_memory_ratio) / 10
    large, small = 80.0 * GIB, 8.0 * GIB

    def full(instance: str, device: str) -> Firing:
        return Firing("GPUMemoryHigh", {"instance": instance, "device": device}, high)

    yield silent("a large card is used by a third", play((INSTANCE, "cuda:0", large, low)))
    script = play((INSTANCE, "cuda:0", small, high))
    yield fires("a small card is full", script, full(INSTANCE, "cuda:0"), not_yet_s=0.75 * t.gpu_memory_for_s)
    script = play((INSTANCE, "cuda:0", large, low), (INSTANCE, "cuda:1", large, high), ("b:8000", "cuda:0", large, low))
    yield fires("one full card beside others", script, full(INSTANCE, "cuda:1"))
    yield silent("a card that says nothing of its size", play((INSTANCE, "cuda:0", 0.0, 0.0)))


def _store(t: Thresholds) -> Iterator[Scenario]:
    step_s = t.store_down_for_s / 4
    down = Firing("StoreDown", {"part": "tasks", "instance": "b:8000"})

    script = Script(4 * t.store_down_for_s, step_s)
    script.put(metrics.STORE_UP.name, script.hold(1))
    script.put(metrics.STORE_UP.name, "1+0x3 0+0x12", "b:8000")
    yield fires("the store does not answer one of two servers", script, down, not_yet_s=1.5 * t.store_down_for_s)

    script = Script(4 * t.store_down_for_s, step_s)
    script.put(metrics.STORE_UP.name, "1+0x5 0+0x2 1+0x7")
    yield silent("the store is away for a moment", script)


def _progress(t: Thresholds) -> Iterator[Scenario]:
    def play(depth: float, ended: float = 0.0, steps: float = 0.0) -> Script:
        script = Script(2 * t.no_progress_s + t.window_s, t.window_s / 20)
        for instance in ("a:8000", "b:8000"):
            for lane in metrics.LANES:
                waiting = depth if lane == "default" else 0
                script.put(metrics.TASK_QUEUE.name, script.hold(waiting), instance, lane=lane)
        outcomes(script, AGENTS, success=ended)
        for status in metrics.STEP_STATUSES:
            script.put(metrics.TASK_STEPS.name, script.grow(steps), model=MODEL, status=status)
        return script

    stuck = Firing("NoProgress", {"part": "tasks"}, 7)
    yield fires("tasks wait and nothing gets done", play(7), stuck, not_yet_s=0.9 * t.no_progress_s)
    yield silent("tasks wait while others end", play(7, ended=0.2))
    yield silent("tasks wait while long ones go on step by step", play(7, steps=0.2))
    yield silent("there is nothing to do", play(0))


def _leases(t: Thresholds) -> Iterator[Scenario]:
    def play(times: int) -> Script:
        script = Script(t.lease_window_s, t.window_s / 20)
        half = script.steps // 2
        script.put(metrics.LEASE_LOSSES.name, f"0+0x{half} {times}+0x{half}")
        return script

    yield fires("tasks are lost by their workers", play(t.lease_losses + 1), Firing("LeaseLosses", {"part": "tasks"}))
    yield silent("one task is lost by its worker", play(min(1, t.lease_losses - 1)))


# A rate over five minutes needs two samples.
_STEP_S = 4 * MINUTE


def _budgets(t: Thresholds) -> Iterator[Scenario]:
    yield _burning(t, "models burn their budgets fast, from the first hour on", 6 * HOUR, (0.8, 2.6, 6))
    yield _burning(t, "models burn their budgets slowly, for three days", 72 * HOUR, (5, 24, 72))

    many, script = float(t.min_requests), Script(7 * HOUR, _STEP_S)
    outcomes(script, AGENTS, success=many, error=f"0+0x89 0+{many}x7 {many * 7}+0x{script.steps}")
    yield Scenario("tasks failed for half an hour, which is over", script, [Check(script.end_s)])

    script = Script(2.5 * HOUR, _STEP_S)
    outcomes(script, AGENTS, success=f"0+0x5 2+0x{script.steps}", error=f"0+0x25 1+0x{script.steps}")
    yield silent("of three tasks in two hours one fails", script)


def _burning(t: Thresholds, name: str, seconds: float, hours: Sequence[float]) -> Scenario:
    """For each pair of windows up to that length a model that just fails often enough for it, and one that is calm.

    A pair fires where its bound is passed and its long window is not longer than what is known.
    """
    script = Script(seconds, _STEP_S)
    firing: dict[float, list[Firing]] = {each: [] for each in hours}
    for family, objective in ((AGENTS, t.agent_objective), (SERVING, t.serving_objective)):
        budget = 1 - objective
        shares = {
            f"burns {burn.factor:g}": min(1.2 * burn.factor * budget, (1 + burn.factor * budget) / 2)
            for burn in burns(objective)
            if (burn.long_s > 6 * HOUR) == (seconds > 6 * HOUR)
        }
        for model, share in (shares | {"calm": budget / 2}).items():
            outcomes(script, family, model, success=t.min_requests * (1 - share), error=t.min_requests * share)
            labels = {"part": family.part, "model": model}
            for at, found in firing.items():
                found += [
                    Firing("ErrorBudgetBurn", {**labels, "window": duration(burn.long_s)}, share)
                    for burn in burns(objective)
                    if burn.factor * budget < share and 0.9 * burn.long_s <= at * HOUR
                ]
    return Scenario(name, script, [Check(at * HOUR, found) for at, found in firing.items()])
