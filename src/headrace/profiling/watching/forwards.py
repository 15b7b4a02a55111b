"""Follows graphs: which forwards built one, whether a backward went through it, and when it was given up.

A small object hangs on the last node of each graph, which lives as long as the graph does, is called when a backward
comes by, and is told when it ends. That needs no walk through memory, and sees what Python cannot: a graph that only
C++ holds.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headrace.profiling.watching.holding import holder_of
from headrace.profiling.watching.patches import Patches, Place, users_place

# Fewer could be the steps that a program needs at the same time.
LEAST = 10
# So much of everything that was made is still there: it grows with the steps.
MOST = 0.8
_MOST_TENSORS = 32


class Site:
    """A line that runs a model, or calls ``backward``, and the graphs of its calls.

    Attributes:
        calls: forwards or backwards.
        without_grad: forwards with gradients off; ``training`` those of them in train mode, with ``modes`` in effect.
        made: graphs, of which ``ran`` saw a backward, ``unused`` ended without one, and ``alive`` are still there,
            ``alive_ran`` after theirs.
        freed_by_gc: graphs, or outputs without one, that only the garbage collector freed.
        kept: how many graphs were still there after their backward, of how many, when that was last far too many;
            ``waiting`` the same for graphs that no backward ever came to.
        holder: who holds one of them, where that has a name.
    """

    def __init__(self, name: str, lock: threading.RLock) -> None:
        self.name = name
        self.lock = lock
        self.calls = self.without_grad = self.training = 0
        self.modes: Counter[str] = Counter()
        self.trained = False
        self.made = self.ran = self.unused = self.alive = self.alive_ran = self.freed_by_gc = 0
        self.kept: tuple[int, int] | None = None
        self.waiting: tuple[int, int] | None = None
        self.holder = ""
        self.last: weakref.ref[Any] | None = None
        self.outputs: set[weakref.ref[Any]] = set()


class _Mark:
    """Hangs on a graph: called by a backward, ended with the graph."""

    __slots__ = ("collector", "ran", "site")

    def __init__(self, site: Site, collector: Collector, ran: bool) -> None:
        self.site, self.collector, self.ran = site, collector, ran
        with site.lock:
            site.made += 1
            site.alive += 1
            site.ran += ran
            site.alive_ran += ran

    def __call__(self, *gradients: Any) -> None:
        with self.site.lock:
            if not self.ran:
                self.ran = True
                self.site.ran += 1
                self.site.alive_ran += 1

    def __del__(self) -> None:
        site = self.site
        with site.lock:
            site.alive -= 1
            site.alive_ran -= self.ran
            site.unused += not self.ran
            site.freed_by_gc += self.collector.at_work


class Collector:
    """Whether the garbage collector is at work just now."""

    def __init__(self) -> None:
        self.at_work = False

    def __call__(self, phase: str, _: Any) -> None:
        self.at_work = phase == "start"


class Forwards:
    """What was seen of models and of ``backward``, by line of the user's code."""

    def __init__(self, torch: Any) -> None:
        self.forwards: dict[tuple[Place, str], Site] = {}
        self.backwards: dict[Place, Site] = {}
        self.collector = Collector()
        self._torch = torch
        self._lock = threading.RLock()
        self._inside = threading.local()
        self._trained: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def backward_calls(self) -> int:
        return sum(site.calls for site in self.backwards.values())

    @property
    def forward_calls(self) -> int:
        return sum(site.calls for site in self.forwards.values())

    def patch(self, patches: Patches, on_forward: Callable[[], None]) -> None:
        """
        Args:
            on_forward: called after each forward.
        """
        patches.add(self._torch.nn.Module, "__call__", functools.partial(self._calling, patches, on_forward))
        patches.add(self._torch.Tensor, "backward", functools.partial(self._going_back, patches))

    def _calling(self, patches: Patches, on_forward: Callable[[], None], original: Any) -> Callable[..., Any]:
        inside = self._inside

        @functools.wraps(original)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "now", False) or not patches.on:
                return original(module, *args, **kwargs)
            inside.now = True
            try:
                output = original(module, *args, **kwargs)
                if patches.on and not self._in_backward():
                    self._forward(module, output)
                    on_forward()
            finally:
                inside.now = False
            return output

        return call

    def _in_backward(self) -> bool:
        """A checkpoint that computes again what it has not kept is no forward of the user's."""
        return bool(self._torch._C._current_graph_task_id() != -1)

    def _going_back(self, patches: Patches, original: Any) -> Callable[..., Any]:
        @functools.wraps(original)
        def backward(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            place = users_place() if patches.on else None
            if place is not None:
                with self._lock:
                    site = self.backwards.setdefault(place, Site("backward", self._lock))
                    site.calls += 1
                if tensor.grad_fn is not None:
                    self._mark(site, [tensor], ran=True)
            return original(tensor, *args, **kwargs)

        return backward

    def _forward(self, module: Any, output: Any) -> None:
        place = users_place()
        if place is None or not _has_weights(module):
            return
        name = type(module).__name__
        with self._lock:
            site = self.forwards.setdefault((place, name), Site(name, self._lock))
            site.calls += 1
        tensors = list(_tensors(self._torch, output))
        graphs = [each for each in tensors if each.grad_fn is not None]
        if graphs:
            self._mark(site, graphs, ran=False, module=module)
        elif not self._torch.is_grad_enabled():
            self._without_grad(site, module, tensors)

    def _mark(self, site: Site, tensors: list[Any], ran: bool, module: Any = None) -> None:
        self._look(site)
        mark = _Mark(site, self.collector, ran)
        for each in tensors[:_MOST_TENSORS]:
            each.grad_fn.register_prehook(mark)
        if module is not None and module not in self._trained:
            tensors[0].grad_fn.register_prehook(_Trains(weakref.ref(module), self._trained))
        site.last = weakref.ref(tensors[0])

    def _look(self, site: Site) -> None:
        """Before a new graph: what of the earlier ones is left that should not be?"""
        with site.lock:
            alive, done, made = site.alive, site.alive_ran, site.made
        if done >= LEAST and done >= MOST * made and self.backward_calls >= LEAST:
            site.kept = (done, made)
        elif alive - done >= LEAST and alive - done >= MOST * made:
            site.waiting = (alive - done, made)
        else:
            return
        if not site.holder:
            held = site.last() if site.last is not None else None
            site.holder = holder_of(held) if held is not None else "another tensor"

    def _without_grad(self, site: Site, module: Any, tensors: list[Any]) -> None:
        with site.lock:
            site.without_grad += 1
        if tensors:
            self._follow(site, tensors[0])
        if not module.training:
            return
        modes = _modes(self._torch, module)
        with site.lock:
            site.training += bool(modes)
            site.modes = site.modes or modes
            site.trained = site.trained or module in self._trained or _has_gradient(module)

    def _follow(self, site: Site, tensor: Any) -> None:
        """See whether an output without a graph is freed when nobody refers to it, or only by the collector."""
        collector, outputs = self.collector, site.outputs

        def ended(reference: weakref.ref[Any]) -> None:
            outputs.discard(reference)
            site.freed_by_gc += collector.at_work

        outputs.add(weakref.ref(tensor, ended))

    def start(self) -> None:
        gc.callbacks.append(self.collector)

    def stop(self) -> None:
        """What is garbage by now is no graph that is kept: it is collected before the judgement."""
        gc.collect()
        gc.callbacks.remove(self.collector)
        self.collector.at_work = False
        for site in self.forwards.values():
            site.outputs.clear()


class _Trains:
    """Hangs on a graph of a module that has none yet, to learn that it is trained."""

    __slots__ = ("module", "trained")

    def __init__(self, module: weakref.ref[Any], trained: weakref.WeakSet[Any]) -> None:
        self.module, self.trained = module, trained

    def __call__(self, *gradients: Any) -> None:
        if (module := self.module()) is not None:
            self.trained.add(module)


def _tensors(torch: Any, output: Any, depth: int = 0) -> Iterator[Any]:
    """The tensors in a model's output: itself, or in tuples, mappings and objects with fields."""
    if isinstance(output, torch.Tensor):
        yield output
    elif depth < 4:
        inner: Any = ()
        if isinstance(output, Mapping):
            inner = output.values()
        elif isinstance(output, (list, tuple)):
            inner = output
        elif hasattr(output, "__dataclass_fields__"):
            inner = vars(output).values()
        for each in inner:
            yield from _tensors(torch, each, depth + 1)


def _has_weights(module: Any) -> bool:
    """Whether a module has any; a loss function has none."""
    return next(module.parameters(), None) is not None


def _has_gradient(module: Any) -> bool:
    weights = next((each for each in module.parameters() if each.requires_grad), None)
    return weights is not None and weights.grad is not None


def _modes(torch: Any, module: Any) -> Counter[str]:
    """The parts of a module that answer differently in train mode, and are in it."""
    found: Counter[str] = Counter()
    for part in module.modules():
        drops = isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.p > 0
        normalises = isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
        if part.training and (drops or normalises):
            found[type(part).__name__] += 1
    return found
