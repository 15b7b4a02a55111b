"""`optimize` from a program: what it takes, and what it refuses before anything is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import MODELS
from headrace.errors import ConfigError, HeadraceError
from headrace.optimizing import library
from headrace.optimizing.library import optimize
from headrace.optimizing.samples import read
from headrace.runners.opened import Instance
from headrace.runners.subject import open_subject

ROWS = [[float(row)] * 32 for row in range(8)]


def by_definition(wanted: Any, found: Any) -> dict[str, float]:
    return {}


class Unpicklable(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keep = lambda x: x


def refused(model: Any, samples: Any = ROWS, **options: Any) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        optimize(model, samples, **options)
    return caught.value


def test_classes_that_others_cannot_import_are_refused() -> None:
    class Inner(torch.nn.Module):
        pass

    error = refused(torch.nn.Sequential(torch.nn.Linear(2, 2), Inner()))
    assert (error.field, "stands in a function" in error.message) == ("model", True)
    code = (
        "import torch\nfrom headrace import ConfigError\nfrom headrace.optimizing.library import optimize\n"
        "class Net(torch.nn.Module):\n    pass\n"
        "try:\n    optimize(Net(), [[1.0]] * 8)\nexcept ConfigError as error:\n    print(error, '|', error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "Net stands in the script itself" in done.stdout
    assert "move it to a module beside the script" in done.stdout


def test_what_cannot_be_handed_over_is_refused() -> None:
    error = refused(Unpicklable())
    assert (error.field, "cannot be handed to other processes" in error.message) == ("model", True)
    assert "module:factory" in (error.hint or "")
    assert refused(7).message == "model cannot be of type int"


def test_a_script_is_given_as_a_file() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        script = torch.jit.script(torch.nn.Linear(2, 2))
    error = refused(script)
    assert "torch.jit.save" in (error.hint or "")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"resume": True}, "resume"),
        ({"factory": "m:f"}, "factory"),
        ({"drift": lambda wanted, found: {}}, "drift"),
        ({"drift": 7}, "drift"),
        ({"rungs": "nf5"}, "rungs"),
        ({"samples": [object()]}, "samples[0]"),
        ({"samples": "/nowhere"}, "samples"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], field: str) -> None:
    assert refused("ladder_models:Rows", **options).field == field


def test_functions_are_named_as_others_import_them() -> None:
    assert library._name(by_definition, "drift") == f"{__name__}:by_definition"
    assert library._name("m:f", "drift") == "m:f"


def test_inputs_in_memory_are_written_as_clients_would_send_them(tmp_path: Path) -> None:
    some = [
        "text",
        {"input_ids": torch.tensor([1, 2]), "attention_mask": np.array([1, 0])},
        torch.tensor([1.5, 2.0], dtype=torch.bfloat16),
        np.float32(0.1),
        [np.int64(1), 2],
        {"input": [1.0]},
    ]
    found = read(library._samples([*some, *some], tmp_path), 100)
    assert found[:6] == [
        "text",
        {"input_ids": [1, 2], "attention_mask": [1, 0]},
        [1.5, 2.0],
        float(np.float32(0.1)),
        [1, 2],
        {"input": [1.0]},
    ]


def test_a_module_arrives_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half its weights are not those that its factory makes, it is being trained, and it was compiled."""
    monkeypatch.syspath_prepend(str(MODELS))
    monkeypatch.chdir(MODELS)
    import ladder_models

    module = torch.compile(ladder_models.Rows(), backend="eager")
    with torch.no_grad():
        module.layers[2].weight.mul_(2)
    target, instance = library._hand_over(module, tmp_path, "ladder_models:Rows")
    assert target == "ladder_models.Rows"
    assert instance.factory == "ladder_models:Rows"
    assert str(MODELS) in instance.path
    opened = open_subject(target, "auto", ROWS, instance)
    assert opened.subject.target == "ladder_models:Rows", "an artifact makes it by its factory"
    assert not opened.module.training
    assert torch.equal(opened.module.model.layers[2].weight, module.layers[2].weight)


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        ("ladder_models:Words", "makes a module with other weights: layers.0.bias"),
        ("ladder_models:missing", "has no 'missing'"),
        ("drift_functions:NO_FUNCTION", "gives int, and no torch.nn.Module"),
    ],
)
def test_a_factory_that_makes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str, told: str
) -> None:
    monkeypatch.syspath_prepend(str(MODELS))
    monkeypatch.chdir(MODELS)
    import ladder_models

    target, instance = library._hand_over(ladder_models.Rows(), tmp_path, factory)
    with pytest.raises(ConfigError) as caught:
        open_subject(target, "auto", ROWS, instance)
    assert told in caught.value.message
    assert caught.value.field == "factory"


def test_what_cannot_be_unpickled_says_so(tmp_path: Path) -> None:
    (tmp_path / "instance.pt").write_bytes(b"nothing")
    with pytest.raises(HeadraceError, match="cannot be handed to other processes"):
        open_subject("m.C", "auto", ROWS, Instance(str(tmp_path / "instance.pt")))
