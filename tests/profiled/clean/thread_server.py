"""A server of threads that is mostly idle: its main thread waits for connections, and its handlers are quick."""

from __future__ import annotations

import http.server
import subprocess
import sys

_CLIENT = """
import http.client, sys, time
for number in range(40):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    connection.request("GET", f"/{number}")
    connection.getresponse().read()
    time.sleep(0.02)
connection.request("GET", "/stop")
connection.getresponse().read()
"""


def answer(path: str) -> bytes:
    return b"%d" % sum(range(len(path) * 1000))


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = answer(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.path == "/stop":
            self.server.shutdown()

    def log_message(self, *_: object) -> None:
        pass


def main(seed: int = 0) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        client = subprocess.Popen([sys.executable, "-c", _CLIENT, str(server.server_port)])
        server.serve_forever()
    client.wait()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
