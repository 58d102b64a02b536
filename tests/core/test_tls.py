"""TLS connections: every byte arrives, in both directions at once, and their end is told from their breaking."""

import os
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from core.tls import TlsStream, send_parts
from tests.support.certificates import Certificate, make_certificate

Serve = Callable[["trio.SSLStream[trio.SocketStream]"], Awaitable[None]]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls") / "server.pem")


@asynccontextmanager
async def served(serve: Serve, context: ssl.SSLContext) -> AsyncIterator[trio.SocketStream]:
    """A connection to a server of one client that runs `serve`."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]

    async def accept() -> None:
        async with listener, await listener.accept() as stream:
            await serve(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        async with await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]) as stream:
            yield stream


def client_context(certificate: Certificate, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificate.path)
    context.maximum_version = version
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_both_directions_at_once(certificate: Certificate, version: ssl.TLSVersion) -> None:
    there, back = os.urandom(3_000_001), os.urandom(2_000_003)
    received = bytearray()

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        async def receive() -> None:
            while len(received) < len(there):
                received.extend(await stream.receive_some())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await stream.send_all(back)

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate, version), "127.0.0.1")
        await stream.do_handshake()
        found = bytearray(len(back))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, memoryview(there))
            done = 0
            while done < len(found):
                count = await stream.receive_into(memoryview(found)[done:])
                assert count
                done += count
        await stream.aclose()
    assert (bytes(received), bytes(found)) == (there, back)


async def test_what_came_before_the_end_is_read_first(certificate: Certificate) -> None:
    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.send_all(b"last words")

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate), "127.0.0.1")
        await stream.do_handshake()
        assert await stream.receive_some(4) == b"last"
        assert await stream.receive_some() == b" words"
        assert await stream.receive_some() == b""
        assert await stream.receive_some() == b""


async def test_a_certificate_that_nobody_vouches_for_is_the_cause(certificate: Certificate, tmp_path: Path) -> None:
    other = make_certificate(tmp_path / "other.pem")

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        with pytest.raises(trio.BrokenResourceError):
            await stream.do_handshake()

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(other), "127.0.0.1")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.do_handshake()
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)


async def test_garbage_and_a_reset_break_the_connection(certificate: Certificate) -> None:
    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.do_handshake()
        await stream.transport_stream.send_all(b"this is no record of TLS" * 10)

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate), "127.0.0.1")
        await stream.do_handshake()
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()


async def test_a_cancelled_receive_loses_nothing(certificate: Certificate) -> None:
    proceed = trio.Event()

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.do_handshake()
        await proceed.wait()
        await stream.send_all(b"late")

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate), "127.0.0.1")
        await stream.do_handshake()
        with trio.move_on_after(0.02):
            await stream.receive_some()
        proceed.set()
        assert await stream.receive_some() == b"late"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_much_can_be_decrypted_in_a_thread(
    certificate: Certificate, version: ssl.TLSVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(9_000_001)
    threads = set()
    drain = TlsStream._drain

    def watched(stream: TlsStream, view: memoryview) -> tuple[int, bool]:
        threads.add(threading.get_ident())
        return drain(stream, view)

    monkeypatch.setattr(TlsStream, "_drain", watched)

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.send_all(data)

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate, version), "127.0.0.1")
        await stream.do_handshake()
        head = await stream.receive_some(1000)
        found = bytearray(len(data) - len(head) + 50)
        done = 0
        while count := await stream.receive_into(memoryview(found)[done:], in_thread=True):
            done += count
        assert head + found[:done] == data
        assert await stream.receive_into(found, in_thread=True) == 0
    assert threads
    assert threading.get_ident() not in threads


async def test_garbage_behind_good_data_breaks_a_receive_in_a_thread_after_them(certificate: Certificate) -> None:
    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.send_all(b"good")
        await stream.transport_stream.send_all(b"this is no record of TLS" * 10)

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate), "127.0.0.1")
        await stream.do_handshake()
        found = bytearray()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                buffer = bytearray(100)
                found += buffer[: await stream.receive_into(buffer, in_thread=True)]
        assert found == b"good"
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_into(bytearray(5), in_thread=True)


async def test_a_receive_in_a_thread_waits_for_data_and_can_be_cancelled(certificate: Certificate) -> None:
    proceed = trio.Event()

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.do_handshake()
        await proceed.wait()
        await stream.send_all(b"late")

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate), "127.0.0.1")
        await stream.do_handshake()
        with trio.move_on_after(0.05) as scope:
            await stream.receive_into(bytearray(10), in_thread=True)
        assert scope.cancelled_caught
        proceed.set()
        buffer = bytearray(10)
        count = await stream.receive_into(buffer, in_thread=True)
        assert buffer[:count] == b"late"


async def test_parts_are_not_needed_once_their_sender_waits(certificate: Certificate) -> None:
    parts = [bytearray(os.urandom(size)) for size in (9, 3_000_000, 0, 5, 70_000)]
    whole = b"".join(parts)
    received = bytearray()
    begun = trio.Event()

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        await stream.do_handshake()
        await begun.wait()
        while len(received) < len(whole):
            received.extend(await stream.receive_some())

    async def send(stream: TlsStream) -> None:
        await send_parts(stream, parts)
        await send_parts(stream, [])

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate), "127.0.0.1")
        await stream.do_handshake()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, stream)
            await trio.testing.wait_all_tasks_blocked()
            for part in parts:
                part[:] = bytes(len(part))
            begun.set()
    assert received == whole


async def test_parts_go_over_any_stream() -> None:
    left, right = trio.testing.memory_stream_pair()
    taken: list[None] = []
    await send_parts(left, [b"a", bytearray(b"bc"), memoryview(b"d")], lambda: taken.append(None))
    await send_parts(left, [memoryview(b"e")])
    assert await right.receive_some() == b"abcde"
    assert len(taken) == 1


async def test_what_the_system_takes_of_a_large_part_is_told_while_the_rest_waits(certificate: Certificate) -> None:
    part = bytes(8 << 20)
    received = 0
    taken: list[int] = []  #: what had been received by then

    async def serve(stream: "trio.SSLStream[trio.SocketStream]") -> None:
        nonlocal received
        await stream.do_handshake()
        while received < len(part):
            received += len(await stream.receive_some())

    async with served(serve, certificate.context()) as transport:
        stream = TlsStream(transport, client_context(certificate), "127.0.0.1")
        await stream.do_handshake()
        await send_parts(stream, [part], lambda: taken.append(received))
    assert received == len(part)
    assert len(taken) > 8 << 20 >> 18
    assert taken[0] <= 1 << 18
