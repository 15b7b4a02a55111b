"""What this installation of headrace declares that it needs, and what of that is here.

Read from the metadata of the installed package, so that a new extra needs no line here.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import msgspec

try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
except ImportError:  # a doctor goes on where something is missing
    _CAN_COMPARE = False
else:
    _CAN_COMPARE = True

# It repeats the others.
_ALL = "all"


class Package(msgspec.Struct, frozen=True):
    """One requirement.

    Args:
        wanted: as declared, for example ``torch>=2.11``.
        extra: the extra that asks for it; empty for one that is always needed.
        version: the installed one; empty when there is none.
        fits: whether that version is within the declared range.
    """

    name: str
    wanted: str
    extra: str = ""
    version: str = ""
    fits: bool = True


class Installation(msgspec.Struct, frozen=True):
    """What the metadata say.

    Args:
        version: of headrace.
        python: versions of Python that it is made for; empty when it does not say.
        python_fits: whether the running one is among them.
        problem: why the rest is unknown.
    """

    version: str = ""
    python: str = ""
    python_fits: bool = True
    packages: Sequence[Package] = ()
    problem: str = ""


def read_installation(name: str = "headrace") -> Installation:
    """The requirements of an installed package that apply to this machine."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return Installation(problem=f"{name} runs from its source and is not installed: what it needs is not known")
    python = "".join(found.metadata.get_all("Requires-Python") or [])
    if not _CAN_COMPARE:
        return Installation(found.version, python, problem="versions cannot be compared: packaging is not installed")
    fits = SpecifierSet(python).contains(platform.python_version(), prereleases=True)
    extras = [extra for extra in found.metadata.get_all("Provides-Extra") or [] if extra != _ALL]
    wanted = [Requirement(line) for line in found.requires or []]
    packages = [_package(each) for each in wanted if _applies(each, "")]
    for extra in extras:
        packages += [_package(each, extra) for each in wanted if _applies(each, extra) and not _applies(each, "")]
    return Installation(found.version, python, fits, packages)


def _applies(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _package(wanted: Requirement, extra: str = "") -> Package:
    options = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
    declared = f"{wanted.name}{options}{wanted.specifier}"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Package(wanted.name, declared, extra)
    return Package(wanted.name, declared, extra, version, wanted.specifier.contains(version, prereleases=True))
