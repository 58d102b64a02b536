"""Answers compressed for who asks for that (spec 3.2): `deflate`, which in HTTP is zlib's format."""

import zlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Final

from core.buffers import Buffer
from core.limits import in_cpu_thread
from server.answers import Answer
from server.http1 import Body, Handle, Request, Upgrade

_LEVEL: Final = 1
#: Bytes from which on a thread of its own is worth the way.
_LARGE: Final = 64 << 10


def compressing(handle: Handle) -> Handle:
    """`handle`, whose answers are compressed where the request accepts it."""

    async def handled(request: Request, body: Body) -> Answer | Upgrade:
        answer = await handle(request, body)
        if isinstance(answer, Upgrade) or request.method == "HEAD" or answer.length == 0 or not accepts(request):
            return answer
        headers = [*answer.headers, ("content-encoding", "deflate"), ("vary", "accept-encoding")]
        return replace(answer, headers=headers, parts=(), stream=_compressed(answer))

    return handled


def accepts(request: Request) -> bool:
    """True if the sender of the request wants `deflate`."""
    for part in request.headers.get("accept-encoding", "").lower().split(","):
        name, *parameters = (text.strip() for text in part.split(";"))
        if name == "deflate":
            refused = any(one.replace(" ", "").rstrip("0") in ("q=", "q=0.") for one in parameters)
            return not refused
    return False


async def _compressed(answer: Answer) -> AsyncGenerator[Buffer, None]:
    packer = zlib.compressobj(_LEVEL)
    for part in answer.parts:
        if packed := await _packed(packer.compress, part):
            yield packed
    if answer.stream is not None:
        async with aclosing(answer.stream) as stream:
            async for part in stream:
                if packed := await _packed(packer.compress, part):
                    yield packed
    yield packer.flush()


async def _packed(compress: Callable[[Buffer], bytes], part: Buffer) -> bytes:
    work: Callable[[], bytes] = lambda: compress(part)  # noqa: E731
    return await in_cpu_thread(work) if len(part) > _LARGE else work()
