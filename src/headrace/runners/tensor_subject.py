"""Targets that take tensors: a module of the user's own, a TorchScript archive, an exported program.

What their inputs are called and look like is known from the samples, and from what the target says of itself.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from headrace.artifact import Subject, TensorSpec
from headrace.errors import ConfigError, InvalidInput, LoadError
from headrace.runners import archives, collate, module, recipes, text, user
from headrace.runners.collate import Item
from headrace.runners.opened import Instance, Opened

_MASK = "attention_mask"
_FIXED = "the graph of an exported program is fixed"
_BATCHABLE = "torch.export.export(…, dynamic_shapes={'x': {0: torch.export.Dim('items')}})"


def open_module(target: str, task: str, samples: Sequence[Any]) -> Opened:
    """A ``module:factory`` that gives a `torch.nn.Module`, or names one.

    Raises:
        LoadError, InvalidInput: as `subject.open_subject` does.
    """
    made = user.import_target(target)
    if not isinstance(made, torch.nn.Module) and callable(made):
        made = made()
    if not isinstance(made, torch.nn.Module):
        raise LoadError(
            f"{target} gives {type(made).__name__}, which cannot be optimised",
            field="target",
            hint="name a function or class that gives a torch.nn.Module",
        )
    return of_module(made, target, task, samples)


def open_instance(instance: Instance, target: str, task: str, samples: Sequence[Any]) -> Opened:
    """A module that the ladder has been handed as an object.

    Raises:
        ConfigError: its factory makes something else.
        LoadError, InvalidInput: as `subject.open_subject` does.
    """
    # As it will be imported where the artifact is served; what follows finds more.
    other = _factory(instance.factory) if instance.factory else None
    sys.path += [each for each in instance.path if each not in sys.path]
    try:
        made = torch.load(instance.file, map_location="cpu", weights_only=False)  # written by our own parent process
    except Exception as error:  # unpickling raises whatever the code of the object's parts does
        raise LoadError(
            f"{target} cannot be handed to other processes: {type(error).__name__}: {error}",
            field="model",
            hint="its classes must be importable; or give module:factory",
        ) from None
    if other is not None:
        mine, theirs = ({name: value.shape for name, value in each.state_dict().items()} for each in (made, other))
        if different := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
            raise ConfigError(
                f"{instance.factory} makes a module with other weights: {', '.join(different[:3])}", field="factory"
            )
    return of_module(made, instance.factory or target, task, samples)


def _factory(name: str) -> torch.nn.Module:
    try:
        made = user.import_target(name)
    except LoadError as error:
        raise ConfigError(error.message, field="factory", hint=error.hint) from None
    if not isinstance(made, torch.nn.Module) and callable(made):
        made = made()
    if not isinstance(made, torch.nn.Module):
        raise ConfigError(f"{name} gives {type(made).__name__}, and no torch.nn.Module", field="factory")
    return made


def of_module(made: torch.nn.Module, target: str, task: str, samples: Sequence[Any]) -> Opened:
    """A module that is there already; it is put into float32 and into evaluation."""
    made = made.float().eval()
    names = _names(made)
    inputs = _as_numbers(_inputs(_items(samples, names[0]), names), made)
    return _opened(made, names, target, task, samples, inputs)


def open_archive(target: str, task: str, samples: Sequence[Any]) -> Opened:
    """A file of torch's own.

    Raises:
        LoadError, InvalidInput: as `subject.open_subject` does.
    """
    path = Path(target).expanduser().resolve()
    return (_scripted if path.suffix in archives.SCRIPTED else _exported)(path, target, task, samples)


def _scripted(path: Path, target: str, task: str, samples: Sequence[Any]) -> Opened:
    script = archives.read_scripted(path).float().eval()
    names = _names(script)
    items = _items(samples, names[0])
    opened = _opened(script, names, target, task, samples, _as_numbers(_inputs(items, names), script))

    def make_exportable() -> None:
        longest = sorted(items, key=lambda item: collate.length(item, opened.subject))[-2:]
        arrays = collate.collate(longest, opened.subject)
        example = tuple(torch.from_numpy(arrays[name]) for name in names if name in arrays)
        opened.module.model = _Program(archives.as_exported(script, example), guarded=False)

    refuses = dict.fromkeys(recipes.QUANTIZES, "the layers of a TorchScript archive cannot be exchanged")
    refuses |= dict.fromkeys(recipes.COMPILES, "torch.compile does not look into a TorchScript archive")
    return dataclasses.replace(opened, archive=path, refuses=refuses, make_exportable=make_exportable)


def _exported(path: Path, target: str, task: str, samples: Sequence[Any]) -> Opened:
    program = archives.read_exported(path)
    by_position, by_name = _taken(program)
    kinds = {value.dtype for value in program.state_dict.values() if value.is_floating_point()}
    if kinds - {torch.float32}:
        raise LoadError(
            f"{path} has weights in {', '.join(sorted(map(str, kinds)))}: what a ladder begins with is in float32",
            field="target",
            hint="export the module in float32; rungs try other precisions where it is given as module:factory",
        )
    names = [*by_position, *by_name]
    inputs = _inputs(_items(samples, names[0]), names)
    inputs = [_as_exported(spec, by_position | by_name) for spec in inputs]
    if missing := (by_position | by_name).keys() - {spec.name for spec in inputs} - {_MASK}:
        raise InvalidInput("is missing in the samples", field=f"samples.input.{min(missing)}")
    model = _Program(program, guarded=True)
    opened = _opened(model, list(by_position), target, task, samples, inputs)
    refuses = dict.fromkeys(("bf16", "fp16"), f"{_FIXED}: it was made in float32")
    refuses |= dict.fromkeys(recipes.QUANTIZES, f"{_FIXED}: there are no layers that could be exchanged")
    return dataclasses.replace(opened, archive=path, refuses=refuses, make_exportable=model.unguard)


def _taken(program: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What an exported program takes by position and by name: an example of each, whose sizes may be symbols.

    Raises:
        LoadError: it takes something else than tensors.
    """
    given, named = program.call_spec.in_spec.children()
    if any(not each.is_leaf() for each in (*given.children(), *named.children())):
        raise LoadError("the exported program takes more than plain tensors", field="target")
    examples = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    names = list(program.graph_signature.user_inputs)
    if any(not isinstance(examples.get(name), torch.Tensor) for name in names) or not names:
        raise LoadError("the exported program takes other things than tensors", field="target")
    tensors = [examples[name] for name in names]
    count = given.num_children
    return dict(zip(names, tensors[:count], strict=False)), dict(zip(named.context, tensors[count:], strict=True))


