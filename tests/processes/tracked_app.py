"""A user's own application, which counts; served by whatever manager the test starts."""

from __future__ import annotations

import os

from fastapi import FastAPI

import headrace as hr

app = FastAPI()
app.add_middleware(hr.MetricsMiddleware, model="shop")
app.mount("/metrics", hr.metrics_app())
if port := os.environ.get("METRICS_PORT"):
    hr.start_metrics_server(int(port))


@app.get("/items/{item}")
async def item(item: int) -> int:
    with hr.track_request(model="m"):
        return os.getpid()


active: list[hr.track_request] = []


@app.get("/hold")
async def hold() -> int:
    """Leaves a request that never ends."""
    active.append(hr.track_request(model="m"))
    active[-1].__enter__()
    return os.getpid()
