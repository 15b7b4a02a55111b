"""The ladder from a wish to an artifact: climb, choose, pack, report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from headrace.errors import ConfigError
from headrace.optimizing import report
from headrace.optimizing.ladder import Result, Wish, climb, default_work
from headrace.optimizing.words import Predicted, Report, Row


def optimize(
    wish: Wish,
    out: Path | None,
    *,
    resume: bool = False,
    tell: Callable[[Row], None] = lambda row: None,
    foresee: Callable[[Predicted], None] = lambda predicted: None,
) -> Report:
    """Climb the ladder, and make an artifact of the rung that was chosen.

    Args:
        out: the artifact's directory, which gets the report too; without one there is only the report that is returned.
        resume: go on with what an earlier climb has left beside ``out``.
        tell, foresee: as `climb` has them.

    Raises: as `into`.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="headrace-ladder-") as folder:
            return climb(wish, Path(folder), tell=tell, foresee=foresee).report
    return into(wish, out, resume=resume, tell=tell, foresee=foresee).report


def into(
    wish: Wish,
    out: Path,
    *,
    resume: bool = False,
    tell: Callable[[Row], None] = lambda row: None,
    foresee: Callable[[Predicted], None] = lambda predicted: None,
) -> Result:
    """Climb the ladder and make an artifact. What was built and found stays beside ``out``, also where that ends early.

    Raises:
        ConfigError: ``out`` is something else already, or an option is wrong.
        LoadError, InvalidInput, Unavailable: the target or the samples cannot be used.
    """
    from headrace.optimizing.pack import check_out

    check_out(out)
    work = default_work(out)
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {work}: {error.strerror}", field="out") from None
    result = climb(wish, work, resume=resume, tell=tell, foresee=foresee)
    report.write(result.report, work)  # what was measured is kept also where no artifact can be made of it
    save(result, out)
    return result


def save(result: Result, out: Path) -> None:
    """An artifact of the rung that was chosen, with the report. Raises as `pack.pack`."""
    from headrace.optimizing.pack import pack

    pack(result, out)
    report.write(result.report, out)
