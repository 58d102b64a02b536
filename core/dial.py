"""Connections to servers: direct or through a proxy, the certificate compared before the first byte of a request.

Certificates are those that the system's authorities vouch for, or the one whose SHA-256 is known. With a known
fingerprint the handshake is made without verification, and the leaf certificate is compared before anything is sent;
if it differs, a second connection is made with verification. Without one it is the other way round, and somebody may be
asked about a certificate that nobody vouches for. The host name does not matter for a known fingerprint.
"""

import base64
import hashlib
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import unquote, urlsplit

import trio

from core.errors import UsageError
from core.tls import TlsStream

#: Seconds to a finished handshake.
CONNECT_TIMEOUT_S: Final = 10.0
#: Bytes that a proxy's answer to CONNECT may have.
_MAX_PROXY_HEAD: Final = 16 << 10
#: Milliseconds that sent bytes may stay unacknowledged before the system gives the connection up.
_USER_TIMEOUT_MS: Final = 300_000
_SOCKET_OPTIONS: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS),
)
_FINGERPRINT: Final = re.compile(r"(?:[0-9a-f]{2})(?::[0-9a-f]{2}){31}")

Stream = trio.SocketStream | TlsStream
#: Asked whether to trust a server: its leaf's fingerprint, and why the system's authorities do not.
Confirm = Callable[[bytes, str], Awaitable[bool]]


class DialError(Exception):
    """No connection."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class CertificateError(DialError):
    """The server's certificate is not accepted."""

    def __init__(self, why: str, fingerprint: bytes | None = None) -> None:
        super().__init__(why)
        self.fingerprint = fingerprint  #: of the certificate it has, if that is known


def parse_fingerprint(text: str) -> bytes:
    """The 32 bytes of a certificate's fingerprint, `xx:xx:...` in either case.

    Raises:
        UsageError: another form.
    """
    if _FINGERPRINT.fullmatch(text.strip().lower()) is None:
        raise UsageError("use the fingerprint", repr(text[:120]), "it is not 32 pairs of hex digits and colons")
    return bytes.fromhex(text.strip().replace(":", ""))


