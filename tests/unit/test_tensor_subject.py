"""Targets that take tensors: modules, TorchScript archives, exported programs; and what of them is never loaded."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import MODELS
from headrace.errors import HeadraceError, InvalidInput, LoadError, Unavailable
from headrace.optimizing import export, rungs
from headrace.runners import collate
from headrace.runners.opened import Opened
from headrace.runners.subject import open_subject
from headrace.runners.way import of_files, of_module

ROWS = [[float((row * column) % 7) for column in range(4)] for row in range(8)]
WORDS = [{"input_ids": [(number * step) % 50 for step in range(1 + number % 6)]} for number in range(8)]


class Scorer(torch.nn.Module):
    """Takes token ids and their mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(50, 8)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        weights = attention_mask.unsqueeze(-1).float()
        return self.head((self.table(input_ids) * weights).sum(1) / weights.sum(1))


def scripted(path: Path) -> Path:
    example = (torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(Scorer().eval(), example), path)
    return path


def exported(path: Path, most_items: int | None = 64, by_name: bool = False, module: Any = None) -> Path:
    example = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    items, length = torch.export.Dim("items", min=1, max=most_items), torch.export.Dim("length", min=1, max=128)
    shapes = {name: {0: items, 1: length} for name in example} if most_items else None
    given, named = ((), example) if by_name else (tuple(example.values()), {})
    program = torch.export.export(module or Scorer().eval(), given, named, dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def answers(opened: Opened, samples: list[Any], recipe: tuple[str, ...] = ()) -> list[Any]:
    items = [opened.prepare(sample) for sample in samples]
    return of_module(opened.module, recipe, "cpu", opened.subject).answer(items)


def wanted() -> list[Any]:
    module = Scorer().eval()
    with torch.no_grad():
        return [
            module(torch.tensor([sample["input_ids"]]), torch.ones(1, len(sample["input_ids"])))[0].numpy()
            for sample in WORDS
        ]


@pytest.mark.parametrize("kind", ["scripted", "by position", "by name"])
def test_files_of_torch_answer_as_the_module_that_they_were_made_of(tmp_path: Path, kind: str) -> None:
    path = (
        scripted(tmp_path / "m.pt") if kind == "scripted" else exported(tmp_path / "m.pt2", by_name=kind == "by name")
    )
    opened = open_subject(str(path), "auto", WORDS)
    assert [(spec.name, spec.dtype, spec.shape, spec.mask) for spec in opened.subject.inputs] == [
        ("input_ids", "int64", [0], False),
        ("attention_mask", "int64", [0], True),
    ]
    assert opened.archive == path
    for found, expected in zip(answers(opened, WORDS), wanted(), strict=True):
        assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["scripted", "exported"])
def test_files_of_torch_become_onnx_of_any_size(tmp_path: Path, kind: str) -> None:
    path = scripted(tmp_path / "m.pt") if kind == "scripted" else exported(tmp_path / "m.pt2")
    opened = open_subject(str(path), "auto", WORDS)
    rung = rungs.find("ort")
    opened.make_ready(rung.engine, rung.recipe)
    items = [opened.prepare(sample) for sample in WORDS]
    export.export(rung, opened.subject, opened.module, items[4:6], [], tmp_path)
    way = of_files("onnx", tmp_path, [], "cpu", 1, opened.subject)
    for batch in ([0], [0, 1, 2, 3, 4, 5, 6, 7]):
        for number, found in zip(batch, way.answer([items[number] for number in batch]), strict=True):
            assert np.allclose(found, wanted()[number], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "rung", "told"),
    [
        ("scripted", "torch-int8-dynamic", "layers of a TorchScript archive cannot be exchanged"),
        ("scripted", "compile", "torch.compile does not look into a TorchScript archive"),
        ("scripted", "nf4", "cannot be exchanged"),
        ("scripted", "sdpa", "no attention that can be exchanged"),
        ("exported", "bf16", "made in float32"),
        ("exported", "nf4", "no layers that could be exchanged"),
        ("exported", "sdpa", "no attention that can be exchanged"),
    ],
)
def test_rungs_that_cannot_be_applied_say_why(tmp_path: Path, kind: str, rung: str, told: str) -> None:
    path = scripted(tmp_path / "m.pt") if kind == "scripted" else exported(tmp_path / "m.pt2")
    opened = open_subject(str(path), "auto", WORDS)
    found = rungs.find(rung)
    with pytest.raises(Unavailable, match=told):
        opened.make_ready(found.engine, found.recipe)
    opened.make_ready("torch", ["tf32"])


def test_a_script_that_cannot_be_exported_says_so(tmp_path: Path) -> None:
    class Loop(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while bool(x.sum() < 100):
                x = x + 1
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Loop()), tmp_path / "m.pt")
    opened = open_subject(str(tmp_path / "m.pt"), "auto", ROWS)
    with pytest.raises(Unavailable, match="this TorchScript archive cannot be exported") as refused:
        opened.make_ready("onnx", [])
    assert "module:factory" in (refused.value.hint or "")