def _as_exported(spec: TensorSpec, examples: dict[str, torch.Tensor]) -> TensorSpec:
    """An input as the program takes it. Raises `LoadError` for programs that run no batches, `InvalidInput` for
    samples that do not fit."""
    example = examples.get(spec.name)
    if example is None:
        raise InvalidInput(f"the exported program takes {', '.join(examples)}", field=f"samples.input.{spec.name}")
    items, *wanted = (size if isinstance(size, int) else 0 for size in example.shape)
    if items:
        raise LoadError(
            f"the program was exported for exactly {items} items a call in {spec.name}", field="target", hint=_BATCHABLE
        )
    if len(wanted) != len(spec.shape) or any(a and a != b for a, b in zip(wanted, spec.shape, strict=True)):
        raise InvalidInput(
            f"has items of shape [{', '.join(str(each or 'any') for each in spec.shape)}], "
            f"the program takes [{', '.join(str(each or 'any') for each in wanted)}]",
            field=f"samples.input.{spec.name}",
        )
    if spec.dtype.startswith("float") and not example.is_floating_point():
        raise InvalidInput("must be whole numbers", field=f"samples.input.{spec.name}")
    return msgspec.structs.replace(spec, dtype=str(example.dtype).removeprefix("torch."))


class _Program(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """An exported program as a module among others. Its graph cannot be put into training or evaluation.

    Args:
        guarded: it refuses sizes that it was not exported for; such checks cannot be exported again.
    """

    def __init__(self, program: Any, guarded: bool) -> None:
        super().__init__()
        self._program = program
        self.graph = program.module(check_guards=guarded)

    def forward(self, *tensors: torch.Tensor, **named: torch.Tensor) -> Any:
        return self.graph(*tensors, **named)

    def train(self, mode: bool = True) -> _Program:
        return self

    def unguard(self) -> None:
        self.graph = self._program.module(check_guards=False)


def _opened(
    model: torch.nn.Module,
    by_position: Sequence[str],
    target: str,
    task: str,
    samples: Sequence[Any],
    inputs: list[TensorSpec],
) -> Opened:
    vocabulary = module.vocabulary_of(model) or 0
    inputs = [msgspec.structs.replace(each, below=vocabulary) if each.name == "input_ids" else each for each in inputs]
    subject = Subject(
        target=target,
        task="logits" if task == "auto" else task,
        inputs=inputs,
        activation="softmax" if task == "classify" else "none",
        named=all(isinstance(sample, dict) for sample in samples),
    )
    first = inputs[0].name
    return Opened(subject, OneTensor(model, by_position).eval(), lambda sample: _arrays(sample, None, first))


class OneTensor(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """A module whose answer is the tensor that matters: ``logits``, ``last_hidden_state``, or all there is.

    Args:
        by_position: inputs that are given by position: what a layer is exchanged for may call them something else.
    """

    def __init__(self, model: torch.nn.Module, by_position: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self._by_position = list(by_position)

    def forward(self, **tensors: torch.Tensor) -> torch.Tensor:
        kind = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        # Whatever precision the module has been put into, items come as they are.
        named = {name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()}
        given = []
        for name in self._by_position:
            if name not in named:
                break
            given.append(named.pop(name))
        output = self.model(*given, **named)
        for name in ("logits", "last_hidden_state"):
            found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
            if isinstance(found, torch.Tensor):
                return found
        if isinstance(output, (tuple, list)) and len(output) == 1:
            output = output[0]
        if not isinstance(output, torch.Tensor):
            raise LoadError(
                f"the module gives {type(output).__name__}: only one tensor can be compared", field="target"
            )
        return output


def _names(made: torch.nn.Module) -> list[str]:
    """What a module takes by position, in order."""
    if isinstance(made, torch.jit.ScriptModule):
        return [each.name for each in made.forward.schema.arguments][1:]
    parameters = inspect.signature(made.forward).parameters.values()
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    return names or ["input"]


def _items(samples: Sequence[Any], first: str) -> list[Item]:
    return [_arrays(sample, number, first) for number, sample in enumerate(samples)]


def _inputs(items: list[Item], names: Sequence[str]) -> list[TensorSpec]:
    """What the samples bring, in the module's order, and a mask where it takes one and lengths differ."""
    found = {name: [item[name] for item in items if name in item] for item in items for name in item}
    inputs = [_spec(name, arrays) for name, arrays in found.items()]
    for spec in inputs:
        if spec.name != _MASK and len(found[spec.name]) < len(items):
            number = next(number for number, item in enumerate(items) if spec.name not in item)
            raise InvalidInput("is missing where others have it", field=f"samples[{number}].input.{spec.name}")
    if _MASK in names and _MASK not in found and any(each.ragged for each in inputs):
        inputs.append(TensorSpec(_MASK, "int64", [0]))
    inputs = [msgspec.structs.replace(each, mask=each.name == _MASK) for each in inputs]
    return sorted(inputs, key=lambda each: names.index(each.name) if each.name in names else len(names))


def _as_numbers(inputs: list[TensorSpec], made: torch.nn.Module) -> list[TensorSpec]:
    """Whole numbers are numbers like others for a module that looks nothing up, as where it is served itself."""
    if module.number_type(made) is None:
        return inputs
    return [each if _is_tokens(each.name) else msgspec.structs.replace(each, dtype="float32") for each in inputs]


def _arrays(sample: Any, number: int | None, first: str) -> Item:
    field = "input" if number is None else f"samples[{number}].input"
    try:
        tensors = module.prepare(sample)
    except InvalidInput as error:
        raise InvalidInput(error.message, field=f"{field}{(error.field or 'input').removeprefix('input')}") from None
    named = tensors if isinstance(tensors, dict) else {first: tensors}
    return {name: tensor.numpy() for name, tensor in named.items()}


def _spec(name: str, arrays: list[Any]) -> TensorSpec:
    shapes = {array.shape for array in arrays}
    if len({shape[1:] for shape in shapes}) > 1 or len({len(shape) for shape in shapes}) > 1:
        raise InvalidInput(
            f"has shapes {sorted(shapes)}: items may differ in their first dimension only",
            field=f"samples.input.{name}",
        )
    first = next(iter(shapes))
    shape = list(first) if len(shapes) == 1 and not _is_tokens(name) else [0, *first[1:]]
    # JSON does not tell 1 from 1.0: one number that is not whole makes numbers of all.
    whole = all(array.dtype.kind != "f" for array in arrays)
    return TensorSpec(name, "int64" if whole else "float32", shape)


def _is_tokens(name: str) -> bool:
    return name in text.TENSORS
