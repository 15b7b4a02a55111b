"""A causal language model as the ladder runs it: the prompt at once, then token by token, the likeliest each time.

Both parts are timed apart: the first is bound by arithmetic, the second by reading the weights. Prompts of a batch are
filled up at their beginnings, so that all of them end at one slot. Caches are ours: models of transformers ask of one
only that it takes keys and values, and the mask that they get is complete.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from headrace.clock import perf_counter
from headrace.runners.collate import Array
from headrace.runners.graphs import own_workspaces
from headrace.runners.language import Generated

CacheKind = Literal["kv-off", "kv-dynamic", "kv-static"]
_STEP_OF_SLOTS = 64
_WARM_UPS = 3


class Decoder(torch.nn.Module):  # type: ignore[misc]  # torch is not analysed
    """A model of transformers with a head that gives logits, under a mask that is made here."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(
        self, input_ids: torch.Tensor, pads: torch.Tensor, at: torch.Tensor, keep: torch.Tensor, cache: Any = None
    ) -> torch.Tensor:
        """Logits of shape (items, keep, vocabulary).

        Args:
            input_ids: (items, slots).
            pads: (items,) empty slots before each item.
            at: (slots,) numbers of the slots.
            keep: numbers of the given slots whose logits are wanted.
            cache: holds the slots before, and gets these.
        """
        slots = cache.slots(input_ids.shape[1]) if cache is not None else input_ids.shape[1]
        keys = torch.arange(slots, device=input_ids.device)
        seen = (keys <= at[:, None]) & (keys >= pads[:, None, None])
        kind = self.model.dtype
        # No slot sees nothing, not even an empty one: its answer would be no number, and spread.
        mask = torch.zeros(seen.shape, dtype=kind, device=input_ids.device).masked_fill(~seen, torch.finfo(kind).min)
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask[:, None],
            position_ids=(at - pads[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=keep,
        )
        found: torch.Tensor = output.logits
        return found


class Growing:
    """Keys and values of all slots so far, joined with the new ones at every call."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        self.layers = layers or []

    def slots(self, new: int) -> int:
        return new + (self.layers[0][0].shape[2] if self.layers else 0)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer < len(self.layers):
            before = self.layers[layer]
            self.layers[layer] = (torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2))
        else:
            self.layers.append((keys, values))
        return self.layers[layer]

    def get_seq_length(self, *rest: Any) -> int:
        """Asked for by some models for positions, which they are given."""
        return self.layers[0][0].shape[2] if self.layers else 0


class Slots:
    """Room for a fixed number of slots, written in place: shapes and addresses never change.

    Args:
        at: the tensor of slot numbers that the next call writes, set by whoever calls the model.
    """

    def __init__(self, layers: int, heads: int, width: int, items: int, slots: int, like: torch.Tensor) -> None:
        shape = (items, heads, slots, width)
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
        self.most = slots
        self.at: torch.Tensor = torch.zeros(1, dtype=torch.int64, device=like.device)

    def slots(self, new: int) -> int:
        return self.most

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *rest: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        here = self.layers[layer]
        here[0].index_copy_(2, self.at, keys)
        here[1].index_copy_(2, self.at, values)
        return here

    def get_seq_length(self, *rest: Any) -> int:
        return 0


class TorchLanguage:
    """A decoder run by torch.

    Args:
        cache: ``kv-off`` runs all slots again for every token.
        compiled: steps are compiled, where the cache is static; ``captured``: and are CUDA graphs.
    """

    def __init__(
        self, decoder: Decoder, device: str, cache: CacheKind, *, compiled: bool = False, captured: bool = False
    ) -> None:
        self._decoder = decoder
        self._device = device
        self._cache = cache
        self._step: Callable[..., torch.Tensor] = decoder
        if compiled:
            self._step = torch.compile(decoder, dynamic=False)
        self._captured = captured
        self._rooms: dict[tuple[int, int], _Room] = {}
        self.step_bytes = _step_bytes(decoder.model)

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is not analysed
    def logits(self, ids: Array, pads: Array, last: int) -> Array:
        slots = ids.shape[1]
        keep = torch.arange(slots - last, slots, device=self._device)
        found: Array = self._prefill(self._tensor(ids), self._tensor(pads), keep, None).float().cpu().numpy()
        return found

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def generate(self, ids: Array, pads: Array, new: int) -> Generated:
        start = perf_counter()
        prompt, empty = self._tensor(ids), self._tensor(pads)
        if self._cache == "kv-static":
            return self._generate_in_room(prompt, empty, new, start)
        last = torch.tensor([ids.shape[1] - 1], device=self._device)
        cache = None if self._cache == "kv-off" else Growing()
        token = self._prefill(prompt, empty, last, cache).argmax(-1)
        first = token.cpu()
        prefilled = perf_counter()
        found = [first]
        for number in range(new - 1):
            slot = ids.shape[1] + number
            if cache is None:
                prompt = torch.cat((prompt, token), dim=1)
                last = torch.tensor([slot], device=self._device)
                token = self._prefill(prompt, empty, last, None).argmax(-1)
            else:
                at = torch.tensor([slot], device=self._device)
                token = self._decoder(token, empty, at, torch.zeros_like(at), cache).argmax(-1)
            found.append(token)
        tokens = torch.cat([each.to(self._device) for each in found], dim=1).cpu().numpy()
        return Generated(tokens, prefilled - start, perf_counter() - prefilled)

    def _prefill(self, ids: torch.Tensor, pads: torch.Tensor, keep: torch.Tensor, cache: Any) -> torch.Tensor:
        found: torch.Tensor = self._decoder(ids, pads, torch.arange(ids.shape[1], device=self._device), keep, cache)
        return found

    def _generate_in_room(self, prompt: torch.Tensor, pads: torch.Tensor, new: int, start: float) -> Generated:
        items, slots = prompt.shape
        most = -(-(slots + new) // _STEP_OF_SLOTS) * _STEP_OF_SLOTS
        room = self._rooms.get((items, most))
        if room is None:
            room = self._rooms[items, most] = _Room(self._decoder, self._step, items, most, self._captured)
        first = room.begin(prompt, pads).cpu()
        prefilled = perf_counter()
        tokens = torch.cat([first, room.go_on(new - 1).cpu()], dim=1).numpy()
        return Generated(tokens, prefilled - start, perf_counter() - prefilled)

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class _Room:
    """A batch in a static cache. A step reads and writes tensors of its own only, so it can be a graph of the GPU."""

    def __init__(self, decoder: Decoder, step: Callable[..., torch.Tensor], items: int, slots: int, captured: bool):
        config = decoder.config
        like = next(each for each in decoder.parameters() if each.is_floating_point())
        like = torch.empty(0, dtype=decoder.model.dtype, device=like.device)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._decoder = decoder
        self._run_step = step
        self._cache = Slots(config.num_hidden_layers, heads, width, items, slots, like)
        self._token = torch.zeros((items, 1), dtype=torch.int64, device=like.device)
        self._pads = torch.zeros(items, dtype=torch.int64, device=like.device)
        self._at = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._keep = torch.zeros(1, dtype=torch.int64, device=like.device)
        self._said = torch.zeros((items, slots), dtype=torch.int64, device=like.device)
        self._captured = captured
        self._graph: Any = None

    def begin(self, prompt: torch.Tensor, pads: torch.Tensor) -> torch.Tensor:
        slots = prompt.shape[1]
        at = torch.arange(slots, device=prompt.device)
        self._cache.at = at
        self._pads.copy_(pads)
        self._token.copy_(self._decoder(prompt, self._pads, at, at[-1:], self._cache).argmax(-1))
        self._at.fill_(slots)
        return self._token.clone()

    def go_on(self, steps: int) -> torch.Tensor:
        self._cache.at = self._at
        first = int(self._at)
        if self._captured and self._graph is None:
            self._capture()
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._step()
        return self._said[:, first : first + steps]

    def _step(self) -> None:
        found = self._run_step(self._token, self._pads, self._at, self._keep, self._cache).argmax(-1)
        self._token.copy_(found)
        self._said.index_copy_(1, self._at, found)
        self._at.add_(1)

    def _capture(self) -> None:
        kept = self._token.clone(), self._at.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step()
                self._at.copy_(kept[1])
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with own_workspaces(), torch.cuda.graph(graph, stream=stream):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._token.copy_(kept[0])
        self._at.copy_(kept[1])
        self._graph = graph


def _step_bytes(model: Any) -> int:
    """Bytes of weights that a step reads: all but the table of embeddings, of which it reads a row, unless it is the
    head too."""
    from headrace.runners.recipes import bytes_of

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is table.weight
    return bytes_of(model) - (0 if tied else bytes_of(table))
