"""Requests to models: how many, how many fail, how long they take, and where the time goes."""

from __future__ import annotations

from boards.panels import JOB, USUAL, Board, Panel, Query, Row, figure, one, percentiles
from boards.promql import FINISHED, failures, grown, mean, quantile, rate, ratio, value
from headrace import metrics as m

_OVERLOADED = rate(m.REFUSED, "model", reason="overloaded")

NOW = Row(
    "Now",
    [
        figure(
            "Requests",
            "reqps",
            "Requests answered per second, however they ended. If it drops to nothing while clients are busy, look at "
            "Workers below and at whatever stands in front of the servers.",
            rate(m.REQUESTS),
        ),
        figure(
            "Failures",
            "percentunit",
            "Errors and timeouts as a share of what was finished. What was refused or cancelled counts on neither "
            "side. If it is red, find the model under Failures by model, then read that server's log.",
            failures(m.REQUESTS),
            limit=USUAL.error_ratio,
        ),
        figure(
            "p99",
            "s",
            "One request in a hundred takes longer than this, all servers and models together, refusals left out. If "
            "it is high, see whether Time in queue or Time in run grew with it.",
            quantile(0.99, m.REQUEST_DURATION, apart=m.REFUSAL_DURATION),
            limit=USUAL.serving_latency_s,
        ),
        figure(
            "Waiting",
            "short",
            "Requests whose batch has not begun, all servers together. If it stays high there is more work than "
            "workers: add workers or servers, or let clients send less.",
            value(m.QUEUE_SIZE),
            limit=USUAL.queue_size,
        ),
        figure(
            "Workers ready",
            "short",
            "Model workers that take requests. If it is below what was configured, Workers by state says what the "
            "others do.",
            value(m.WORKERS, state="ready"),
        ),
        figure(
            "Restarts",
            "short",
            "Model workers that died or hung and were started again, within the time shown. Any is worth a look at the "
            "log, which says how each one ended.",
            grown(m.WORKER_RESTARTS),
            limit=1,
        ),
    ],
)

REQUESTS = Row(
    "Requests",
    [
        Panel(
            "Requests by status",
            "reqps",
            "How requests ended. rejected are refusals for want of room and clients' own mistakes, cancelled are "
            "clients that left. If error or timeout appears, go on with Failures by model.",
            one(rate(m.REQUESTS, "status"), "{{status}}"),
            "stack",
        ),
        Panel(
            "Failures by model",
            "percentunit",
            "Errors and timeouts as a share of what each model finished. The dashed line is where HighErrorRate "
            "begins by default. A single model: look at its log and input. All at once: look at the machine.",
            one(failures(m.REQUESTS, "model"), "{{model}}"),
            limit=USUAL.error_ratio,
        ),
        Panel(
            "Requests by model and endpoint",
            "reqps",
            "Who is asked for what. Use it to see whether a change in latency comes with a change in load.",
            one(rate(m.REQUESTS, "model endpoint"), "{{model}} {{endpoint}}"),
            "stack",
        ),
    ],
)

REFUSALS = Row(
    "Refusals",
    [
        Panel(
            "Refused by reason",
            "reqps",
            "Requests that were not computed. overloaded: the queue is full, add workers. expired: deadlines are "
            "shorter than the wait. abandoned: clients give up. invalid: a client sends what the model does not take.",
            one(rate(m.REFUSED, "reason"), "{{reason}}"),
            "stack",
        ),
        Panel(
            "Shed by model",
            "percentunit",
            "Share of the requests that found no room (429). The dashed line is where RequestsShed begins by default. "
            "Those let in are served in time; for the others add workers.",
            one(ratio(_OVERLOADED, f"({_OVERLOADED} + {rate(m.REQUESTS, 'model', status=FINISHED)})"), "{{model}}"),
            limit=USUAL.shed_ratio,
        ),
        Panel(
            "Time to refuse",
            "s",
            "How long it takes to say that there is no room. It should stay within a few milliseconds, whatever the "
            "load. If it does not, the front ends lack processor time: see the dashboard of the machine.",
            percentiles(m.REFUSAL_DURATION),
        ),
    ],
)

LATENCY = Row(
    "Latency",
    [
        Panel(
            "All models",
            "s",
            "From the last byte of a request to its answer, over all servers, refusals left out. If p99 runs away "
            "from p50, some requests wait: compare Time in queue. A value is read off buckets: between two of their "
            "bounds it is a guess.",
            percentiles(m.REQUEST_DURATION, apart=m.REFUSAL_DURATION),
            width=24,
        ),
        *(
            Panel(
                f"p{100 * q:g} by model",
                "s",
                f"{text} The servers' requests are put together first. Find the slow model here, then its part of "
                "the time under Queue and batches.",
                one(
                    quantile(q, m.REQUEST_DURATION, "model", apart=m.REFUSAL_DURATION), "{{model}}", m.REQUEST_DURATION
                ),
                limit=USUAL.serving_latency_s if q == 0.99 else None,
            )
            for q, text in (
                (0.5, "Half of a model's requests take longer."),
                (0.95, "One request in twenty takes longer."),
                (0.99, "One request in a hundred takes longer; the dashed line is HighP99Latency's default."),
            )
        ),
    ],
)

