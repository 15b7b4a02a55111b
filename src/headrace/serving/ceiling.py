"""How large a batch may be after one did not fit in memory: halved at once, recovered slowly."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from headrace.batcher import Batcher

_log = logging.getLogger(__name__)

# So many batches near the ceiling must pass before it is raised by the factor: what filled the memory may come back.
PASSES_TO_RAISE = 50
RAISE = 1.25
NEAR = 0.75


class Ceiling:
    """Bounds ``max_batch_tokens`` of some batchers. An item without a length counts as one token.

    Args:
        rooms: the batchers.
        limit: what it may never be above.
    """

    def __init__(self, rooms: Sequence[Batcher], limit: int) -> None:
        self._rooms = rooms
        self._limit = limit
        self._passed = 0
        self.tokens = limit

    def lower(self, failed: int) -> None:
        """A batch of so many tokens, padding included, did not fit."""
        self._passed = 0
        self._set(max(1, min(self.tokens, failed) // 2))
        _log.warning(
            "out of memory: batches of at most %d tokens from now on; lower max_batch_size or max_batch_tokens to avoid"
            " the failed attempts",
            self.tokens,
        )

    def passed(self, tokens: int) -> None:
        """A batch of so many tokens has run."""
        if self.tokens == self._limit or tokens < NEAR * self.tokens:
            return
        self._passed += 1
        if self._passed == PASSES_TO_RAISE:
            self._passed = 0
            self._set(min(self._limit, max(self.tokens + 1, int(self.tokens * RAISE))))

    def _set(self, tokens: int) -> None:
        self.tokens = tokens
        for room in self._rooms:
            room.max_batch_tokens = tokens
