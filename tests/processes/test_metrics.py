"""The names that users' dashboards depend on, in a live scrape before anything has happened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import AGENTS, MODELS, ROOT, Server, serving
from headrace import metrics

STATUSES = ("success", "error", "timeout", "rejected", "cancelled")
# Label sets that are known before the first request, and the bounds of histograms.
FIXED: dict[str, tuple[list[str], list[str]]] = {
    "agent_requests_total": ([f'status="{each}",model="shout"' for each in STATUSES], []),
    "llm_api_calls_total": ([f'provider="other",model="other",status="{each}"' for each in STATUSES], []),
    "tool_calls_total": ([f'tool_name="other",status="{each}"' for each in STATUSES], []),
    "agent_request_duration_seconds": (
        ['model="shout"'],
        ["0.1", "0.5", "1.0", "2.0", "5.0", "10.0", "30.0", "60.0", "120.0", "300.0", "600.0"],
    ),
    "llm_api_duration_seconds": (['model="other"'], ["0.1", "0.5", "1.0", "2.0", "5.0", "10.0"]),
    "agent_tokens_per_request": (
        ['model="shout"'],
        [f"{each}.0" for each in (100, 500, 1000, 2000, 5000, 10000, 50000)],
    ),
    "agent_active_requests": ([""], []),
    "request_queue_size": (['model="echo"'], []),
}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a model and of agents that nobody has asked anything."""
    folder = tmp_path_factory.mktemp("metrics")
    file = folder / "headrace.toml"
    file.write_text('[models.echo]\ntarget = "models:echo"\n')
    options = ("--config", str(file), "--data-dir", str(folder / "data"))
    paths = f"{MODELS}:{AGENTS}"
    with serving(folder, "agents_app.py", *options, verb="up", cwd=AGENTS, env={"PYTHONPATH": paths}) as up:
        yield up


@pytest.mark.parametrize("name", FIXED)
def test_every_fixed_series_is_there_at_0_before_the_first_request(fresh: Server, name: str) -> None:
    lines = fresh.client.get("/metrics").text.splitlines()
    labels, bounds = FIXED[name]
    for each in labels:
        if not bounds:
            assert f"{name}{{{each}}} 0".replace("{}", "") in lines
            continue
        for bound in (*bounds, "+Inf"):
            assert f'{name}_bucket{{{each},le="{bound}"}} 0' in lines
        assert f"{name}_count{{{each}}} 0" in lines
        assert f"{name}_sum{{{each}}} 0" in lines


def test_the_table_in_the_documents_is_what_is_exported(fresh: Server) -> None:
    text = fresh.client.get("/metrics").text
    exported = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    written = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert exported <= written
    # A card's figures are there where a card is; the others once their first event has come.
    later = {each for each in written - exported if not each.startswith(("gpu_", "headrace_gpu_"))}
    assert later <= {metrics.OUT_OF_MEMORY.name, metrics.RETRIED.name, metrics.PADDING.name}
    assert not Path("/proc/driver/nvidia/version").exists() or "gpu_memory_used_bytes" in exported
