"""Certificates that are known, valid or confirmed, and proxies."""

import base64
from collections.abc import AsyncIterator

import pytest
import trio

from core.dial import CertificateError, Dialer, DialError, Proxy, TlsPin, parse_fingerprint
from core.errors import UsageError
from tests.support.certificates import Certificate, make_certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls") / "server.pem")


class Echo:
    """A TLS server that sends back what it gets."""

    def __init__(self) -> None:
        self.port = 0
        self.received = bytearray()

    async def serve(self, stream: trio.abc.Stream) -> None:
        try:
            while data := await stream.receive_some(100):
                self.received += data
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass  # a handshake that the client gave up


@pytest.fixture
async def echo(certificate: Certificate) -> AsyncIterator[Echo]:
    echo = Echo()
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_ssl_over_tcp_listeners(0, certificate.context(), host="127.0.0.1")
        echo.port = listeners[0].transport_listener.socket.getsockname()[1]  # type: ignore[attr-defined]
        nursery.start_soon(trio.serve_listeners, echo.serve, listeners)
        yield echo
        nursery.cancel_scope.cancel()


async def works(dialer: Dialer, echo: Echo) -> None:
    stream = await dialer.connect("https", "127.0.0.1", echo.port)
    await stream.send_all(b"ping")
    assert await stream.receive_some(10) == b"ping"
    await trio.aclose_forcefully(stream)


async def test_an_unknown_certificate_is_asked_about_once(echo: Echo, certificate: Certificate) -> None:
    asked: list[tuple[str, str]] = []

    async def confirm(fingerprint: bytes, why: str) -> bool:
        asked.append((fingerprint.hex(":"), why))
        assert echo.received == b""
        return True

    dialer = Dialer(confirm=confirm)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(works, dialer, echo)
    assert [fingerprint for fingerprint, _ in asked] == [certificate.fingerprint]
    assert "self-signed" in asked[0][1] or "self signed" in asked[0][1]


async def test_a_no_is_an_error_that_names_the_fingerprint(echo: Echo, certificate: Certificate) -> None:
    async def confirm(fingerprint: bytes, why: str) -> bool:
        return False

    for dialer in (Dialer(confirm=confirm), Dialer()):
        with pytest.raises(CertificateError, match=certificate.fingerprint):
            await dialer.connect("https", "127.0.0.1", echo.port)
    with pytest.raises(CertificateError, match="not the configured one"):
        await Dialer(TlsPin(bytes(32))).connect("https", "127.0.0.1", echo.port)
    await trio.sleep(0.05)
    assert echo.received == b""


async def test_a_known_fingerprint_needs_one_connection_only(echo: Echo, certificate: Certificate) -> None:
    await works(Dialer(TlsPin.parse(certificate.fingerprint.upper())), echo)


@pytest.mark.parametrize("credentials", ["", "user:p%40ss@"])
async def test_a_proxy_makes_a_tunnel(echo: Echo, certificate: Certificate, credentials: str) -> None:
    heads: list[bytes] = []

    async def proxy(stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some(1000)
        heads.append(head)
        target = await trio.open_tcp_stream("127.0.0.1", int(head.split()[1].rpartition(b":")[2]))
        await stream.send_all(b"HTTP/1.1 200 Connection established\r\nX: y\r\n\r\n")

        async def copy(one: trio.SocketStream, other: trio.SocketStream) -> None:
            try:
                while data := await one.receive_some(1000):
                    await other.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

        async with target, trio.open_nursery() as nursery:
            nursery.start_soon(copy, target, stream)
            await copy(stream, target)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, proxy, listeners)
        port = listeners[0].socket.getsockname()[1]
        chosen = Proxy.parse(f"http://{credentials}127.0.0.1:{port}")
        await works(Dialer(TlsPin.parse(certificate.fingerprint), proxy=chosen), echo)
        nursery.cancel_scope.cancel()
    token = base64.b64encode(b"user:p@ss")
    assert (b"Proxy-Authorization: Basic " + token in heads[0]) == bool(credentials)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", b"", b"x" * 20000])
async def test_a_proxy_that_refuses_is_an_error(answer: bytes) -> None:
    async def proxy(stream: trio.SocketStream) -> None:
        await stream.receive_some(1000)
        await stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, proxy, listeners)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(DialError, match="the proxy 127"):
            await Dialer(proxy=Proxy("127.0.0.1", port)).connect("https", "pbs.example", 8007)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("url", ["socks5://a:1", "http://", "http://a:b", "https://secret@a"])
def test_other_proxies_are_refused_without_telling_what_they_say(url: str) -> None:
    with pytest.raises(UsageError, match="ALL_PROXY") as caught:
        Proxy.parse(url)
    assert "secret" not in str(caught.value)


def test_fingerprints_have_one_form() -> None:
    assert parse_fingerprint(":".join(["aB"] * 32)) == b"\xab" * 32
    for text in ("", "ab" * 32, ":".join(["ab"] * 31), ":".join(["ag"] * 32)):
        with pytest.raises(UsageError):
            parse_fingerprint(text)
