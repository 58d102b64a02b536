"""Answers are compressed for who asks, and for nobody else."""

import zlib
from collections.abc import AsyncGenerator

import pytest

from core.buffers import Buffer
from server.answers import RAW, Answer
from server.compression import compressing
from server.http1 import Request
from tests.support.direct_server import Given, body_of

DATA = [b"abc" * 10, bytes(200_000), b"", b"end"]


async def pieces() -> AsyncGenerator[Buffer, None]:
    for piece in DATA:
        yield piece


async def asked(accepted: str | None, answer: Answer, method: str = "GET") -> Answer:
    async def handle(request: object, body: object) -> Answer:
        return answer

    headers = {} if accepted is None else {"accept-encoding": accepted}
    got = await compressing(handle)(Request(method, "/", headers), Given(b""))
    assert isinstance(got, Answer)
    return got


@pytest.mark.parametrize("accepted", ["deflate", "gzip, deflate;q=0.5", "DEFLATE"])
async def test_files_and_documents(accepted: str) -> None:
    for answer in (Answer(content_type=RAW, stream=pieces()), Answer(parts=DATA)):
        got = await asked(accepted, answer)
        assert ("content-encoding", "deflate") in got.headers
        assert got.length is None
        packed = await body_of(got)
        assert len(packed) < 1000
        assert zlib.decompress(packed) == b"".join(DATA)


@pytest.mark.parametrize("accepted", [None, "", "gzip", "identity", "deflate;q=0", "deflate; q=0.000", "xdeflate"])
async def test_others_get_them_as_they_are(accepted: str | None) -> None:
    answer = Answer(parts=DATA)
    assert await asked(accepted, answer) is answer


async def test_nothing_stays_nothing() -> None:
    empty = Answer(414, None)
    assert await asked("deflate", empty) is empty
