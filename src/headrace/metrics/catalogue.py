"""The catalogue of metrics: every family once, as data.

Exporter, alert rules, dashboards and `docs/metrics.md` are made from it. Names, labels and buckets are what users'
dashboards depend on: they stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

STATUSES = ("success", "error", "timeout", "rejected", "cancelled")

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SHARE = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)
_SIZE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Metric:
    """One family.

    Args:
        merge: how the gauges of several processes become one value.
        exemplar: of a histogram that keeps the id of the last one in each bucket: the label of that id.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merge: Literal["sum", "max"] = "sum"
    exemplar: str = ""


REQUESTS = Metric(
    "headrace_requests_total",
    "counter",
    "Requests answered, by how they ended. A request with several items counts once.",
    ("model", "endpoint", "status"),
)
REQUEST_DURATION = Metric(
    "headrace_request_duration_seconds",
    "histogram",
    "Time from the last byte of a request to its answer, in the front end.",
    ("model", "endpoint"),
    _LATENCY_S,
    exemplar="request_id",
)
ITEMS = Metric("headrace_items_total", "counter", "Items computed.", ("model",))
QUEUE_WAIT = Metric(
    "headrace_queue_wait_seconds",
    "histogram",
    "Time an item waited in its worker before its batch started.",
    ("model",),
    _LATENCY_S,
)
BATCH_SIZE = Metric("headrace_batch_size", "histogram", "Items in a batch.", ("model",), _SIZE)
BATCH_DURATION = Metric("headrace_batch_duration_seconds", "histogram", "Time in `run`.", ("model",), _LATENCY_S)
PADDING = Metric(
    "headrace_padding_ratio", "histogram", "Share of a batch's tokens that is padding, 0 to 1.", ("model",), _SHARE
)
TOKENS = Metric(
    "headrace_tokens_total",
    "counter",
    "Tokens put into batches; kind is real or padding.",
    ("model", "kind"),
)
QUEUE_SIZE = Metric("request_queue_size", "gauge", "Requests waiting, their batch not begun.", ("model",))
IN_FLIGHT = Metric("headrace_requests_in_flight", "gauge", "Requests accepted and not yet answered.", ("model",))
REFUSED = Metric(
    "headrace_refused_total",
    "counter",
    "Requests not computed: overloaded (429), expired (deadline passed), abandoned (client gone), invalid (4xx).",
    ("model", "reason"),
)
REFUSAL_DURATION = Metric(
    "headrace_refusal_duration_seconds",
    "histogram",
    "Time from the last byte of a request to its refusal for want of room (429), in the front end.",
    ("model",),
    _LATENCY_S,
)
OUT_OF_MEMORY = Metric(
    "headrace_out_of_memory_total", "counter", "Batches that did not fit in memory and were split.", ("model",)
)
RETRIED = Metric(
    "headrace_retried_total", "counter", "Requests sent a second time because their worker was lost.", ("model",)
)
WORKERS = Metric("headrace_workers", "gauge", "Model worker processes, by state.", ("model", "state"))
WORKER_RESTARTS = Metric(
    "headrace_worker_restarts_total", "counter", "Model workers started again after a death or a hang.", ("model",)
)
HTTP_RESTARTS = Metric("headrace_http_restarts_total", "counter", "HTTP front ends started again after a death.")
_AGENT_S = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_LLM_S = (0.1, 0.5, 1, 2, 5, 10)
_TOKENS = (100, 500, 1000, 2000, 5000, 10000, 50000)
AGENT_REQUESTS = Metric(
    "agent_requests_total", "counter", "Tasks that reached their end, by how; model is the agent.", ("status", "model")
)
AGENT_DURATION = Metric(
    "agent_request_duration_seconds",
    "histogram",
    "From the submission of a task to its end.",
    ("model",),
    _AGENT_S,
    exemplar="task_id",
)
AGENT_ACTIVE = Metric("agent_active_requests", "gauge", "Tasks whose code runs just now.")
AGENT_TOKENS = Metric(
    "agent_tokens_per_request", "histogram", "Tokens that a task's calls of language models used.", ("model",), _TOKENS
)
LLM_CALLS = Metric(
    "llm_api_calls_total", "counter", "Calls of language models, by how they ended.", ("provider", "model", "status")
)
LLM_DURATION = Metric("llm_api_duration_seconds", "histogram", "Time of one call.", ("model",), _LLM_S)
TOOL_CALLS = Metric("tool_calls_total", "counter", "Calls of tools, by how they ended.", ("tool_name", "status"))
TASK_QUEUE = Metric("headrace_task_queue_depth", "gauge", "Tasks that wait for a worker.", ("lane",), merge="max")
TASK_OLDEST = Metric(
    "headrace_task_oldest_seconds", "gauge", "How long the task that waits longest has waited.", ("lane",), merge="max"
)
TASK_DURATION = Metric(
    "headrace_task_duration_seconds",
    "histogram",
    "The same as agent_request_duration_seconds, by lane.",
    ("model", "lane"),
    _AGENT_S,
)
TASKS_OPEN = Metric("headrace_tasks_open", "gauge", "Tasks that are not finished.", merge="max")
TASKS_SUBMITTED = Metric("headrace_tasks_submitted_total", "counter", "Tasks accepted.", ("model",))
TASK_ATTEMPTS = Metric("headrace_task_attempts_total", "counter", "Times that a worker took up a task.", ("model",))
TASK_STEPS = Metric(
    "headrace_task_steps_total",
    "counter",
    "Steps by how they ended: success, error, or replayed from the journal.",
    ("model", "status"),
)
LEASE_LOSSES = Metric(
    "headrace_task_lease_losses_total", "counter", "Tasks that a worker let go because they may be another's.", ()
)
TASK_WATCHERS = Metric("headrace_task_watchers", "gauge", "Clients that watch the events of a task.")
TASK_WORKER_RESTARTS = Metric(
    "headrace_task_worker_restarts_total", "counter", "Task workers started again after a death."
)
STORE_UP = Metric("headrace_task_store_up", "gauge", "1 while the store answers this server.", merge="max")
GPU_MEMORY_USED = Metric(
    "gpu_memory_used_bytes", "gauge", "Memory of the card in use, by whomever.", ("device",), merge="max"
)
GPU_MEMORY_TOTAL = Metric("gpu_memory_total_bytes", "gauge", "Memory of the card.", ("device",), merge="max")
GPU_UTILIZATION = Metric(
    "headrace_gpu_utilization_ratio",
    "gauge",
    "Share of the last sample period in which a kernel ran, 0 to 1.",
    ("device",),
    merge="max",
)
GPU_POWER = Metric("headrace_gpu_power_watts", "gauge", "Power the card draws.", ("device",), merge="max")
PROCESS_MEMORY = Metric(
    "process_resident_memory_bytes", "gauge", "Memory a process of this server has in RAM.", ("process",)
)
PROCESS_CPU = Metric(
    "process_cpu_seconds_total", "counter", "Processor time that a process and those before it took.", ("process",)
)
PROCESS_FILES = Metric("process_open_fds", "gauge", "Descriptors that a process has open.", ("process",))
PROCESS_MOST_FILES = Metric("process_max_fds", "gauge", "Descriptors that a process may have open.", ("process",))
LOOP_LAG = Metric(
    "headrace_event_loop_lag_seconds",
    "histogram",
    "How much later than asked for an event loop came to a timer, twice a second.",
    ("process",),
    _LATENCY_S,
)
BUILD_INFO = Metric("headrace_build_info", "gauge", "Always 1; the version is the label.", ("version",), merge="max")

