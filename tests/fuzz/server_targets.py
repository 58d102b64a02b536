"""What of the server is fuzzed: bytes of a client, before and behind the upgrade.

Whatever comes, the connection is answered or ended, in bounded time, and nothing fails in a way that was not foreseen:
that would be logged as an error.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final

import h11
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from trio.testing import MockClock, memory_stream_pair

from server import errors
from server.access.auth_ids import ROOT_USER, AuthId
from server.application import Application
from server.backup_calls import BackupCalls
from server.h2_session import H2Session
from server.http1 import Http1Connection, Request
from server.routing import Call, Routes
from server.state import ServerState
from tests.support.wire_server import Stores

#: Bytes that the server may send back for a byte of the client, and in any case: it is no amplifier.
_ANSWERS: Final = (200, 1 << 20)


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _nothing_unforeseen() -> Iterator[None]:
    handler = _Errors()
    logger = logging.getLogger("server")
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)
    for record in handler.records:
        raise AssertionError(record.getMessage()) from (record.exc_info[1] if record.exc_info else None)


class Targets:
    """The server's parts, made once for many inputs."""

    def __init__(self, folder: Path) -> None:
        """`folder`: empty, for the server's files."""
        self._application: Final = Application(ServerState(folder, Stores({})))
        self._application.caller = self._caller  # type: ignore[method-assign]
        endpoints = BackupCalls.routes(object.__new__(BackupCalls)).endpoints
        self._routes: Final = Routes([replace(one, handler=_echo) for one in endpoints])

    async def _caller(self, request: Request) -> AuthId:
        return ROOT_USER

    def routes(self) -> Routes:
        """See `server.h2_session.Session`."""
        return self._routes

    def log(self, text: str) -> None:
        """See `server.h2_session.Session`."""

    def http1(self, data: bytes) -> str:
        """The bytes of a connection behind its handshake; the statuses that come back."""

        async def serve(stream: trio.abc.Stream) -> None:
            await Http1Connection(stream, "192.0.2.1", self._application.handle).serve()

        answer = _spoken(data, serve)
        client = h11.Connection(h11.CLIENT)
        statuses = []
        while answer:
            # As if each were asked for alone: what is asked is what the fuzzer has mixed up.
            client.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
            client.send(h11.EndOfMessage())
            client.receive_data(answer)
            event = client.next_event()
            while isinstance(event, h11.InformationalResponse):
                event = client.next_event()
            if not isinstance(event, h11.Response):
                break
            statuses.append(event.status_code)
            assert event.status_code < 500 or event.status_code == 501
            while isinstance(event, h11.Response | h11.Data):
                event = client.next_event()
            answer = bytes(client.trailing_data[0])
            client = h11.Connection(h11.CLIENT)
        return " ".join(map(str, statuses[:4])) or "nothing"

    def http2(self, data: bytes) -> str:
        """The bytes of a connection behind its upgrade; the kinds of frames and the statuses that come back."""

        async def serve(stream: trio.abc.Stream) -> None:
            session = H2Session(self, self._application._state, ROOT_USER)
            await session.serve(stream, data[:1])

        answer = _spoken(data[1:], serve)
        kinds = set()
        while len(answer) >= 9:
            size = int.from_bytes(answer[:3], "big")
            kind = answer[3]
            if kind == 7:
                code = int.from_bytes(answer[13:17], "big")
                kinds.add(f"goodbye-{ErrorCodes(code).name}")
            kinds.add(f"{kind}")
            answer = answer[9 + size :]
        assert not answer, "half a frame"
        return " ".join(sorted(kinds))


async def _echo(call: Call) -> object:
    return {key: value for key, value in call.values.items() if value is not None}


def _spoken(data: bytes, serve: Callable[[trio.abc.Stream], object]) -> bytes:
    """What the server sends back to a client that sends `data` and waits for the end."""
    answer = bytearray()

    async def main() -> None:
        ours, theirs = memory_stream_pair()

        async def hear() -> None:
            async for more in theirs:
                answer.extend(more)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear)
            await theirs.send_all(data)
            await theirs.send_eof()
            await serve(ours)  # type: ignore[misc]
            await ours.aclose()

    delays = errors.UNAUTHORIZED_DELAY_S, errors.FORBIDDEN_DELAY_S
    errors.UNAUTHORIZED_DELAY_S = errors.FORBIDDEN_DELAY_S = 0.0  # type: ignore[misc]
    try:
        with _nothing_unforeseen():
            trio.run(main, clock=MockClock(autojump_threshold=0))
    finally:
        errors.UNAUTHORIZED_DELAY_S, errors.FORBIDDEN_DELAY_S = delays  # type: ignore[misc]
    assert len(answer) <= _ANSWERS[0] * len(data) + _ANSWERS[1]
    return bytes(answer)


