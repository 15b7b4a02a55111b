"""The demo's agents on the real model: a folder is indexed, and what is said in it is found.

What needs time, a crash or another model runs on a small one, whose texts are near when they share words.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import ROOT, Server, events_of, serving, task_status, wait_for_end, wait_until
from headrace.demo.memory import Memory
from headrace.demo.reading import MOST_FILES, read

TEXTS = {
    "garden/roses.md": "# Roses\n\nCut them back in March.\n\nThey want sun for at least six hours a day.\n",
    "kitchen/bread.txt": "Flour and water.\n\nLet the dough rest overnight in the fridge before you bake it.\n",
    "workshop/saw.py": '"""Tools."""\n\n# The blade of the saw has to be sharpened once a year.\n',
}
KEY = "correct-horse"


def run(server: Server, agent: str, value: object) -> Any:
    answer = server.client.post("/agent/run", json={"agent": agent, "input": value})
    assert answer.status_code == 200, answer.text
    return answer.json()["result"]


def refusal(server: Server, agent: str, value: object) -> tuple[int, dict[str, Any]]:
    answer = server.client.post("/agent/run", json={"agent": agent, "input": value})
    return answer.status_code, answer.json()["error"]


def counts(indexed: dict[str, Any]) -> dict[str, int]:
    """What has come of a folder, without its name and without zeros."""
    return {name: count for name, count in indexed.items() if name != "folder" and count}


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_what_is_said_is_found_by_file_and_line(demo: Server, tmp_path: Path) -> None:
    write(tmp_path, TEXTS)
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\x00")
    indexed = run(demo, "index", str(tmp_path))
    assert indexed["folder"] == str(tmp_path.resolve())
    assert counts(indexed) == {"files": 4, "passages": 7, "skipped": 1}
    for question, place in (
        ("how much light do flowers need?", ("roses.md", 5)),
        ("when should I put bread into the oven?", ("bread.txt", 3)),
        ("how often must a blade be made sharp?", ("saw.py", 3)),
    ):
        best = run(demo, "where", question)[0]
        assert (Path(best["file"]).name, best["line"]) == place, question
        lines = Path(best["file"]).read_text().splitlines()
        assert best["quote"].splitlines()[0] == lines[best["line"] - 1]
    again = run(demo, "index", str(tmp_path))
    assert counts(again) == {"files": 4, "unchanged": 3, "skipped": 1}, "nothing is embedded twice"


def test_what_is_said_nowhere_is_not_found(demo: Server, tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "serve.md", tmp_path)
    run(demo, "index", str(tmp_path))
    for question in ("can I use the OpenAI client?", "how do I send a file to a model?", "octet-stream"):
        assert run(demo, "where", question), question
    for question in ("who painted the Mona Lisa?", "what is the capital of France?", "why do cats purr?"):
        assert run(demo, "where", question) == [], question


def test_what_is_gone_is_forgotten_and_other_folders_are_not(demo: Server, tmp_path: Path) -> None:
    write(tmp_path, {"one/a.md": "Whales sing.", "one/deep/b.md": "Whales dive.", "one2/c.md": "Whales breathe."})
    for folder in ("one", "one2"):
        run(demo, "index", str(tmp_path / folder))
    (tmp_path / "one/a.md").unlink()
    (tmp_path / "one/deep/b.md").write_bytes(b"\xff")
    (tmp_path / "one2/c.md").unlink()
    assert counts(run(demo, "index", str(tmp_path / "one"))) == {"files": 1, "skipped": 1, "forgotten": 1}
    found = [hit["quote"] for hit in run(demo, "where", "whales")]
    assert found == ["Whales breathe."], "nobody has looked into that folder again"
    assert counts(run(demo, "index", str(tmp_path))) == {"files": 1, "skipped": 1, "forgotten": 1}
    assert run(demo, "where", "whales") == []


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "", "~nobody/x", __file__, "/tmp/\0"])
def test_a_folder_that_is_not_there_is_said(demo: Server, folder: str) -> None:
    status, error = refusal(demo, "index", folder)
    assert (status, error["code"], error["field"]) == (422, "invalid_input", "folder")
    assert repr(folder) in error["message"]


@pytest.mark.parametrize("question", ["", "  \n", "?!", '"', "* - ()", "\0"])
def test_a_question_without_a_word_is_refused(demo: Server, question: str) -> None:
    status, error = refusal(demo, "where", question)
    assert (status, error["code"], error["field"]) == (422, "invalid_input", "question")
    assert error["message"] == "the question has no word in it"


@contextlib.contextmanager
def small(folder: Path, *options: str, **variables: str) -> Iterator[Server]:
    """The demo's agents beside a model of the tests."""
    use_model(folder, "Words")
    arguments = ("headrace.demo", "--config", str(folder / "headrace.toml"), "--lease-s", "1", *options)
    env = {"EMBED_NOTES": str(folder / "notes"), **variables}
    with serving(folder, *arguments, verb="up", env=env) as server:
        yield server


