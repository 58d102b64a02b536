"""HTTP/1.1 over trio: connections with pinned certificates, bodies in pieces without copies, time-outs for inactivity.

The one module that imports httpx (and the engine below it, httpcore).

Certificates (R4): the handshake is made with the system's authorities first. If that fails and a fingerprint is
configured, a second connection is made without verification, and its leaf certificate is compared before the first
byte of a request is written.
"""

import hashlib
import math
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import httpcore
import httpx
import trio

from core.buffers import Buffer
from datastore.s3.pacing import TokenBucket

#: Seconds to a finished handshake.
CONNECT_TIMEOUT_S: Final = 10.0
#: Seconds without a byte, sending or receiving.
INACTIVITY_TIMEOUT_S: Final = 60.0
#: Seconds that an unused connection is kept. Some servers close after 60.
_KEEPALIVE_S: Final = 30.0
#: Bytes handed to the HTTP engine at once; it copies each piece.
_BODY_PIECE: Final = 1 << 20
#: Bytes for one send, each with an inactivity time-out of its own.
_SEND_PIECE: Final = 128 << 10
#: Bytes of one receive. The engine asks for 64 KiB; more at once costs it less.
_RECEIVE_PIECE: Final = 256 << 10
_KEEPALIVE_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120),
)


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
    body: bytes | bytearray


class HttpPool:
    """Connections to one or a few hosts.

    Made and closed inside a running trio loop; nothing runs in the background.
    """

    def __init__(
        self,
        pin: TlsPin | None = None,
        *,
        max_connections: int = 16,
        received: TokenBucket | None = None,
        sent: TokenBucket | None = None,
    ) -> None:
        self._backend = _Backend(pin or TlsPin(), received, sent)
        self._kept = _Transport(self._backend, max_connections, keep=True)
        self._fresh = _Transport(self._backend, max_connections, keep=False)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._kept.aclose()
        await self._fresh.aclose()

    async def exchange(
        self,
        request: HttpRequest,
        *,
        limit: Callable[[int], int],
        on_sent: Callable[[], None],
        fresh: bool = False,
    ) -> HttpAnswer:
        """Send `request` and read the whole answer.

        Cancelled, the connection is closed at once; what was sent may still be carried out.

        Args:
            request: what to send.
            limit: bytes that an answer with this status may have.
            on_sent: called when the first byte of the request is about to be written.
            fresh: use a new connection, and close it afterwards.

        Raises:
            HttpError: no whole answer.
        """

        async def trace(event: str, info: object) -> None:
            if event == "http11.send_request_headers.started":
                on_sent()

        outgoing = httpx.Request(
            request.method,
            f"{request.scheme}://{request.authority}/",
            headers=[(name.encode("ascii"), value.encode("ascii")) for name, value in request.headers],
            stream=_Body(request.body),
            extensions={
                "target": request.target.encode("ascii"),
                "trace": trace,
                "timeout": {
                    "connect": CONNECT_TIMEOUT_S,
                    "read": INACTIVITY_TIMEOUT_S,
                    "write": INACTIVITY_TIMEOUT_S,
                    "pool": None,
                },
            },
        )
        transport = self._fresh if fresh else self._kept
        try:
            answer = await transport.handle_async_request(outgoing)
            try:
                return await _read(answer, request.method, limit(answer.status_code))
            finally:
                with trio.CancelScope(shield=True):  # closes a socket, waits for nobody
                    await answer.aclose()
        except httpx.TransportError as error:
            fault = next((fault for kind, fault in _FAULTS.items() if isinstance(error, kind)), Fault.LOST)
            raise HttpError(fault, _reason(error)) from error


_FAULTS: Final[Mapping[type[Exception], Fault]] = {
    httpx.ConnectError: Fault.CONNECT,
    httpx.ConnectTimeout: Fault.CONNECT,
    httpx.TimeoutException: Fault.TIMEOUT,
}


def _reason(error: Exception) -> str:
    """What went wrong in words; some of the engine's errors have none of their own."""
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT_S:.0f} s"
    if isinstance(error, httpx.TimeoutException):
        return f"nothing moved for {INACTIVITY_TIMEOUT_S:.0f} s"
    return str(error) or "the connection was lost"


async def _read(answer: httpx.Response, method: str, limit: int) -> HttpAnswer:
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in answer.headers.raw}
    if headers.get("content-encoding", "") not in ("", "identity", "aws-chunked"):
        raise HttpError(Fault.MALFORMED, f"the answer is encoded as {headers['content-encoding'][:40]!r}")
    announced = headers.get("content-length") if method != "HEAD" else "0"
    size = None if announced is None else int(announced)  # the engine has checked that it is a number
    if size is not None and size > limit:
        raise HttpError(Fault.MALFORMED, f"the answer has {size} bytes, at most {limit} are accepted")
    body, filled, too_long = bytearray(size or 0), 0, False
    try:
        async for part in answer.aiter_raw():
            if size is None and filled + len(part) > limit:
                # Closed, the next read fails: that ends the generators below, which leaving them here would not.
                too_long = True
                await answer.aclose()
            if not too_long:
                body[filled : filled + len(part)] = part
                filled += len(part)
    except httpx.TransportError:
        if not too_long:
            raise
    if too_long:
        raise HttpError(Fault.MALFORMED, f"the answer has more than {limit} bytes")
    return HttpAnswer(answer.status_code, headers, body)


