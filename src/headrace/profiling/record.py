"""What was seen of one run, raw: saved first, judged and drawn after. Every report can be made again from it.

A record knows nothing of findings or formats. CPU and waiting are two lists that are never added up: a stack that runs
holds a processor, a chain of awaits holds nothing but somebody's time.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from headrace.errors import ConfigError

VERSION = 1


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """One function.

    Args:
        function: its qualified name where Python knows it.
        file: as the program has it; ``~`` for what is built in, as in pstats.
        line: where it begins; 0 where nothing is known.
        kind: ``user`` for the program's own code, ``library`` for installed and standard ones, ``builtin``.
    """

    function: str
    file: str
    line: int
    kind: str = "user"


class Stack(msgspec.Struct, frozen=True):
    """A way through the program, and the time that was seen on it.

    Args:
        frames: numbers of `Record.frames`, the outermost first.
        lines: line that was being run in each of them.
        seconds: every sample counts for the time since the one before it, whatever the rate.
        samples: how often it was seen.
        owner: thread of a running stack, name of the task of a waiting one.
        waits_for: of a waiting chain what its end waits for: ``sleep``, ``socket``, ``lock``, ``task``, ``future``,
            ``thread``, ``process``; of a thread's stack that sits in a call that waits, the same; else empty.
    """

    frames: list[int]
    lines: list[int]
    seconds: float
    samples: int
    owner: str = ""
    waits_for: str = ""


class Call(msgspec.Struct, frozen=True):
    """Exact counts of one function, by tracing (`cProfile`), its own cost taken off as well as it is known.

    Args:
        frame: number of `Record.frames`.
        calls: all of them; ``primitive``: those that were no recursion.
        own_s, cumulative_s: without and with what it called; seconds of wall time on the traced threads.
        callers: number of the calling frame → (calls, primitive calls, own_s, cumulative_s) on its account.
        repeated: share of sampled calls whose arguments had been seen before, 0 to 1; ``None`` if not looked at.
        longest_s: the longest single call that was seen; ``None`` if not looked at.
    """

    frame: int
    calls: int
    primitive: int
    own_s: float
    cumulative_s: float
    callers: dict[int, tuple[int, int, float, float]] = {}
    repeated: float | None = None
    longest_s: float | None = None


class Block(msgspec.Struct, frozen=True):
    """A stretch for which one piece of code kept an event loop from everything else.

    Args:
        stack: seen in it: frames as in `Stack`.
        lines: as in `Stack`.
        seconds: its length.
    """

    frames: list[int]
    lines: list[int]
    seconds: float


class Gil(msgspec.Struct, frozen=True):
    """How threads stood in each other's way.

    Args:
        runnable: mean number of threads that had a running stack, over the samples.
        late_s: median of how late a thread that only sleeps was woken.
        shares: of the time with at least two runnable threads, 0 to 1.
        switch_s: the interpreter's switch interval meanwhile.
    """

    runnable: float
    late_s: float
    shares: float
    switch_s: float = 0.005


class Child(msgspec.Struct, frozen=True):
    """A process that the program started and that was looked at too, or only counted."""

    command: str
    pid: int
    cpu_s: float
    record: Record | None = None


class Line(msgspec.Struct, frozen=True):
    """A line of a function that was followed line by line.

    Args:
        hits: how often it ran; ``seconds``: all of them together.
    """

    file: str
    line: int
    function: str
    hits: int
    seconds: float
    source: str = ""


class Machine(msgspec.Struct, frozen=True):
    """What times can be compared across: those of one machine with one Python, and no others.

    Args:
        fingerprint: of all the rest; records with different ones are not compared.
    """

    fingerprint: str
    processor: str
    cores: int
    system: str
    python: str
    packages: dict[str, str] = {}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Args:
        command: as it was given, for people; ``arguments`` to run it again in ``directory``: those of a program, or of
            Python where the first one is a script or ``-m``.
        started: seconds since 1970.
        attached: it was a look at a process that went on: its seconds are those of a window, of any length.
        wall_s, cpu_s: of the run; ``cpu_s`` is the process's own, user and system.
        children_cpu_s: of processes it started and waited for.
        rate_hz: mean rate at which it was sampled; 0 without sampling.
        sampling_cpu_s, tracing_s: what watching cost: taken off, or said.
        cpu: running stacks. waiting: chains of awaits, in task-seconds, and threads that wait.
        calls: traced functions; empty when the process was only sampled.
        blocks: of event loops.
        import_s: spent importing modules.
        lines: followed line by line.
        device: timeline of a GPU as `profiling/device.py` has it; ``None`` without one.
        notes: what the reader must know, for example what could not be seen.
    """

    version: int = VERSION
    command: str
    arguments: list[str] = []
    directory: str = ""
    started: float
    pid: int
    machine: Machine
    commit: str = ""
    attached: bool = False
    wall_s: float
    cpu_s: float
    children_cpu_s: float = 0.0
    rate_hz: float = 0.0
    sampling_cpu_s: float = 0.0
    tracing_s: float = 0.0
    exit_status: int | None = None
    frames: list[Frame] = []
    cpu: list[Stack] = []
    waiting: list[Stack] = []
    calls: list[Call] = []
    blocks: list[Block] = []
    gil: Gil | None = None
    import_s: float = 0.0
    children: list[Child] = []
    lines: list[Line] = []
    device: dict[str, object] | None = None
    notes: list[str] = []


def write(record: Record, path: Path) -> None:
    """Save a record as JSON. Raises `OSError`."""
    path.write_bytes(msgspec.json.encode(record))


def read(path: Path) -> Record:
    """Read what `write` has saved.

    Raises:
        ConfigError: there is no such file, or it is no record, or one of another version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="record") from None
    try:
        found = msgspec.json.decode(content, type=Record)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{path} is no record of a run: {error}", field="record", hint="headrace profile --save json writes one"
        ) from None
    if found.version != VERSION:
        raise ConfigError(f"{path} is of version {found.version}, this headrace reads {VERSION}", field="record")
    return found
