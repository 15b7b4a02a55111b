"""What somebody waits for: known by the name of the C function that a line calls, and by the library that calls it.

Names alone do not prove a wait (`get` of a dictionary is none); who uses them also looks at the processor's clock.
Waits have the words of `record.Stack`: ``sleep``, ``socket``, ``lock``, ``task``, ``future``, ``thread``, ``process``;
here a lock is one that somebody holds, while an event, a condition or a queue is a ``future`` that somebody must set.
Two more are for threads nobody waits with: ``loop``, an event loop that has nothing to run, and ``idle``, a thread of a
pool that has no work.
"""

from __future__ import annotations

import opcode
import sys
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, CodeType
from typing import Any

_BY_NAME = {
    "socket": "select poll epoll kqueue control recv recv_into recvfrom recvfrom_into recvmsg recvmsg_into accept "
    "_accept connect connect_ex send sendall sendto sendmsg sendfile do_handshake getaddrinfo gethostbyname "
    "gethostbyname_ex gethostbyaddr getnameinfo",
    "sleep": "sleep",
    "lock": "acquire acquire_lock __enter__",
    "thread": "join",
    "process": "waitpid wait3 wait4 waitid",
    "future": "get wait result",
    "loop": "run_forever run_until_complete",
}
_NAMES = {name: kind for kind, names in _BY_NAME.items() for name in names.split()}
# Far more often those of methods that never wait: of a dictionary, of a string.
_QUICK = {"get", "join", "wait", "result"}

# Functions that say it better than what they call. The end of the file, then how the qualified name begins.
_FUNCTIONS: list[tuple[str, str, str]] = [
    ("/threading.py", "Thread.join", "thread"),
    ("/threading.py", "Thread._wait_for_tstate_lock", "thread"),
    ("/threading.py", "_shutdown", "thread"),
    ("/threading.py", "Semaphore.", "lock"),
    ("/threading.py", "Condition.wait", "future"),
    ("/threading.py", "Event.wait", "future"),
    ("/threading.py", "Barrier.", "future"),
    ("/queue.py", "", "future"),
    ("/concurrent/futures/thread.py", "_worker", "idle"),
    ("/concurrent/futures/process.py", "_process_worker", "idle"),
    ("/concurrent/futures/process.py", "_ExecutorManagerThread.", "process"),
    ("/concurrent/futures/_base.py", "", "thread"),
    ("/multiprocessing/connection.py", "", "process"),
    ("/multiprocessing/popen_fork.py", "", "process"),
    ("/multiprocessing/popen_spawn_posix.py", "", "process"),
    ("/multiprocessing/process.py", "BaseProcess.join", "process"),
    ("/multiprocessing/queues.py", "", "process"),
    ("/multiprocessing/pool.py", "worker", "idle"),
    ("/multiprocessing/pool.py", "Pool._", "idle"),
    ("/multiprocessing/pool.py", "", "process"),
    ("/subprocess.py", "", "process"),
    ("/ssl.py", "", "socket"),
    ("/socket.py", "", "socket"),
    ("/socketserver.py", "", "socket"),
    ("/asyncio/base_events.py", "BaseEventLoop._run_once", "loop"),
    ("/asyncio/base_events.py", "BaseEventLoop.run_in_executor", "thread"),
    ("/asyncio/base_events.py", "BaseEventLoop.getaddrinfo", "socket"),
    ("/asyncio/base_events.py", "BaseEventLoop.sock_", "socket"),
    ("/asyncio/base_events.py", "BaseEventLoop.create_connection", "socket"),
    ("/asyncio/selector_events.py", "", "socket"),
    ("/asyncio/sslproto.py", "", "socket"),
    ("/asyncio/streams.py", "", "socket"),
    ("/asyncio/tasks.py", "sleep", "sleep"),
    ("/asyncio/locks.py", "Lock.", "lock"),
    ("/asyncio/locks.py", "Semaphore.", "lock"),
    ("/asyncio/locks.py", "_ContextManagerMixin.", "lock"),
    ("/asyncio/locks.py", "", "future"),
    ("/asyncio/queues.py", "", "future"),
    ("/asyncio/subprocess.py", "", "process"),
    ("/asyncio/base_subprocess.py", "", "process"),
    ("/asyncio/threads.py", "to_thread", "thread"),
    ("/anyio/_backends/_asyncio.py", "AsyncIOBackend.run_sync_in_worker_thread", "thread"),
    ("/anyio/_backends/_asyncio.py", "run_sync_in_worker_thread", "thread"),
    ("/anyio/_backends/_asyncio.py", "WorkerThread.", "idle"),
    ("/anyio/_backends/_asyncio.py", "SocketStream.", "socket"),
    ("/anyio/_backends/_asyncio.py", "UNIXSocketStream.", "socket"),
    ("/anyio/_backends/_asyncio.py", "Process.", "process"),
    ("/anyio/streams/tls.py", "", "socket"),
    ("/aiohttp/client_proto.py", "", "socket"),
    ("/aiohttp/streams.py", "", "socket"),
    ("/aiohttp/connector.py", "", "socket"),
    ("/websockets/asyncio/connection.py", "Connection.recv", "socket"),
]
_BY_FILE: dict[str, list[tuple[str, str, str]]] = {}
for _rule in _FUNCTIONS:
    _BY_FILE.setdefault(_rule[0].rpartition("/")[2], []).append(_rule)
