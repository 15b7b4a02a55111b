"""What requests and tasks run on: cards, memory, processors, event loops, and which version it is."""

from __future__ import annotations

from boards.panels import JOB, USUAL, Board, Panel, Query, Row, figure, one
from boards.promql import quantile, rate, ratio, value
from headrace import metrics as m

_CARD = "instance device"
# A server that is scraped under two jobs still has its cards once.
_USED = value(m.GPU_MEMORY_USED, _CARD, "max")
_TOTAL = value(m.GPU_MEMORY_TOTAL, _CARD, "max")

NOW = Row(
    "Now",
    [
        figure(
            "Servers",
            "short",
            "Servers that Prometheus has metrics of. If it is below what should be there, TargetDown names the one "
            "that is missing.",
            value(m.BUILD_INFO),
            width=6,
        ),
        figure(
            "Fullest card",
            "percentunit",
            "Memory in use on the card that is fullest, by whomever, of all that it has. If it is red, the next larger "
            "batch may not fit: see who uses the card.",
            f"max({ratio(_USED, _TOTAL)})",
            width=6,
            limit=USUAL.gpu_memory_ratio,
        ),
        figure(
            "Memory",
            "bytes",
            "Memory in RAM of all processes of headrace. Pages that processes share count in each.",
            value(m.PROCESS_MEMORY),
            width=6,
        ),
        figure(
            "Event loops, p99",
            "s",
            "How late event loops come to what they have to do. Above a tenth of a second every request and stream of "
            "that process waits: the panel below names it.",
            quantile(0.99, m.LOOP_LAG),
            width=6,
            limit=0.1,
        ),
    ],
)

CARDS = Row(
    "GPUs",
    [
        Panel(
            "GPU memory",
            "percentunit",
            "Memory in use by every process on the card, of all that it has. The dashed line is where GPUMemoryHigh "
            "begins by default. Lower max_batch_tokens, or move what else uses the card.",
            one(ratio(_USED, _TOTAL), "{{instance}} {{device}}"),
            limit=USUAL.gpu_memory_ratio,
            width=6,
        ),
        Panel(
            "GPU memory used and total",
            "bytes",
            "The same in bytes. Compare it with what a model should take before a second one is put on the card.",
            [
                Query(_USED, "{{instance}} {{device}} used"),
                Query(_TOTAL, "{{instance}} {{device}} total"),
            ],
            width=6,
        ),
        Panel(
            "GPU utilisation",
            "percentunit",
            "Share of the time in which some kernel ran. Low under load: the card waits for the processor or for "
            "requests. High says only that it is never idle, not that it is used well.",
            one(value(m.GPU_UTILIZATION, _CARD, "max"), "{{instance}} {{device}}"),
            width=6,
        ),
        Panel(
            "GPU power",
            "watt",
            "What the card draws. Near its limit under load is right; a card that is busy and draws little does small "
            "batches or is throttled.",
            one(value(m.GPU_POWER, _CARD, "max"), "{{instance}} {{device}}"),
            width=6,
        ),
    ],
)

PROCESSES = Row(
    "Processes",
    [
        Panel(
            "Memory by process",
            "bytes",
            "Memory in RAM. Steps at a start are right; a line that climbs for hours is a leak, and MemoryGrowth warns "
            "of it. Until it is found, restart that process in quiet hours.",
            one(value(m.PROCESS_MEMORY, "instance process"), "{{instance}} {{process}}"),
            width=12,
        ),
        Panel(
            "Processors by process",
            "short",
            "Processor cores in use; 1 is one core. A front end at 1 is full: raise http_workers. A worker on a GPU at "
            "1 is held up by Python.",
            one(rate(m.PROCESS_CPU, "instance process"), "{{instance}} {{process}}"),
            width=12,
        ),
        Panel(
            "Event loop lag, p99 by process",
            "s",
            "One timer in a hundred fires later than this. Spikes are blocking calls on the loop: in a task worker, "
            "agents' code that belongs into a step; elsewhere, too little processor.",
            one(quantile(0.99, m.LOOP_LAG, "instance process"), "{{instance}} {{process}}"),
        ),
        Panel(
            "Open files",
            "percentunit",
            "Descriptors in use as a share of what each process may have. Near 1 no connection is accepted any more: "
            "raise the limit (ulimit -n), or look for clients that never close.",
            one(
                ratio(value(m.PROCESS_FILES, "instance process"), value(m.PROCESS_MOST_FILES, "instance process")),
                "{{instance}} {{process}}",
            ),
            limit=0.9,
        ),
        Panel(
            "Versions",
            "short",
            "Servers by version. Two lines are a rolling update that goes on, or one that was forgotten.",
            one(value(m.BUILD_INFO, "version"), "{{version}}"),
            "stack",
        ),
    ],
)

MACHINE = Board(
    "machine",
    "headrace: machine",
    "What requests and tasks run on: cards, memory, processors and event loops.",
    [JOB, ("instance", "Server", 'label_values(headrace_build_info{job=~"$job"}, instance)')],
    [NOW, CARDS, PROCESSES],
)
