"""A proxy on loopback that lets what a client sends wait, as a distant server would.

    python bench/latency.py TARGET-PORT MILLISECONDS

Each connection is passed on to 127.0.0.1:TARGET-PORT. What the client sends is handed on after the delay, in order and
without limiting how much of it is under way; answers pass at once, so a request takes one round trip of this length.
Prints its port when it is ready, and ends with its standard input.
"""

import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress

#: Bytes read at once. Answers are large, and each read costs a hand-over between threads.
PIECE = 1 << 20


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    buffer = memoryview(bytearray(PIECE))
    with suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])
    _end(source, target)


class _Delayed:
    """One direction of a connection, in which every byte waits for `delay_s`."""

    def __init__(self, source: socket.socket, target: socket.socket, delay_s: float) -> None:
        self._source, self._target, self._delay_s = source, target, delay_s
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._came = threading.Semaphore(0)

    def receive(self) -> None:
        data = b"?"
        while data:
            try:
                data = self._source.recv(PIECE)
            except OSError:
                data = b""
            self._waiting.append((time.monotonic() + self._delay_s, data))
            self._came.release()

    def send(self) -> None:
        with suppress(OSError):
            while True:
                self._came.acquire()
                due, data = self._waiting.popleft()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                self._target.sendall(data)
        _end(self._source, self._target)


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, target_port: int, delay_s: float) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", target_port))
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there = _Delayed(client, server, delay_s)
        for work in (there.receive, there.send):
            threading.Thread(target=work, daemon=True).start()
        threading.Thread(target=_pass_on, args=(server, client), daemon=True).start()


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    delay_s = float(sys.argv[2]) / 1000
    threading.Thread(target=_accept, args=(listener, int(sys.argv[1]), delay_s), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
