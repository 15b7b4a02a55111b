"""Tasks of agents: how they end, how long they take, who waits, and what language models and tools do."""

from __future__ import annotations

from boards.panels import JOB, USUAL, Board, Panel, Query, Row, figure, one, percentiles
from boards.promql import failures, mean, quantile, rate, ratio, value
from headrace import metrics as m

# Each server reports the same lanes of the one store, hence the largest per job and not the sum.
_WAITING = value(m.TASK_QUEUE, "job lane", "max")
_OLDEST = value(m.TASK_OLDEST, "job lane", "max")

NOW = Row(
    "Now",
    [
        figure(
            "Finished",
            "cpm",
            "Tasks per minute that reached their end, however. If it is nothing while tasks wait, look whether there "
            "are task workers and whether the store is up.",
            f"60 * {rate(m.AGENT_REQUESTS)}",
        ),
        figure(
            "Failures",
            "percentunit",
            "Errors and timeouts as a share of the tasks that were finished. What was cancelled or refused counts on "
            "neither side. If it is red, Failures by agent names the agent.",
            failures(m.AGENT_REQUESTS),
            limit=USUAL.error_ratio,
        ),
        figure(
            "p99",
            "s",
            "One task in a hundred takes longer, from submission to end, all lanes together. If it is high, see "
            "whether the waiting grew (Oldest by lane) or the work did (Language models).",
            quantile(0.99, m.AGENT_DURATION),
            limit=USUAL.agent_latency_s,
        ),
        figure(
            "Open",
            "short",
            "Tasks that are not finished: those that wait, run, sleep or ask. New ones are refused when it reaches "
            "max_tasks.",
            f"sum({value(m.TASKS_OPEN, 'job', 'max')})",
        ),
        figure(
            "Oldest waiting",
            "s",
            "How long the task that waits longest has waited, in any lane. If it grows, there are too few task "
            "workers, or their places are taken by tasks that hang.",
            f"max({_OLDEST})",
        ),
        figure(
            "Store",
            "short",
            "Whether every server reaches the task store. If it is down nothing is accepted or finished, and nothing "
            "is lost: look at the store's machine, its memory and its disk.",
            value(m.STORE_UP, how="min"),
            words={"0": ("down", "red"), "1": ("up", "green")},
        ),
    ],
)

TASKS = Row(
    "Tasks",
    [
        Panel(
            "Finished by status",
            "cpm",
            "How tasks ended, per minute. error is an exception of the agent, timeout its deadline, cancelled a "
            "wish of somebody's. If error or timeout appears, go on with Failures by agent.",
            one(f"60 * {rate(m.AGENT_REQUESTS, 'status')}", "{{status}}"),
            "stack",
        ),
        Panel(
            "Failures by agent",
            "percentunit",
            "Errors and timeouts as a share of what each agent finished. The dashed line is where HighErrorRate begins "
            "by default. headrace task list shows the tasks that failed, each with its error.",
            one(failures(m.AGENT_REQUESTS, "model"), "{{model}}"),
            limit=USUAL.error_ratio,
        ),
        Panel(
            "Submitted and finished",
            "cpm",
            "What comes in and what gets done, per minute. While submitted is above finished, more and more wait.",
            [
                Query(f"60 * {rate(m.TASKS_SUBMITTED)}", "submitted"),
                Query(f"60 * {rate(m.AGENT_REQUESTS)}", "finished"),
            ],
        ),
        Panel(
            "Duration",
            "s",
            "From submission to end, over all agents and servers, waiting included. A value is read off buckets: "
            "between two of their bounds it is a guess, and past the last one, 600 s, it stays there.",
            percentiles(m.AGENT_DURATION),
        ),
        Panel(
            "p50 by agent",
            "s",
            "Half of an agent's tasks take longer. Use it to see what is usual for each.",
            one(quantile(0.5, m.AGENT_DURATION, "model"), "{{model}}", m.AGENT_DURATION),
        ),
        Panel(
            "p99 by agent",
            "s",
            "One task in a hundred takes longer. The dashed line is where HighP99Latency begins by default, which "
            "leaves the batch lane out. An agent far above its own p50 waits or retries.",
            one(quantile(0.99, m.AGENT_DURATION, "model"), "{{model}}", m.AGENT_DURATION),
            limit=USUAL.agent_latency_s,
        ),
    ],
)

