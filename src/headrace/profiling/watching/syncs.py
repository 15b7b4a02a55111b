"""Counts where the program waits for the device: `item`, `cpu`, `print`, `if tensor` and the like, by line.

Only what the user's own code calls counts: a library's own `item` is not the user's to change. On a GPU, torch's own
debug mode says in addition where other operations wait (a boolean mask, `nonzero`).
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from headrace.clock import perf_counter
from headrace.profiling.leaking.lines import is_users
from headrace.profiling.watching.patches import Patches, Place

# What is written for each, as a reader knows it.
_SPELT = {
    "item": ".item()",
    "cpu": ".cpu()",
    "tolist": ".tolist()",
    "numpy": ".numpy()",
    "nonzero": ".nonzero()",
    "__bool__": "if tensor",
    "__float__": "float()",
    "__int__": "int()",
    "__index__": "as an index",
    "__array__": "numpy.asarray()",
    "__repr__": "print()",
    "__format__": "f-string",
}
# On the host this costs nothing, and would not work on a GPU: the program is meant for the CPU.
_FREE_ON_HOST = (".numpy()", "numpy.asarray()", ".nonzero()")
_WARNING = "called a synchronizing CUDA operation"


class SyncSite:
    """One line: how often it fetched from a device, how often the same was done on the host, and how long it waited."""

    def __init__(self) -> None:
        self.on_device: Counter[str] = Counter()
        self.on_host: Counter[str] = Counter()
        self.waited_s = 0.0


class Syncs:
    """What was seen, by line of the user's code."""

    def __init__(self) -> None:
        self.sites: dict[Place, SyncSite] = {}
        self._lock = threading.Lock()
        self._hears = False
        self._filter: Any = None

    def patch(self, patches: Patches, torch: Any) -> None:
        for name, spelt in _SPELT.items():
            patches.add(torch.Tensor, name, functools.partial(self._counting, patches, spelt))
        patches.add(torch.Tensor, "to", functools.partial(self._moving, patches))
        patches.add(torch.cuda, "synchronize", functools.partial(self._counting, patches, "torch.cuda.synchronize()"))
        patches.add(warnings, "showwarning", functools.partial(self._hearing, patches))

    def _counting(self, patches: Patches, spelt: str, original: Any) -> Callable[..., Any]:
        @functools.wraps(original)
        def fetch(*args: Any, **kwargs: Any) -> Any:
            code = sys._getframe(1).f_code
            if not patches.on or not is_users(code.co_filename):
                return original(*args, **kwargs)
            line = sys._getframe(1).f_lineno
            start = perf_counter()
            result = original(*args, **kwargs)
            waited = perf_counter() - start
            on_device = spelt.startswith("torch.cuda") or _is_elsewhere(args[0])
            if on_device or spelt not in _FREE_ON_HOST:
                self._note((code.co_filename, line), spelt, on_device, waited)
            return result

        return fetch

    def _moving(self, patches: Patches, original: Any) -> Callable[..., Any]:
        @functools.wraps(original)
        def to(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if not patches.on or not _is_elsewhere(tensor):
                return original(tensor, *args, **kwargs)
            start = perf_counter()
            result = original(tensor, *args, **kwargs)
            waited = perf_counter() - start
            frame = sys._getframe(1)
            if result.device.type == "cpu" and not kwargs.get("non_blocking") and is_users(frame.f_code.co_filename):
                self._note((frame.f_code.co_filename, frame.f_lineno), '.to("cpu")', True, waited)
            return result

        return to

    def _note(self, place: Place, spelt: str, on_device: bool, waited_s: float) -> None:
        with self._lock:
            site = self.sites.setdefault(place, SyncSite())
            (site.on_device if on_device else site.on_host)[spelt] += 1
            if on_device:
                site.waited_s += waited_s

    # The debug mode of torch.cuda, which warns of what no patch sees.

    def _hearing(self, patches: Patches, original: Any) -> Callable[..., Any]:
        def showwarning(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if not patches.on or not self._hears or _WARNING not in str(message):
                original(message, category, filename, lineno, *rest)
            elif is_users(filename):  # in our own files it is a call that is counted already
                self._note((filename, lineno), "an operation that waits (a mask, nonzero, …)", True, 0.0)

        return showwarning

    def hear(self, torch: Any) -> None:
        """Switch the debug mode on, once CUDA is in use; a mode that somebody has set is left alone.

        Called again and again: a ``catch_warnings`` of the user's that ends takes the filter with it, and a warning
        that got through to a filter of "error" would end the user's program.
        """
        if not self._hears and torch.cuda.is_initialized() and torch.cuda.get_sync_debug_mode() == 0:
            _set_mode(torch, "warn")
            self._hears = True
        if self._hears and self._filter not in warnings.filters:
            warnings.filterwarnings("always", message=_WARNING)
            self._filter = warnings.filters[0]

    def stop(self, torch: Any) -> None:
        if self._hears:
            self._hears = False
            _set_mode(torch, "default")
            if self._filter in warnings.filters:
                warnings.filters.remove(self._filter)  # type: ignore[attr-defined]


def _set_mode(torch: Any, mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode itself warns that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)


def _is_elsewhere(tensor: Any) -> bool:
    return tensor.device.type not in ("cpu", "meta")
