"""A model as it is before anything is done to it: float32, plain attention, and how samples become its inputs.

What the ladder compares everything with, and what the rungs that need torch start from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from headrace.artifact import Subject, TensorSpec
from headrace.errors import LoadError
from headrace.runners import archives, huggingface, tensor_subject, text
from headrace.runners.collate import Item, as_item
from headrace.runners.opened import Instance, Opened
from headrace.runners.way import GENERATE

# Text is cut to this for export and measurement as the server would.
_MASK = "attention_mask"
_LONGEST_PROMPT = 64
_TARGETS = "give module:factory, a Hugging Face directory or id, a TorchScript .pt, or an exported .pt2"


def open_subject(target: str, task: str, samples: list[Any], instance: Instance | None = None) -> Opened:
    """Load a target: a Hugging Face directory or id, ``module:factory`` that gives an `nn.Module`, a TorchScript
    archive or an exported program.

    Args:
        task: embed, classify, logits, or auto.
        samples: by which the inputs of what takes tensors are known; not looked at for texts.
        instance: the target itself, where it was handed over as an object; then ``target`` only names it.

    Raises:
        LoadError: it cannot be loaded, or is of a kind that cannot be optimised.
        InvalidInput: a sample is not what the model takes; names its number.
    """
    if instance is not None:
        return tensor_subject.open_instance(instance, target, task, samples)
    if archives.is_archive(target):
        return tensor_subject.open_archive(target, task, samples)
    if Path(target).expanduser().is_file():
        raise LoadError(f"{target} is a file that cannot be optimised", field="target", hint=_TARGETS)
    if ":" in target and not Path(target).exists():
        return tensor_subject.open_module(target, task, samples)
    files = huggingface.Files.read(huggingface.locate(target))
    task = files.optimised_as(task)
    return _open_language(target, files) if task == GENERATE else _open_text(target, task, files)


class TextEncoder(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """An encoder with what comes after it, of token ids and a mask to one row per text."""

    def __init__(self, model: torch.nn.Module, finish: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.finish = finish

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.finish(self.model(input_ids=input_ids, attention_mask=attention_mask), attention_mask)


def _open_text(target: str, task: str, files: huggingface.Files) -> Opened:
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

    return Opened(subject, TextEncoder(model, finish).eval(), prepare, files.directory)


def _open_language(target: str, files: huggingface.Files) -> Opened:
    from headrace.runners.decoder import Decoder

    model = huggingface.load_model(files, GENERATE, target, attn_implementation="eager")
    # What comes before the last tokens of a long text is cut off where the ladder measures, not where it is served.
    spec = msgspec.structs.replace(huggingface.text_spec(files, model, GENERATE, files.max_tokens), token_types=0)
    preparer = text.TextPreparer(msgspec.structs.replace(spec, max_tokens=min(spec.max_tokens, _LONGEST_PROMPT)))
    ends = getattr(model.generation_config, "eos_token_id", None)
    subject = Subject(
        target=target,
        task=GENERATE,
        inputs=[TensorSpec("input_ids", "int64", [0], below=spec.vocabulary)],
        text=spec,
        ends=ends if isinstance(ends, list) else [] if ends is None else [ends],
    )

    def prepare(sample: Any) -> Item:
        found = preparer.tensors(sample) if isinstance(sample, dict) else preparer.text(str(sample))
        return as_item(subject, found)

    return Opened(subject, Decoder(model).eval(), prepare, files.directory)
