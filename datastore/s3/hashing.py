"""SHA-256 and MD5 of request bodies, in worker threads, several bodies side by side.

On machines where `datastore.sha256` has vector lanes, bodies that arrive while others are being hashed wait and become
the next batch. Elsewhere each has a thread of its own: joining the parts of a body for the other ways to hash costs as
much as they save.
"""

import base64
import hashlib
from collections.abc import Sequence
from typing import Final

import trio

from core.buffers import Buffer
from core.limits import cpu_count, in_cpu_thread
from datastore.s3.signer import EMPTY_SHA256
from datastore.sha256 import digest_many, implementation

#: A body up to this many bytes is hashed at once: a hand-over to a thread costs more.
_SMALL: Final = 32 << 10
#: Bodies of one batch.
_MAX_BATCH: Final = 16


class _Waiting:
    """A body that waits for its digest."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self.parts = parts
        self.done = trio.Event()
        self.digest = ""  #: hex, empty until it is known


class BodyHasher:
    """Hashes the bodies of one endpoint's requests."""

    def __init__(self) -> None:
        self._queue: list[_Waiting] = []
        self._batches = 0

    async def sha256(self, parts: Sequence[Buffer]) -> str:
        """Hex SHA-256 of the body that `parts` make together. Cancelled, other bodies are hashed all the same."""
        size = sum(len(memoryview(part).cast("B")) for part in parts)
        if size == 0:
            return EMPTY_SHA256
        if size <= _SMALL:
            return _hash_alone(parts)
        mine = _Waiting(parts)
        self._queue.append(mine)
        try:
            while not mine.digest:
                if mine in self._queue and self._batches < cpu_count():
                    await self._next_batch(mine)
                else:
                    await mine.done.wait()  # it is hashed, or it is our turn to hash
                    mine.done = trio.Event()
        finally:
            if mine in self._queue:
                self._queue.remove(mine)
            self._wake()
        return mine.digest

    async def _next_batch(self, mine: _Waiting) -> None:
        """Hash `mine` and others that wait."""
        self._queue.remove(mine)
        more = _MAX_BATCH - 1 if _has_lanes() else 0
        batch = [mine, *self._queue[:more]]
        del self._queue[:more]
        self._batches += 1
        try:
            digests = await in_cpu_thread(_hash_batch, [waiting.parts for waiting in batch])
        except BaseException:
            self._queue[:0] = batch
            raise
        finally:
            self._batches -= 1
        for waiting, digest in zip(batch, digests, strict=True):
            waiting.digest = digest
            waiting.done.set()

    def _wake(self) -> None:
        """Let one that waits make the next batch."""
        if self._queue and self._batches < cpu_count():
            self._queue[0].done.set()


async def content_md5(parts: Sequence[Buffer]) -> str:
    """The header `content-md5` for a body."""

    def compute() -> str:
        state = hashlib.md5(usedforsecurity=False)
        for part in parts:
            state.update(part)
        return base64.b64encode(state.digest()).decode("ascii")

    if sum(len(part) for part in parts) <= _SMALL:
        return compute()
    return await in_cpu_thread(compute)


def _hash_alone(parts: Sequence[Buffer]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def _has_lanes() -> bool:
    """True if many bodies at once are much quicker here; the first call measures for a few ms."""
    return implementation(_MAX_BATCH).startswith("lanes")


def _hash_batch(bodies: Sequence[Sequence[Buffer]]) -> list[str]:
    if len(bodies) == 1:
        return [_hash_alone(bodies[0])]
    # One copy of a body of several parts costs a tenth of what the lanes save.
    whole = [parts[0] if len(parts) == 1 else b"".join(parts) for parts in bodies]
    return [digest.hex() for digest in digest_many(whole)]
