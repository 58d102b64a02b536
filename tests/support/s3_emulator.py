"""A strict S3 endpoint on loopback, in threads of its own: what it does not accept from Fleece fails the test.

What it checks and does is in `s3_service.py`, what it stores in `s3_bucket.py`. Faults are planned (`s3_faults.py`),
every request is logged, the time that listings tell can be set.

    with S3Emulator() as emulator:
        emulator.plan("PUT", "answer", status=503, times=2)
        async with S3Client.open(emulator.endpoint(), "bucket") as client: ...
    # leaving the block raises if a planned fault was not met or a request broke the rules
"""

import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from types import TracebackType
from typing import Any, Final, Self

from datastore.s3.endpoint import Endpoint
from tests.support.s3_faults import Fault, FaultPlan, Kind
from tests.support.s3_service import BUCKET, Answer, Refused, Request, S3Service

#: Seconds that a connection may be silent; longer than any test waits.
_SOCKET_TIMEOUT_S: Final = 120.0
_KEPT_BODY: Final = 64 << 10


@dataclass(frozen=True)
class Logged:
    """One request as it came, and what became of it."""

    operation: str  #: GET, PUT, COPY, DELETE, HEAD, POST, LIST, HEAD-BUCKET, LIST-BUCKETS, or the subresource's name
    request: str  #: method and target
    headers: Sequence[tuple[str, str]]
    bucket: str
    key: str
    size: int  #: bytes of the body
    body: bytes  #: if it is small
    connection: int
    at: float  #: Unix seconds
    status: int = 0  #: 0: no answer was given
    fault: str = ""  #: kind of the fault that was met

    def header(self, name: str) -> str | None:
        """The value of a header."""
        return dict(self.headers).get(name)


