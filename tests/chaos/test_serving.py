"""The short form of the chaos run; `make soak` has the long one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from chaos import ARGUMENTS, Chaos
from conftest import serving


@pytest.mark.usefixtures("needs_proc")
def test_every_request_gets_its_own_answer_whatever_dies(tmp_path: Path) -> None:
    with serving(tmp_path, *ARGUMENTS) as server:
        chaos = Chaos(server, seed=20261124, seconds=20)
        report = chaos.run()
        sys.stderr.write(json.dumps(report.as_dict(), indent=2))
        chaos.check()
