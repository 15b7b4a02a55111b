"""A client that asks one question after the other; the server, a thread, takes its time for every answer."""

from __future__ import annotations

import random
import socket
import sys
import threading


def serve(listener: socket.socket, pause: threading.Event, delay_s: float) -> None:
    connection, _ = listener.accept()
    with connection:
        while question := connection.recv(100):
            pause.wait(delay_s)
            connection.sendall(question.upper())


def ask(connection: socket.socket, question: bytes) -> bytes:
    connection.sendall(question)
    return connection.recv(100)  # HERE


def main(seed: int = 0) -> None:
    draw = random.Random(seed)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        delay_s = 0.015 + draw.random() * 0.02
        threading.Thread(target=serve, args=(listener, threading.Event(), delay_s), daemon=True).start()
        with socket.create_connection(listener.getsockname()) as connection:
            answers = [ask(connection, b"question %d" % number) for number in range(int(1.2 / delay_s))]
    print(len(answers))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
