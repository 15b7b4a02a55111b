"""The HTTP front-end process: uvicorn on the socket that the supervisor has opened. Never imports torch."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Callable, Sequence

import uvicorn

from headrace import metrics
from headrace.child import Child, raise_descriptor_limit
from headrace.core import Beat, Hello
from headrace.machine import watch_loop
from headrace.serving.app import FrontEnd, Part
from headrace.serving.protocol import PatientProtocol
from headrace.serving.router import Router

# Descriptors kept for everything that is not a client's connection.
_OTHER_DESCRIPTORS = 128
BEAT_S = 0.5


def main(argv: list[str], parts: Callable[[Child], Sequence[Part]] = lambda child: ()) -> int:
    """``python -m headrace.serving.http LISTENER_FD SLOT RUN_DIR CONTROL_FD``.

    Args:
        parts: makes what is served beside the models.
    """
    listener = socket.socket(fileno=int(argv[0]))
    child = Child(argv[1:], cleans_up=True)
    router = Router(child.config, child.run_dir, child.row)
    reader = metrics.Reader(child.run_dir.metrics)
    app = FrontEnd(child.config, router, child.row, reader, parts(child))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http=PatientProtocol,
            ws="websockets-sansio",
            ws_max_size=child.config.max_body_bytes,
            lifespan="on",
            limit_concurrency=raise_descriptor_limit() - _OTHER_DESCRIPTORS,
            timeout_graceful_shutdown=max(1, round(child.config.shutdown_grace_s)),
        )
    )

    # Modules and tokenizers live as long as the process, and requests make few cycles: a collection every 700 objects
    # would cost a tenth of the time and find nothing.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_serve(server, listener, app, child))
    return 0


async def _serve(server: uvicorn.Server, listener: socket.socket, app: FrontEnd, child: Child) -> None:
    loop = asyncio.get_running_loop()

    def drain(grace_s: float) -> None:
        server.should_exit = True
        loop.call_soon_threadsafe(app.drain)

    child.watch(drain)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    watching = asyncio.ensure_future(watch_loop(child.row, child.slot))
    # It is ready when it listens and is connected to a worker of every model. Neither side offers an event to await.
    while not (server.started and app.ready) and not serving.done():  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    if not serving.done():
        child.tell(Hello())
    step = 0
    while not serving.done():
        # From the loop that does the work: a beat from a thread would only prove that the thread is well.
        child.tell(Beat(step := step + 1))
        await asyncio.wait({serving}, timeout=BEAT_S)
    watching.cancel()
    await serving


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
