"""Who must be called, and when: alert rules as plain data, one function each.

`scenarios` shows each rule firing and staying silent. Nothing here knows how rules are written to files.
"""

from __future__ import annotations

from headrace import metrics
from headrace.errors import ConfigError
from headrace.monitoring.alert import (
    AGENTS,
    FAILED,
    FINISHED,
    SERVING,
    Alert,
    Family,
    Record,
    Rule,
    early,
    failure_ratio,
    finished,
)
from headrace.monitoring.budget import error_budget
from headrace.monitoring.thresholds import Thresholds
from headrace.monitoring.words import duration, number


def groups(t: Thresholds) -> dict[str, list[Rule]]:
    """All rules by group; within a group what is recorded comes first.

    Raises:
        ConfigError: a threshold that no value of its metric can pass.
    """
    return {
        "agents": [
            _duration_buckets(t, AGENTS),
            high_error_rate(t, AGENTS),
            all_failed(t, AGENTS),
            high_p99_latency(t, AGENTS, t.agent_latency_s),
            llm_api_failure_rate(t),
        ],
        "serving": [
            _duration_buckets(t, SERVING),
            high_error_rate(t, SERVING),
            all_failed(t, SERVING),
            high_p99_latency(t, SERVING, t.serving_latency_s),
            queue_backlog(t),
            requests_shed(t),
        ],
        "targets": [target_down(t), target_missing(t)],
        "processes": [
            worker_down(t),
            no_worker_ready(t),
            restart_loop(t),
            memory_growth(t),
            gpu_memory_high(t),
        ],
        "tasks": [store_down(t), no_progress(t), lease_losses(t)],
        "slo": [*error_budget(t, AGENTS, t.agent_objective), *error_budget(t, SERVING, t.serving_objective)],
    }


def alerts(t: Thresholds) -> list[Alert]:
    """The alerts of all groups."""
    return [rule for rules in groups(t).values() for rule in rules if isinstance(rule, Alert)]


def high_error_rate(t: Thresholds, family: Family) -> Alert:
    window = duration(t.window_s)
    return Alert(
        "HighErrorRate",
        f"{failure_ratio(family, window)} > {number(t.error_ratio)}\n"
        f"and\n{finished(family, window)} >= {t.min_requests}",
        t.error_for_s,
        "critical",
        f"{{value}} of the {family.noun} of {{model}} fail",
        f"More than {100 * t.error_ratio:g}% of them ended in an error or a timeout over {window}. The log says why.",
        "percent",
        {"part": family.part},
    )


def all_failed(t: Thresholds, family: Family) -> Alert:
    """Too few requests for a ratio, yet none of them went well."""
    window = duration(t.few_window_s)
    name = family.requests.name
    # `increase` gives a little more than was counted, never less: half a request below the bound is far from both.
    return Alert(
        "AllFailed",
        f"sum by (job, model) (increase({name}{{{FAILED}}}[{window}])) > {number(t.few_requests - 0.5)}\n"
        f'unless\nsum by (job, model) (increase({name}{{status="success"}}[{window}])) > 0',
        t.few_for_s,
        "critical",
        f"All {family.noun} of {{model}} fail",
        f"At least {t.few_requests} ended within {window}, and none of them well. The log has the reason.",
        labels={"part": family.part},
    )


def high_p99_latency(t: Thresholds, family: Family, latency_s: float) -> Alert:
    largest = family.durations.buckets[-1]
    if not latency_s < largest:
        raise ConfigError(
            f"a p99 above {latency_s:g} s cannot be seen: the last bucket of {family.durations.name} is {largest:g} s",
            field="agent_latency_s" if family is AGENTS else "serving_latency_s",
            hint=f"choose a bound below {largest:g}",
        )
    buckets, part = _buckets_name(t), f'part="{family.part}"'
    return Alert(
        "HighP99Latency",
        f"histogram_quantile(0.99, {buckets}{{{part}}}) > {number(latency_s)}\n"
        # Requests per second, times the window: as many as there were in it.
        f'and on (job, model)\n{buckets}{{{part},le="+Inf"}} * {number(t.window_s)} >= {t.min_requests}',
        t.latency_for_s,
        "warning",
        f"One in a hundred {family.noun} of {{model}} takes longer than {{value}}",
        f"The p99 of the whole fleet over {duration(t.window_s)} is above {latency_s:g} s.",
        "seconds",
        {"part": family.part},
    )