def test_a_pickled_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    for name in ("weights.pt", "weights.pt2"):
        torch.save(Scorer().state_dict(), tmp_path / name)
    for name, told in [("weights.pt", "is not a TorchScript archive"), ("weights.pt2", "is not an exported program")]:
        with pytest.raises(LoadError, match=told):
            open_subject(str(tmp_path / name), "auto", WORDS)


class Bomb:
    """Unpickling this is seen."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def with_parts(source: Path, target: Path, changes: dict[str, bytes]) -> Path:
    """The archive with other parts, which are named by the ends of their names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            ends = [end for end in changes if name.endswith(end)]
            new.writestr(name, changes[ends[0]] if ends else old.read(name))
    return target


@pytest.mark.parametrize("part", ["example inputs", "weights", "constants"])
def test_an_exported_program_with_a_pickled_part_is_never_loaded(tmp_path: Path, part: str) -> None:
    mark = tmp_path / "it ran"
    bomb = pickle.dumps(Bomb(mark))
    good = exported(tmp_path / "good.pt2")
    entry = '{"config": {"x": {"path_name": "%s", "use_pickle": true, "is_param": false, "tensor_meta": null}}}'
    changes = {
        "example inputs": {"sample_inputs/model.pt": bomb},
        "weights": {"weights_config.json": (entry % "weight_0").encode(), "weights/weight_0": bomb},
        "constants": {"constants_config.json": (entry % "opaque_obj_0").encode()},
    }[part]
    bad = with_parts(good, tmp_path / "bad.pt2", changes)
    with pytest.raises(LoadError, match="is pickled, and what is pickled is never loaded"):
        open_subject(str(bad), "auto", WORDS)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("samples", "options", "told"),
    [
        (WORDS, {"most_items": None}, "exported for exactly 2 items a call in input_ids"),
        (ROWS, {}, "samples.input.input_ids: must be whole numbers"),
        ([{"x": [1, 2]}] * 8, {}, "samples.input.x"),
        ([{"input_ids": [[1, 2], [3, 4]]}] * 8, {}, "samples.input.input_ids"),
    ],
)
def test_samples_and_programs_that_do_not_fit_are_named(
    tmp_path: Path, samples: list[Any], options: dict[str, Any], told: str
) -> None:
    path = exported(tmp_path / "m.pt2", **options)
    with pytest.raises(HeadraceError) as refused:
        answers(open_subject(str(path), "auto", samples), samples)
    assert told in f"{refused.value.field}: {refused.value.message}"


def test_a_program_in_half_precision_is_no_beginning(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 2).to(torch.bfloat16)
    program = torch.export.export(module, (torch.zeros(2, 4, dtype=torch.bfloat16),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(LoadError, match=r"has weights in torch\.bfloat16"):
        open_subject(str(tmp_path / "m.pt2"), "auto", ROWS)


@pytest.mark.parametrize(
    ("name", "told"), [("nowhere.pt", "there is no file"), ("nowhere.pt2", "there is no file"), ("model.bin", "a file")]
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(LoadError, match=told):
        open_subject(str(tmp_path / name), "auto", ROWS)


@pytest.mark.parametrize("recipe", [(), ("torch-int8-dynamic",), ("bf16",)])
def test_a_layer_alone_is_a_module(monkeypatch: pytest.MonkeyPatch, recipe: tuple[str, ...]) -> None:
    """What it is exchanged for calls its input otherwise."""
    monkeypatch.chdir(MODELS)
    rows = [[float((row * column) % 7) for column in range(32)] for row in range(8)]
    opened = open_subject("ladder_models:layer", "auto", rows)
    layer = open_subject("ladder_models:layer", "auto", rows).module.model
    expected = layer(torch.tensor(rows)).detach().numpy()
    assert np.allclose(answers(opened, rows, recipe), expected, atol=0.05 * np.abs(expected).max())


def test_whole_numbers_are_numbers_for_a_module_that_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON does not tell 1 from 1.0, and the first sample says nothing of the others."""
    monkeypatch.chdir(MODELS)
    rows = [[1] * 32, *([number + 0.5] * 32 for number in range(7))]
    opened = open_subject("ladder_models:layer", "auto", rows)
    assert opened.subject.inputs[0].dtype == "float32"
    items = [opened.prepare(row) for row in rows]
    batch = collate.collate(items, opened.subject)
    assert batch["input"][:, 0].tolist() == [1, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5]


def test_a_sample_that_lacks_what_others_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MODELS)
    samples: list[Any] = [{"input_ids": [1, 2]}] * 7 + [{"attention_mask": [1, 1]}]
    with pytest.raises(InvalidInput, match="missing where others have it") as refused:
        open_subject("ladder_models:Words", "auto", samples)
    assert refused.value.field == "samples[7].input.input_ids"
