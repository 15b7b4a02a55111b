"""An encoder of transformers that takes all tokens of a batch in one row: attention by segments, no padding.

`torch.nn.attention.varlen` has the kernel (CUDA, half precision). The model sees one row of tokens with their
positions; its attention is exchanged for one that knows where each item begins. Before the pooling, tokens get rows of
their own again, so that whatever comes after the encoder stays as it is.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from headrace.errors import Unavailable

_NAME = "headrace_varlen"
_ITEMS = (5, 12)
_LEAST_COSINE = 0.999


class Varlen(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """An encoder with its pooling, of tokens in one row.

    Args:
        encoder: of transformers, in half precision, with attention that can be exchanged.
        finish: from the encoder's output and a mask of shape (items, length) to one row per item.
    """

    def __init__(self, encoder: Any, finish: Any) -> None:
        super().__init__()
        self.model = encoder
        self._finish = finish

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        starts: torch.Tensor,
        rows: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """One vector per item.

        Args:
            input_ids, position_ids: (tokens,) of all items, one after the other.
            starts: (items + 1,), where each begins; the last is their number of tokens.
            rows, attention_mask: (items, length): which token stands there, and whether one does.
        """
        longest = rows.shape[1]
        output = self.model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            cu_seq_lens_q=starts,
            cu_seq_lens_k=starts,
            max_length_q=longest,
            max_length_k=longest,
        )
        states = output.last_hidden_state[0][rows]
        found: torch.Tensor = self._finish(SimpleNamespace(last_hidden_state=states), attention_mask)
        return found


def exchange(text: Any, device: str) -> Varlen:
    """An encoder as `runners.subject` opens it, on its device, with its attention exchanged.

    Raises:
        Unavailable: it cannot be run in this way, or its answers would not be the same.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    encoder, finish = getattr(text, "model", None), getattr(text, "finish", None)
    if encoder is None or finish is None or not hasattr(encoder, "set_attn_implementation"):
        raise Unavailable("only an encoder of transformers that embeds can take a batch in one row")
    wanted = _alone(text, device)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    try:
        encoder.set_attn_implementation(_NAME)
        packed = Varlen(encoder, finish)
        found = _together(packed, device)
    except Exception as error:  # models take what they like
        raise Unavailable(
            f"this encoder cannot take a batch in one row: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    least = float(torch.nn.functional.cosine_similarity(wanted.float(), found.float(), dim=-1).min())
    if not least > _LEAST_COSINE:
        raise Unavailable(f"in one row this encoder answers otherwise: cosine {least:.4f}")
    return packed


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one row of tokens, (1, heads, tokens, width), each item by itself: (1, tokens, heads, width)."""
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    found = varlen_attn(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
    return found[None], None


def _alone(text: Any, device: str) -> torch.Tensor:
    answers = []
    with torch.inference_mode():
        for size in _ITEMS:
            ids = _tokens(size, device)[None]
            answers.append(text(input_ids=ids, attention_mask=torch.ones_like(ids)))
    return torch.cat(answers)


def _together(packed: Varlen, device: str) -> torch.Tensor:
    longest, ends = max(_ITEMS), torch.tensor([0, *_ITEMS]).cumsum(0)
    positions = torch.arange(longest).expand(len(_ITEMS), longest)
    mask = positions < torch.tensor(_ITEMS)[:, None]
    rows = torch.where(mask, positions + ends[:-1, None], 0)
    arguments = {
        "input_ids": torch.cat([_tokens(size, "cpu") for size in _ITEMS]),
        "position_ids": torch.cat([torch.arange(size) for size in _ITEMS]),
        "starts": ends,
        "rows": rows,
        "attention_mask": mask,
    }
    with torch.inference_mode():
        found: torch.Tensor = packed(**{name: each.to(torch.int32).to(device) for name, each in arguments.items()})
        return found


def _tokens(size: int, device: str) -> torch.Tensor:
    return torch.arange(3, 3 + size, dtype=torch.int64, device=device)
