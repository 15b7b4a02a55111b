"""What the kernel says that a thread of this process is doing: in which system call it waits, if in any. Linux only.

Reading it takes a system call that lets go of the interpreter's lock: for the few threads whose stack does not tell.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress

# What a thread that wants the interpreter's lock waits in too, like everybody who waits for a lock.
LOCK = "lock"
# In no system call: it has a processor, or is to get one.
RUNS = "running"
_FILE = "file"
_NUMBERS = {
    "x86_64": {
        "socket": (7, 23, 42, 43, 44, 45, 46, 47, 232, 270, 271, 281, 288, 299, 307, 441),
        "sleep": (35, 230),
        "process": (61, 247),
        LOCK: (202,),
        _FILE: (0, 1, 17, 18, 19, 20),
    },
    "aarch64": {
        "socket": (22, 72, 73, 202, 203, 206, 207, 211, 212, 242, 243, 269),
        "sleep": (101, 115),
        "process": (95, 260),
        LOCK: (98,),
        _FILE: (63, 64, 65, 66, 67, 68),
    },
}
_CALLS = {number: kind for kind, numbers in _NUMBERS.get(platform.machine(), {}).items() for number in numbers}


def waits_in(native_id: int) -> str | None:
    """``socket``, ``sleep``, ``process`` or `LOCK`; empty for another call; `RUNS`; `None` if it is not known."""
    try:
        file = os.open(f"/proc/self/task/{native_id}/syscall", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        words = os.read(file, 200).split()
    except OSError:
        return None
    finally:
        os.close(file)
    if len(words) < 3:
        return RUNS if words == [b"running"] else None
    kind = _CALLS.get(int(words[0]), "" if _CALLS else None)
    return _kind_of_file(int(words[1], 16)) if kind == _FILE else kind


def _kind_of_file(number: int) -> str:
    with suppress(OSError):
        what = os.readlink(f"/proc/self/fd/{number}")
        if what.startswith("socket:"):
            return "socket"
        if what.startswith("pipe:"):
            return "process"
    return ""
