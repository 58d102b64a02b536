"""A server in memory that is as strict as the wire protocol's description, and keeps a log of what it was asked.

It shares no code with Fleece's own server: where both agree with the client, two readers of the description agree.
REST calls come as requests, upgraded connections as streams of `trio.testing`. A connection can be cut before any
frame, and answers can be replaced by lies. What it keeps: `pbs_store`; what it answers: `pbs_rest`, `pbs_sessions`.
"""

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import h11
import trio
import trio.testing
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings

from core.dial import DialError
from datastore.s3.wire import Fault, HttpAnswer, HttpError, HttpRequest
from tests.support.pbs_rest import PbsRest
from tests.support.pbs_sessions import PbsSession
from tests.support.pbs_store import Asked, RefusedError


@dataclass
class _Request:
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)


class PbsDouble(PbsRest):
    """The server, and the two ways in."""

    def __init__(self, store: str = "store") -> None:
        super().__init__(store)
        self.frames = 0  #: of upgraded connections, both directions
        self.cut_at: int | None = None  #: the frame before which every connection ends, once
        self.away = False  #: nobody can connect
        self.silent: set[str] = set()  #: endpoints that are not carried out and get no answer; pings do
        self.fell_silent = trio.Event()  #: one of them was asked
        self.refuse_upgrades: tuple[int, str] | None = None  #: status and text for every new connection
        self.connections = 0
        self.port = 0  #: of `listen`
        self.client_settings: dict[int, int] = {}  #: of the last upgraded connection

    async def exchange(
        self, request: HttpRequest, *, limit: Callable[[int], int], on_sent: Callable[[], None], fresh: bool = False
    ) -> HttpAnswer:
        """As `HttpPool.exchange`."""
        if self.away:
            raise HttpError(Fault.CONNECT, "Connection refused")
        await trio.lowlevel.checkpoint()
        on_sent()
        headers = {name.lower(): value for name, value in request.headers}
        body = b"".join(bytes(part) for part in request.body)
        status, answer = self.rest(request.method, request.target, headers, body)
        if len(answer) > limit(status):
            raise HttpError(Fault.MALFORMED, "too long")
        return HttpAnswer(status, {}, answer)

    async def connect(self, scheme: str, host: str, port: int) -> trio.abc.Stream:
        """As `Dialer.connect`."""
        if self.away:
            raise DialError("Connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self.connections += 1
        self.nursery.start_soon(self._serve, theirs)
        return ours

    nursery: trio.Nursery

    async def listen(self, context: ssl.SSLContext) -> int:
        """Serve on a free port of 127.0.0.1, with TLS, in `nursery`; returns the port."""
        listeners = await trio.open_ssl_over_tcp_listeners(0, context, host="127.0.0.1", https_compatible=True)
        self.nursery.start_soon(trio.serve_listeners, self._serve, listeners)
        port: int = listeners[0].transport_listener.socket.getsockname()[1]  # type: ignore[attr-defined]
        return port

    async def _serve(self, stream: trio.abc.Stream) -> None:
        try:
            await self._upgrade(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError, ProtocolError):
            pass
        finally:
            await trio.aclose_forcefully(stream)

    async def _upgrade(self, stream: trio.abc.Stream) -> None:
        engine = h11.Connection(h11.SERVER)
        request, body = h11.Request(method="GET", target="/", headers=[("Host", "x")]), bytearray()
        while True:
            event = engine.next_event()
            if isinstance(event, h11.Request):
                request, body = event, bytearray()
            elif isinstance(event, h11.Data):
                body += event.data
            elif event is h11.NEED_DATA:
                data = await stream.receive_some(65536)
                if not data:
                    return
                engine.receive_data(bytes(data))
            elif isinstance(event, h11.EndOfMessage) or event is h11.PAUSED:
                if urlsplit(request.target.decode()).path in ("/api2/json/backup", "/api2/json/reader"):
                    break
                named = {name.decode().lower(): value.decode() for name, value in request.headers}
                status, answer = self.rest(request.method.decode(), request.target.decode(), named, bytes(body))
                head = h11.Response(status_code=status, headers=[("Content-Length", str(len(answer)))])
                sent = [engine.send(head), engine.send(h11.Data(data=answer)), engine.send(h11.EndOfMessage())]
                await stream.send_all(b"".join(piece or b"" for piece in sent))
                engine.start_next_cycle()
            else:
                return
        headers = {name.decode(): value.decode() for name, value in request.headers}
        parts = urlsplit(request.target.decode())
        protocol = parts.path.removeprefix("/api2/json/")
        query = dict(parse_qsl(parts.query, strict_parsing=True))
        asked = Asked(protocol, "GET", parts.path, dict(query), headers.get("content-type", ""), 0)
        self.asked.append(asked)
        try:
            user = self.user_of("GET", headers)
            if self.refuse_upgrades is not None:
                raise RefusedError(*self.refuse_upgrades)
            wanted = f"proxmox-backup-{'reader-' if protocol == 'reader' else ''}protocol-v1"
            if protocol not in ("backup", "reader") or headers.get("upgrade") != wanted:
                raise RefusedError(400, f"expected upgrade to {wanted}")
            session = PbsSession(self, protocol, query, user)
        except RefusedError as error:
            asked.status = error.status
            text = error.text.encode()
            await stream.send_all(
                (
                    engine.send(h11.Response(status_code=error.status, headers=[("Content-Length", str(len(text)))]))
                    or b""
                )
                + (engine.send(h11.Data(data=text)) or b"")
            )
            return
        asked.status = 101
        try:
            http2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
            settings = {
                SettingCodes.INITIAL_WINDOW_SIZE: 32 << 20,
                SettingCodes.MAX_FRAME_SIZE: 4 << 20,
                SettingCodes.MAX_CONCURRENT_STREAMS: 200,
                SettingCodes.MAX_HEADER_LIST_SIZE: 16 << 10,
            }
            http2.local_settings = Settings(client=False, initial_values=settings)
            http2.max_inbound_frame_size = 4 << 20
            http2.initiate_connection()
            http2.increment_flow_control_window((32 << 20) - 65535)
            answer = engine.send(
                h11.InformationalResponse(status_code=101, headers=[("Connection", "upgrade"), ("Upgrade", wanted)])
            )
            # The first frames come in one piece with the answer: they must not be lost.
            await stream.send_all((answer or b"") + http2.data_to_send())
            await _Http2(self, stream, http2, session).run(engine.trailing_data[0])
        finally:
            session.end()


class _Http2:
    """One connection, frame by frame."""

    def __init__(self, double: PbsDouble, stream: trio.abc.Stream, http2: H2Connection, session: PbsSession) -> None:
        self.double, self.stream, self.http2, self.session = double, stream, http2, session
        self.requests: dict[int, _Request] = {}
        self.answers: dict[int, memoryview] = {}

    def frame(self) -> None:
        """Count one; cut the connection before the planned one."""
        self.double.frames += 1
        if self.double.cut_at is not None and self.double.frames >= self.double.cut_at:
            self.double.cut_at = None
            raise trio.BrokenResourceError

    async def send(self) -> None:
        data = self.http2.data_to_send()
        while data:
            length = 9 + int.from_bytes(data[:3], "big") if data[:3] != b"PRI" else len(data)
            self.frame()
            await self.stream.send_all(data[:length])
            data = data[length:]

    async def run(self, data: bytes) -> None:
        if not data:
            data = bytes(await self.stream.receive_some(1 << 20))
        pending = b""
        preface = 24
        while True:
            pending += data
            while len(pending) >= preface + 9:
                length = preface + 9 + int.from_bytes(pending[preface : preface + 3], "big")
                if len(pending) < length:
                    break
                self.frame()
                for event in self.http2.receive_data(pending[:length]):
                    if isinstance(event, ConnectionTerminated):
                        return
                    self.handle(event)
                pending, preface = pending[length:], 0
                self.answer()
                await self.send()
            data = bytes(await self.stream.receive_some(1 << 20))
            if not data:
                return

    def handle(self, event: Any) -> None:
        if isinstance(event, RequestReceived):
            self.requests[event.stream_id] = _Request({str(name): str(value) for name, value in event.headers})
        elif isinstance(event, DataReceived):
            self.requests[event.stream_id].body += event.data
            self.http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, RemoteSettingsChanged):
            self.double.client_settings = {int(code): one.new_value for code, one in event.changed_settings.items()}
        elif isinstance(event, StreamReset):
            self.requests.pop(event.stream_id, None)
            self.answers.pop(event.stream_id, None)
        elif isinstance(event, StreamEnded):
            request = self.requests.pop(event.stream_id)
            if urlsplit(request.headers[":path"]).path.strip("/") in self.double.silent:
                self.double.fell_silent.set()
                return
            status, body, kind = self.session.request(request.headers, bytes(request.body))
            headers = [(":status", str(status)), ("content-type", kind)]
            self.http2.send_headers(event.stream_id, headers, end_stream=not body)
            if body:
                self.answers[event.stream_id] = memoryview(body)

    def answer(self) -> None:
        for number in list(self.answers):
            while (rest := self.answers.get(number)) is not None:
                size = min(len(rest), self.http2.local_flow_control_window(number), self.http2.max_outbound_frame_size)
                if size <= 0:
                    break
                self.http2.send_data(number, bytes(rest[:size]), end_stream=size == len(rest))
                if size == len(rest):
                    del self.answers[number]
                else:
                    self.answers[number] = rest[size:]