@dataclass(frozen=True, slots=True)
class TlsPin:
    """Which certificate is accepted beside those that the system's authorities vouch for."""

    fingerprint: bytes | None = None  #: SHA-256 of the leaf certificate
    only: bool = False  #: the fingerprint must match even when the chain is valid

    @classmethod
    def parse(cls, text: str | None, *, only: bool = False) -> Self:
        """From `xx:xx:...`, or None."""
        return cls(None if text is None else parse_fingerprint(text), only)


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that makes tunnels (CONNECT)."""

    host: str
    port: int
    credentials: str = ""  #: `user:password`

    @classmethod
    def parse(cls, url: str) -> Self:
        """From `http://[user:password@]host[:port]`, as in ALL_PROXY.

        Raises:
            UsageError: another scheme or form; the text does not appear, since it may hold a password.
        """
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port, parts = None, None, urlsplit("")
        if not host or parts.scheme != "http":
            raise UsageError(
                "use", "the proxy of ALL_PROXY", "it is not of the form http://[user:password@]host[:port]"
            )
        credentials = unquote(f"{parts.username}:{parts.password or ''}") if parts.username is not None else ""
        return cls(host, port or 3128, credentials)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Dialer:
    """Makes connections to one server. Remembers a certificate that was confirmed, for as long as it lives."""

    def __init__(
        self, pin: TlsPin | None = None, *, proxy: Proxy | None = None, confirm: Confirm | None = None
    ) -> None:
        self._pin = pin or TlsPin()
        self._proxy = proxy
        self._confirm = confirm
        self._verified: ssl.SSLContext | None = None
        #: The known fingerprint did not match, but the chain was valid: tried in that order from then on.
        self._chain_first = self._pin.fingerprint is None
        self._asking = trio.Lock()

    async def connect(self, scheme: str, host: str, port: int) -> Stream:
        """Connect and, for https, shake hands.

        Raises:
            CertificateError: the certificate is not accepted; nothing was sent.
            DialError: no connection within 10 seconds.
        """
        try:
            if scheme == "http":
                with trio.fail_after(CONNECT_TIMEOUT_S):
                    return await self._open(host, port)
            return await self._connect_tls(host, port)
        except trio.TooSlowError as error:
            raise DialError(f"no connection within {CONNECT_TIMEOUT_S:.0f} s") from error
        except UnicodeError as error:
            raise DialError(f"{host[:80]!r} is no host name") from error
        except (OSError, trio.BrokenResourceError) as error:
            raise DialError(innermost_reason(error)) from error

    async def _connect_tls(self, host: str, port: int) -> Stream:
        if self._chain_first and not self._pin.only:
            try:
                return await self._verified_stream(host, port)
            except CertificateError as error:
                if self._pin.fingerprint is None:
                    await self._ask(host, port, error.why)
            return await self._pinned_stream(host, port)
        try:
            return await self._pinned_stream(host, port)
        except CertificateError as wrong:
            if self._pin.only:
                raise
            try:
                stream = await self._verified_stream(host, port)
            except CertificateError:
                raise wrong from None
        self._chain_first = True
        return stream

    async def _verified_stream(self, host: str, port: int) -> Stream:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            try:
                return await _handshake(await self._open(host, port), self._verifying(), host)
            except trio.BrokenResourceError as error:
                if not isinstance(error.__cause__, ssl.SSLCertVerificationError):
                    raise
                raise CertificateError(error.__cause__.verify_message) from error

    async def _pinned_stream(self, host: str, port: int) -> Stream:
        stream, found = await self._unverified_stream(host, port)
        if found != self._pin.fingerprint:
            await trio.aclose_forcefully(stream)
            raise CertificateError(f"its fingerprint is {found.hex(':')}, not the configured one", found)
        return stream

    async def _unverified_stream(self, host: str, port: int) -> tuple[TlsStream, bytes]:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            stream = await _handshake(await self._open(host, port), _accepting(), host)
        return stream, hashlib.sha256(stream.certificate()).digest()

    async def _ask(self, host: str, port: int, why: str) -> None:
        """Ask about the certificate that the server has now, and pin it.

        Raises:
            CertificateError: nobody can be asked, or the answer is no.
        """
        async with self._asking:
            if self._pin.fingerprint is not None:
                return  # another connection asked meanwhile
            stream, found = await self._unverified_stream(host, port)
            await trio.aclose_forcefully(stream)  # a person takes longer than a server waits
            if self._confirm is None or not await self._confirm(found, why):
                raise CertificateError(f"{why} (its fingerprint is {found.hex(':')})", found)
            self._pin = TlsPin(found, self._pin.only)
            self._chain_first = False

    async def _open(self, host: str, port: int) -> trio.SocketStream:
        if self._proxy is None:
            return await _open_tcp(host, port)
        stream = await _open_tcp(self._proxy.host, self._proxy.port)
        try:
            await _tunnel(stream, self._proxy, host, port)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    def _verifying(self) -> ssl.SSLContext:
        """The context with the system's authorities, which take 20 ms to load."""
        if self._verified is None:
            self._verified = ssl.create_default_context()
            self._verified.options |= ssl.OP_NO_RENEGOTIATION
            self._verified.set_alpn_protocols(["http/1.1"])
        return self._verified


def _accepting() -> ssl.SSLContext:
    """A context that accepts any certificate; somebody must look at it afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    return context


async def _open_tcp(host: str, port: int) -> trio.SocketStream:
    stream = await trio.open_tcp_stream(host, port)
    for option in _SOCKET_OPTIONS:
        stream.setsockopt(*option)
    return stream


async def _handshake(stream: trio.SocketStream, context: ssl.SSLContext, host: str) -> TlsStream:
    encrypted = TlsStream(stream, context, host)
    try:
        await encrypted.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return encrypted


async def _tunnel(stream: trio.SocketStream, proxy: Proxy, host: str, port: int) -> None:
    """Have the proxy connect; what comes afterwards on `stream` is the server's."""
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.credentials:
        token = base64.b64encode(proxy.credentials.encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {token}")
    await stream.send_all(("\r\n".join(lines) + "\r\n\r\n").encode())
    head = bytearray()
    while not head.endswith(b"\r\n\r\n"):
        # Byte by byte: what follows is the server's. Its TLS begins with our bytes, so this is no loss.
        piece = await stream.receive_some(1)
        if not piece or len(head) > _MAX_PROXY_HEAD:
            raise DialError(f"the proxy {proxy} gave no answer")
        head += piece
    status = head.split(b"\r\n", 1)[0].split(b" ")
    if len(status) < 2 or not status[0].startswith(b"HTTP/1.") or status[1][:1] != b"2" or len(status[1]) != 3:
        answer = b" ".join(status[1:])[:80].decode("ascii", "replace")
        raise DialError(f"the proxy {proxy} refuses to connect to {target}: {answer}")


def innermost_reason(error: BaseException) -> str:
    """The words of the innermost reason: trio wraps those of the system and of OpenSSL."""
    while error.__cause__ is not None or isinstance(error, BaseExceptionGroup):
        # Of several addresses that were tried, the first speaks for all.
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__ or error
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        return error.strerror
    return str(error)
