"""CUDA graphs of a torch module, captured by shape, with memory of the host that the card reads by itself.

At small batches a GPU waits for the processor that launches its kernels: a captured graph is launched once. A batch is
laid out in one of few shapes; each shape has its graph. Inputs go up in one copy, answers come back in one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from headrace.errors import Unavailable
from headrace.runners.collate import Array
from headrace.runners.engines import own_part
from headrace.runners.layouts import Layout, Shape

# A graph of BERT-base takes 1.4 MiB of the host's memory and 0.7 of the card's. A model of 512 tokens in batches of 32
# has 102 shapes, without padding (`layouts.Ragged`) hundreds.
_MOST_GRAPHS = 512
_WARM_UPS = 3
_ALIGNED = 16


@contextlib.contextmanager
def own_workspaces() -> Iterator[None]:
    """Let what is captured take the room that cuBLAS works in from the graph's own memory.

    That of the warm-up belongs to the stream, and may be given back by somebody else (torch's own graphs do) while the
    captured kernels still write to it.
    """
    torch._C._cuda_clearCublasWorkspaces()
    yield
    torch._C._cuda_clearCublasWorkspaces()


class Captured:
    """A module on a GPU as an engine: arrays of shape (items, …) in, float32 of shape (items, …) out.

    All graphs work in the same memory, one after the other, so an answer is copied before the next one is made; not for
    several threads. Of more than `_MOST_GRAPHS` shapes those that were not met for longest are forgotten.
    """

    def __init__(self, module: Any, device: str, layout: Layout) -> None:
        if not device.startswith("cuda"):
            raise Unavailable("graphs are captured on an NVIDIA GPU only", hint="leave graphs out of --rungs")
        self._module = module
        self._device = device
        self._layout = layout
        self._graphs: dict[Shape, _Graph] = {}  # the last one met last
        self._pool: Any = None
        # One for all: torch lends memory that was freed in one stream to no other.
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: dict[str, Array]) -> Array:
        items, *length = next(iter(batch.values())).shape[:2]
        shape = self._layout.shape(batch)
        graph = self._graphs.pop(shape, None)
        if graph is None:
            if len(self._graphs) >= _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            with torch.cuda.device(self._device), torch.inference_mode():
                tensors = self._layout.tensors(shape, batch)
                graph = _Graph(self._module, self._device, self._stream, tensors, self._layout, batch, self._pool)
            self._pool = graph.pool
        self._graphs[shape] = graph
        self._layout.fill(graph.places, batch)
        return own_part(graph.run(items), items, length, shape)


class _Graph:
    """One shape: its places for inputs on both sides, the graph, its places for the answer."""

    def __init__(
        self,
        module: Any,
        device: str,
        stream: torch.cuda.Stream,
        tensors: Mapping[str, tuple[Shape, str]],
        layout: Layout,
        batch: Mapping[str, Array],
        pool: Any,
    ) -> None:
        # One piece of memory for all inputs, so that one copy brings them.
        bounds, total = {}, 0
        for name, (shape, dtype) in tensors.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            bounds[name] = (total, total + size)
            total += -(-size // _ALIGNED) * _ALIGNED
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=True)
        self._there = torch.zeros(total, dtype=torch.uint8, device=device)
        whole = self._host.numpy()
        self.places: dict[str, Array] = {}
        inputs = {}
        for name, (shape, dtype) in tensors.items():
            first, last = bounds[name]
            self.places[name] = whole[first:last].view(dtype).reshape(shape)
            inputs[name] = self._there[first:last].view(torch.from_numpy(self.places[name]).dtype).view(shape)
        layout.fill(self.places, batch)
        # transformers leaves a mask out that masks nothing, but not of what is captured: without padding, the warm-up
        # would go, and be compiled for, another way.
        layout.shorten(self.places)
        self._there.copy_(self._host)
        self._stream = stream
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):  # compiles, and lets libraries choose and take what they need
                module(**inputs)
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with own_workspaces(), torch.cuda.graph(self._graph, pool=pool, stream=self._stream):
                output = module(**inputs)
                self._output = (output[0] if isinstance(output, (tuple, list)) else output).float()
        self.pool = self._graph.pool()
        self._answer = torch.empty(self._output.shape, dtype=torch.float32, pin_memory=True)

    def run(self, items: int) -> Array:
        """What the module answers to what lies in `places`, of the first items."""
        with torch.cuda.stream(self._stream), torch.inference_mode():
            self._there.copy_(self._host, non_blocking=True)
            self._graph.replay()
            self._answer[:items].copy_(self._output[:items], non_blocking=True)
            self._stream.synchronize()
        found: Array = self._answer[:items].numpy().copy()
        return found