QUEUE = Row(
    "Queue and batches",
    [
        Panel(
            "Waiting by model",
            "short",
            "Requests whose batch has not begun. The dashed line is where QueueBacklog begins by default, for all "
            "models together. A queue that grows steadily ends in refusals: add workers.",
            one(value(m.QUEUE_SIZE, "model"), "{{model}}"),
            "stack",
            6,
            limit=USUAL.queue_size,
        ),
        Panel(
            "In flight by model",
            "short",
            "Requests accepted and not yet answered: those that wait and those that are computed. By far more than "
            "wait: many are in a batch, or clients read their answers slowly.",
            one(value(m.IN_FLIGHT, "model"), "{{model}}"),
            "stack",
            6,
        ),
        Panel(
            "Time in queue",
            "s",
            "How long an item waits in its worker. If it is most of the latency, more workers help; if it is little, "
            "they do not.",
            percentiles(m.QUEUE_WAIT),
            width=6,
        ),
        Panel(
            "Time in run, p95 by model",
            "s",
            "One batch in twenty takes longer on the device. If it grows while batches do not, the device is shared, "
            "hot or out of memory: see the dashboard of the machine.",
            one(quantile(0.95, m.BATCH_DURATION, "model"), "{{model}}"),
            width=6,
        ),
        Panel(
            "Batch size",
            "short",
            "Items in a batch: the mean of each model, and the p95 of all. Batches of one under load mean that "
            "nothing is batched: look at max_batch_size and max_batch_tokens.",
            [
                Query(mean(m.BATCH_SIZE, "model"), "{{model}} mean"),
                Query(quantile(0.95, m.BATCH_SIZE), "p95"),
            ],
            width=6,
        ),
        Panel(
            "Padding",
            "percentunit",
            "Share of the tokens that are padding: computed and thrown away. Above a quarter, lengths are too mixed: "
            "a smaller max_batch_tokens, or workers of their own for long texts, help.",
            [
                Query(ratio(rate(m.TOKENS, "model", kind="padding"), rate(m.TOKENS, "model")), "{{model}}"),
                Query(quantile(0.95, m.PADDING), "p95 of batches"),
            ],
            width=6,
        ),
        Panel(
            "Items",
            "cps",
            "What the workers get through, per second. A request with several items counts once as a request and "
            "several times here.",
            one(rate(m.ITEMS, "model"), "{{model}}"),
            "stack",
            6,
        ),
        Panel(
            "Tokens",
            "cps",
            "Tokens put into batches, per second. The real ones are throughput; the padding is what Padding shows as a "
            "share.",
            one(rate(m.TOKENS, "model kind"), "{{model}} {{kind}}"),
            "stack",
            6,
        ),
    ],
)

WORKERS = Row(
    "Workers",
    [
        Panel(
            "Workers by state",
            "short",
            "Model worker processes. restarting for more than a minute or two: they die again and again, and the log "
            "says why. starting: they load and warm up.",
            one(value(m.WORKERS, "model state"), "{{model}} {{state}}"),
            "stack",
            6,
        ),
        Panel(
            "Restarts",
            "cpm",
            "Processes started again after a death or a hang, per minute. Several of one model: look for what kills "
            "it, such as memory or one certain input. Front ends should never be here.",
            [
                Query(f"60 * {rate(m.WORKER_RESTARTS, 'model')}", "{{model}} workers"),
                Query(f"60 * {rate(m.HTTP_RESTARTS)}", "front ends"),
            ],
            width=6,
        ),
        Panel(
            "Sent a second time",
            "cpm",
            "Requests per minute whose worker was lost while it had them. Without restarts on purpose this means that "
            "workers die under load.",
            one(f"60 * {rate(m.RETRIED, 'model')}", "{{model}}"),
            width=6,
        ),
        Panel(
            "Out of memory",
            "cpm",
            "Batches per minute that did not fit in memory and were split. Each costs time: lower max_batch_tokens or "
            "max_batch_size, or see on the dashboard of the machine who else uses the card.",
            one(f"60 * {rate(m.OUT_OF_MEMORY, 'model')}", "{{model}}"),
            width=6,
        ),
    ],
)

SERVING = Board(
    "serving",
    "headrace: serving",
    "Requests to models: rate, failures and duration first, then where the time goes.",
    [JOB, ("model", "Model", 'label_values(headrace_requests_total{job=~"$job"}, model)')],
    [NOW, REQUESTS, REFUSALS, LATENCY, QUEUE, WORKERS],
)