_FOLDERS = {"/httpcore/": "socket", "/asyncpg/": "socket"}
# How far out, through frames of libraries, it is looked for who says it better.
_FRAMES = 10
_FRAMES_OF_SELECTORS = 2


def told_by(file: str, function: str) -> str:
    """What is waited for in a function of a library; empty if it does not say."""
    if function == "<module>":
        return ""  # it is being imported
    file = file.replace("\\", "/")
    for end, begin, kind in _BY_FILE.get(file[file.rfind("/") + 1 :], ()):
        if file.endswith(end) and function.startswith(begin):
            return kind
    return next((kind for folder, kind in _FOLDERS.items() if folder in file), "")


def is_known(calls: str) -> bool:
    """Whether a function of C with this name waits, as far as a name says."""
    return calls in _NAMES


def is_quick(calls: str, tells: str) -> bool:
    """Whether such a name says little, unless the function that calls it tells that it waits."""
    return calls in _QUICK and not tells


def reason(calls: str, outwards: Iterable[tuple[str, bool]]) -> str:
    """What a thread or a task waits for, if it waits.

    Args:
        calls: name of what the innermost instruction calls.
        outwards: of the places of its stack, the innermost first, what they tell, and whether they are a library's.
            The last library function on the way out to the program's own code has the last word.
    """
    found = _NAMES.get(calls, "")
    for number, (tells, library) in enumerate(outwards):
        if not library or number == _FRAMES:
            break
        if tells == "loop":
            # Further out it only says that a callback of the loop is what waits.
            return "loop" if number < _FRAMES_OF_SELECTORS else found
        found = tells or found
    return found


# What an instruction calls is found by going back from it, undoing the stack's effects, to where that was loaded.

_NAME = opcode.opname
_CALLS = {"CALL", "CALL_KW", "PRECALL"}
_SKIPPED = {"CACHE", "EXTENDED_ARG", "PRECALL", "KW_NAMES", "NOP", "RESUME", "COPY_FREE_VARS"}
_SHIFTED = {"LOAD_GLOBAL", *(["LOAD_ATTR"] if sys.version_info >= (3, 12) else [])}
_OF_NAMES = {"LOAD_NAME", "LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD"}
_LOCALS = {"LOAD_FAST", "LOAD_DEREF", "LOAD_FAST_CHECK", "LOAD_CLOSURE", "LOAD_CLASSDEREF"}
_EXTENDED = opcode.opmap["EXTENDED_ARG"]


def called(code: CodeType, instruction: int, names: Mapping[str, Any]) -> str:
    """Name of what the instruction at an offset calls, as far as it is read from it; empty where it calls nothing.

    Args:
        instruction: `FrameType.f_lasti`.
        names: the function's globals; what is called by another name there has its own.
    """
    if instruction < 0:
        return ""
    text = code.co_code
    name = _NAME[text[instruction]]
    if name in ("BEFORE_WITH", "LOAD_SPECIAL"):
        return "__enter__"
    if name not in _CALLS:
        return ""
    wanted = _argument(text, instruction) + (name == "CALL_KW")
    at = instruction
    while True:
        at = _before(text, at)
        if at < 0:
            return ""
        name = _NAME[text[at]]
        if wanted == 0:
            if name == "PUSH_NULL":
                continue
            found = _loaded(code, name, _argument(text, at))
            known = names.get(found) if name in ("LOAD_GLOBAL", "LOAD_NAME") else None
            return known.__name__ if isinstance(known, BuiltinFunctionType) else found
        wanted -= _effect(text, at, name)
        if wanted < 0:
            return ""


def _before(text: bytes, at: int) -> int:
    """Offset of the instruction before one; negative if there is none."""
    at -= 2
    while at >= 0 and _NAME[text[at]] in _SKIPPED:
        at -= 2
    return at


def _argument(text: bytes, at: int) -> int:
    found, shift = text[at + 1], 8
    while at >= 2 and text[at - 2] == _EXTENDED:
        at -= 2
        found |= text[at + 1] << shift
        shift += 8
    return found


def _effect(text: bytes, at: int, name: str) -> int:
    """By how many values the stack is higher after an instruction than before it, if it does not jump."""
    argument = _argument(text, at)
    if name == "CALL":  # what Python itself says of it differs between versions
        return -argument - 1
    has_argument = text[at] >= opcode.HAVE_ARGUMENT
    try:
        return opcode.stack_effect(text[at], argument if has_argument else None, jump=False)
    except ValueError:
        return 0


def _loaded(code: CodeType, name: str, argument: int) -> str:
    if name in _OF_NAMES:
        return code.co_names[argument >> 1 if name in _SHIFTED else argument]
    if name in _LOCALS:
        names = (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        return names[argument] if argument < len(names) else ""
    return ""
