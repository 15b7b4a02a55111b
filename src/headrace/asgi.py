"""The application for other servers: ``uvicorn headrace.asgi:app``, or gunicorn with as many workers as you like.

Models and options come from `headrace.toml` of the current directory and from ``HEADRACE_…`` variables.
"""

from __future__ import annotations

from headrace import config
from headrace.serving.embedded import EmbeddedFrontEnd

app = EmbeddedFrontEnd(config.load())