QUEUE = Row(
    "Waiting",
    [
        Panel(
            "Waiting by lane",
            "short",
            "Tasks that wait for a worker. batch may wait; if interactive does, add task workers or raise concurrency.",
            one(_WAITING, "{{job}} {{lane}}"),
            "stack",
            width=6,
        ),
        Panel(
            "Oldest by lane",
            "s",
            "How long the task that waits longest has waited. A line that rises as fast as the clock means that nobody "
            "takes tasks from that lane.",
            one(_OLDEST, "{{job}} {{lane}}"),
            width=6,
        ),
        Panel(
            "p95 by lane",
            "s",
            "From submission to end, by lane. HighP99Latency leaves batch out: its tasks wait until there is time.",
            one(quantile(0.95, m.TASK_DURATION, "lane"), "{{lane}}"),
            width=6,
        ),
        Panel(
            "Open and running",
            "short",
            "Tasks that are not finished, and those whose code runs just now. Open without waiting or running: they "
            "sleep, or wait for somebody's answer.",
            [
                Query(value(m.TASKS_OPEN, "job", "max"), "{{job}} open"),
                Query(value(m.AGENT_ACTIVE), "running"),
            ],
            width=6,
        ),
    ],
)

WORK = Row(
    "Workers and steps",
    [
        Panel(
            "Attempts per task",
            "short",
            "How often a worker took up a task, for each one submitted. One is right; more means retries, workers that "
            "die, or tasks that slept or asked and were taken up again.",
            one(ratio(rate(m.TASK_ATTEMPTS, "model"), rate(m.TASKS_SUBMITTED, "model")), "{{model}}"),
        ),
        Panel(
            "Steps by status",
            "cpm",
            "Steps per minute. replayed ones were read from the journal after a restart and not done again. Many "
            "errors: see the log of the agent; a step that is tried several times counts once.",
            one(f"60 * {rate(m.TASK_STEPS, 'status')}", "{{status}}"),
            "stack",
        ),
        Panel(
            "Lost leases",
            "cpm",
            "Tasks per minute that a worker let go because another may have them. There should be none: either an "
            "event loop was blocked (see Event loop lag on the dashboard of the machine), or the store did not answer.",
            one(f"60 * {rate(m.LEASE_LOSSES)}", "lost leases"),
        ),
        Panel(
            "Restarts of task workers",
            "cpm",
            "Task workers started again after a death, per minute. Their tasks go on elsewhere from the journal, but "
            "an agent that kills its worker kills the next one too: the log names the task.",
            one(f"60 * {rate(m.TASK_WORKER_RESTARTS)}", "restarts"),
        ),
        Panel(
            "Watchers",
            "short",
            "Clients that hold the events of a task, each with a connection of its own. If they grow without tasks, "
            "clients do not close their streams.",
            one(value(m.TASK_WATCHERS), "watchers"),
        ),
        Panel(
            "Store",
            "short",
            "1 while a server reaches the task store, else 0. One server at 0 is that server's network; all of them: "
            "look at the store's machine, its memory and its disk.",
            one(value(m.STORE_UP, "instance", "min"), "{{instance}}"),
        ),
    ],
)

MODELS = Row(
    "Language models",
    [
        Panel(
            "Calls",
            "cpm",
            "Calls of language models per minute, by how they ended; rejected is the provider's 429. If rejected "
            "grows, ask for a higher limit or run fewer tasks at once.",
            one(
                f"60 * {rate(m.LLM_CALLS, 'provider model status')}",
                "{{provider}} {{model}} {{status}}",
            ),
            "stack",
        ),
        Panel(
            "Failures by provider and model",
            "percentunit",
            "Errors and timeouts as a share of the finished calls. The dashed line is where LLMAPIFailureRate begins "
            "by default. All models of a provider at once: look at its status page; one of them: at its name and key.",
            one(failures(m.LLM_CALLS, "provider model"), "{{provider}} {{model}}"),
            limit=USUAL.llm_failure_ratio,
        ),
        Panel(
            "Duration of calls",
            "s",
            "Time of one call over all models. Past the last bucket, 10 s, it stays there.",
            percentiles(m.LLM_DURATION),
        ),
        Panel(
            "p95 of calls by model",
            "s",
            "One call in twenty takes longer. If a model got slower, tasks that use it did too: a smaller model, or "
            "another provider, is the remedy.",
            one(quantile(0.95, m.LLM_DURATION, "model"), "{{model}}"),
        ),
        Panel(
            "Tokens per task",
            "short",
            "Tokens that a task's calls used: the mean of each agent, and the p95 of all. It is what is paid for. If "
            "it climbs, conversations grow or an agent goes round in circles.",
            [
                Query(mean(m.AGENT_TOKENS, "model"), "{{model}} mean"),
                Query(quantile(0.95, m.AGENT_TOKENS), "p95"),
            ],
        ),
        Panel(
            "Tool calls",
            "cpm",
            "Calls of tools per minute, by how they ended. A tool with many errors costs a model call each time: fix "
            "the tool, or tell the model better how to use it.",
            one(f"60 * {rate(m.TOOL_CALLS, 'tool_name status')}", "{{tool_name}} {{status}}"),
            "stack",
        ),
    ],
)

AGENTS = Board(
    "agents",
    "headrace: agents",
    "Tasks of agents: how they end, how long they take, who waits, and what language models and tools do.",
    [JOB, ("model", "Agent", 'label_values(agent_requests_total{job=~"$job"}, model)')],
    [NOW, TASKS, QUEUE, WORK, MODELS],
)