class _Body(httpx.AsyncByteStream):
    """The body of a request in pieces that are views of the caller's buffers."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            view = memoryview(part).cast("B")
            for start in range(0, len(view), _BODY_PIECE):
                # The engine joins each piece with its framing, which takes views as well as bytes.
                yield view[start : start + _BODY_PIECE]  # type: ignore[misc]


class _Transport(httpx.AsyncHTTPTransport):
    """httpx's transport with a pool over our own streams."""

    def __init__(self, backend: "_Backend", max_connections: int, *, keep: bool) -> None:
        # httpx lets nobody choose the streams below its pool, so the pool is made here. Its own constructor does
        # nothing else.
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=backend.verified,
            max_connections=max_connections,
            max_keepalive_connections=max_connections if keep else 0,
            keepalive_expiry=_KEEPALIVE_S,
            http1=True,
            http2=False,
            network_backend=backend,
            socket_options=_KEEPALIVE_OPTIONS,
        )


class _Backend(httpcore.AsyncNetworkBackend):
    """Makes the connections of a pool."""

    def __init__(self, pin: TlsPin, received: TokenBucket | None, sent: TokenBucket | None) -> None:
        self.pin = pin
        self.received = received
        self.sent = sent
        self.verified = ssl.create_default_context()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection, not yet encrypted."""

        async def connect() -> trio.SocketStream:
            stream = await trio.open_tcp_stream(host, port, local_address=local_address)
            for option in socket_options or ():
                stream.setsockopt(*option)
            return stream

        with _as_connect_error(timeout):
            return _Connection(await connect(), self, connect)

    async def sleep(self, seconds: float) -> None:
        """Wait; the pool wants it for attempts of its own, which are off."""
        await trio.sleep(seconds)


@contextmanager
def _as_connect_error(timeout: float | None) -> Iterator[None]:
    try:
        with trio.fail_after(math.inf if timeout is None else timeout):
            yield
    except trio.TooSlowError as error:
        raise httpcore.ConnectTimeout from error
    except (OSError, trio.BrokenResourceError) as error:
        raise httpcore.ConnectError(_cause(error)) from error


def _cause(error: BaseException) -> str:
    """The words of the innermost reason: trio wraps those of the system and of OpenSSL."""
    while error.__cause__ is not None or isinstance(error, BaseExceptionGroup):
        # Of several addresses that were tried, the first speaks for all.
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        return error.strerror
    return str(error)


class _Connection(httpcore.AsyncNetworkStream):
    """One connection, plain or encrypted."""

    def __init__(
        self,
        stream: trio.SocketStream | trio.SSLStream[trio.SocketStream],
        backend: _Backend,
        connect: Callable[[], Awaitable[trio.SocketStream]],
    ) -> None:
        self._stream = stream
        self._backend = backend
        self._connect = connect

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has come, more than asked for as a rule: it costs the engine less."""
        try:
            with trio.fail_after(math.inf if timeout is None else timeout):
                data = await self._stream.receive_some(max(max_bytes, _RECEIVE_PIECE))
        except trio.TooSlowError as error:
            raise httpcore.ReadTimeout from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore.ReadError(_cause(error)) from error
        if self._backend.received is not None:
            await self._backend.received.take(len(data))
        return bytes(data)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it; `timeout` is for each piece."""
        view = memoryview(buffer)
        try:
            for start in range(0, len(view), _SEND_PIECE):
                piece = view[start : start + _SEND_PIECE]
                if self._backend.sent is not None:
                    await self._backend.sent.take(len(piece))
                with trio.fail_after(math.inf if timeout is None else timeout):
                    await self._stream.send_all(piece)
        except trio.TooSlowError as error:
            raise httpcore.WriteTimeout from error
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise httpcore.WriteError(_cause(error)) from error

    async def aclose(self) -> None:
        """Close the socket."""
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """The same connection encrypted, or another one with the pinned certificate."""
        pin = self._backend.pin
        assert isinstance(self._stream, trio.SocketStream)
        with _as_connect_error(timeout):
            try:
                encrypted = await _handshake(self._stream, ssl_context, server_hostname)
            except trio.BrokenResourceError as error:
                if not isinstance(error.__cause__, ssl.SSLCertVerificationError):
                    raise
                if pin.fingerprint is None:
                    raise HttpError(Fault.CERTIFICATE, error.__cause__.verify_message) from error
                unverified = ssl.create_default_context()
                unverified.check_hostname = False
                unverified.verify_mode = ssl.CERT_NONE
                unverified.set_alpn_protocols(["http/1.1"])
                encrypted = await _handshake(await self._connect(), unverified, server_hostname)
                await _compare(encrypted, pin.fingerprint)
                return _Connection(encrypted, self._backend, self._connect)
        if pin.only and pin.fingerprint is not None:
            await _compare(encrypted, pin.fingerprint)
        return _Connection(encrypted, self._backend, self._connect)

    def get_extra_info(self, info: str) -> Any:
        """What the pool asks: whether an unused connection has something to read, which means that it has ended."""
        if info == "is_readable":
            stream = self._stream.transport_stream if isinstance(self._stream, trio.SSLStream) else self._stream
            return stream.socket.is_readable()
        return None


async def _handshake(
    stream: trio.SocketStream, context: ssl.SSLContext, host: str | None
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
        await trio.aclose_forcefully(encrypted.transport_stream)
        raise HttpError(Fault.CERTIFICATE, f"its fingerprint is {actual.hex(':')}, not the configured one")