class S3Emulator(S3Service):
    """See the module."""

    def __init__(
        self,
        *,
        path_style: bool = True,
        tls: ssl.SSLContext | None = None,
        buckets: Sequence[str] = (BUCKET,),
        strict: bool = True,
    ) -> None:
        super().__init__(path_style=path_style, buckets=buckets, strict=strict)
        self.faults = FaultPlan()
        self.log: list[Logged] = []
        self.violations: list[str] = []
        self.latency_s = 0.0  #: before each answer
        self.latency_per_delete_s = 0.0
        self.most_at_once: Counter[str] = Counter()  #: by operation: how many requests waited for `latency_s` together
        self._at_once: Counter[str] = Counter()
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._ending = threading.Event()
        self._open: dict[int, socket.socket] = {}
        self._connections = 0
        self._threads: list[threading.Thread] = []

    def endpoint(self, **changes: Any) -> Endpoint:
        """How Fleece reaches it."""
        values: dict[str, Any] = {
            "id": "emulator",
            "endpoint": "127.0.0.1",
            "access_key": self.access_key,
            "secret": self.secret,
            "port": self.port,
            "region": self.region,
            "path_style": self.path_style,
            "allow_http": self._tls is None,
        }
        return Endpoint(**{**values, **changes})

    def plan(self, operation: str, kind: Kind, **fields: Any) -> Fault:
        """Plan a fault; `fields` are those of `Fault`."""
        return self.faults.add(Fault(operation, kind, **fields))

    def requests(self, operation: str | None = None) -> list[Logged]:
        """The log so far, of one operation or of all."""
        with self.lock:
            return [logged for logged in self.log if operation in (None, logged.operation)]

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            assert self.violations == []
            assert self.faults.unmet() == []

    def close(self) -> None:
        """End all connections and threads; in-flight requests are cut. Once more does nothing."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        deadline = time.monotonic() + _SOCKET_TIMEOUT_S
        for thread in self._threads:
            while thread.is_alive() and time.monotonic() < deadline:
                self.cut_connections()  # also one that was accepted last
                thread.join(timeout=0.1)
            assert not thread.is_alive(), "a thread of the emulator does not end"

    def cut_connections(self) -> None:
        """End every connection at once, as a crash does."""
        with self.lock:
            sockets = list(self._open.values())
        for connection in sockets:
            with suppress(OSError):  # the thread that serves it closes it
                connection.shutdown(socket.SHUT_RDWR)

    # Connections

    def _start(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="s3-emulator")
        with self.lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()

    def _accept(self) -> None:
        while not self._ending.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections += 1
            self._start(self._serve, connection, self._connections)

    def _serve(self, raw: socket.socket, number: int) -> None:
        connection = raw
        try:
            raw.settimeout(_SOCKET_TIMEOUT_S)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(raw, server_side=True)
            with self.lock:
                self._open[number] = connection
            received = bytearray()
            while not self._ending.is_set():
                request = _receive(connection, received)
                if request is None or not self._handle(connection, request, number):
                    break
        except (OSError, ValueError):
            pass  # the client hung up, or refused our certificate
        finally:
            with self.lock:
                self._open.pop(number, None)
            connection.close()

    def _handle(self, connection: socket.socket, request: Request, number: int) -> bool:
        """Answer one request; False if the connection is at its end."""
        at = time.time()
        try:
            self.understand(request)
        except Refused as refused:
            self.violations.append(f"{request.method} {request.target}: {refused.code} {refused.message}")
            return self._send(connection, request, self.refusal(request, refused), None, number, at)
        fault = self.faults.meet(request.operation, request.key)
        kind = fault.kind if fault is not None else ""
        if fault is not None and kind == "delay":
            self._pause(fault)
        if fault is not None and kind in ("reset", "late", "deaf"):
            self._note(request, number, at, 0, kind)
            if kind == "deaf":
                _wait_for_hangup(connection)
            elif kind == "late":
                self._start(self._later, request, fault)
            _reset(connection)
            return False
        if fault is not None and kind == "answer":
            partial = bool(fault.failed_keys)
            answer = self.do(request, fault.failed_keys) if partial else self._planned(request, fault)
        else:
            if kind == "damage":
                request.body = bytes([request.body[0] ^ 1]) + request.body[1:]
            answer = self.do(request, {}, trust=kind == "damage")
            if fault is not None and kind == "lie":
                answer = self._planned(request, fault)
        delay = self.latency_s
        if request.operation == "POST":
            delay += self.latency_per_delete_s * request.body.count(b"<Key>")
        if delay:
            with self.lock:
                self._at_once[request.operation] += 1
                now, most = self._at_once[request.operation], self.most_at_once[request.operation]
                self.most_at_once[request.operation] = max(now, most)
            self._ending.wait(delay)
            with self.lock:
                self._at_once[request.operation] -= 1
        return self._send(connection, request, answer, fault, number, at)

    def _pause(self, fault: Fault) -> None:
        end = time.monotonic() + fault.seconds
        while time.monotonic() < end and not self._ending.is_set():
            if fault.released.wait(min(0.02, max(0.0, end - time.monotonic()))):
                return

    def _later(self, request: Request, fault: Fault) -> None:
        self._pause(fault)
        self.do(request, {})

    def _planned(self, request: Request, fault: Fault) -> Answer:
        refused = Refused(fault.status, fault.code, fault.message, **fault.details)
        answer = self.refusal(request, refused) if fault.code or fault.status >= 300 else Answer(fault.status)
        if not fault.code:
            answer.body = b""
        answer.headers.update({name: value for name, value in fault.headers.items() if value is not None})
        return answer

    def _send(
        self,
        connection: socket.socket,
        request: Request,
        answer: Answer,
        fault: Fault | None,
        number: int,
        at: float,
    ) -> bool:
        kind = fault.kind if fault is not None else ""
        self._note(request, number, at, 0 if kind == "lost" else answer.status, kind)
        if kind == "lost":
            _reset(connection)
            return False
        body = b"" if request.method == "HEAD" else answer.body
        if kind == "truncate":
            body = body[:-1]
        if kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        off = fault.seconds if fault is not None and kind == "date" else 0.0
        headers: dict[str, str | None] = {"date": formatdate(self.now() + off, usegmt=True)}
        if request.method != "HEAD":
            headers["content-length"] = str(len(body))
        headers.update(answer.headers)
        if fault is not None and kind == "headers":
            headers.update(fault.headers)
        lines = [f"HTTP/1.1 {answer.status} Status"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if kind in ("cut", "stall"):
            connection.sendall(head + body[: len(body) // 2])
            if kind == "stall":
                _wait_for_hangup(connection)
            _reset(connection)
            return False
        if len(body) < _KEPT_BODY:
            connection.sendall(head + body)
        else:
            connection.sendall(head)
            connection.sendall(body)
        return True

    def _note(self, request: Request, number: int, at: float, status: int, fault: str) -> None:
        with self.lock:
            self.log.append(
                Logged(
                    request.operation,
                    f"{request.method} {request.target}",
                    request.headers,
                    request.bucket,
                    request.key,
                    len(request.body),
                    request.body if len(request.body) <= _KEPT_BODY else b"",
                    number,
                    at,
                    status,
                    fault,
                )
            )


def _receive(connection: socket.socket, received: bytearray) -> Request | None:
    """The next request; None at the end of the connection.

    Raises:
        ValueError: not HTTP.
    """
    while (end := received.find(b"\r\n\r\n")) < 0:
        data = connection.recv(65536)
        if not data:
            return None
        received += data
    head = received[:end].decode("ascii")
    del received[: end + 4]
    first, *lines = head.split("\r\n")
    method, target, version = first.split(" ")
    if version != "HTTP/1.1":
        raise ValueError(version)
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    length = int(dict(headers).get("content-length", "0"))
    body = bytearray(length)
    have = min(length, len(received))
    body[:have] = received[:have]
    del received[:have]
    view = memoryview(body)
    while have < length:
        count = connection.recv_into(view[have:])
        if not count:
            return None
        have += count
    return Request(method, target, headers, bytes(body))


def _reset(connection: socket.socket) -> None:
    """Close with RST."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def _wait_for_hangup(connection: socket.socket) -> None:
    with suppress(OSError):
        while connection.recv(65536):
            pass
