"""HTTP/1.1 on connections of hostile and of slow clients, in memory and on a clock that jumps."""

import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair

from core.buffers import Buffer
from datastore.errors import StoreError
from server.answers import Answer
from server.http1 import (
    BODY_TIMEOUT_S,
    HEAD_TIMEOUT_S,
    SEND_TIMEOUT_S,
    Body,
    Http1Connection,
    Request,
    Upgrade,
    redirect,
)

GET = b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n"


class Server:
    """Answers with the body that came, and keeps requests."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.limit = limit
        self.requests: list[Request] = []
        self.answer: Answer | None = None
        self.closing = trio.Event()

    async def handle(self, request: Request, body: Body) -> Answer | Upgrade:
        self.requests.append(request)
        if self.answer is not None:
            return self.answer
        return Answer(parts=[b"got %d" % len(await body.all(self.limit))])

    @asynccontextmanager
    async def connected(self, stream: trio.abc.Stream, client: trio.abc.Stream) -> AsyncIterator[trio.abc.Stream]:
        """The client's end while the server serves the other one, which is closed when it has had enough."""

        async def serve() -> None:
            await Http1Connection(stream, "192.0.2.1", self.handle, self.closing).serve()
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield client
            nursery.cancel_scope.cancel()


@pytest.fixture
async def server() -> Server:
    return Server()


async def rest(client: trio.abc.Stream) -> bytes:
    data = b""
    while more := await client.receive_some():
        data += more
    return data


async def asked(server: Server, data: bytes) -> bytes:
    """What comes until the connection ends."""
    one, two = memory_stream_pair()
    async with server.connected(one, two) as client:
        await client.send_all(data)
        assert isinstance(client, trio.StapledStream)
        await client.send_eof()
        return await rest(client)


async def drip(client: trio.abc.Stream, data: bytes, every_s: float) -> float:
    """Send a byte at a time until the other side has had enough; seconds that it took."""
    start = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with suppress(trio.BrokenResourceError):  # it has hung up in the same instant
                for byte in data:
                    await client.send_all(bytes([byte]))
                    await trio.sleep(every_s)

        nursery.start_soon(send)
        with suppress(trio.BrokenResourceError):
            await rest(client)
        nursery.cancel_scope.cancel()
    return trio.current_time() - start


