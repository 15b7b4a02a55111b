"""The rules of the house, read from the source: layers, light front ends, and documents that are true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import headrace
from conftest import ROOT

SOURCE = ROOT / "src" / "headrace"

# From the ground up; a module may import from its own layer (but see PARTS) and from those below.
PARTS = {"serving", "loadgen", "dynamic", "client", "tasks_client", "tasks", "agents", "tracking", "monitoring"}
PARTS |= {"optimizing", "profiling"}
COMMANDS = {"cli", "task_cli", "ops_cli", "optimize_cli", "profile_cli", "lint_cli", "compare_cli", "top_cli"}
LAYERS = [
    {"errors", "clock", "log", "cgroups", "config", "version"},
    {"core", "metrics", "stats", "artifact"},
    {"ipc", "batcher", "isolation", "runners", "calibration", "rundir", "errand", "child", "supervisor", "machine"}
    | {"web", "http_client", "admin_client"},
    PARTS,
    {"", "up", "front", "demo", "define", "asgi", "library", "live_profile", "testing", "doctor", "__main__"}
    | COMMANDS,
]
TORCH_ALLOWED = {"runners", "optimizing", "profiling"}
# One home per heavy dependency.
HOMES = {
    "torch": {"runners", "optimizing", "profiling"},
    "transformers": {"runners"},
    "huggingface_hub": {"runners"},
    "tokenizers": {"runners"},
    "safetensors": {"runners", "optimizing"},
    "onnxruntime": {"runners", "optimizing"},
    "openvino": {"runners", "optimizing"},
    "onnx": {"optimizing"},
    "nncf": {"optimizing"},
    "torchao": {"runners", "optimizing"},
    "bitsandbytes": {"runners"},
    "fastapi": {"web", "serving", "tasks"},
    "starlette": {"web", "serving", "tasks"},
    "uvicorn": {"serving"},
    "pydantic": {"runners", "tasks", "agents", "demo"},
    "jsonschema_rs": {"serving", "tasks"},
    "redis": {"tasks"},
    "docket": {"tasks"},
    "ag_ui": {"tasks"},
    "psutil": {"machine", "tracking", "optimizing", "profiling"},
    "pynvml": {"machine"},
    "line_profiler": {"profiling"},
    "memray": {"profiling"},
    "pydantic_ai": {"agents"},
    "click": COMMANDS,
    "httptools": {"loadgen"},
    "httpx": {"http_client", "tasks_client"},
    "python_multipart": {"serving"},
}


def modules() -> dict[str, Path]:
    """Dotted name inside the package → file."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> list[str]:
    """Everything a file imports, also inside functions; not what only a type checker sees."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
            if node.module == "headrace":
                found += [f"headrace.{alias.name}" for alias in node.names]
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


def layer(name: str) -> int:
    (found,) = [index for index, names in enumerate(LAYERS) if top(name) in names]
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downwards(name: str) -> None:
    for imported in imports(modules()[name]):
        if imported.startswith("headrace."):
            other = imported.removeprefix("headrace.")
            assert layer(other) <= layer(name), f"{name} imports {other} from above"
            if top(other) in PARTS and top(name) in PARTS:
                assert top(other) == top(name), f"part {name} imports part {other}"


@pytest.mark.parametrize("name", sorted(modules()))
def test_heavy_dependencies_stay_at_home(name: str) -> None:
    for imported in imports(modules()[name]):
        homes = HOMES.get(top(imported))
        assert homes is None or top(name) in homes, f"{name} imports {imported}"


def test_only_the_clock_asks_for_the_time() -> None:
    for name, path in modules().items():
        if name != "clock":
            assert "time" not in [top(each) for each in imports(path)], f"{name} imports time"


def test_there_are_no_cycles() -> None:
    known = modules()
    edges = {
        name: {each.removeprefix("headrace.") for each in imports(path) if each.removeprefix("headrace.") in known}
        - {name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"cycle: {' → '.join((*way, name))}"
        if name not in done:
            for other in edges[name]:
                # A package may be made of its modules, and its modules of one another.
                if not name.startswith(f"{other}."):
                    visit(other, (*way, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_the_command_imports_nothing_heavy() -> None:
    code = "import sys, headrace, headrace.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "pydantic", "fastapi", "uvicorn", "transformers", "asyncio", "orjson", "rich"}
    assert not heavy & set(loaded)


def test_a_front_end_imports_no_torch() -> None:
    code = "import sys, headrace.serving.http; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "prometheus_client"} & set(loaded)


def test_every_public_name_exists_and_says_what_it_is() -> None:
    assert len(headrace.__all__) <= 40
    for name in headrace.__all__:
        assert getattr(headrace, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = headrace.nothing


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_module_says_what_it_is(name: str) -> None:
    tree = ast.parse(modules()[name].read_text())
    assert ast.get_docstring(tree)


def documents() -> list[Path]:
    return [
        ROOT / "README.md",
        ROOT / "README.zh-CN.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_commands_in_the_documents_exist(path: Path) -> None:
    from headrace.cli import main

    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"^\$? ?make ([a-z]+)", path.read_text(), re.MULTILINE):
        assert target in targets, f"make {target}"
    for line in re.findall(r"^\$? ?headrace ([^\n#]+)", path.read_text(), re.MULTILINE):
        verb, *words = line.split()
        if verb.startswith("-"):
            continue
        command = main.commands[verb]
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in flags, f"headrace {verb} has no {word}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_python_in_the_documents_runs(path: Path, tmp_path: Path) -> None:
    """Blocks marked ``python`` run as they stand; a block for illustration only is marked ``text``."""
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        script = tmp_path / "block.py"
        script.write_text(block)
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_tables_made_from_the_source_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_promise_about_failures_has_a_test() -> None:
    text = (ROOT / "docs" / "failure-semantics.md").read_text()
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| event")]
    assert len(rows) > 25
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names, f"no test for {row}"
        for name in names:
            assert f"def {name}(" in written, f"there is no {name}"
