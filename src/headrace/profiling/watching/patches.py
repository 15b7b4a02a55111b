"""Functions put in the place of others for a while, and everything put back as it was."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from headrace.profiling.leaking.lines import is_users

Place = tuple[str, int]
_MISSING = object()


class Patches:
    """Attributes of classes and modules that are replaced while this is installed.

    While torch compiles, everything is taken out: the compiler reads the source of what it meets, and must meet torch's
    own. Where somebody has patched on top meanwhile, their function stays; ours below it then only passes on.
    """

    def __init__(self) -> None:
        self.on = False
        self._entries: list[tuple[Any, str, Any, Any]] = []
        self._lock = threading.RLock()
        self._handler: Any = None

    def add(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace ``owner.name`` by ``make(what it is now)`` from `install` on."""
        own = vars(owner).get(name, _MISSING)
        ours = make(getattr(owner, name))
        self._entries.append((owner, name, own, ours))

    def install(self) -> None:
        self.on = True
        self._put()
        if "torch._dynamo" in sys.modules:
            self.mind_compiler()

    def remove(self) -> None:
        self.on = False
        self._take()
        handler, self._handler = self._handler, None
        if handler is not None:
            for callbacks, ours in (
                (handler.start_callbacks, self._compiling),
                (handler.end_callbacks, self._compiled),
            ):
                if ours in callbacks:  # a reset of the compiler has cleared them
                    callbacks.remove(ours)

    def mind_compiler(self) -> None:
        """From now on step aside while torch compiles. Imports the compiler."""
        with self._lock:
            if self._handler is None and self.on:
                from torch._dynamo.callback import callback_handler
                from torch._dynamo.eval_frame import skip_code

                for _, _, _, ours in self._entries:
                    skip_code(ours.__code__)  # it runs between two compiled parts, and is not to become one
                self._handler = callback_handler
                callback_handler.register_start_callback(self._compiling)
                callback_handler.register_end_callback(self._compiled)

    def _compiling(self, _: Any) -> None:
        self._take()

    def _compiled(self, _: Any) -> None:
        if self.on:
            self._put()

    def _put(self) -> None:
        with self._lock:
            for owner, name, own, ours in self._entries:
                if vars(owner).get(name, _MISSING) is own:
                    setattr(owner, name, ours)

    def _take(self) -> None:
        with self._lock:
            for owner, name, own, ours in reversed(self._entries):
                if vars(owner).get(name, _MISSING) is ours:
                    if own is _MISSING:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, own)


def users_place() -> Place | None:
    """The nearest line of the user's code among the callers."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None
