"""Find what a program costs: time, memory, and what it never gives back.

The package can be called: ``headrace.profiling(...)`` is `block.profiling`, whose name it has. (Python puts a package
that is imported into its parent under its name, where it would hide the function.)
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        from headrace.profiling.block import profiling

        return profiling(*arguments, **named)


sys.modules[__name__].__class__ = _Callable