CATALOGUE: tuple[Metric, ...] = (
    REQUESTS,
    REQUEST_DURATION,
    ITEMS,
    QUEUE_WAIT,
    BATCH_SIZE,
    BATCH_DURATION,
    PADDING,
    TOKENS,
    QUEUE_SIZE,
    IN_FLIGHT,
    REFUSED,
    REFUSAL_DURATION,
    OUT_OF_MEMORY,
    RETRIED,
    WORKERS,
    WORKER_RESTARTS,
    HTTP_RESTARTS,
    AGENT_REQUESTS,
    AGENT_DURATION,
    AGENT_ACTIVE,
    AGENT_TOKENS,
    LLM_CALLS,
    LLM_DURATION,
    TOOL_CALLS,
    TASK_QUEUE,
    TASK_OLDEST,
    TASK_DURATION,
    TASKS_OPEN,
    TASKS_SUBMITTED,
    TASK_ATTEMPTS,
    TASK_STEPS,
    LEASE_LOSSES,
    TASK_WATCHERS,
    TASK_WORKER_RESTARTS,
    STORE_UP,
    GPU_MEMORY_USED,
    GPU_MEMORY_TOTAL,
    GPU_UTILIZATION,
    GPU_POWER,
    PROCESS_MEMORY,
    PROCESS_CPU,
    PROCESS_FILES,
    PROCESS_MOST_FILES,
    LOOP_LAG,
    BUILD_INFO,
)
# Labels whose values this package alone chooses: they are kept where other values become `other`.
CLOSED_LABELS = frozenset({"status", "endpoint", "reason", "state", "kind", "lane", "version"})
LANES = ("interactive", "default", "batch")
STEP_STATUSES = ("success", "error", "replayed")
ENDPOINTS = ("predict", "embeddings", "infer")
REFUSAL_REASONS = ("overloaded", "expired", "abandoned", "invalid")
WORKER_STATES = ("starting", "ready", "restarting", "stopping")
