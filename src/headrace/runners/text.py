"""Text and token ids → what a transformer worker takes, without torch: this runs in front ends.

A prepared item is an int32 array of token ids, or, when its attention mask or token types say something, a dictionary
of such arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from headrace.core import TextSpec
from headrace.errors import InvalidInput, LoadError

Ids = npt.NDArray[np.int32]
TENSORS = ("input_ids", "attention_mask", "token_type_ids")
ALIASES = {"token_ids": "input_ids"}


class TextPreparer:
    """Tokenises like the model's own tokenizer and checks token ids that clients send themselves.

    Longer texts are cut to ``spec.max_tokens``, special tokens included.

    Raises:
        LoadError: the tokenizer's file cannot be read, or its special tokens leave no room for a text.
    """

    def __init__(self, spec: TextSpec) -> None:
        self.spec = spec
        try:
            self._tokenizer = Tokenizer.from_file(spec.tokenizer)
        except Exception as error:  # tokenizers raises nothing more special
            raise LoadError(f"cannot read {spec.tokenizer}: {error}", field="target") from error
        # tokenizers does not cut at all where the limit is below its special tokens.
        special = self._tokenizer.num_special_tokens_to_add(False)
        if spec.max_tokens <= special:
            raise LoadError(
                f"at most {spec.max_tokens} tokens leave no room for a text beside {special} special ones",
                field="target",
                hint="raise max_batch_tokens, or the limit in the model's files",
            )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.max_tokens)

    def text(self, text: str, field: str | None = None) -> Ids:
        """Token ids of one text, special tokens included. Shape (tokens,).

        Raises:
            InvalidInput: the text has no tokens, or one that the model does not know.
        """
        text = self.spec.prefix + text
        ids = np.array(self._tokenizer.encode(text.lower() if self.spec.lower else text).ids, dtype=np.int32)
        if not len(ids):
            raise InvalidInput("has no tokens", field=field)
        if int(ids.max()) >= self.spec.vocabulary:
            raise InvalidInput(
                f"has token {ids.max()}, but the model's tokens go from 0 to {self.spec.vocabulary - 1}: "
                "its tokenizer has more tokens than the model",
                field=field,
            )
        return ids

    def tensors(self, named: dict[str, Any], field: str = "") -> Ids | dict[str, Ids]:
        """Check one item given as named lists of integers.

        Raises:
            InvalidInput: names the tensor: unknown, missing, of another length, or with values that the model has no
                embedding for.
        """
        prefix = f"{field}." if field else ""
        for name in named:
            if name not in TENSORS:
                raise InvalidInput(f"unknown tensor; known are {', '.join(TENSORS)}", field=f"{prefix}{name}")
        if "input_ids" not in named:
            raise InvalidInput("missing", field=f"{prefix}input_ids")
        arrays = {name: _integers(values, f"{prefix}{name}") for name, values in named.items()}
        ids = arrays["input_ids"]
        if len(ids) == 0 or len(ids) > self.spec.max_tokens:
            raise InvalidInput(f"needs 1 to {self.spec.max_tokens} tokens, has {len(ids)}", field=f"{prefix}input_ids")
        if int(ids.min()) < 0 or int(ids.max()) >= self.spec.vocabulary:
            raise InvalidInput(f"token ids go from 0 to {self.spec.vocabulary - 1}", field=f"{prefix}input_ids")
        for name, values in arrays.items():
            if len(values) != len(ids):
                raise InvalidInput(f"has {len(values)} values where input_ids has {len(ids)}", field=f"{prefix}{name}")
        if "attention_mask" in arrays and not np.isin(arrays["attention_mask"], (0, 1)).all():
            raise InvalidInput("values are 0 or 1", field=f"{prefix}attention_mask")
        if "token_type_ids" in arrays:
            self._check_types(arrays["token_type_ids"], f"{prefix}token_type_ids")
        return _shortest(arrays, f"{prefix}attention_mask")

    def _check_types(self, types: Ids, field: str) -> None:
        known = self.spec.token_types
        if not known:
            raise InvalidInput("this model takes no token_type_ids", field=field)
        if int(types.min()) < 0 or int(types.max()) >= known:
            raise InvalidInput(f"token types go from 0 to {known - 1}", field=field)


def cost(item: Ids | dict[str, Ids]) -> int:
    """Tokens of a prepared item."""
    return len(item["input_ids"]) if isinstance(item, dict) else len(item)


def _integers(values: Any, field: str) -> Ids:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise InvalidInput("must be a list of integers", field=field)
    try:
        return np.array(values, dtype=np.int32)
    except OverflowError:
        raise InvalidInput("integers must fit in 32 bits", field=field) from None


def _shortest(arrays: dict[str, Ids], mask_field: str) -> Ids | dict[str, Ids]:
    """Drop padding at the end, and tensors that say nothing beyond the ids."""
    mask = arrays.get("attention_mask")
    if mask is not None:
        real = np.flatnonzero(mask)
        if not len(real):
            raise InvalidInput("masks every token", field=mask_field)
        arrays = {name: values[: real[-1] + 1] for name, values in arrays.items()}
        if arrays["attention_mask"].all():
            del arrays["attention_mask"]
    if "token_type_ids" in arrays and not arrays["token_type_ids"].any():
        del arrays["token_type_ids"]
    return arrays["input_ids"] if len(arrays) == 1 else arrays