def use_model(folder: Path, name: str) -> None:
    (folder / "headrace.toml").write_text(f'[models.embed]\ntarget = "demo_models:{name}"\n')


def test_before_anything_is_indexed_it_says_so_at_once(tmp_path: Path) -> None:
    with small(tmp_path) as server:
        status, error = refusal(server, "where", "overnight in the fridge")
        assert (status, error["code"]) == (503, "not_ready")
        assert "run the agent index first" in error["message"]
        assert "trying it again" not in server.log


def test_what_is_printed_can_be_tried_also_where_a_key_is_asked_for(tmp_path: Path) -> None:
    with small(tmp_path, HEADRACE_API_KEYS=f" {KEY}, other-key") as server:
        hints = dict(line.split(None, 1) for line in server.log.splitlines() if line.startswith("  "))
        assert len(shell(hints["try"])["prediction"]) == 512
        ident = shell(hints["index"])["task_id"]
        command = f"exec {hints['watch'].replace('TASK_ID', ident)}"
        with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True, env=WITH_KEY) as watching:
            assert watching.stdout
            events = (event for _, event in events_of(iter(watching.stdout)))
            progress = next(event["value"] for event in events if event.get("name") == "progress")
            watching.kill()
        assert 0 < progress["done"] < progress["of"]
        assert shell(hints["where"])["result"][0]["file"].endswith(".py")
        assert server.client.post(f"/agent/cancel/{ident}", headers={"X-API-Key": "other-key"}).status_code == 200
        assert KEY not in server.log


WITH_KEY = {**os.environ, "HEADRACE_API_KEY": "other-key"}


def shell(command: str) -> Any:
    """What a printed command answers."""
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20, check=True, env=WITH_KEY)
    return json.loads(done.stdout)


@pytest.mark.long
def test_another_model_of_the_same_name_is_noticed_and_everything_is_indexed_anew(tmp_path: Path) -> None:
    write(tmp_path / "texts", TEXTS)
    folder = str(tmp_path / "texts")
    with small(tmp_path) as server:
        assert counts(run(server, "index", folder)) == {"files": 3, "passages": 7}
        for name in ("Narrow", "Mirrored"):
            use_model(tmp_path, name)
            assert httpx.post(f"{server.admin}/admin/reload", timeout=20).status_code == 200
            status, error = refusal(server, "where", "overnight in the fridge")
            assert (status, error["code"]) == (503, "not_ready")
            assert "with this model" in error["message"]
            assert counts(run(server, "index", folder)) == {"files": 3, "passages": 7}, "all of it is embedded again"
            assert run(server, "where", "overnight in the fridge")[0]["line"] == 3
        assert counts(run(server, "index", folder)) == {"files": 3, "unchanged": 3}


@pytest.mark.long
def test_a_model_that_makes_no_vectors_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"headrace.toml": '[models.shout]\ntarget = "models:shout"\n'})
    with serving(tmp_path, "headrace.demo", "--config", str(tmp_path / "headrace.toml"), verb="up") as server:
        for agent in ("index", "where"):
            status, error = refusal(server, agent, str(tmp_path))
            assert (status, error["code"]) == (500, "config_error")
            assert "gives no vectors" in error["message"]