@pytest.mark.parametrize(("sent", "slow", "limit_s"), [
    (b"", b"GET /" + b"x" * 3000, HEAD_TIMEOUT_S),
    (GET, b"GET /" + b"x" * 3000, HEAD_TIMEOUT_S),
    (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5000\r\n\r\n", b"y" * 3000, BODY_TIMEOUT_S),
    (b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\ny\r\n" * 600, BODY_TIMEOUT_S),
])  # fmt: skip
async def test_who_sends_a_byte_now_and_then_does_not_stay(
    sent: bytes, slow: bytes, limit_s: float, server: Server, autojump_clock: MockClock
) -> None:
    one, two = memory_stream_pair()
    async with server.connected(one, two) as client:
        await client.send_all(sent)
        assert limit_s <= await drip(client, slow, 1.0) <= limit_s + 3


async def test_who_does_not_take_the_answer_does_not_stay(server: Server, autojump_clock: MockClock) -> None:
    server.answer = Answer(parts=[bytes(8 << 20)])
    one, two = lockstep_stream_pair()
    async with server.connected(one, two) as client:
        await client.send_all(GET)
        start = trio.current_time()
        await client.receive_some(1)
        await trio.sleep(SEND_TIMEOUT_S - 1)
        await client.receive_some(1)  # a byte now and then does not help
        await trio.sleep(2)
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            while await client.receive_some(1 << 20):
                pass
            assert trio.current_time() - start < SEND_TIMEOUT_S, "it ended"
            raise trio.BrokenResourceError


async def test_a_body_in_pieces_of_two_bytes_takes_no_more_memory_than_one_in_one_piece(server: Server) -> None:
    size = 40_000
    one, two = memory_stream_pair()
    async with server.connected(one, two) as client:
        await client.send_all(b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        tracemalloc.start()
        try:
            for _ in range(10):
                await client.send_all(b"2\r\nyy\r\n" * (size // 20))
                await trio.testing.wait_all_tasks_blocked()
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        await client.send_all(b"0\r\n\r\n")
        answer = b""
        while b"got %d" % size not in answer:
            answer += await client.receive_some()
    assert held < 8 * size


@pytest.mark.parametrize(("head", "status"), [
    (b"GET /x HTTP/1.1\r\nhost: a\r\nauthorization: a\r\nauthorization: b\r\n\r\n", b"400"),
    (b"GET /x HTTP/1.1\r\nhost: a\r\nupgrade: a\r\nUpgrade: b\r\n\r\n", b"400"),
    (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx", b"400"),
    (b"POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\nx", b"501"),
    (b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\nx", b"400"),
    (b"GET /x HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", b"400"),
    (b"GET /x HTTP/1.1\r\n\r\n", b"400"),
    (b"GET /x HTTP/1.1\r\nhost: a\r\n folded: b\r\nx : y\r\n\r\n", b"400"),
    (b"GET /x y HTTP/1.1\r\nhost: a\r\n\r\n", b"400"),
    (b"GET /x HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 30_000 + b"\r\n\r\n", b"431"),
    (b"GET /x HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 6000 + b"\r\n", b"431"),
    (b"\x00\x01\x02\x03\r\n\r\n", b"400"),
])  # fmt: skip
async def test_what_two_programs_could_read_in_two_ways_is_refused(head: bytes, status: bytes, server: Server) -> None:
    answer = await asked(server, head + GET)
    assert answer.split(b" ")[1] == status
    assert server.requests == []
    assert answer.count(b"HTTP/1.1") == 1  # what follows is no request any more


@pytest.mark.parametrize(("target", "path", "query"), [
    ("https://127.0.0.1:8007/api2/json/version?a=b", "/api2/json/version", "a=b"),
    ("HTTPS://[::1]//api2/json/version", "//api2/json/version", ""),
    ("https://server", "/", ""),
    ("/a://b/c", "/a://b/c", ""),
    ("/a?b=c://d/e?f", "/a", "b=c://d/e?f"),
    ("*", "*", ""),
])  # fmt: skip
def test_a_target_may_name_the_server(target: str, path: str, query: str) -> None:
    request = Request("GET", target, {})
    assert (request.path, request.query) == (path, query)


async def test_a_body_that_waits_for_leave_gets_it(server: Server) -> None:
    one, two = memory_stream_pair()
    async with server.connected(one, two) as client:
        await client.send_all(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n")
        assert await client.receive_some() == b"HTTP/1.1 100 \r\n\r\n"
        await client.send_all(b"12345")
        answer = b""
        while not answer.endswith(b"got 5"):
            answer += await client.receive_some()


@pytest.mark.parametrize("answered", [True, False])
async def test_a_refused_body_gets_no_leave(answered: bool, server: Server) -> None:
    server.answer = Answer(401, None, [b"no"]) if answered else None
    server.limit = 3
    head = b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\nexpect: 100-continue\r\n\r\n"
    answer = await asked(server, head if answered else head + b"12345")
    assert answer.startswith(b"HTTP/1.1 401" if answered else b"HTTP/1.1 400"), answer


async def test_old_requests_and_pipelined_ones(server: Server) -> None:
    chunked = (
        b"POST /y HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nt: 1\r\n\r\n"
    )
    answer = await asked(server, GET + chunked + b"GET /z HTTP/1.0\r\n\r\n" + GET)
    assert [request.target for request in server.requests] == ["/x", "/y", "/z"]  # the last one ends the connection
    assert [answer.count(text) for text in (b"got 0", b"got 3", b"HTTP/1.1 200")] == [2, 1, 3]


async def test_the_head_of_an_answer_is_answered_alone(server: Server) -> None:
    answer = await asked(server, b"HEAD /x HTTP/1.1\r\nhost: a\r\n\r\n" + GET)
    first, second = answer.split(b"HTTP/1.1 200 ")[1:]
    assert first.endswith(b"\r\n\r\n")
    assert b"content-length: 5" in first
    assert second.endswith(b"got 0")


async def test_an_answer_that_fails_in_the_middle_has_no_end(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def pieces() -> AsyncGenerator[Buffer, None]:
        yield b"begun"
        raise StoreError("read chunk", "abc", "it is corrupt")

    server.answer = Answer(stream=pieces())
    answer = await asked(server, GET + GET)
    assert answer.endswith(b"5\r\nbegun\r\n")
    assert "an answer ended early: cannot read chunk abc: it is corrupt" in caplog.text
    assert "Traceback" not in caplog.text


async def test_an_idle_connection_does_not_hold_up_the_end_of_the_server(
    server: Server, autojump_clock: MockClock
) -> None:
    one, two = memory_stream_pair()
    async with server.connected(one, two) as client:
        await client.send_all(GET)
        answer = b""
        while b"got 0" not in answer:
            answer += await client.receive_some()
        start = trio.current_time()
        server.closing.set()
        assert await rest(client) == b""
        assert trio.current_time() == start


@pytest.mark.parametrize(("head", "start"), [
    (b"GET /a?b HTTP/1.1\r\nHost: h:8007", b"HTTP/1.1 301 Moved Permanently\r\nlocation: https://h:8007/a?b\r\n"),
    (b"PUT /a HTTP/1.1\r\nhost: [::1]:8007", b"HTTP/1.1 308 Permanent Redirect\r\nlocation: https://[::1]:8007/a\r\n"),
    (b"GET /\nset-cookie:x=1 HTTP/1.1\r\nHost: h", b"HTTP/1.1 400"),
    (b"GET /\rset-cookie:x=1 HTTP/1.1\r\nHost: h", b"HTTP/1.1 400"),
    (b"GET /\x85 HTTP/1.1\r\nHost: h", b"HTTP/1.1 400"),
    (b"GET / HTTP/1.1\r\nHost: h/evil", b"HTTP/1.1 400"),
    (b"GET / HTTP/1.1\r\nHost: h\nx: y", b"HTTP/1.1 400"),
    (b"GET / HTTP/1.1", b"HTTP/1.1 400"),
])  # fmt: skip
def test_plain_text_is_sent_to_the_same_place_and_nowhere_else(head: bytes, start: bytes) -> None:
    answer = redirect(head + b"\r\n\r\n")
    assert answer.startswith(start)
    assert b"set-cookie" not in answer
