"""The examples of docs/profile.md do what the page says: what is found, where, and that it is gone once mended."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import HEADRACE, ROOT, Server, serving
from headrace import live_profile
from headrace.profiling.finding import Finding
from headrace.profiling.record import Record, read

EXAMPLES = ROOT / "docs" / "examples"
PAGE = (ROOT / "docs" / "profile.md").read_text()
SECONDS = 3.0


def line_of(file: str, text: str) -> int:
    """The line of an example that has this text; there is one."""
    (found,) = [number for number, line in enumerate((EXAMPLES / file).read_text().splitlines(), 1) if text in line]
    return found


def places(findings: list[Finding]) -> list[tuple[str, str, int]]:
    return [(each.code, Path(each.file).name, each.line) for each in findings]


# A slow agent.

RATIO = line_of("slow_agent.py", ".ratio()")


@contextlib.contextmanager
def asked(server: Server, clients: int = 4) -> Iterator[None]:
    """Clients that ask for similar tickets, again and again."""
    over = threading.Event()

    def ask_on() -> None:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            while not over.is_set():
                client.post("/agent/run", json={"agent": "similar", "message": "word1 word2"}).raise_for_status()

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(ask_on) for _ in range(clients)]
        try:
            yield
        finally:
            over.set()
    for each in running:
        each.result()


def looked_at(app: str, folder: Path) -> list[Finding]:
    """What a look at the busy task worker of an app finds."""
    with serving(folder, app, verb="up", cwd=EXAMPLES) as server, asked(server):
        return live_profile.findings(live_profile.fetch(server.admin, "task.0", SECONDS))


def test_the_slow_agent_keeps_the_event_loop_at_the_line_that_the_page_names(tmp_path: Path) -> None:
    findings = looked_at("slow_agent.py", tmp_path)
    assert places(findings)[:1] == [("blocked_loop", "slow_agent.py", RATIO)], findings
    assert f"slow_agent.py:{RATIO} [blocked_loop]" in PAGE


@pytest.mark.long
def test_the_mended_agent_keeps_nobody_waiting(tmp_path: Path) -> None:
    findings = looked_at("mended_agent.py", tmp_path)
    # Neither is a step's way into the journal, which is all that it waits for, taken for something that it asks.
    assert not {"blocked_loop", "io_wait"} & {each.code for each in findings}, findings


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, list[dict[str, Any]]]:
    """The slow agent's search as a script, profiled."""
    command = [HEADRACE, "profile", "--no-trace", "--format", "json", str(EXAMPLES / "slow_agent.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path_factory.mktemp("script"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    return read(Path(report["files"]["record"])), report["findings"]


def test_its_search_as_a_script_is_found_at_the_same_line(profiled: tuple[Record, list[dict[str, Any]]]) -> None:
    _, findings = profiled
    assert (findings[0]["file"], findings[0]["line"]) == (str(EXAMPLES / "slow_agent.py"), RATIO), findings
    assert findings[0]["code"] in ("look_into_children", "cpu_hot_spot")


def test_a_dictionary_is_nothing_to_wait_for(profiled: tuple[Record, list[dict[str, Any]]]) -> None:
    """`difflib` calls `get` of a dictionary all the time; on a busy machine it is often stopped right there."""
    record, _ = profiled
    waited = sum(stack.seconds for stack in record.waiting if stack.waits_for == "future")
    assert waited < 0.05 * record.wall_s, record.waiting


def test_mended_it_finds_the_same() -> None:
    """Of tickets with some of their words exchanged too."""
    program = """
import sys, types, random
stub = types.ModuleType("headrace")
stub.agent = lambda function: function
sys.modules["headrace"] = stub
import mended_agent, slow_agent
chance = random.Random(1)
for words in slow_agent.archive()[:3]:
    text = " ".join(word if chance.random() < 0.7 else "other" for word in words)
    for least in (0.6, 0.25):
        slow, mended = ([(each.number, each.ratio) for each in module.closest(text, least)]
                        for module in (slow_agent, mended_agent))
        assert slow == mended and (least > 0.5 or slow), (slow, mended)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES, timeout=60).returncode == 0


# A leaking service.


def leak(name: str) -> dict[str, Any]:
    command = [HEADRACE, "leak", name, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_service_leaks_by_the_list_that_the_page_names() -> None:
    report = leak("leaking_service:one_batch")
    assert (report["verdict"], report["kind"]) == ("leak", "python"), report
    assert report["holder"] == "list: attribute `served` of Urgency"
    assert report["holder"] in PAGE
    lines = [(Path(each["file"]).name, each["line"]) for each in report["where"]]
    assert ("leaking_service.py", line_of("leaking_service.py", "self.served.append(")) in lines
    for file, line in lines:
        assert f"{file}:{line} " in PAGE


def test_mended_it_does_not_leak() -> None:
    report = leak("mended_service:one_batch")
    assert report["verdict"] in ("no_leak", "warm_up"), report
    assert report["holder"] is None