@pytest.mark.usefixtures("needs_proc")
def test_a_worker_that_is_killed_while_it_indexes_leaves_every_file_indexed_once(tmp_path: Path) -> None:
    """Also a folder whose list of files would be larger than the value of a step may be, and one that changes."""
    texts = tmp_path / "texts"
    per_part, parts = MOST_FILES, 4
    names = [f"{'long' * 10}-{number:04}.txt" for number in range(per_part * parts)]
    write(texts, {name: f"{name} begins.\n\n{name} ends.\n" for name in names})
    with small(tmp_path, "--max-value-bytes", "4096") as server:
        ident = submit_index(server, texts)
        for steps in (2, 3):  # the list and a part; another part
            wait_until(
                lambda steps=steps: task_status(server, ident).get("steps", 0) >= steps, 20, "some parts are done"
            )
            os.kill(server.pid_of("task.0"), signal.SIGKILL)
        # Of a part that is done, of one that is not; and a place that has been passed.
        (texts / names[0]).unlink()
        (texts / names[-1]).unlink()
        write(texts, {"a.txt": "Too late for this time.", "z.txt": "In time."})
        task = wait_for_end(server, ident)
        assert task["status"] == "completed", task
        assert task["attempt"] > 1
        assert task["steps"] == parts + 3, "the folder, the parts, one that finds nothing more, what has gone"
        result = task["result"]
        assert (result["files"], result["forgotten"]) == (len(names), 1)

        memory = Memory(tmp_path / "data")
        kept = [str(texts.resolve() / name) for name in [*names[1:-1], "z.txt"]]
        assert sorted(memory.files_in("/")) == kept
        with contextlib.closing(sqlite3.connect(memory.file)) as base:
            rows = base.execute("SELECT path, line, quote FROM passages JOIN files ON files.id = file").fetchall()
            assert sorted(rows) == [(path, *passage) for path in kept for passage in read(path).passages]
            base.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")
        embedded = Counter(map(json.loads, (tmp_path / "notes").read_text().splitlines()))
        done_before = [f"{name} {verb}." for name in names[:per_part] for verb in ("begins", "ends")]
        assert {embedded[quote] for quote in done_before} == {1}, "what was journalled is not embedded again"
        assert run(server, "where", names[5])[0]["file"] == kept[4]


@pytest.mark.usefixtures("needs_proc")
@pytest.mark.long
def test_a_restart_in_the_middle_ends_no_index(tmp_path: Path) -> None:
    write(tmp_path / "texts", {f"{number:03}.txt": f"Number {number}." for number in range(4 * MOST_FILES)})
    with small(tmp_path, "--shutdown-grace-s", "2") as server:
        ident = submit_index(server, tmp_path / "texts")
        wait_until(lambda: task_status(server, ident).get("steps", 0) >= 2, 20, "a part is done")
    with small(tmp_path) as server:
        task = wait_for_end(server, ident)
        assert task["status"] == "completed", task
        assert counts(task["result"]) == {"files": 4 * MOST_FILES, "passages": 4 * MOST_FILES}


def test_while_the_index_waits_for_its_file_others_are_answered(tmp_path: Path) -> None:
    write(tmp_path / "first", TEXTS)
    write(tmp_path / "second", {"new.md": "The second folder."})
    with small(tmp_path) as server:
        run(server, "index", str(tmp_path / "first"))
        with contextlib.closing(sqlite3.connect(Memory(tmp_path / "data").file, isolation_level=None)) as base:
            base.execute("BEGIN IMMEDIATE")
            ident = submit_index(server, tmp_path / "second")
            wait_until(lambda: "second folder" in (tmp_path / "notes").read_text(), 20, "it wants to write")
            for _ in range(5):
                answer = server.client.post("/agent/run", json={"agent": "where", "input": "the fridge"}, timeout=5)
                assert answer.json()["result"][0]["line"] == 3
            assert task_status(server, ident)["status"] == "running"
            base.execute("ROLLBACK")
        assert counts(wait_for_end(server, ident)["result"]) == {"files": 1, "passages": 1}


def submit_index(server: Server, folder: Path) -> str:
    answer = server.client.post("/agent/submit", json={"agent": "index", "input": str(folder)})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


# Each begins with an index that is not there yet, opens it for every call, and reads while others write.
_PROCESS = """
import sys
from pathlib import Path
import numpy as np
from headrace.demo.memory import Memory
from headrace.demo.reading import Passage, Text

memory, name = Memory(Path(sys.argv[1])), sys.argv[2]
probe = np.eye(8, dtype=np.float32)[0]
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    texts = [Text(f"/{name}/{number}.md", "d", [Passage(1, f"File {number} of {name}.")])]
    assert memory.unknown(probe, texts) == texts
    memory.keep(probe, texts, probe[None])
    assert memory.unknown(probe, texts) == []
    assert memory.search(probe, probe, name)
    memory.forget([f"/{name}/{number - 1}.md"])
"""


@pytest.mark.long
def test_many_processes_may_make_the_index_and_use_it_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PROCESS, str(tmp_path / "data")]
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen([*command, f"p{number}"], stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for number in range(6)
    ]
    for process in running:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        _, problem = process.communicate(timeout=25)
        assert process.returncode == 0, problem
    assert Memory(tmp_path / "data").files_in("/") == sorted(f"/p{number}/9.md" for number in range(6))
    assert not [path.name for path in (tmp_path / "data").iterdir() if path.is_dir()], "nothing is left of its making"
