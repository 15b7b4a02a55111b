"""A front-end process that serves agents beside models, or agents alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from headrace.child import Child
from headrace.serving import http
from headrace.serving.app import Part
from headrace.tasks.gateway import Gateway
from headrace.tasks.routes import add_routes


class Agents(Gateway):
    """The gateway of the tasks as a part of a front end."""

    name = "agents"

    def __init__(self, child: Child) -> None:
        super().__init__(child.config, child.row)
        self._options = child.config

    def add_routes(self, app: Any) -> None:
        """Serve the endpoints under ``/agent``."""
        add_routes(app, self, self._options)


def _parts(child: Child) -> Sequence[Part]:
    return [Agents(child)]


def main(argv: list[str]) -> int:
    """``python -m headrace.front LISTENER_FD SLOT RUN_DIR CONTROL_FD``."""
    return http.main(argv, _parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
