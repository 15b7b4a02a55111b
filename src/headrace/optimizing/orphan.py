"""A process of the ladder does not outlive the ladder, however that ends: also where it hangs in code of others."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# In a child's environment: the process that has started it.
PARENT = "HEADRACE_LADDER_PID"
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the system end this process together with the one that has started it. On Linux; elsewhere a child that
    waits for a command ends as its standard input does, and one that is busy as soon as it is done."""
    if not sys.platform.startswith("linux") or PARENT not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ[PARENT]):  # it was gone before that
        os._exit(1)
