"""One connection and a server that does what HTTP/2 allows, at the worst moment."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import Event, RequestReceived, StreamEnded
from h2.settings import SettingCodes, Settings

from datastore.s3.pacing import TokenBucket
from repository.remote.errors import RemoteError, RemoteUnavailableError
from repository.remote.http2 import Http2Client

MIB = 1 << 20


@dataclass
class Peer:
    """The server's side, by hand."""

    stream: trio.abc.Stream
    engine: H2Connection

    @classmethod
    async def begin(cls, stream: trio.abc.Stream, settings: dict[SettingCodes, int] | None = None) -> "Peer":
        engine = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        values = {SettingCodes.MAX_FRAME_SIZE: 4 * MIB, **(settings or {})}
        engine.local_settings = Settings(client=False, initial_values=values)
        engine.max_inbound_frame_size = 4 * MIB
        engine.initiate_connection()
        peer = cls(stream, engine)
        await peer.flush()
        return peer

    async def flush(self) -> None:
        if data := self.engine.data_to_send():
            await self.stream.send_all(data)

    async def events(self) -> list[Event]:
        """What comes next; nothing is said about windows."""
        data = await self.stream.receive_some(MIB)
        if not data:
            raise EOFError
        return self.engine.receive_data(data)

    async def until(self, wanted: Callable[[Event], bool]) -> int:
        """Wait for such an event, and return its stream."""
        while True:
            for event in await self.events():
                if wanted(event):
                    return int(getattr(event, "stream_id", 0))
            await self.flush()

    def answer(self, stream: int, body: bytes = b"{}", status: int = 200) -> None:
        self.engine.send_headers(stream, [(":status", str(status))])
        self.engine.send_data(stream, body, end_stream=True)


@asynccontextmanager
async def connected(
    settings: dict[SettingCodes, int] | None = None, *, sent: TokenBucket | None = None
) -> AsyncIterator[tuple[Http2Client, Peer]]:
    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(3600):  # of the clock that jumps
        async with Http2Client.open(ours, b"", where="here", sent=sent) as client:
            yield client, await Peer.begin(theirs, settings)


def is_request(event: Event) -> bool:
    return isinstance(event, RequestReceived)


def is_whole(event: Event) -> bool:
    return isinstance(event, StreamEnded)


async def post(client: Http2Client, size: int, answers: list[tuple[int, bytes] | RemoteError]) -> None:
    try:
        body = [bytes(size)] if size else []
        answer = await client.request("POST", "/x", what="ask", body=body, limit=lambda status: 100)
        answers.append((answer.status, bytes(answer.body)))
    except RemoteError as error:
        answers.append(error)


@pytest.mark.parametrize("answered", [True, False])
async def test_a_request_that_is_reset_while_it_is_being_sent_fails_alone(
    answered: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """As servers do that refuse before they have read everything: whichever task runs first sees it."""
    for _ in range(12):  # trio shuffles what is ready at the same time
        answers: list[tuple[int, bytes] | RemoteError] = []
        async with connected() as (client, peer), trio.open_nursery() as nursery:
            # More than the stream's window of 64 KiB: it is not sent whole before it is reset.
            nursery.start_soon(post, client, MIB, answers)
            stream = await peer.until(is_request)
            if answered:
                peer.answer(stream, b"no", 400)
            peer.engine.increment_flow_control_window(4096, stream)
            peer.engine.reset_stream(stream)
            peer.engine.increment_flow_control_window(MIB)
            await peer.flush()
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(post, client, 10, answers)
            peer.answer(await peer.until(is_whole))
            await peer.flush()
        (first, second) = answers
        assert second == (200, b"{}")
        assert first == (400, b"no") if answered else isinstance(first, RemoteUnavailableError)


async def test_an_answer_that_came_whole_before_the_connection_ended_counts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    answers: list[tuple[int, bytes] | RemoteError] = []
    async with connected() as (client, peer), trio.open_nursery() as nursery:
        nursery.start_soon(post, client, 0, answers)
        peer.answer(await peer.until(is_whole), b"done")
        peer.engine.close_connection()
        await peer.flush()
    assert answers == [(200, b"done")]


async def test_requests_wait_for_a_server_that_takes_few_and_go_on_when_it_takes_more(
    autojump_clock: trio.testing.MockClock,
) -> None:
    answers: list[tuple[int, bytes] | RemoteError] = []
    async with connected({SettingCodes.MAX_CONCURRENT_STREAMS: 0}) as (client, peer):
        await trio.testing.wait_all_tasks_blocked()  # the settings are known
        async with trio.open_nursery() as nursery:
            nursery.start_soon(post, client, 0, answers)
            await trio.testing.wait_all_tasks_blocked()
            assert not any(is_request(event) for event in await peer.events())
            peer.engine.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
            await peer.flush()
            peer.answer(await peer.until(is_whole))
            await peer.flush()
    assert answers == [(200, b"{}")]


async def test_a_server_that_lets_nobody_ask_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    answers: list[tuple[int, bytes] | RemoteError] = []
    async with connected({SettingCodes.MAX_CONCURRENT_STREAMS: 0}) as (client, _):
        await trio.testing.wait_all_tasks_blocked()
        await post(client, 0, answers)
    assert isinstance(answers[0], RemoteUnavailableError)


async def test_a_slow_upload_is_a_sign_of_life(autojump_clock: trio.testing.MockClock) -> None:
    """With 20 KiB a second a chunk takes minutes, in which the server has nothing to say."""
    answers: list[tuple[int, bytes] | RemoteError] = []
    bucket = TokenBucket(20 << 10)
    settings = {SettingCodes.INITIAL_WINDOW_SIZE: 32 * MIB}
    async with connected(settings, sent=bucket) as (client, peer), trio.open_nursery() as nursery:
        peer.engine.increment_flow_control_window(32 * MIB)
        await peer.flush()
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        nursery.start_soon(post, client, 8 * MIB, answers)
        count = 0
        while not count:  # says nothing, not even to a ping
            count = sum(is_whole(event) for event in await peer.events())
        peer.answer(1)
        await peer.flush()
    assert answers == [(200, b"{}")]
    assert trio.current_time() - start > 300


async def test_what_is_small_does_not_wait_behind_a_chunk_when_the_rate_is_limited(
    autojump_clock: trio.testing.MockClock,
) -> None:
    settings = {SettingCodes.INITIAL_WINDOW_SIZE: 32 * MIB}
    async with connected(settings, sent=TokenBucket(64 << 10)) as (client, peer), trio.open_nursery() as nursery:
        peer.engine.increment_flow_control_window(32 * MIB)
        await peer.flush()
        await trio.testing.wait_all_tasks_blocked()
        answers: list[tuple[int, bytes] | RemoteError] = []
        nursery.start_soon(post, client, 8 * MIB, answers)
        await peer.until(is_request)
        start = trio.current_time()
        nursery.start_soon(post, client, 100, answers)
        peer.answer(await peer.until(is_whole))
        assert trio.current_time() - start < 5
        nursery.cancel_scope.cancel()