_HEAD: Final = b"host: x\r\ncookie: PBSAuthCookie=a\r\n"
HTTP1_SEEDS: Final = [
    b"GET /api2/json/ping HTTP/1.1\r\n" + _HEAD + b"\r\nGET //api2/extjs/version HTTP/1.1\r\n" + _HEAD + b"\r\n",
    b"POST /api2/json/access/ticket HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 46\r\n\r\n"
    b'{"username":"u@pbs","password":"long enough"}\n',
    b"PUT /api2/json/admin/datastore/main/notes?ns=a/b&backup-type=vm HTTP/1.1\r\n" + _HEAD +
    b"transfer-encoding: chunked\r\n\r\n1e\r\nbackup-id=100&backup-time=1000\r\n4\r\n&not\r\n4\r\nes=%\r\n"
    b"0\r\nx: y\r\n\r\n",
    b"GET /api2/json/nodes/localhost/tasks/UPID%3Avm%3A00000001%3A00000001%3A00000001%3A00000001%3Abackup%3Amain"
    b"%3Au@pbs%3A/log?start=0&limit=0&test-status=1 HTTP/1.1\r\n" + _HEAD + b"\r\n",
    b"DELETE /api2/json/admin/datastore/main/snapshots?backup-type=vm&backup-id=1&backup-time=1 HTTP/1.1\r\n" + _HEAD +
    b"\r\n",
    b"GET /api2/json/backup?store=main&backup-type=host&backup-id=a&backup-time=9 HTTP/1.1\r\n" + _HEAD +
    b"connection: upgrade\r\nupgrade: proxmox-backup-protocol-v1\r\n\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"PUT /api2/json/access/acl HTTP/1.1\r\n" + _HEAD + b"expect: 100-continue\r\ncontent-type: application/json\r\n"
    b'content-length: 57\r\n\r\n{"path":"/datastore","role":"Audit","auth-id":"u@pbs!t1"}',
]  # fmt: skip


def http2_seeds() -> list[bytes]:
    """Small sessions."""
    found = []
    for kind in range(3):
        h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        h2.initiate_connection()
        h2.increment_flow_control_window(1 << 20)
        calls = [
            ("GET", "/", b""),
            ("POST", "/dynamic_index?archive-name=a.didx", b""),
            ("POST", f"/dynamic_chunk?wid=1&digest={'0' * 64}&size=3&encoded-size=15", b"x" * 15),
            ("PUT", "/dynamic_index", b'{"wid":1,"digest-list":["' + b"0" * 64 + b'"],"offset-list":[0]}'),
            ("POST", f"/dynamic_close?wid=1&chunk-count=1&size=3&csum={'0' * 64}", b""),
            ("GET", "/previous?archive-name=index.json.blob&_dc=1", b""),
        ]
        for method, path, body in calls[:2] if kind == 0 else calls:
            number = h2.get_next_available_stream_id()
            headers = [(":method", method), (":path", path), (":scheme", "https"), (":authority", "x")]
            headers += [("content-type", "application/json")] if body.startswith(b"{") else []
            h2.send_headers(number, headers, end_stream=not body)
            if body and kind == 1:
                h2.send_data(number, body[:3], pad_length=5)
                h2.send_data(number, body[3:], end_stream=True)
            elif body:
                h2.send_data(number, body, end_stream=True)
            if kind == 2:
                h2.ping(b"12345678")
        if kind == 2:
            h2.reset_stream(3, ErrorCodes.CANCEL)
            h2.update_settings({4: 1000, 5: 20_000})
            h2.close_connection()
        found.append(h2.data_to_send())
    return found


def changed_frames(data: bytes, random: Random) -> bytes:
    """`data`, the client's side of HTTP/2, with one frame that is changed, doubled, moved or left out."""
    start = 24
    frames = []
    while start + 9 <= len(data):
        end = start + 9 + int.from_bytes(data[start : start + 3], "big")
        frames.append(bytearray(data[start:end]))
        start = end
    if not frames:
        return data
    at = random.randrange(len(frames))
    frame = frames[at]
    match random.randrange(8):
        case 0:
            del frames[at]
        case 1:
            frames.insert(at, frame)
        case 2:
            frames.insert(random.randrange(len(frames)), frames.pop(at))
        case 3 if len(frame) > 4:
            frame[3] = random.randrange(12)
        case 4 if len(frame) > 5:
            frame[4] ^= 1 << random.randrange(8)
        case 5 if len(frame) > 8:
            frame[5:9] = random.choice([0, 1, 2, 3, 5, 7, (1 << 31) - 1]).to_bytes(4, "big")
        case 6:
            body = bytearray(random.randbytes(random.choice([0, 1, 4, 5, 8, 40])))
            kind, flags, stream = random.randrange(11), random.choice([0, 1, 4, 5, 8, 32]), random.choice([0, 1, 3, 99])
            frames.insert(at, bytearray([0, 0, len(body), kind, flags, *stream.to_bytes(4, "big"), *body]))
        case _ if len(frame) > 9:
            frame[random.randrange(9, len(frame))] = random.randrange(256)
    return data[:24] + b"".join(bytes(one) for one in frames)
