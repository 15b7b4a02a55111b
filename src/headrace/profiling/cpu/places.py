"""Functions and the places in them that stacks are made of: numbered, named, and known for what they wait for.

A stack is looked at hundreds of times a second, so that everything about a place (which function, which line, what the
instruction there calls) is found out once, when it is first seen.
"""

from __future__ import annotations

import inspect
import os
import sys
from types import CodeType, FrameType
from typing import NamedTuple

from headrace.profiling.cpu import waits
from headrace.profiling.record import Frame

# Of a deeper stack the middle is left out: what began it and what it does now say more.
_DEEPEST = 300
NOWHERE = -1
_RESUMED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_STANDARD = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_TYPED_IN = ("<string>", "<stdin>", "<ipython", "<doctest")


# Files that run in the threads that are looked at, but are none of the program's doing: they start it, look at it, and
# are an empty callback of its loops.
_HERE = os.path.dirname(os.path.abspath(__file__))
OURS = {entry.path for entry in os.scandir(_HERE) if entry.name.endswith(".py")}
OURS.add(os.path.join(os.path.dirname(_HERE), "block.py"))


class Place(NamedTuple):
    """An instruction of a function.

    Args:
        frame: number of the function.
        tells: what is waited for in this function, if somebody waits in it; empty where that does not say it.
    """

    frame: int
    line: int
    tells: str
    library: bool


class Places:
    """Everything that was seen of a process's code. Not for several threads at once."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.places: list[Place] = []
        self.resumed: set[int] = set()  # functions of the program's own that pause and go on
        self._by_frame: dict[Frame, int] = {}
        self._by_code: dict[int, int] = {}
        self._by_instruction: dict[tuple[int, int], int] = {}
        self._called: dict[int, str] = {}
        self._kept: list[CodeType] = []  # or another one could get its number
        self._floors: set[int] = set()

    def set_floor(self, code: CodeType) -> None:
        """Leave out, of every stack, this function and what stands before it: who started the program."""
        self._kept.append(code)
        self._floors.add(id(code))

    def of_stack(self, frame: FrameType | None) -> list[int]:
        """Places of a stack, the outermost first."""
        found: list[int] = []
        known, floors = self._by_instruction, self._floors
        while frame is not None:
            code = frame.f_code
            if floors and id(code) in floors:
                break
            place = known.get((id(code), frame.f_lasti))
            if place is None:
                place = self.of_frame(frame)
            if place != NOWHERE:
                found.append(place)
            frame = frame.f_back
        if len(found) > _DEEPEST:
            del found[_DEEPEST // 2 : -_DEEPEST // 2]
        found.reverse()
        return found

    def of_frame(self, frame: FrameType) -> int:
        """The place where a function is now; `NOWHERE` in one of ours."""
        code, instruction = frame.f_code, frame.f_lasti
        number = self._by_instruction.get((id(code), instruction))
        if number is None and code.co_filename in OURS:
            number = self._by_instruction[id(code), instruction] = NOWHERE
            self._kept.append(code)
        if number is None:
            function = self.of_code(code)
            seen = self.frames[function]
            library = seen.kind == "library"
            tells = waits.told_by(seen.file, seen.function) if library else ""
            number = len(self.places)
            self.places.append(Place(function, frame.f_lineno or 0, tells, library))
            self._by_instruction[id(code), instruction] = number
        return number

    def called_by(self, frame: FrameType) -> str:
        """Name of what a function's instruction of now calls, as the source has it; empty where it calls nothing."""
        number = self.of_frame(frame)
        if number == NOWHERE:
            return ""
        name = self._called.get(number)
        if name is None:
            name = self._called[number] = waits.called(frame.f_code, frame.f_lasti, frame.f_globals)
        return name

    def of_code(self, code: CodeType) -> int:
        """Number of a function."""
        number = self._by_code.get(id(code))
        if number is None:
            file = code.co_filename
            number = self.of_function(Frame(code.co_qualname, file, code.co_firstlineno, kind_of(file)))
            self._by_code[id(code)] = number
            if code.co_flags & _RESUMED and self.frames[number].kind == "user":
                self.resumed.add(number)
            self._kept.append(code)
        return number

    def of_builtin(self, name: str) -> int:
        """Number of a function of C."""
        return self.of_function(Frame(name, "~", 0, "builtin"))

    def place_of_builtin(self, name: str) -> int:
        """A place for what is no code of Python's."""
        function = self.of_builtin(name)
        number = self._by_instruction.get((-1, function))
        if number is None:
            number = self._by_instruction[-1, function] = len(self.places)
            self.places.append(Place(function, 0, "", False))
        return number

    def of_function(self, frame: Frame) -> int:
        """Number of a function: the same for two code objects of one name in one place."""
        number = self._by_frame.get(frame)
        if number is None:
            number = self._by_frame[frame] = len(self.frames)
            self.frames.append(frame)
        return number


def kind_of(file: str) -> str:
    """Whose code a file is: ``user``, ``library`` or ``builtin``."""
    if file == "~":
        return "builtin"
    if file.startswith("<"):
        return "user" if file.startswith(_TYPED_IN) else "library"
    installed = file.startswith((_STANDARD, _PACKAGE)) or any(part in file for part in _INSTALLED)
    return "library" if installed or file.startswith(_FROZEN) else "user"


# Standard modules that a zip file holds, and code that a binary distribution was made from.
_FROZEN = tuple(path for path in sys.path if path.endswith(".zip")) or ("<frozen",)
