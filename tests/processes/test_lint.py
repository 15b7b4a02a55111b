"""`headrace lint` as it is typed: on code with pitfalls, on none, and on what is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import HEADRACE

PLANTED = """\
import time
import torch


async def handle(text):
    time.sleep(1)
    return open(text)


def train(model, batches, criterion):
    total = 0.0
    for x, y in batches:
        loss = criterion(model(x), y)
        loss.backward()
        total += loss
    return total
"""
FIELDS = ["code", "severity", "title", "evidence", "advice", "file", "line", "column"]


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HEADRACE, "lint", *arguments], capture_output=True, text=True, encoding="utf-8", timeout=30, cwd=folder
    )


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON document, once its shape has been found right."""
    assert not done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert list(found) == ["findings", "files", "skipped"]
    for each in found["findings"]:
        assert list(each) == FIELDS
        assert each["severity"] in ("info", "warning")
        assert all(each.values())
    assert done.returncode == int(any(each["severity"] != "info" for each in found["findings"]))
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "planted.py").write_text(PLANTED)
    return tmp_path


def test_what_is_found_is_printed_with_its_place_and_what_to_do(project: Path) -> None:
    done = run("app", folder=project)
    assert done.returncode == 1
    assert not done.stderr
    places = [line.split(": ")[:2] for line in done.stdout.splitlines() if line.startswith("app/")]
    assert places == [
        ["app/planted.py:6:5", "warning blocking_in_async"],
        ["app/planted.py:7:12", "info file_in_async"],
        ["app/planted.py:15:9", "warning graph_kept"],
    ]
    assert done.stdout.count("    → ") == 3
    assert done.stdout.splitlines()[-1] == "2 warnings, 1 info in 1 file"


def test_the_document_names_file_line_and_column(project: Path) -> None:
    found = document(run("app/planted.py", "--format", "json", folder=project))
    assert found["files"] == 1
    assert [(each["code"], each["file"], each["line"], each["column"]) for each in found["findings"]] == [
        ("blocking_in_async", "app/planted.py", 6, 5),
        ("file_in_async", "app/planted.py", 7, 12),
        ("graph_kept", "app/planted.py", 15, 9),
    ]
    assert found["findings"][2]["evidence"] == "total += loss"


def test_good_advice_alone_is_no_failure(project: Path) -> None:
    planted = project / "app" / "planted.py"
    planted.write_text(PLANTED.replace("time.sleep(1)", "pass").replace("+= loss", "+= loss.detach()"))
    done = run("app", folder=project)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "0 warnings, 1 info in 1 file")


def test_a_silenced_line_is_no_failure(project: Path) -> None:
    planted = project / "app" / "planted.py"
    text = PLANTED.replace("time.sleep(1)", "time.sleep(1)  # headrace: ignore[blocking_in_async]")
    planted.write_text(text.replace("+= loss", "+= loss  # headrace: ignore[graph_kept]"))
    assert [each["code"] for each in document(run(".", "--format", "json", folder=project))["findings"]] == [
        "file_in_async"
    ]


def test_a_file_that_cannot_be_read_is_said_and_the_rest_is_checked(project: Path) -> None:
    (project / "app" / "broken.py").write_text("async def f(:\n")
    done = run("app", folder=project)
    assert done.returncode == 1
    assert "app/broken.py: not read: SyntaxError" in done.stderr
    found = json.loads(run("app", "--format", "json", folder=project).stdout)
    assert [each["file"] for each in found["skipped"]] == ["app/broken.py"]
    assert (found["files"], len(found["findings"])) == (2, 3)


def test_source_cannot_steer_the_terminal(project: Path) -> None:
    (project / "app" / "planted.py").write_text('async def f():\n    open("\x1b[31mred\x07")\n')
    done = run("app", folder=project)
    assert "file_in_async" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout


def test_a_path_that_is_not_there_is_a_mistake_of_the_callers(project: Path) -> None:
    done = run("nowhere", folder=project)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert run(folder=project).returncode == 2


@pytest.mark.parametrize(("package", "folder"), [("torch", "optim"), ("transformers", "models/bert")])
def test_installed_code_is_read_without_a_crash_and_without_a_false_alarm(
    package: str, folder: str, tmp_path: Path
) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    found = document(run(str(Path(spec.origin).parent / folder), "--format", "json", folder=tmp_path))
    assert found["files"] >= 5
    assert not found["skipped"]
    assert not [each for each in found["findings"] if each["severity"] != "info"]


def test_our_own_source_has_none_of_these(tmp_path: Path) -> None:
    import headrace

    found = document(run(str(Path(headrace.__file__).parent), "--format", "json", folder=tmp_path))
    assert found["files"] > 100
    assert not [each for each in found["findings"] if each["severity"] != "info"]
