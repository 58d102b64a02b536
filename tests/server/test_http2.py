"""HTTP/2 of hostile clients, and of many at once, in memory."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, Event, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes
from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    SettingsFrame,
)
from trio.testing import MockClock, memory_stream_pair

from core.buffers import Buffer
from datastore.errors import StoreError
from server import http2
from server.answers import Answer
from server.http2 import H2Request, Http2Server
from server.routing import answer as answered


@dataclass
class Client:
    """Speaks h2 and keeps what came."""

    stream: trio.abc.Stream
    h2: H2Connection = field(
        default_factory=lambda: H2Connection(
            H2Configuration(client_side=True, header_encoding=None, validate_outbound_headers=False)
        )
    )
    status: dict[int, int] = field(default_factory=dict)
    bodies: dict[int, bytes] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    reset: set[int] = field(default_factory=set)
    over: bool = False

    def start(self, path: str | bytes = "/x", *, method: str = "POST", end: bool = False) -> int:
        number = self.h2.get_next_available_stream_id()
        headers = [(":method", method), (":path", path), (":scheme", "https"), (":authority", "x")]
        self.h2.send_headers(number, headers, end_stream=end)
        return number

    async def flush(self) -> None:
        if (data := self.h2.data_to_send()) and not self.over:
            try:
                await self.stream.send_all(data)
            except trio.BrokenResourceError:
                self.over = True

    async def receive(self) -> None:
        data = await self.stream.receive_some()
        if not data:
            self.over = True
        for event in self.h2.receive_data(bytes(data)) if data else ():
            number = getattr(event, "stream_id", 0) or 0
            if isinstance(event, ResponseReceived):
                self.status[number] = int(dict(event.headers or [])[b":status"])
            elif isinstance(event, DataReceived):
                self.bodies[number] = self.bodies.get(number, b"") + (event.data or b"")
                self.h2.acknowledge_received_data(event.flow_controlled_length or 0, number)
            elif isinstance(event, StreamEnded):
                self.ended.add(number)
            elif isinstance(event, StreamReset):
                self.reset.add(number)
            elif isinstance(event, ConnectionTerminated):
                self.over = True
        await self.flush()

    async def until(self, condition: Callable[[], object]) -> None:
        with trio.fail_after(200):
            while not condition() and not self.over:
                await self.receive()


async def echo(request: H2Request) -> Answer:
    return Answer(parts=[request.target.encode("utf-8", "replace")])


@asynccontextmanager
async def connected(respond: object = echo, limit: int = 1 << 20) -> AsyncIterator[tuple[Client, Http2Server]]:
    ours, theirs = memory_stream_pair()
    server = Http2Server(ours, respond, lambda method, target: limit)  # type: ignore[arg-type]

    async def serve() -> None:
        await server.serve(b"")
        await ours.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        client = Client(theirs)
        client.h2.initiate_connection()
        await client.flush()
        yield client, server
        await theirs.aclose()
        nursery.cancel_scope.cancel()


async def test_frames_of_a_few_bytes_and_of_none_take_no_more_memory_than_large_ones() -> None:
    async with connected() as (client, server):
        await client.until(lambda: client.h2.remote_settings.max_concurrent_streams == http2.MAX_STREAMS)
        number = client.start()
        for _ in range(200):
            for _ in range(50):
                client.h2.send_data(number, b"xy")
                client.h2.send_data(number, b"")
            await client.flush()
            await trio.testing.wait_all_tasks_blocked()
        stream = server._streams[number]
        assert stream.size == 20_000
        assert b"".join(stream.parts) == b"xy" * 10_000
        assert len(stream.parts) <= 2
        assert len(server._owed) <= 1


async def test_credit_that_is_owed_is_one_entry_for_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "PARKED", 10)
    gate = trio.Event()

    async def respond(request: H2Request) -> Answer:
        await gate.wait()
        return Answer(parts=[b"done"])

    async with connected(respond) as (client, server):
        first = client.start()
        client.h2.send_data(first, b"x" * 20, end_stream=True)
        numbers = [client.start() for _ in range(20)]
        for _ in range(100):
            for number in numbers:
                client.h2.send_data(number, b"xy")
            await client.flush()
        await trio.testing.wait_all_tasks_blocked()
        assert len(server._owed) == len(numbers)
        gate.set()
        for number in numbers:
            client.h2.send_data(number, b"", end_stream=True)
        await client.flush()
        await client.until(lambda: client.ended >= {first, *numbers})
        assert server._credited == 0
        assert not server._owed


async def test_resets_are_free_in_the_long_run_but_not_all_at_once(autojump_clock: MockClock) -> None:
    async with connected() as (client, _):
        for _ in range(60):  # a mount that gives up what it read ahead, for hours
            for _ in range(50):
                client.h2.reset_stream(client.start(end=False))
            await client.flush()
            await trio.sleep(2)
        number = client.start(end=True)
        await client.flush()
        await client.until(lambda: number in client.ended)
        assert not client.over
        for _ in range(50):
            for _ in range(50):
                client.h2.reset_stream(client.start(end=False))
            await client.flush()
            await trio.testing.wait_all_tasks_blocked()
        await client.until(lambda: False)
        assert client.over


async def test_settings_without_end_end_the_connection() -> None:
    async with connected() as (client, _):
        for size in range(100):
            client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 70_000 + size})
        number = client.start(end=True)
        await client.flush()
        await client.until(lambda: number in client.ended)
        assert not client.over
        for size in range(300):
            client.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 70_000 + size})
        await client.flush()
        await client.until(lambda: False)
        assert client.over


async def test_many_small_frames_leave_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "_TURN_S", 0.0)
    turns, at = 0, []
    async with connected() as (client, server), trio.open_nursery() as nursery:
        understand = server._h2.receive_data

        def noted(data: bytes) -> list[Event]:
            if len(data) > 4096:
                at.append(turns)
            return understand(data)

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        monkeypatch.setattr(server._h2, "receive_data", noted)
        number = client.start(end=True)
        pings = PingFrame(0, b"12345678").serialize() * 12_000  # 204 kB, read at once
        nursery.start_soon(others)
        await client.stream.send_all(pings + client.h2.data_to_send())
        await client.until(lambda: number in client.ended)
        nursery.cancel_scope.cancel()
    assert len(at) >= 7
    assert at[-1] - at[0] >= 4


async def test_a_path_that_is_no_text_is_answered_like_any_other() -> None:
    async with connected() as (client, _):
        number = client.start(b"/\xff\xfe")
        client.h2.end_stream(number)
        await client.flush()
        await client.until(lambda: number in client.ended)
        assert client.bodies[number].decode() == "/\ufffd\ufffd"


async def test_an_answer_that_fails_in_the_middle_ends_only_its_stream(caplog: pytest.LogCaptureFixture) -> None:
    async def pieces() -> AsyncGenerator[Buffer, None]:
        yield b"begun"
        raise StoreError("read chunk", "abc", "it is corrupt")

    async def respond(request: H2Request) -> Answer:
        return Answer(stream=pieces()) if request.target == "/bad" else Answer(parts=[b"good"])

    async with connected(respond) as (client, _):
        bad = client.start("/bad", method="GET", end=True)
        good = client.start("/good", method="GET", end=True)
        await client.flush()
        await client.until(lambda: bad in client.reset and good in client.ended)
        assert client.bodies[good] == b"good"
        assert "cannot read chunk abc: it is corrupt" in caplog.text
        again = client.start("/good", method="GET", end=True)
        await client.flush()
        await client.until(lambda: again in client.ended)


@pytest.mark.parametrize("error", [trio.TooSlowError(), trio.BrokenResourceError(), OSError(5, "I/O error")])
async def test_a_fault_behind_the_server_is_an_answer_and_no_end_of_the_connection(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> object:
        raise error

    assert (await answered(work, "GET /x\n")).status == 400
    assert "'GET /x\\n' failed unexpectedly" in caplog.text


async def test_the_memory_for_bodies_of_32_clients_is_bounded_and_none_waits_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kilo = 16 << 10  # 16 KiB stand for 1 MiB
    for name, value in [("SMALL_WINDOW", 8), ("PARKED", 64), ("SHARED", 512), ("FLOOR", 8), ("WINDOW", 32)]:
        monkeypatch.setattr(http2, name, value * kilo)
    gate = trio.Event()

    async def respond(request: H2Request) -> Answer:
        await gate.wait()
        return Answer(parts=[b"%d" % len(request.body)])

    sent = 0
    done = 0

    async def client_run() -> None:
        nonlocal sent, done
        async with connected(respond) as (client, _):
            await client.until(lambda: client.h2.remote_settings.initial_window_size == 32 * kilo)
            numbers = [client.start() for _ in range(40)]
            for number in numbers:
                left = 4 * kilo
                while left:
                    room = min(client.h2.local_flow_control_window(number), left, kilo)
                    if not room:
                        await client.flush()
                        await client.receive()
                        continue
                    left -= room
                    sent += room
                    client.h2.send_data(number, bytes(room), end_stream=not left)
            await client.flush()
            await client.until(lambda: client.ended >= set(numbers))
            assert {client.bodies[number] for number in numbers} == {b"%d" % (4 * kilo)}
            done += 1

    with trio.fail_after(200):
        async with trio.open_nursery() as nursery:
            for _ in range(32):
                nursery.start_soon(client_run)
            await trio.testing.wait_all_tasks_blocked(0.05)
            # Windows of 16 large and 16 small ones, what all share, what each may have in any case, a frame on the way.
            bound = (16 * 32 + 16 * 8 + 512 + 32 * (8 + 4)) * kilo
            assert sent < 32 * 40 * 4 * kilo
            assert sent <= bound
            gate.set()
    assert done == 32
    assert http2._of_all().credited == 0
    assert http2._of_all().connections == 0


async def test_an_answer_goes_whole_before_the_next_one_unless_its_own_window_is_closed() -> None:
    """In turn, answers asked for together would end together, and a client far away would then wait for the next."""

    async def respond(request: H2Request) -> Answer:
        return Answer(parts=[bytes(200_000), bytes(100_000)])

    order: list[int] = []

    async with connected(respond) as (client, _):
        client.h2.increment_flow_control_window(8 << 20)
        numbers = [client.start(end=True) for _ in range(4)]
        for number in numbers[1:]:
            client.h2.increment_flow_control_window(1 << 20, number)
        await client.flush()

        def seen() -> bool:
            for number in numbers:
                if len(client.bodies.get(number, b"")) == 300_000 and number not in order:
                    order.append(number)
            # All that came is of whole bodies, but for the one that is coming and the one with a small window.
            parts = [one for one in numbers[1:] if 0 < len(client.bodies.get(one, b"")) < 300_000]
            assert len(parts) <= 1
            return len(order) == 4

        await client.until(seen)
        assert order[-1] == numbers[0]
        assert sorted(order[:-1]) == numbers[1:]


async def test_who_makes_no_further_requests_still_gets_the_answers_and_then_the_end() -> None:
    asked, may = trio.Event(), trio.Event()

    async def respond(request: H2Request) -> Answer:
        asked.set()
        await may.wait()
        return Answer(parts=[b"late"])

    async with connected(respond) as (client, _):
        slow = client.start(end=True)
        await client.flush()
        await asked.wait()
        # By hand: h2 itself would take nothing after it.
        await client.stream.send_all(GoAwayFrame(0, last_stream_id=0, error_code=0).serialize())
        await client.stream.send_all(PingFrame(0, b"12345678").serialize())
        await client.receive()
        assert not client.over
        may.set()
        await client.until(lambda: False)
        assert client.bodies == {slow: b"late"}
        assert client.ended == {slow}


@pytest.mark.parametrize("code", [ErrorCodes.NO_ERROR, ErrorCodes.INTERNAL_ERROR])
async def test_a_goodbye_with_nothing_to_wait_for_or_after_an_error_ends_the_connection(code: ErrorCodes) -> None:
    async def respond(request: H2Request) -> Answer:
        await trio.sleep_forever()
        raise AssertionError

    async with connected(respond) as (client, _):
        if code is not ErrorCodes.NO_ERROR:
            client.start(end=True)
            await client.flush()
        await client.stream.send_all(GoAwayFrame(0, last_stream_id=0, error_code=code).serialize())
        await client.until(lambda: False)
        assert client.over


async def test_an_answer_to_head_has_no_body() -> None:
    async with connected() as (client, _):
        number = client.start(method="HEAD", end=True)
        await client.flush()
        await client.until(lambda: number in client.ended)
        assert (client.status[number], client.bodies) == (200, {})
        other = client.start(end=True)
        await client.flush()
        await client.until(lambda: other in client.ended)
        assert client.bodies == {other: b"/x"}


async def test_what_a_client_may_do_and_few_do() -> None:
    """All of it right behind the upgrade: the beginning, a padded body with trailers, priorities, unknown things."""
    encode = Encoder().encode
    pseudo = [(":method", "POST"), (":scheme", "https"), (":authority", "a"), (":path", "/x")]
    head = HeadersFrame(1, data=encode(pseudo), depends_on=0, stream_weight=16, exclusive=True)
    head.flags |= {"PRIORITY"}
    body = DataFrame(1, data=b"12345", pad_length=7)
    body.flags.add("PADDED")
    trailers = encode([("x-checksum", "1")])
    middle = HeadersFrame(1, data=trailers[:3])
    middle.flags.add("END_STREAM")
    rest = ContinuationFrame(1, data=trailers[3:])
    rest.flags.add("END_HEADERS")
    head.flags.add("END_HEADERS")
    first = b"".join([
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", SettingsFrame(0, {0x99: 7}).serialize(), head.serialize(),
        PriorityFrame(9, depends_on=3, stream_weight=5).serialize(), b"\0\0\2\x77\0\0\0\0\0xx", body.serialize(),
        DataFrame(1).serialize(), middle.serialize(), rest.serialize(), PingFrame(0, b"12345678").serialize(),
    ])  # fmt: skip
    asked: list[H2Request] = []

    async def respond(request: H2Request) -> Answer:
        asked.append(request)
        return Answer(parts=[b"fine"])

    ours, theirs = memory_stream_pair()
    server = Http2Server(ours, respond, lambda method, target: 100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, first)
        answer = b""
        with trio.fail_after(60):
            while b"fine" not in answer or b"12345678" not in answer:
                answer += await theirs.receive_some()
        nursery.cancel_scope.cancel()
    assert [(one.method, one.target, one.body) for one in asked] == [("POST", "/x", b"12345")]
