"""One HTTP/1.1 connection over trio: TLS with pinned certificates, bodies without copies, time-outs for inactivity.

h11 writes and reads heads, and bodies of unknown length. Bodies of known length pass it by: what is sent are views of
the caller's buffers, what comes goes straight into the answer's buffer (`bodies.py`). Through h11 they are copied four
times, which took half of the CPU time of a download.

Certificates (R4): the handshake is made with the system's authorities first. If that fails and a fingerprint is
configured, a second connection is made without verification, and its leaf certificate is compared before the first
byte of a request is written.
"""

import hashlib
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final

import h11
import trio

from core.buffers import Buffer
from datastore.s3.bodies import BodyMemory
from datastore.s3.pacing import TokenBucket

#: Seconds to a finished handshake.
CONNECT_TIMEOUT_S: Final = 10.0
#: Seconds without a byte, sending or receiving.
INACTIVITY_TIMEOUT_S: Final = 60.0
#: Bytes for one send, each with an inactivity time-out of its own.
_SEND_PIECE: Final = 256 << 10
#: Bytes of a first receive: what comes of the body with the head is copied once more.
_RECEIVE_PIECE: Final = 64 << 10
#: Bytes that the head of an answer may have.
_MAX_HEAD: Final = 64 << 10
_SOCKET_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120),
)
_WITHOUT_BODY: Final = frozenset({204, 304})


class Fault(Enum):
    """Why there is no answer."""

    CONNECT = "connect"  #: no connection was made
    CERTIFICATE = "certificate"  #: the wrong certificate
    LOST = "lost"  #: the connection ended or broke
    TIMEOUT = "timeout"  #: nothing moved for too long
    MALFORMED = "malformed"  #: not HTTP, another length than announced, too long


class HttpError(Exception):
    """A request that got no whole answer."""

    def __init__(self, fault: Fault, why: str) -> None:
        super().__init__(why)
        self.fault = fault
        self.why = why


