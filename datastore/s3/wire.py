"""One HTTP/1.1 connection over trio: TLS with pinned certificates, bodies without copies, time-outs for inactivity.

h11 writes and reads heads, and bodies of unknown length. Bodies of known length pass it by: what is sent are views of
the caller's buffers, what comes goes straight into the answer's buffer (`bodies.py`). Through h11 they are copied four
times, which took half of the CPU time of a download.

Connections are made, and certificates compared (R4), by `core.dial`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final

import h11
import trio

from core.buffers import Buffer
from core.dial import CertificateError, Dialer, DialError, Stream, innermost_reason
from core.tls import TlsStream
from datastore.s3.bodies import BodyMemory
from datastore.s3.pacing import TokenBucket

#: Seconds without a byte, sending or receiving.
INACTIVITY_TIMEOUT_S: Final = 60.0
#: Bytes for one send, each with an inactivity time-out of its own.
_SEND_PIECE: Final = 256 << 10
#: Bytes of a first receive: what comes of the body with the head is copied once more.
_RECEIVE_PIECE: Final = 64 << 10
#: Bytes of a body from which on it is decrypted in a worker thread.
_THREAD_FROM: Final = 256 << 10
#: Bytes that the head of an answer may have.
_MAX_HEAD: Final = 64 << 10
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
        self,
        dialer: Dialer,
        bodies: BodyMemory,
        received: TokenBucket | None = None,
        sent: TokenBucket | None = None,
        *,
        inactivity_s: float | None = None,
    ) -> None:
        self.dialer = dialer
        self.bodies = bodies
        self.received = received
        self.sent = sent
        self._inactivity_s = inactivity_s

    @property
    def inactivity_s(self) -> float:
        """Seconds without a byte that end a request."""
        return INACTIVITY_TIMEOUT_S if self._inactivity_s is None else self._inactivity_s


class Wire:
    """One connection. Use `Wire.connect`; one request at a time."""

    def __init__(self, stream: Stream, settings: WireSettings) -> None:
        self._stream = stream
        self._socket = stream.socket
        self._settings = settings

    @classmethod
    async def connect(cls, scheme: str, host: str, port: int, settings: WireSettings) -> "Wire":
        """Connect and, for https, shake hands.

        Raises:
            HttpError: CONNECT or CERTIFICATE.
        """
        try:
            return cls(await settings.dialer.connect(scheme, host, port), settings)
        except CertificateError as error:
            raise HttpError(Fault.CERTIFICATE, error.why) from error
        except DialError as error:
            raise HttpError(Fault.CONNECT, error.why) from error

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
            with _translated(self._settings.inactivity_s):
                answer = await self._read_head(engine)
                return await self._read_body(engine, request.method, answer, limit, broken is None)
        except HttpError as error:
            raise broken or error from error

    async def _send_request(self, head: bytes, body: Sequence[Buffer]) -> None:
        with _translated(self._settings.inactivity_s):
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
        with trio.fail_after(self._settings.inactivity_s):
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
        with trio.fail_after(self._settings.inactivity_s):
            data = bytes(await self._stream.receive_some(_RECEIVE_PIECE))
        if self._settings.received is not None:
            await self._settings.received.take(len(data))
        return data

    async def _receive_into(self, view: memoryview) -> None:
        """Fill `view`."""
        while view:
            with trio.fail_after(self._settings.inactivity_s):
                if isinstance(self._stream, TlsStream):
                    # The request is sent, so nobody else uses the connection.
                    count = await self._stream.receive_into(view, in_thread=len(view) > _THREAD_FROM)
                else:
                    count = await self._socket.recv_into(view)
            if not count:
                raise HttpError(Fault.LOST, "the connection ended inside the answer")
            if self._settings.received is not None:
                await self._settings.received.take(count)
            view = view[count:]


@contextmanager
def _translated(inactivity_s: float) -> Iterator[None]:
    """Errors of the layers below as `HttpError`."""
    try:
        yield
    except trio.TooSlowError as error:
        raise HttpError(Fault.TIMEOUT, f"nothing moved for {inactivity_s:.0f} s") from error
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise HttpError(Fault.LOST, innermost_reason(error) or "the connection was lost") from error
    except h11.RemoteProtocolError as error:
        raise HttpError(Fault.MALFORMED, f"the answer is no HTTP: {error}") from error
