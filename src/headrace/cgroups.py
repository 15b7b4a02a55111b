"""What the control groups of this process allow it: processor time, memory, processes.

Every group up to the root counts. In a container the path that the kernel names is often not to be seen, while the
root is the container's own group.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

# Version 1 writes the largest number of pages for "no limit".
_NO_LIMIT = 1 << 60


class Limits(msgspec.Struct, frozen=True):
    """The strictest of all groups; ``None`` where there is no limit.

    Args:
        cores: processor time per time.
        memory_bytes: most memory, and used of it, without what can be dropped at once.
        processes: most processes and threads, and how many there are.
    """

    cores: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int = 0
    processes: int | None = None
    processes_used: int = 0


def read_limits(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Limits:
    """Read the limits, of version 2 or 1.

    Args:
        membership: lines ``number:controllers:path``.
        root: where the groups are mounted.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return Limits()
    groups = {name: path for _, names, path in lines for name in names.split(",")}
    cores = [allowed for group in _groups(root, groups, "cpu") if (allowed := _cores(group)) is not None]
    memory = [
        (most, _used(group))
        for group in _groups(root, groups, "memory")
        if (most := _number(group, "memory.max", "memory.limit_in_bytes")) is not None and most < _NO_LIMIT
    ]
    processes = [
        (most, _number(group, "pids.current") or 0)
        for group in _groups(root, groups, "pids")
        if (most := _number(group, "pids.max")) is not None
    ]
    return Limits(
        min(cores, default=None),
        *min(memory, key=lambda each: each[0] - each[1], default=(None, 0)),
        *min(processes, key=lambda each: each[0] - each[1], default=(None, 0)),
    )


def _groups(root: Path, groups: dict[str, str], controller: str) -> Iterator[Path]:
    """Folders of the group and of those that it is part of."""
    own = Path(groups.get("", "/").lstrip("/"))
    yield from (top / each for top in (root, root / "unified") for each in (own, *own.parents))
    own = Path(groups.get(controller, "/").lstrip("/"))
    yield from (root / controller / each for each in (own, *own.parents))


def _cores(group: Path) -> float | None:
    """Processor time per time: quota and period of version 2 in one file, of version 1 in two."""
    words = [*_words(group / "cpu.max"), *_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
    return int(words[0]) / int(words[1]) if len(words) == 2 and all(word.isdigit() for word in words) else None


def _used(group: Path) -> int:
    """Memory in use, without pages of files that nobody has used for a while."""
    used = _number(group, "memory.current", "memory.usage_in_bytes") or 0
    words = _words(group / "memory.stat")
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    return max(0, used - int(pairs.get("total_inactive_file") or pairs.get("inactive_file") or 0))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _number(group: Path, *names: str) -> int | None:
    """The number in the first of these files that there is; ``None`` if there is none, or it says ``max``."""
    words = next(filter(None, (_words(group / name) for name in names)), ["max"])
    return int(words[0]) if words[0].isdigit() else None