@dataclass(frozen=True, slots=True)
class TlsPin:
    """Which certificate is accepted beside those that the system's authorities vouch for."""

    fingerprint: bytes | None = None  #: SHA-256 of the leaf certificate
    only: bool = False  #: the fingerprint must match even when the chain is valid

    @classmethod
    def parse(cls, text: str | None, *, only: bool = False) -> "TlsPin":
        """From `xx:xx:...`, or None."""
        return cls(None if text is None else bytes.fromhex(text.replace(":", "")), only)


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request, exactly as it is sent."""

    method: str
    scheme: str
    authority: str  #: host and port to connect to
    target: str  #: encoded path and query
    headers: Sequence[tuple[str, str]]
    body: Sequence[Buffer] = ()  #: their total is the header content-length


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """One answer, read whole."""

    status: int
    headers: Mapping[str, str]  #: names in lower case
    body: Buffer  #: a large one lies in memory that is used again when no view of it is left
    reusable: bool = True  #: the connection takes another request


class WireSettings:
    """What all connections of one pool have in common."""

    def __init__(
        self, pin: TlsPin, bodies: BodyMemory, received: TokenBucket | None = None, sent: TokenBucket | None = None
    ) -> None:
        self.pin = pin
        self.bodies = bodies
        self.received = received
        self.sent = sent
        self._verified: ssl.SSLContext | None = None

    def verified(self) -> ssl.SSLContext:
        """The context with the system's authorities, which take 20 ms to load."""
        if self._verified is None:
            self._verified = ssl.create_default_context()
            self._verified.set_alpn_protocols(["http/1.1"])
        return self._verified

    def unverified(self) -> ssl.SSLContext:
        """A context that accepts any certificate; somebody must look at it afterwards."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["http/1.1"])
        return context


class Wire:
    """One connection. Use `Wire.connect`; one request at a time."""

    def __init__(self, stream: "trio.SocketStream | trio.SSLStream[trio.SocketStream]", settings: WireSettings) -> None:
        self._stream = stream
        self._socket = (stream.transport_stream if isinstance(stream, trio.SSLStream) else stream).socket
        self._settings = settings

    @classmethod
    async def connect(cls, scheme: str, host: str, port: int, settings: WireSettings) -> "Wire":
        """Connect and, for https, shake hands.

        Raises:
            HttpError: CONNECT or CERTIFICATE.
        """
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                stream = await _open(host, port)
                return cls(stream if scheme == "http" else await _encrypt(stream, host, port, settings), settings)
        except trio.TooSlowError as error:
            raise HttpError(Fault.CONNECT, f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from error
        except (OSError, trio.BrokenResourceError) as error:
            raise HttpError(Fault.CONNECT, _cause(error)) from error

    async def aclose(self) -> None:
        """Close the socket; waits for nobody."""
        await trio.aclose_forcefully(self._stream)

    def has_input(self) -> bool:
        """True if an unused connection can be read, which means that it has ended."""
        return self._socket.is_readable()

    async def exchange(
        self, request: HttpRequest, limit: Callable[[int], int], on_sent: Callable[[], None]
    ) -> HttpAnswer:
        """Send `request` and read the whole answer; see `HttpPool.exchange`.

        Failed or cancelled, the connection must be closed.
        """
        engine = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        head = engine.send(h11.Request(method=request.method, target=request.target, headers=list(request.headers)))
        assert head is not None
        on_sent()
        broken = None
        try:
            await self._send_request(head, request.body)
        except HttpError as error:
            # Servers may refuse before they have read all, and close; their answer says why.
            if error.fault is not Fault.LOST:
                raise
            broken = error
        try:
            with _translated():
                answer = await self._read_head(engine)
                return await self._read_body(engine, request.method, answer, limit, broken is None)
        except HttpError as error:
            raise broken or error from error

    async def _send_request(self, head: bytes, body: Sequence[Buffer]) -> None:
        with _translated():
            if sum(memoryview(part).nbytes for part in body) <= _SEND_PIECE:
                await self._send(b"".join([head, *body]))
                return
            await self._send(head)
            for part in body:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), _SEND_PIECE):
                    await self._send(view[start : start + _SEND_PIECE])

    async def _send(self, data: Buffer) -> None:
        if self._settings.sent is not None:
            await self._settings.sent.take(len(data))
        with trio.fail_after(INACTIVITY_TIMEOUT_S):
            await self._stream.send_all(data)

    async def _read_head(self, engine: h11.Connection) -> h11.Response:
        while True:
            event = engine.next_event()
            if isinstance(event, h11.Response):
                return event
            if event is h11.NEED_DATA:
                data = await self._receive()
                if not data:
                    raise HttpError(Fault.LOST, "the connection ended without an answer")
                engine.receive_data(data)
            elif not isinstance(event, h11.InformationalResponse):
                raise HttpError(Fault.MALFORMED, "no answer where one is due")

    async def _read_body(
        self, engine: h11.Connection, method: str, head: h11.Response, limit: Callable[[int], int], whole: bool
    ) -> HttpAnswer:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        highest = limit(head.status_code)
        encoding = headers.get("content-encoding", "")
        if encoding not in ("", "identity", "aws-chunked"):
            raise HttpError(Fault.MALFORMED, f"the answer is encoded as {encoding[:40]!r}")
        keep = whole and head.http_version == b"1.1" and "close" not in headers.get("connection", "").lower()
        without = method == "HEAD" or head.status_code in _WITHOUT_BODY
        if not without and ("content-length" not in headers or "transfer-encoding" in headers):
            pieces = await self._read_unknown_length(engine, highest)
            return HttpAnswer(head.status_code, headers, pieces, keep and "transfer-encoding" in headers)
        size = 0 if without else int(headers["content-length"])  # h11 has checked that it is a number
        if size > highest:
            raise HttpError(Fault.MALFORMED, f"the answer has {size} bytes, at most {highest} are accepted")
        came, _ = engine.trailing_data
        body = self._settings.bodies.take(size)
        body[: min(len(came), size)] = came[:size]
        await self._receive_into(memoryview(body)[len(came) :])
        return HttpAnswer(head.status_code, headers, body, keep and len(came) <= size)

    async def _read_unknown_length(self, engine: h11.Connection, limit: int) -> bytearray:
        body = bytearray()
        while True:
            event = engine.next_event()
            if isinstance(event, h11.Data):
                if len(body) + len(event.data) > limit:
                    raise HttpError(Fault.MALFORMED, f"the answer has more than {limit} bytes")
                body += event.data
            elif event is h11.NEED_DATA:
                data = await self._receive()
                try:
                    engine.receive_data(data)
                    if not data:
                        event = engine.next_event()
                except h11.RemoteProtocolError as error:
                    raise HttpError(Fault.LOST, "the connection ended inside the answer") from error
            if isinstance(event, h11.EndOfMessage):
                return body

    async def _receive(self) -> bytes:
        with trio.fail_after(INACTIVITY_TIMEOUT_S):
            data = bytes(await self._stream.receive_some(_RECEIVE_PIECE))
        if self._settings.received is not None:
            await self._settings.received.take(len(data))
        return data

    async def _receive_into(self, view: memoryview) -> None:
        """Fill `view`."""
        while view:
            with trio.fail_after(INACTIVITY_TIMEOUT_S):
                if isinstance(self._stream, trio.SSLStream):
                    data = await self._stream.receive_some(len(view))
                    count = len(data)
                    view[:count] = data
                else:
                    count = await self._socket.recv_into(view)
            if not count:
                raise HttpError(Fault.LOST, "the connection ended inside the answer")
            if self._settings.received is not None:
                await self._settings.received.take(count)
            view = view[count:]


async def _open(host: str, port: int) -> trio.SocketStream:
    stream = await trio.open_tcp_stream(host, port)
    for option in _SOCKET_OPTIONS:
        stream.setsockopt(*option)
    return stream


async def _encrypt(
    stream: trio.SocketStream, host: str, port: int, settings: WireSettings
) -> "trio.SSLStream[trio.SocketStream]":
    """The connection encrypted, or another one with the pinned certificate."""
    pin = settings.pin
    try:
        encrypted = await _handshake(stream, settings.verified(), host)
    except trio.BrokenResourceError as error:
        if not isinstance(error.__cause__, ssl.SSLCertVerificationError):
            raise
        if pin.fingerprint is None:
            raise HttpError(Fault.CERTIFICATE, error.__cause__.verify_message) from error
        encrypted = await _handshake(await _open(host, port), settings.unverified(), host)
        await _compare(encrypted, pin.fingerprint)
        return encrypted
    if pin.only and pin.fingerprint is not None:
        await _compare(encrypted, pin.fingerprint)
    return encrypted


async def _handshake(
    stream: trio.SocketStream, context: ssl.SSLContext, host: str
) -> "trio.SSLStream[trio.SocketStream]":
    encrypted = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
    try:
        await encrypted.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return encrypted


async def _compare(encrypted: "trio.SSLStream[trio.SocketStream]", fingerprint: bytes) -> None:
    leaf = encrypted.getpeercert(True)
    actual = hashlib.sha256(leaf or b"").digest()
    if actual != fingerprint:
        await trio.aclose_forcefully(encrypted)
        raise HttpError(Fault.CERTIFICATE, f"its fingerprint is {actual.hex(':')}, not the configured one")


@contextmanager
def _translated() -> Iterator[None]:
    """Errors of the layers below as `HttpError`."""
    try:
        yield
    except trio.TooSlowError as error:
        raise HttpError(Fault.TIMEOUT, f"nothing moved for {INACTIVITY_TIMEOUT_S:.0f} s") from error
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise HttpError(Fault.LOST, _cause(error) or "the connection was lost") from error
    except h11.RemoteProtocolError as error:
        raise HttpError(Fault.MALFORMED, f"the answer is no HTTP: {error}") from error


def _cause(error: BaseException) -> str:
    """The words of the innermost reason: trio wraps those of the system and of OpenSSL."""
    while error.__cause__ is not None or isinstance(error, BaseExceptionGroup):
        # Of several addresses that were tried, the first speaks for all.
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        return error.strerror
    return str(error)
