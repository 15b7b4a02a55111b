"""Who holds a tensor, as far as one look at the heap shows it: a container, and its name in the code that runs now."""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from typing import Any

from headrace.profiling.leaking.lines import is_users


def holder_of(tensor: Any) -> str:
    """The container that a tensor is in, for example "the list `losses`"."""
    found = [each for each in gc.get_referrers(tensor) if isinstance(each, (list, tuple, set, dict, deque))]
    # A module's globals hold what a script has in a variable just now: the last one, not all.
    found = [each for each in found if not (isinstance(each, dict) and "__name__" in each)]
    if not found:
        return "a variable or another object"
    container = min(found, key=lambda each: isinstance(each, dict))
    name = _name_of(container)
    return f"the {type(container).__name__} `{name}`" if name else f"a {type(container).__name__}"


def _name_of(container: Any) -> str:
    """A variable, or an attribute of one, of the user's functions that run now."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:
                if value is container:
                    return name
                for attribute, inner in getattr(value, "__dict__", {}).items():
                    if inner is container and not isinstance(value, (type, types.ModuleType)):
                        return f"{name}.{attribute}"
        frame = frame.f_back
    return ""
