from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from headrace import metrics
from headrace.metrics import rows


def test_increments_are_exact_across_threads() -> None:
    row = metrics.Row()
    counter = row.counter(metrics.ITEMS, model="m")
    histogram = row.histogram(metrics.QUEUE_WAIT, model="m")

    def work() -> None:
        for _ in range(100_000):
            counter.inc()
            histogram.observe(1.0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = metrics.Reader(rows=[row]).values()
    assert values["headrace_items_total", ("m",)] == [800_000]
    assert sum(values["headrace_queue_wait_seconds", ("m",)][:-1]) == 800_000


def test_slots_add_up_and_maxima_do_not(tmp_path: Path) -> None:
    for slot in ("a", "b"):
        row = metrics.Row(tmp_path / slot)
        row.counter(metrics.ITEMS, model="m").inc(2)
        row.gauge(metrics.QUEUE_SIZE, model="m").set(3)
        row.gauge(metrics.BUILD_INFO, version="1").set(1)
    values = metrics.Reader(tmp_path).values()
    assert values["headrace_items_total", ("m",)] == [4]
    assert values["request_queue_size", ("m",)] == [6]
    assert values["headrace_build_info", ("1",)] == [1]


WRITER = """
import sys, time
from pathlib import Path
from headrace import metrics
row = metrics.Row(Path(sys.argv[1]))
row.gauge(metrics.QUEUE_SIZE, model="m").set(7)
counter = row.counter(metrics.ITEMS, model="m")
for _ in range(1000): counter.inc()
print("counted", flush=True)
time.sleep(60)
"""


def test_a_killed_process_loses_no_count_and_leaves_no_gauge(tmp_path: Path) -> None:
    reader = metrics.Reader(tmp_path)
    for round_ in (1, 2):
        argv = [sys.executable, "-c", WRITER, str(tmp_path / "slot")]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            assert process.stdout
            assert process.stdout.readline() == b"counted\n"
            assert reader.values()["request_queue_size", ("m",)] == [7]
            os.kill(process.pid, signal.SIGKILL)
        metrics.Row(tmp_path / "slot").close()  # what the supervisor does at a process's end
        assert reader.values()["request_queue_size", ("m",)] == [0]
        assert reader.values()["headrace_items_total", ("m",)] == [1000 * round_]


def test_the_exposition_is_what_prometheus_reads() -> None:
    row = metrics.Row()
    row.counter(metrics.REQUESTS, model='a "b"\\c', endpoint="predict", status="success").inc(3)
    for value in (0.001, 0.003, 99.0):
        row.histogram(metrics.BATCH_DURATION, model="m").observe(value)
    text = metrics.Reader(rows=[row]).exposition().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (request,) = families["headrace_requests"].samples
    assert (request.labels["model"], request.value) == ('a "b"\\c', 3)
    samples = families["headrace_batch_duration_seconds"].samples
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.0025"], buckets["0.005"], buckets["+Inf"]) == (1, 1, 2, 3)
    assert {s.name.rpartition("_")[2]: s.value for s in samples[-2:]} == {"sum": pytest.approx(99.004), "count": 3}


def test_a_full_row_folds_into_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CELLS", 8)
    row = metrics.Row()
    for name in "abcdefghij":
        row.counter(metrics.ITEMS, model=name).inc()
    values = {labels: cells for (_, labels), cells in metrics.Reader(rows=[row]).values().items()}
    assert sum(cells[0] for cells in values.values()) == 10
    assert values["other",] == [4]


def test_labels_are_checked() -> None:
    with pytest.raises(TypeError, match="headrace_items_total"):
        metrics.Row().counter(metrics.ITEMS, modle="m")


def test_the_catalogue_keeps_its_rules() -> None:
    names = [metric.name for metric in metrics.CATALOGUE]
    assert len(names) == len(set(names))
    declared = {value for value in vars(metrics).values() if isinstance(value, metrics.Metric)}
    assert declared == set(metrics.CATALOGUE)
    for metric in metrics.CATALOGUE:
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(metric.buckets)
        assert metric.help.endswith("."), metric.name


def test_the_last_one_in_each_bucket_is_told_to_those_who_ask_for_openmetrics(tmp_path: Path) -> None:
    for slot, ident in (("a", "request-1"), ("b", "request-2")):
        row = metrics.Row(tmp_path / slot)
        histogram = row.histogram(metrics.REQUEST_DURATION, model="m", endpoint="predict")
        histogram.observe(0.02, ident)
        histogram.observe(7.0, "x" * 41)  # longer than what is kept
        row.counter(metrics.ITEMS, model="m").inc()
    reader = metrics.Reader(tmp_path)
    text, kind = reader.answer("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;q=0.5")
    assert kind == metrics.OPENMETRICS_TYPE
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(text.decode())}
    assert families["headrace_items"].type == "counter"
    examples = {
        sample.labels["le"]: sample.exemplar
        for sample in families["headrace_request_duration_seconds"].samples
        if sample.exemplar
    }
    assert set(examples) == {"0.025"}
    assert examples["0.025"].labels == {"request_id": "request-2"}
    assert examples["0.025"].value == 0.02
    assert float(examples["0.025"].timestamp) > 0
    plain, kind = reader.answer("text/plain")
    assert kind == metrics.CONTENT_TYPE
    assert b"request-2" not in plain
    assert b'le="30.0"' in plain


def test_names_beyond_a_bound_are_counted_as_other_and_cost_no_memory() -> None:
    row = metrics.Row()
    for number in range(5000):
        row.counter(metrics.TOOL_CALLS, tool_name=f"tool {number}", status="success").inc()
    values = metrics.Reader(rows=[row]).values()
    names = {labels for name, labels in values if name == "tool_calls_total"}
    assert len(names) == 2001
    assert values["tool_calls_total", ("other", "success")] == [3000]
    assert len(row._handles) == 2001