def llm_api_failure_rate(t: Thresholds) -> Alert:
    window, name = duration(t.window_s), metrics.LLM_CALLS.name
    by = "sum by (job, provider, model)"
    # A provider that refuses our calls fails us: unlike our own refusals, these count.
    failed, all_ended = 'status=~"error|timeout|rejected"', 'status!="cancelled"'
    return Alert(
        "LLMAPIFailureRate",
        f"{by} (rate({name}{{{failed}}}[{window}]))\n  / {by} (rate({name}{{{all_ended}}}[{window}])) "
        f"> {number(t.llm_failure_ratio)}\n"
        f"and\n{by} (increase({name}{{{all_ended}}}[{window}])) >= {t.min_requests}",
        t.llm_failure_for_s,
        "warning",
        "{value} of the calls of {model} at {provider} fail",
        "Errors, timeouts and refusals for their rate (429). Look at the provider's status page and at its limits.",
        "percent",
        {"part": "llm"},
    )


def queue_backlog(t: Thresholds) -> Alert:
    window = duration(t.queue_for_s)
    return Alert(
        "QueueBacklog",
        # The median of the window rather than what is there now: one peak does not begin it, and neither one low value
        # nor a failed scrape ends it.
        f"sum by (job) (quantile_over_time(0.5, {metrics.QUEUE_SIZE.name}[{window}])) > {t.queue_size}",
        t.queue_for_s,
        "warning",
        "{value} requests wait in {job}",
        f"All models and servers together, for longer than {window}; more than {t.queue_size} is too much.",
        labels={"part": "serving"},
    )


def requests_shed(t: Thresholds) -> Alert:
    window = duration(t.window_s)
    shed = f'sum by (job, model) (rate({metrics.REFUSED.name}{{reason="overloaded"}}[{window}]))'
    answered = f"sum by (job, model) (rate({metrics.REQUESTS.name}{{{FINISHED}}}[{window}]))"
    return Alert(
        "RequestsShed",
        f"{shed}\n  / ({shed}\n    + {answered}) > {number(t.shed_ratio)}\n"
        f"and\n({shed}\n  + {answered}) * {number(t.window_s)} >= {t.min_requests}",
        t.shed_for_s,
        "warning",
        "{value} of the requests for {model} are refused for want of room",
        "More comes in than the workers can do: they answer 429 with Retry-After, and those let in are served in time.",
        "percent",
        {"part": "serving"},
    )


def target_down(t: Thresholds) -> Alert:
    return Alert(
        "TargetDown",
        f'up{{job=~"{t.job}.*"}} == 0',
        t.target_down_for_s,
        "critical",
        "{instance} does not answer Prometheus",
        "The server is gone, hangs, or cannot be reached from here.",
    )


def target_missing(t: Thresholds) -> Alert:
    return Alert(
        "TargetMissing",
        f'absent(up{{job=~"{t.job}.*"}})',
        t.target_down_for_s,
        "critical",
        "Prometheus knows no server of headrace",
        f'No target has the job "{t.job}": nothing is watched, and no other alert can fire.',
    )


def worker_down(t: Thresholds) -> Alert:
    return Alert(
        "WorkerDown",
        f'sum by (job, instance, model) ({metrics.WORKERS.name}{{state="restarting"}}) > 0',
        t.worker_down_for_s,
        "warning",
        "{value} workers of {model} on {instance} do not come back",
        "They ended and are not ready again. The server's log says why; /admin/workers shows each.",
        labels={"part": "serving"},
    )


def no_worker_ready(t: Thresholds) -> Alert:
    workers = metrics.WORKERS.name
    return Alert(
        "NoWorkerReady",
        f'sum by (job, model) ({workers}{{state="ready"}}) == 0\n'
        # A first start may take long and serves nobody yet; what is being stopped is meant to be gone.
        f'and\nsum by (job, model) ({workers}{{state="restarting"}}) > 0',
        t.no_worker_for_s,
        "critical",
        "No worker of {model} is ready",
        "Requests for it wait or fail with 503. The server's log says how the workers ended.",
        labels={"part": "serving"},
    )


def restart_loop(t: Thresholds) -> Alert:
    window = duration(t.restart_window_s)
    kinds = {
        "model worker": f"sum by (job, instance, model) (increase({metrics.WORKER_RESTARTS.name}[{window}]))",
        "front end": f"sum by (job, instance) (increase({metrics.HTTP_RESTARTS.name}[{window}]))",
        "task worker": f"sum by (job, instance) (increase({metrics.TASK_WORKER_RESTARTS.name}[{window}]))",
    }
    each = [f'label_replace({expr}, "process", "{kind}", "", "")' for kind, expr in kinds.items()]
    return Alert(
        "RestartLoop",
        "(\n  " + "\n  or ".join(each) + f"\n) > {number(t.restarts - 0.5)}",
        t.restart_for_s,
        "warning",
        "Processes on {instance} die again and again: {process} {model}",
        f"At least {t.restarts} restarts within {window}. The log says how each ended: a signal, an exit code, a hang.",
    )


