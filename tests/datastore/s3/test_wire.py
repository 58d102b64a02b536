"""Answers that no honest server would send, as bytes: lengths that lie, heads without end, answers to no request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import trio

from core.nursery import open_nursery
from datastore.s3.client import CHUNK_LIMIT, S3Client
from datastore.s3.errors import S3Error
from datastore.s3.link import RetryPolicy
from tests.datastore.s3.conftest import endpoint
from tests.support.s3_service import BUCKET
from tests.support.waiting import PATIENCE_S

TWICE = RetryPolicy(attempts=2, base_s=0.001, cap_s=0.002, patience_s=PATIENCE_S)
START = b'HTTP/1.1 200 OK\r\nETag: "0"\r\n'
GOOD = START + b"Content-Length: 4\r\n\r\ngood"


@asynccontextmanager
async def scripted(*answers: bytes, ends: bool = False) -> AsyncIterator[tuple[S3Client, list[int]]]:
    """A client whose server gives the n-th request the n-th of `answers`, or the last one, and then perhaps hangs up;
    and the connections, by numbers, over which requests came."""
    connections = 0
    used: list[int] = []

    async def serve(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        number = connections
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while request := await stream.receive_some():
                assert request.endswith(b"\r\n\r\n")  # small ones come at once
                used.append(number)
                await stream.send_all(answers[min(len(used), len(answers)) - 1])
                if ends:
                    break

    async with open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(partial(trio.serve_listeners, serve, listeners))
        port = listeners[0].socket.getsockname()[1]
        place = endpoint(endpoint="127.0.0.1", port=port, path_style=True, allow_http=True)
        async with S3Client.open(place, BUCKET, policy=TWICE) as client:
            yield client, used
        nursery.cancel_scope.cancel()


async def read(client: S3Client) -> bytes:
    found = await client.get("st1/a")
    assert found is not None
    return bytes(found.data)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (START + b"Content-Length: -4\r\n\r\ngood", "no HTTP"),
        (START + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\ngood!", "no HTTP"),
        (START + b"Content-Length: 0x4\r\n\r\ngood", "no HTTP"),
        (START + b"Content-Length: 9" + b"9" * 17 + b"\r\n\r\ngood", "at most"),
        (START + b"Content-Length: %d\r\n\r\ngood" % (CHUNK_LIMIT + 1), f"at most {CHUNK_LIMIT} are accepted"),
        (START + b"Transfer-Encoding: chunked\r\n\r\n" + (b"100000\r\n%s\r\n" % bytes(1 << 20)) * 18, "more than"),
        (START + b"X-A: %s\r\n\r\n" % (b"a" * 300_000), "no HTTP"),
        (START + b"".join(b"x-%d: a\r\n" % number for number in range(30_000)) + b"\r\n", "no HTTP"),
        (b"HTTP/1.1 OK\r\n\r\n", "no HTTP"),
        (b"220 smtp.example.org\r\n\r\n", "no HTTP"),
        (b"\x16\x03\x01\x00\x05hello\r\n\r\n", "no HTTP"),
    ],
    ids=["negative", "two lengths", "hexadecimal", "long number", "too long", "chunks without end", "long header",
         "many headers", "no status", "another protocol", "TLS"],
)  # fmt: skip
async def test_what_is_no_answer_ends_in_an_error_after_all_attempts(answer: bytes, why: str) -> None:
    async with scripted(answer, ends=True) as (client, used):
        with trio.fail_after(PATIENCE_S), pytest.raises(S3Error, match=why):
            await read(client)
        assert used == [1, 2], "what comes behind it is nothing to go on with"


async def test_bytes_behind_an_answer_are_not_taken_for_the_next_one() -> None:
    forged = START + b"Content-Length: 4\r\n\r\nevil"
    async with scripted(GOOD + forged, GOOD) as (client, used):
        assert await read(client) == b"good"
        assert await read(client) == b"good"
        assert used == [1, 2]


async def test_a_connection_whose_answer_was_as_it_must_be_is_kept() -> None:
    async with scripted(GOOD) as (client, used):
        assert await read(client) == b"good"
        assert await read(client) == b"good"
        assert used == [1, 1]


async def test_interim_answers_are_passed_over() -> None:
    async with scripted(b"HTTP/1.1 100 Continue\r\n\r\n" * 500 + GOOD) as (client, _):
        assert await read(client) == b"good"


async def test_a_body_in_chunks_is_read_like_any_other() -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n<List\r\nb\r\nBucketResul\r\n3\r\nt/>\r\n0\r\n\r\n"
    )
    async with scripted(answer) as (client, used):
        assert (await client.page("st1/")).objects == []
        assert (await client.page("st1/")).objects == []
        assert used == [1, 1]
