"""Any `nn.Module` as a runner: stack or pad the items, run without gradients, take the answers apart again."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import msgspec
import numpy as np
import torch

from headrace.config import ModelConfig
from headrace.core import ModelInfo
from headrace.errors import InvalidInput, LoadError
from headrace.runners import Loaded

_SEQUENCES = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
_MOST = 2**63 - 1
_SCHEMA = {
    "anyOf": [
        {"type": ["array", "number"]},
        {"type": "object", "minProperties": 1, "additionalProperties": {"type": ["array", "number"]}},
    ]
}


class ModuleRunner:
    """Items are tensors or dictionaries of tensors by parameter name.

    Tensors that differ in their first dimension only are padded with zeros to the longest (``input_ids`` and its kin
    always may); then ``attention_mask`` is made if the module takes one. Tensors of equal shape are stacked. The
    answer is ``.logits``, else ``.last_hidden_state``, else the output itself, one item each, without its padding.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module.eval()
        self._device = "cpu"
        self._names = _parameters(module)
        self._takes_mask = "attention_mask" in (self._names or ())
        self._number = number_type(module)

    def load(self, device: str) -> None:
        self._device = device
        self._module.to(device)

    def run(self, inputs: list[Any]) -> list[Any]:
        with torch.inference_mode():
            if any(isinstance(item, dict) for item in inputs):
                named, lengths = self._collate_named(inputs)
                output = self._module(**named)
            else:
                batch, lengths = self._collate([self._as_numbers(item) for item in inputs])
                output = self._module(batch)
            return self._split(output, lengths)

    def _as_numbers(self, value: Any) -> torch.Tensor:
        """JSON does not tell 1 from 1.0: a module without an embedding gets floats whatever was written."""
        tensor = torch.as_tensor(value)
        return tensor if self._number is None else tensor.to(self._number)

    def _collate(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[int] | None]:
        if all(tensor.shape == tensors[0].shape for tensor in tensors):
            return torch.stack(tensors).to(self._device), None
        lengths = [tensor.shape[0] if tensor.dim() else -1 for tensor in tensors]
        if any(tensor.dim() == 0 or tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
            shapes = sorted({tuple(tensor.shape) for tensor in tensors})
            raise InvalidInput(f"items of one batch have shapes that cannot be padded to one: {shapes}", field="input")
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(self._device), lengths

    def _collate_named(self, inputs: list[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[int] | None]:
        _check_same_names(inputs)
        names = list(dict.fromkeys(name for item in inputs for name in item))
        unknown = [name for name in names if self._names is not None and name not in self._names]
        if unknown:
            known = ", ".join(self._names or ())
            raise InvalidInput(f"the module's forward takes {known}", field=f"input.{unknown[0]}")
        batch: dict[str, torch.Tensor] = {}
        lengths: list[int] | None = None
        for name in names:
            if name == "attention_mask":
                continue
            convert = torch.as_tensor if name in _SEQUENCES else self._as_numbers
            batch[name], padded = self._collate([convert(item[name]) for item in inputs])
            lengths = padded or lengths
        if "attention_mask" in names or (self._takes_mask and "input_ids" in names):
            masks = [
                torch.as_tensor(item["attention_mask"])
                if "attention_mask" in item
                else torch.ones(len(item["input_ids"]), dtype=torch.long)
                for item in inputs
            ]
            batch["attention_mask"], _ = self._collate(masks)
        return batch, lengths

    def _split(self, output: Any, lengths: list[int] | None) -> list[Any]:
        for name in ("logits", "last_hidden_state"):
            found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
            if found is not None:
                output = found
                break
        if isinstance(output, dict):
            columns = {name: self._split(values, lengths) for name, values in output.items()}
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if isinstance(output, (tuple, list)):
            return [tuple(row) for row in zip(*(self._split(part, lengths) for part in output), strict=True)]
        items = list(output.cpu().unbind(0))
        # One row per token, as the padded input had. A vector of that length is taken for classes, not for tokens.
        if lengths and items and items[0].dim() > 1 and items[0].shape[0] == max(lengths):
            items = [item[:length] for item, length in zip(items, lengths, strict=True)]
        return items


def prepare(item: Any, vocabulary: int | None = None) -> Any:
    """One item as clients may write it → tensors; whole numbers become int64, others float32.

    A leading dimension of 1 on token tensors, as tokenizers return it, is taken off.

    Args:
        vocabulary: how many token ids the module has an embedding for; ``None`` if nobody knows.

    Raises:
        InvalidInput: ragged lists or other things that are no tensor; a number where a sequence is needed; token ids
            outside the vocabulary.
    """
    if not isinstance(item, dict):
        return _tensor(item, "input")
    named = {name: _tensor(value, f"input.{name}") for name, value in item.items()}
    for name in _SEQUENCES & named.keys():
        if named[name].dim() == 0:
            raise InvalidInput("must be a list", field=f"input.{name}")
        if named[name].dim() == 2 and named[name].shape[0] == 1:
            named[name] = named[name][0]
    if vocabulary is not None and "input_ids" in named:
        _check_ids(named["input_ids"], vocabulary)
    return named


def cost(item: Any) -> int:
    """Length of the sequence dimension, 1 for anything that is not a sequence of tokens."""
    if isinstance(item, dict) and "input_ids" in item:
        return max(1, len(item["input_ids"]))
    return 1


def finish(output: Any) -> Any:
    """Tensors to numpy, bfloat16 by way of float32."""
    if isinstance(output, torch.Tensor):
        output = output.detach().cpu()
        return (output.float() if output.dtype == torch.bfloat16 else output).numpy()
    if isinstance(output, dict):
        return {name: finish(value) for name, value in output.items()}
    if isinstance(output, (tuple, list)):
        return [finish(value) for value in output]
    return output


def open_module(config: ModelConfig, module: torch.nn.Module, device: str, platform: str = "pytorch") -> Loaded:
    runner = ModuleRunner(module)
    runner.load(device)
    read = functools.partial(prepare, vocabulary=vocabulary_of(module))
    info = ModelInfo(
        name=config.name,
        task="custom",
        platform=platform,
        device=device,
        item_schema=msgspec.json.encode(_SCHEMA),
        tensors=True,
    )
    example = None
    if config.example:
        try:
            made = read(msgspec.json.decode(config.example))
        except (msgspec.DecodeError, InvalidInput) as error:
            raise LoadError(f"the example of {config.name} is not usable: {error}", field="example") from None

        def example(length: int) -> Any:
            return made

    return Loaded(runner, info, prepare=read, cost=cost, finish=finish, example=example)


def _tensor(value: Any, field: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidInput("rows differ in length: not a tensor", field=field) from None
    if array.dtype.kind == "u" and array.size and int(array.max()) > _MOST:
        raise InvalidInput("integers must fit in 64 bits with a sign", field=field)
    if array.dtype.kind in "iub":
        return torch.as_tensor(array.astype(np.int64))
    if array.dtype.kind == "f":
        return torch.as_tensor(array.astype(np.float32))
    raise InvalidInput("must be numbers", field=field)


def _check_ids(ids: torch.Tensor, vocabulary: int) -> None:
    """On a GPU an id without an embedding ends the process: every later call fails, too."""
    if ids.is_floating_point():
        raise InvalidInput("token ids are whole numbers", field="input.input_ids")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise InvalidInput(f"token ids go from 0 to {vocabulary - 1}", field="input.input_ids")


def _check_same_names(inputs: list[Any]) -> None:
    """A batch mixes clients. Raising makes `isolation.run_batch` run those that go together by themselves.

    Only a mask may be left out, where there are ids to make it from.
    """
    names = {
        frozenset(item) - ({"attention_mask"} if "input_ids" in item else set()) if isinstance(item, dict) else None
        for item in inputs
    }
    if len(names) > 1:
        raise InvalidInput("items of one batch must name the same tensors", field="input")


def vocabulary_of(module: torch.nn.Module) -> int | None:
    """Rows of the table that ``input_ids`` are looked up in; ``None`` if that cannot be told."""
    parts = _embeddings(module)
    ask = getattr(module, "get_input_embeddings", None)
    if ask is not None:
        try:
            found = ask()
        except NotImplementedError:  # transformers' answer where it does not know
            return None
        parts = [found] if isinstance(found, torch.nn.Embedding) else []
    return int(parts[0].weight.shape[0]) if len(parts) == 1 else None


def number_type(module: torch.nn.Module) -> torch.dtype | None:
    """What numbers become that a module is given, whether or not they are whole; ``None`` where they stay as they
    are: a module that looks up rows of a table takes numbers of rows."""
    floats = [p.dtype for p in module.parameters() if p.dtype.is_floating_point]
    return floats[0] if floats and not _embeddings(module) else None


def _embeddings(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [
        part
        for part in module.modules()
        if isinstance(part, torch.nn.Embedding) or getattr(part, "original_name", "") == "Embedding"
    ]


def _parameters(module: torch.nn.Module) -> list[str] | None:
    """Names that ``forward`` takes; ``None`` if it takes any."""
    if isinstance(module, torch.jit.ScriptModule):
        return [argument.name for argument in module.forward.schema.arguments if argument.name != "self"]
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]