def memory_growth(t: Thresholds) -> Alert:
    """It must still grow at the end of a whole window: what only warms up does not."""
    if not t.memory_window_s / 4 < t.memory_for_s < t.memory_horizon_s - t.memory_window_s:
        raise ConfigError(
            f"memory_for_s is {t.memory_for_s:g}: every start would look like growth, or none could be seen",
            field="memory_for_s",
            hint="longer than a quarter of memory_window_s, shorter than memory_horizon_s less memory_window_s",
        )
    # Every exporter has a metric of that name; ours has the label.
    name = f'{metrics.PROCESS_MEMORY.name}{{process!=""}}'
    limit = str(t.memory_limit_bytes) if t.memory_limit_bytes else f"2 * {name}"
    horizon = number(t.memory_horizon_s)
    windows = [duration(t.memory_window_s), duration(t.memory_window_s / 4)]
    grows = "\nand\n".join(f"predict_linear({name}[{window}], {horizon}) > {limit}" for window in windows)
    meant = f"{t.memory_limit_bytes} bytes" if t.memory_limit_bytes else "twice what it takes now"
    return Alert(
        "MemoryGrowth",
        f"{grows}\nand\n{early(name, t.memory_window_s)}",
        t.memory_for_s,
        "warning",
        "{process} on {instance} grows: {value} within " + duration(t.memory_horizon_s),
        f"If it goes on as in the last {windows[0]}, that is more than {meant}.",
        "bytes",
    )


def gpu_memory_high(t: Thresholds) -> Alert:
    return Alert(
        "GPUMemoryHigh",
        # What its size is compared with is the card's own; whatever other labels a scrape adds are dropped.
        f"max by (job, instance, device) ({metrics.GPU_MEMORY_USED.name} / {metrics.GPU_MEMORY_TOTAL.name}) "
        f"> {number(t.gpu_memory_ratio)}",
        t.gpu_memory_for_s,
        "critical",
        "{value} of the memory of {device} on {instance} is in use",
        "By every process on that card, of all that the card has.",
        "percent",
    )


def store_down(t: Thresholds) -> Alert:
    return Alert(
        "StoreDown",
        f"max by (job, instance) ({metrics.STORE_UP.name}) == 0",
        t.store_down_for_s,
        "critical",
        "The task store does not answer {instance}",
        "No task is accepted or finished there until it does; none is lost.",
        labels={"part": "tasks"},
    )


def no_progress(t: Thresholds) -> Alert:
    window = duration(t.no_progress_s)
    return Alert(
        "NoProgress",
        # Each server reports the same lanes of the one store, hence the largest. The last value survives a
        # failed scrape.
        f"sum by (job) (max by (job, lane) (last_over_time({metrics.TASK_QUEUE.name}[{duration(t.window_s)}]))) > 0\n"
        f"unless\nsum by (job) (increase({metrics.AGENT_REQUESTS.name}[{window}])) > 0\n"
        f"unless\nsum by (job) (increase({metrics.TASK_STEPS.name}[{window}])) > 0",
        t.no_progress_s,
        "critical",
        "{value} tasks wait, and nothing gets done",
        f"No task and no step has ended for {window}. Are there task workers, and what do they do?",
        labels={"part": "tasks"},
    )


def lease_losses(t: Thresholds) -> Alert:
    window = duration(t.lease_window_s)
    return Alert(
        "LeaseLosses",
        f"sum by (job) (increase({metrics.LEASE_LOSSES.name}[{window}])) > {number(t.lease_losses - 0.5)}",
        t.lease_for_s,
        "warning",
        "Workers of {job} lose tasks that they run",
        f"At least {t.lease_losses} within {window}: they stall, or do not reach the store. Steps in flight run again.",
        labels={"part": "tasks"},
    )


def _buckets_name(t: Thresholds) -> str:
    return f"headrace:duration_bucket:rate{duration(t.window_s)}"


def _duration_buckets(t: Thresholds, family: Family) -> Record:
    """The fleet's histogram per model, without what is apart, also where there has never been any of that."""
    window = duration(t.window_s)
    every = f"sum by (job, model, le) (rate({family.durations.name}_bucket[{window}]))"
    apart = f"sum by (job, model, le) (rate({family.apart}[{window}]))"
    return Record(_buckets_name(t), f"{every}\n  - {apart}\nor\n{every}", {"part": family.part})
