"""A program that runs in this process as if Python itself had started it, recorded from its first line to its last.

What belongs to the run lies in a folder: `Job` says what to do, the record is written beside it. The program's exit
status, output and traceback are its own. Started as ``python -c CODE JOB_FILE``.
"""

from __future__ import annotations

import atexit
import builtins
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from headrace.profiling.cpu import children
from headrace.profiling.cpu.partial import Partial, finish_at_sigterm, write
from headrace.profiling.cpu.recording import Recording
from headrace.profiling.record import Frame

# Not ``-m``: the module would be found below the current directory first, and be there as ``__main__``.
CODE = (
    "import sys; sys.flags.safe_path or sys.path.pop(0); from headrace.profiling.cpu.program import main; "
    "main(sys.argv[1])"
)
RECORD = "record.json"
# What is known so far, for a run that ends without a word.
PARTIAL = "partial.json"
LINES = "lines.json"
DEVICE = "device.json"
_FIRST_PARTIAL_S = 1.0


class Job(msgspec.Struct, frozen=True):
    """What is to be run, and how it is looked at.

    Args:
        target: path of a script, or name of a module.
        folder: where the record and everything else of this run is written.
        trace: count calls. children: sample the Python processes that it starts.
        lines: functions to follow line by line instead of anything else.
        gpu: run it below torch's profiler instead of anything else.
    """

    target: str
    is_module: bool
    arguments: list[str]
    folder: str
    trace: bool = True
    children: bool = True
    lines: list[Frame] = []
    gpu: bool = False

    def command(self) -> list[str]:
        """Arguments of Python that run the same without looking at it."""
        return [*(["-m"] if self.is_module else []), self.target, *self.arguments]


def main(job_file: str) -> None:
    """Run the job of a file."""
    job = msgspec.json.decode(Path(job_file).read_bytes(), type=Job)
    sys.argv[:] = [job.target, *job.arguments]
    try:
        if job.lines:
            _follow_lines(job)
        elif job.gpu:
            _follow_device(job)
        else:
            _record(job, sys._getframe(1).f_code)
    except BaseException:
        # Python itself prints it and chooses the exit status; only our own frames are not to be seen.
        sys.excepthook = _without_us(sys.excepthook)
        raise


class Script(NamedTuple):
    """A script that is ready to run."""

    code: types.CodeType
    module: types.ModuleType


def read_script(job: Job) -> Script | None:
    """What Python does before a script's first line; `None` for a module, whose packages are run to find it."""
    if job.is_module:
        return None
    path = os.path.abspath(job.target)
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
    return Script(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), module)


def run_program(job: Job, script: Script | None) -> None:
    """What Python does for ``python target`` and for ``python -m target``."""
    module = script.module if script else types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if script:
        code = script.code
    else:
        if not sys.flags.safe_path:
            sys.path.insert(0, os.getcwd())
        code = _module_code(job.target, module)
        sys.argv[0] = code.co_filename
    vars(module)["__builtins__"] = builtins
    exec(code, vars(module))


def _module_code(name: str, module: types.ModuleType) -> types.CodeType:
    """Code of a module, or of the ``__main__`` of a package. Raises `ImportError` as Python itself words it."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    loader: Any = spec.loader if spec is not None else None
    code = loader.get_code(spec.name) if spec is not None and loader is not None else None
    if spec is None or code is None:
        sys.exit(f"{sys.executable}: No module named {name}")
    module.__spec__, module.__loader__, module.__package__ = spec, loader, spec.parent
    module.__file__ = spec.origin
    return code  # type: ignore[no-any-return]


def _record(job: Job, starter: types.CodeType) -> None:
    folder, pid = Path(job.folder), os.getpid()
    command = " ".join(job.command())
    partial = Partial(lambda: write(recording.record(command), folder / PARTIAL), _FIRST_PARTIAL_S)
    recording = Recording(trace=job.trace, on_look=partial.look)
    recording.places.set_floor(starter)
    recording.places.set_floor(run_program.__code__)
    script = read_script(job)

    def finish() -> None:
        if os.getpid() == pid:
            recording.stop_tracing()
            recording.stop()
            write(recording.record(command), folder / RECORD)

    # Ended by Python after the program's threads, and after what else it wants done at the end.
    atexit.register(finish)
    finish_at_sigterm(finish)
    if job.children:
        children.watch(folder, command, recording.drop_in_child)
    recording.start()
    try:
        run_program(job, script)
    finally:
        if os.getpid() == pid:
            recording.stop_tracing()


def _follow_lines(job: Job) -> None:
    from headrace.profiling.linewise.hottest import following

    found, script = following(job.lines), read_script(job)
    pid = os.getpid()
    try:
        with found:
            run_program(job, script)
    finally:
        if os.getpid() == pid:
            (Path(job.folder) / LINES).write_bytes(msgspec.json.encode(found.lines()))


def _follow_device(job: Job) -> None:
    from headrace.profiling.device import record_gpu

    ended: list[BaseException] = []
    script = read_script(job)

    def run() -> None:
        try:
            run_program(job, script)
        except BaseException as error:  # what was seen until then counts
            ended.append(error)

    timeline = record_gpu(run)
    (Path(job.folder) / DEVICE).write_bytes(msgspec.json.encode(timeline))
    if ended:
        raise ended[0]


def _without_us(hook: Callable[..., Any]) -> Callable[..., Any]:
    """An exception hook that is given the program's own part of a traceback."""

    def show(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        while trace is not None and _is_starter(trace):
            trace = trace.tb_next
        hook(kind, error.with_traceback(trace), trace)

    return show


def _is_starter(trace: types.TracebackType) -> bool:
    file = trace.tb_frame.f_code.co_filename
    ours = file.startswith(os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep)
    return ours or (file == "<string>" and trace.tb_frame.f_globals.get("main") is main)
