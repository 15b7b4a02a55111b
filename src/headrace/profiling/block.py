"""`profiling`: a profile of a block of code, in the process that it is part of, around sync and async code.

    with profiling("search.prof") as p:
        await search(query)
    p.record          # everything that was seen
    p.findings        # what it says

What is traced is the thread of the block, so that in a running event loop other tasks are in it too; what is sampled is
the whole process. The calls of threads that had begun before the block are counted from Python 3.12 on only.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import msgspec

from headrace.errors import ConfigError, SetupError
from headrace.profiling import ledger
from headrace.profiling.cpu.awaited import with_awaits
from headrace.profiling.cpu.recording import Recording
from headrace.profiling.finding import Finding
from headrace.profiling.record import Record
from headrace.profiling.render import as_table, write_prof
from headrace.profiling.render.table import ranked

_ACTIVE = threading.Lock()


class profiling:  # noqa: N801
    """Profile a block, and print its top functions to standard error at the end, also after an exception.

    Wall time of awaits is on the account of the coroutine that awaits, not of the event loop's ``select``: in the
    table, in the file, and as chains in ``record.waiting``.

    Args:
        output_file: gets the profile for `pstats` and SnakeViz.
        top_n: functions in the table; 0 for all, less than 0 for no table.
        sort_by: ``cumulative``, ``own``, ``calls`` or ``percall``, also by the names that `pstats` has for them.

    Raises:
        ConfigError: there is no such order, or, at the end, the file cannot be written.
        SetupError: another profiler, or another such block, is active.
    """

    def __init__(
        self, output_file: str | os.PathLike[str] | None = None, top_n: int = 20, sort_by: str = "cumulative"
    ) -> None:
        ranked([], sort_by)
        self._file, self._top, self._sort = output_file, top_n, sort_by
        self._recording: Recording | None = None
        self._record: Record | None = None

    @property
    def record(self) -> Record:
        """Everything that was seen. Raises `SetupError` as long as the block goes on."""
        if self._record is None:
            raise SetupError("the profiled block has not ended yet", hint="read its record after the block")
        return self._record

    @property
    def findings(self) -> list[Finding]:
        """The diagnosis. Raises `SetupError` as long as the block goes on."""
        from headrace.profiling.diagnose import diagnose

        return diagnose(self.record)

    def __enter__(self) -> profiling:
        if not _ACTIVE.acquire(blocking=False):
            raise SetupError("another block is being profiled", hint="one at a time, in all threads together")
        try:
            self._recording = Recording()
            self._recording.start()
        except BaseException:
            _ACTIVE.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._recording is not None
        try:
            self._recording.stop_tracing()
            self._recording.stop()
        finally:
            _ACTIVE.release()
        command = " ".join([os.path.basename(sys.argv[0]) or "python", *sys.argv[1:]])
        record = self._recording.record(f"a block of {command}")
        self._record = msgspec.structs.replace(record, machine=ledger.machine())
        shown = with_awaits(self._record)
        if self._top >= 0:
            print(as_table(shown, self._sort, self._top), file=sys.stderr)
        if self._file is not None:
            try:
                write_prof(shown, Path(self._file))
            except OSError as error:
                raise ConfigError(f"cannot write {self._file}: {error.strerror}", field="output_file") from None
