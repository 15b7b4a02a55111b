"""A model as it is before anything is done to it: float32, plain attention, and how samples become its inputs.

What the ladder compares everything with, and what the rungs that need torch start from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from headrace.artifact import Subject, TensorSpec
from headrace.errors import InvalidInput, LoadError
from headrace.runners import huggingface, module, text, user
from headrace.runners.collate import Item, as_item

# Text is cut to this for export and measurement as the server would.
_MASK = "attention_mask"


@dataclass(frozen=True)
class Opened:
    """A model to begin with.

    Args:
        module: called with the inputs by name, gives one tensor of shape (items, …).
        prepare: one sample, as clients would send it, to arrays; raises `InvalidInput`.
        directory: a Hugging Face directory, ``None`` for other targets.
    """

    subject: Subject
    module: torch.nn.Module
    prepare: Callable[[Any], Item]
    directory: Path | None = None


def open_subject(target: str, task: str, samples: list[Any]) -> Opened:
    """Load a target: a Hugging Face directory or id, or ``module:factory`` that gives an `nn.Module`.

    Args:
        task: embed, classify, logits, or auto.
        samples: by which the inputs of a module are known; not looked at for texts.

    Raises:
        LoadError: it cannot be loaded, or is of a kind that cannot be optimised.
        InvalidInput: a sample is not what the model takes; names its number.
    """
    if ":" in target and not Path(target).exists():
        return _open_module(target, task, samples)
    return _open_text(target, task)


class _Text(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """An encoder with what comes after it, of token ids and a mask to one row per text."""

    def __init__(self, model: torch.nn.Module, finish: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._finish = finish

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self._finish(self.model(input_ids=input_ids, attention_mask=attention_mask), attention_mask)


def _open_text(target: str, task: str) -> Opened:
    files = huggingface.Files.read(huggingface.locate(target))
    task = files.task(task)
    model = huggingface.load_model(files, task, target, attn_implementation="eager")
    spec = huggingface.text_spec(files, model, task, files.max_tokens)
    finish = huggingface.pooling(files) if task == "embed" else lambda output, mask: output.logits.float()
    preparer = text.TextPreparer(spec)
    labels = [str(name) for _, name in sorted(model.config.id2label.items())] if task != "embed" else []
    padding = huggingface.padding(task, model.config, spec.vocabulary)
    subject = Subject(
        target=target,
        task=task,
        inputs=[TensorSpec("input_ids", "int64", [0], padding), TensorSpec(_MASK, "int64", [0], mask=True)],
        labels=labels,
        activation=huggingface.activation(model.config, len(labels)) if labels else "none",
        # The artifact's own model takes no token types.
        text=msgspec.structs.replace(spec, token_types=0),
        width=model.config.hidden_size if task == "embed" else 0,
    )

    def prepare(sample: Any) -> Item:
        found = preparer.tensors(sample) if isinstance(sample, dict) else preparer.text(str(sample))
        return as_item(subject, found)

    return Opened(subject, _Text(model, finish).eval(), prepare, files.directory)


def _open_module(target: str, task: str, samples: list[Any]) -> Opened:
    made = user.import_target(target)
    if not isinstance(made, torch.nn.Module):
        made = made()
    if not isinstance(made, torch.nn.Module):
        raise LoadError(
            f"{target} gives {type(made).__name__}, which cannot be optimised",
            field="target",
            hint="name a function or class that gives a torch.nn.Module",
        )
    made = made.float().eval()
    names = list(inspect.signature(made.forward).parameters)
    named = all(isinstance(sample, dict) for sample in samples)
    items = [_arrays(sample, number, names[0]) for number, sample in enumerate(samples)]
    inputs = [_spec(name, [item[name] for item in items if name in item]) for name in items[0]]
    if named and _MASK in names and _MASK not in items[0] and any(each.ragged for each in inputs):
        inputs.append(TensorSpec(_MASK, "int64", [0], mask=True))
    inputs = [msgspec.structs.replace(each, mask=each.name == _MASK) for each in inputs]
    inputs.sort(key=lambda each: names.index(each.name) if each.name in names else len(names))
    vocabulary = module.vocabulary_of(made) or 0
    inputs = [msgspec.structs.replace(each, below=vocabulary) if each.name == "input_ids" else each for each in inputs]
    subject = Subject(
        target=target,
        task="logits" if task == "auto" else task,
        inputs=inputs,
        activation="softmax" if task == "classify" else "none",
        named=named,
    )
    return Opened(subject, _OneTensor(made).eval(), lambda sample: _arrays(sample, None, names[0]))


class _OneTensor(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """A module whose answer is the tensor that matters: ``logits``, ``last_hidden_state``, or all there is."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **tensors: torch.Tensor) -> torch.Tensor:
        kind = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        # Whatever precision the module has been put into, items come as they are.
        output = self.model(**{name: t.to(kind) if t.is_floating_point() else t for name, t in tensors.items()})
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
    return TensorSpec(name, str(np.asarray(arrays[0]).dtype), shape)


def _is_tokens(name: str) -> bool:
    return name in text.TENSORS
