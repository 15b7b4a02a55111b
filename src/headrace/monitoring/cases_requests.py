"""Scenarios about requests, of agents and of serving: errors, latency, queues, refusals, calls of language models."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

from headrace import metrics
from headrace.monitoring.alert import AGENTS, SERVING, Family
from headrace.monitoring.scenarios import INSTANCE, Firing, Scenario, Script, fires, silent
from headrace.monitoring.thresholds import Thresholds

MODEL = "m"


def cases(t: Thresholds) -> dict[str, list[Scenario]]:
    """By group of rules."""
    return {
        "agents": [*_errors(t, AGENTS), *_few(t, AGENTS), *_odd(t, AGENTS), *_latency(t, AGENTS), *_lanes(t), *_llm(t)],
        "serving": [
            *_errors(t, SERVING),
            *_few(t, SERVING),
            *_odd(t, SERVING),
            *_latency(t, SERVING),
            *_refused_fast(t),
            *_queue(t),
            *_shed(t),
        ],
    }


def below(ratio: float) -> float:
    """A share that is well below a bound: 1 % where the bound is 5 %."""
    return ratio / 5


def above(ratio: float) -> float:
    """A share that is well above a bound: 20 % where the bound is 5 %."""
    return min(4 * ratio, (1 + ratio) / 2)


def outcomes(
    script: Script, family: Family, model: str = MODEL, instance: str = INSTANCE, **values: float | str
) -> None:
    """Counters of the statuses that are named: how much each grows in a step, or its samples."""
    extra = {"endpoint": "predict"} if "endpoint" in family.requests.labels else {}
    for status, value in values.items():
        samples = value if isinstance(value, str) else script.grow(value)
        script.put(family.requests.name, samples, instance, status=status, model=model, **extra)


def durations(
    script: Script, metric: metrics.Metric, per_step: dict[float, float], instance: str = INSTANCE, **labels: str
) -> None:
    """A histogram that grows by so much a step in the bucket with that upper bound, ``inf`` for the last."""
    labels = {"model": MODEL, **({"endpoint": "predict"} if "endpoint" in metric.labels else {}), **labels}
    for bound in (*metric.buckets, math.inf):
        count = sum(each for upper, each in per_step.items() if upper <= bound)
        edge = f"{bound:g}" if bound < math.inf else "+Inf"
        script.put(f"{metric.name}_bucket", script.grow(count), instance, le=edge, **labels)
    script.put(f"{metric.name}_count", script.grow(sum(per_step.values())), instance, **labels)
    most = 2 * metric.buckets[-1]
    total_s = sum(count * min(upper, most) for upper, count in per_step.items())
    script.put(f"{metric.name}_sum", script.grow(total_s), instance, **labels)


def _play(t: Thresholds, seconds: float) -> Script:
    return Script(seconds, t.window_s / 20)


def _failing(family: Family, share: float, model: str = MODEL) -> Firing:
    return Firing("HighErrorRate", {"part": family.part, "model": model}, share)


def _all_failed(family: Family) -> Firing:
    return Firing("AllFailed", {"part": family.part, "model": MODEL})


def _errors(t: Thresholds, family: Family) -> Iterator[Scenario]:
    noun, many = family.noun, float(t.min_requests)
    few, share = below(t.error_ratio), above(t.error_ratio)
    enough_s = t.window_s + t.error_for_s + t.few_for_s

    outcomes(script := _play(t, enough_s), family, success=many * (1 - few), error=many * few)
    yield silent(f"few of the {noun} fail", script)

    outcomes(script := _play(t, enough_s), family, success=many * (1 - share), error=many * share)
    yield fires(f"many of the {noun} fail", script, _failing(family, share), not_yet_s=0.75 * t.error_for_s)

    outcomes(script := _play(t, enough_s), family, timeout=many)
    yield fires(f"all {noun} time out", script, _failing(family, 1.0), _all_failed(family))

    script = _play(t, enough_s)
    outcomes(script, family, success=f"0+0x3 2+0x{script.steps}", error=f"0+0x3 1+0x{script.steps}")
    yield silent(f"one of three {noun} fails", script)

    outcomes(script := _play(t, enough_s), family, success=many / 2, cancelled=many / 4, rejected=many / 4)
    yield silent(f"half of the {noun} are cancelled or refused", script)

    script = _play(t, enough_s)
    outcomes(script, family, success=many * (1 - share), error=many * share, cancelled=10 * many, rejected=10 * many)
    yield fires(f"many {noun} fail among more that are cancelled or refused", script, _failing(family, share))


def _few(t: Thresholds, family: Family) -> Iterator[Scenario]:
    """Six an hour."""
    script, failing = _play(t, t.few_window_s), _play(t, t.few_window_s)
    apart = script.steps // (2 * t.few_requests)
    each = " ".join(f"{count}+0x{apart - 1}" for count in range(2 * t.few_requests + 1))

    outcomes(script, family, success=f"0+0x{apart // 2} 1+0x{script.steps}", error=each)
    yield silent(f"a few {family.noun} in an hour, and one of them goes well", script)

    outcomes(failing, family, error=each)
    yield fires(f"a few {family.noun} in an hour, and all of them fail", failing, _all_failed(family))


def _odd(t: Thresholds, family: Family) -> Iterator[Scenario]:
    """Series that are not there, begin again, or stand still; more servers and models than one."""
    noun, many = family.noun, float(t.min_requests)
    few, share = below(t.error_ratio), above(t.error_ratio)
    enough_s = t.window_s + t.error_for_s

    script = _play(t, enough_s)
    outcomes(script, family, success=script.hold(40), error=script.hold(400))
    yield silent(f"no {noun} at night, after a bad day", script)

    script = _play(t, enough_s)
    half = script.steps // 2

    def begun_again(per_step: float) -> str:
        return f"{1e6:.0f}+{per_step}x{half} 0+{per_step}x{half}"

    outcomes(script, family, success=begun_again(many * (1 - few)), error=begun_again(many * few))
    yield silent(f"the counters of {noun} begin again after a restart", script)

    script = _play(t, enough_s)
    gap = script.samples_in(t.window_s / 4)

    def torn(per_step: float) -> str:
        before = script.steps - gap - 1
        return f"0+{per_step}x{before} _x{gap} {per_step * (before + gap + 1)}+{per_step}x1"

    outcomes(script, family, success=torn(many * (1 - share)), error=torn(many * share))
    yield fires(f"many {noun} fail while scrapes are missing", script, _failing(family, share))

    script = _play(t, enough_s)
    for model, failures in (("good", 0.0), ("bad", share), ("fair", few)):
        outcomes(script, family, model, success=many * (1 - failures), error=many * failures)
    yield fires(f"{noun} of one model among several fail", script, _failing(family, share, "bad"))

    script = _play(t, enough_s)
    outcomes(script, family, instance="a:8000", success=many)
    outcomes(script, family, instance="b:8000", error=many * few)
    yield silent(f"all {noun} fail on a server that gets hardly any", script)

    script = _play(t, enough_s)
    outcomes(script, family, instance="a:8000", success=many / 2 * (1 - share), error=many / 2 * share)
    outcomes(script, family, instance="b:8000", success=many / 2 * (1 - share), timeout=many / 2 * share)
    yield fires(f"many {noun} fail on every server", script, _failing(family, share))


def _bound(t: Thresholds, family: Family) -> float:
    return t.agent_latency_s if family is AGENTS else t.serving_latency_s


def _slow_bucket(t: Thresholds, family: Family) -> tuple[float, float]:
    """The first bucket that lies above the bound as a whole."""
    edges = [*family.durations.buckets, math.inf]
    at = bisect.bisect_left(edges, _bound(t, family))
    return edges[at], edges[at + 1]


def _late(t: Thresholds, family: Family, share: float) -> Firing:
    """The alert where a share is in the slow bucket and all others are fast."""
    lower, upper = _slow_bucket(t, family)
    p99 = lower if upper == math.inf else lower + (upper - lower) * (0.99 - (1 - share)) / share
    return Firing("HighP99Latency", {"part": family.part, "model": MODEL}, p99)


def _latency(t: Thresholds, family: Family) -> Iterator[Scenario]:
    noun, many, metric = family.noun, float(t.min_requests), family.durations
    fast, slow = metric.buckets[0], _slow_bucket(t, family)[1]
    enough_s = t.window_s + t.latency_for_s

    durations(script := _play(t, enough_s), metric, {fast: many * 0.97, slow: many * 0.03})
    firing = _late(t, family, 0.03)
    yield fires(f"three in a hundred {noun} are slow", script, firing, not_yet_s=0.75 * t.latency_for_s)

    durations(script := _play(t, enough_s), metric, {fast: many * 0.995, slow: many * 0.005})
    yield silent(f"one in two hundred {noun} is slow", script)

    script = _play(t, enough_s)
    durations(script, metric, {fast: many})
    durations(script, metric, {slow: 1 / 20}, instance="quiet:8000")
    yield silent(f"{noun} are fast, but for one on a quiet server", script)

    script = _play(t, enough_s)
    for index in range(8):
        durations(script, metric, {slow if index == 3 else fast: many}, instance=f"server-{index}:8000")
    yield fires(f"one of eight servers is slow with its {noun}", script, _late(t, family, 1 / 8))

    durations(script := _play(t, enough_s), metric, {slow: t.min_requests / 2 / 20})
    yield silent(f"too few {noun} for a p99, all of them slow", script)


def _lanes(t: Thresholds) -> Iterator[Scenario]:
    many, longest = float(t.min_requests), math.inf
    fast, slow = AGENTS.durations.buckets[0], _slow_bucket(t, AGENTS)[1]
    lanes = metrics.TASK_DURATION

    script = _play(t, 3600.0)
    durations(script, AGENTS.durations, {fast: many / 2, longest: many / 2})
    durations(script, lanes, {fast: many / 2}, lane="default")
    durations(script, lanes, {longest: many / 2}, lane="batch")
    yield silent("the batch lane is busy for an hour, the others are fast", script)

    script = _play(t, t.window_s + t.latency_for_s)
    durations(script, AGENTS.durations, {fast: many * 0.9, slow: many * 0.1, longest: many})
    durations(script, lanes, {fast: many * 0.9, slow: many * 0.1}, lane="default")
    durations(script, lanes, {longest: many}, lane="batch")
    yield fires("the batch lane is busy, and the default lane is slow", script, _late(t, AGENTS, 0.1))


def _refused_fast(t: Thresholds) -> Iterator[Scenario]:
    many = float(t.min_requests)
    fast, slow = SERVING.durations.buckets[0], _slow_bucket(t, SERVING)[1]
    script = _play(t, t.window_s + t.latency_for_s)
    durations(script, SERVING.durations, {fast: many * 19.9, slow: many * 0.1})
    durations(script, metrics.REFUSAL_DURATION, {fast: many * 19.0})
    yield fires("requests are slow behind many that are refused at once", script, _late(t, SERVING, 0.1))


def _llm(t: Thresholds) -> Iterator[Scenario]:
    many, share, few = float(t.min_requests), above(t.llm_failure_ratio), below(t.llm_failure_ratio)

    def calls(script: Script, provider: str = "p", **per_step: float) -> Script:
        for status in metrics.STATUSES:
            values = script.grow(per_step.get(status, 0.0))
            script.put(metrics.LLM_CALLS.name, values, provider=provider, model="gpt", status=status)
        return script

    def play() -> Script:
        return _play(t, t.window_s + t.llm_failure_for_s)

    def failing(share: float) -> Firing:
        return Firing("LLMAPIFailureRate", {"part": "llm", "provider": "p", "model": "gpt"}, share)

    yield silent("few calls of a language model fail", calls(play(), success=many * (1 - few), error=many * few))
    script = calls(play(), success=many * (1 - share), error=many * share / 2, timeout=many * share / 2)
    early_s = 0.75 * t.llm_failure_for_s
    yield fires("many calls of a language model fail", script, failing(share), not_yet_s=early_s)
    script = calls(play(), success=many / 2, rejected=many / 2)
    yield fires("half of the calls of a language model are refused for their rate", script, failing(0.5))
    script = calls(calls(play(), error=many), "other", success=many)
    yield fires("one of two providers fails", script, failing(1.0))


def _queue(t: Thresholds) -> Iterator[Scenario]:
    name, share = metrics.QUEUE_SIZE.name, round(0.6 * t.queue_size)

    def play() -> Script:
        return Script(4 * t.queue_for_s, t.queue_for_s / 4)

    script = play()
    for instance in ("a:8000", "b:8000"):
        script.put(name, script.hold(share), instance, model=MODEL)
    backlog = Firing("QueueBacklog", {"part": "serving"}, 2 * share)
    yield fires("two servers with six tenths of the bound each", script, backlog, not_yet_s=0.75 * t.queue_for_s)

    script = play()
    for model in ("m", "n"):
        script.put(name, script.hold(round(0.4 * t.queue_size)), model=model)
    yield silent("two models with four tenths of the bound each", script)

    script = play()
    script.put(name, f"0+0x7 {50 * t.queue_size}+0x0 0+0x7", model=MODEL)
    yield silent("a queue that was long for a moment", script)

    script = play()
    script.put(name, f"{2 * t.queue_size}+0x12 0+0x0 {2 * t.queue_size}+0x1 _x1", model=MODEL)
    yield fires(
        "a long queue, one low value, one missing",
        script,
        Firing("QueueBacklog", {"part": "serving"}, 2 * t.queue_size),
    )


def _shed(t: Thresholds) -> Iterator[Scenario]:
    many, share = float(t.min_requests), min(0.9, above(t.shed_ratio))

    def play(overloaded: float, invalid: float = 0.0) -> Script:
        script = _play(t, t.window_s + t.shed_for_s)
        outcomes(script, SERVING, success=many - overloaded, rejected=overloaded + invalid)
        for reason, count in (("overloaded", overloaded), ("invalid", invalid), ("expired", 0.0), ("abandoned", 0.0)):
            script.put(metrics.REFUSED.name, script.grow(count), model=MODEL, reason=reason)
        return script

    shed = Firing("RequestsShed", {"part": "serving", "model": MODEL}, share)
    yield fires("many requests find no room", play(many * share), shed, not_yet_s=0.75 * t.shed_for_s)
    yield silent("few requests find no room", play(many * below(t.shed_ratio)))
    yield silent("nine of ten requests are invalid", play(0.0, invalid=9 * many))
