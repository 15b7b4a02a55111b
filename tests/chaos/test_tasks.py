"""The short form of the chaos run of tasks; `make soak` has the long one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from conftest import stage
from task_chaos import ARGUMENTS, TaskChaos


@pytest.mark.usefixtures("needs_proc")
def test_every_step_counts_once_and_every_stream_is_whole_whatever_dies(tmp_path: Path) -> None:
    with stage(tmp_path, *ARGUMENTS) as play:
        # More steps than places could run in a few seconds, so that several kills find something in flight.
        chaos = TaskChaos(play, agents=24, steps=14, seed=20261124, kill_every_s=1.5, step_s=0.3)
        report = chaos.run(limit_s=60)
        sys.stderr.write(json.dumps(report.as_dict(), indent=2))
        chaos.check()
