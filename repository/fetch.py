"""How chunks flow out of a repository: read with read-ahead, checked in batches, handed on.

    reader  ->  CRC, decrypt, decompress  ->  digests in batches  ->  consumer

Restore, verify and the mount's read-ahead all read this way. A fixed number of chunks is on its way, so memory is
bounded whatever the archive's size.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError
from core.limits import cpu_count, in_cpu_thread, in_io_thread
from core.nursery import open_nursery
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from repository.buffers import Lease, batch_size, shared_pool
from repository.interface import Reader
from repository.locate import Archive

#: Chunks on their way at most. Encoded and decoded they take up to 8 MiB each, plain ones 4 MiB.
MAX_CHUNKS: Final = 40
#: Chunks read by one call where lanes do not ask for more: enough to make a hand-over cheap.
MIN_BATCH: Final = 4
#: Numbers of chunks that are sorted into disk order together.
ORDER_WINDOW: Final = 256
#: Chunks of one batch that the consumer works on at the same time.
CONSUMERS: Final = 4

Chunk = tuple[int, Buffer | FleeceError]  # number in the index; plain data, or why there is none


async def read_batch(
    reader: Reader,
    codec: ChunkCodec,
    archive: Archive,
    numbers: Sequence[int],
    buffers: Sequence[memoryview] = (),
) -> list[Chunk]:
    """Read and check chunks in one go; each gives its plain data or the error that only it has.

    An error of the reader as a whole (no connection any more) comes with every chunk that it hit. With `buffers`, one
    per chunk, chunks are decoded into them where they fit.
    """
    index = archive.index
    digests = [index.digest(number) for number in numbers]
    blobs = await _read_blobs(reader, digests)
    good = [position for position, blob in enumerate(blobs) if isinstance(blob, Blob)]
    jobs = [
        (blob, digest, index.span(number)[1])
        for blob, digest, number in zip(blobs, digests, numbers, strict=True)
        if isinstance(blob, Blob)
    ]
    mode = archive.entry.crypt_mode
    rooms = [buffers[position] for position in good] if buffers else ()

    def decode() -> list[Buffer | FleeceError]:
        return codec.decode_many(jobs, crypt_mode=mode, where=archive.where, buffers=rooms)

    decoded = await in_cpu_thread(decode)
    results: list[Buffer | FleeceError] = list(blobs)  # type: ignore[arg-type]
    for position, result in zip(good, decoded, strict=True):
        results[position] = result
    return [
        (number, _placed(result, archive, number) if isinstance(result, FleeceError) else result)
        for number, result in zip(numbers, results, strict=True)
    ]


async def fetch(
    reader: Reader,
    codec: ChunkCodec,
    archive: Archive,
    numbers: Iterable[int],
    consume: Callable[[int, Buffer | FleeceError], Awaitable[None]],
    *,
    ordered: bool = False,
) -> None:
    """Read the chunks `numbers` of `archive` and pass each to `consume(number, data or error)`.

    Args:
        reader: where the chunks are.
        codec: with the key, if they need one.
        archive: whose chunks they are.
        numbers: of the chunks, as a rule ascending; no number twice.
        consume: called for several chunks at a time, or one after the other in the given order if `ordered`.
        ordered: also gives up reading in disk order.

    Raises:
        FleeceError: what `consume` raises; the rest is given up.

    Cancelled, no call of `consume` is left running.
    """
    batch = max(batch_size(), MIN_BATCH)
    turn = _Turnstile() if ordered else None
    with shared_pool().lease() as lease:
        batches = _Batches(reader, archive, numbers, batch, lease, ordered=ordered)

        async def work() -> None:
            while True:
                place, wanted, buffers = await batches.next()
                if not wanted:
                    return
                chunks = await read_batch(reader, codec, archive, wanted, buffers)
                if turn is not None:
                    await turn.wait(place)
                    while chunks:
                        await consume(*chunks.pop(0))
                    turn.done()
                else:
                    await _consume_all(chunks, consume)
                for buffer in buffers:
                    lease.give(buffer)

        async with open_nursery() as nursery:
            for _ in range(max(2, min(cpu_count() + 1, MAX_CHUNKS // batch))):
                nursery.start_soon(work)


class _Turnstile:
    """Lets holders of the places 0, 1, 2, ... through one after the other."""

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, trio.Event] = {}

    async def wait(self, place: int) -> None:
        if place != self._next:
            event = self._waiting[place] = trio.Event()
            await event.wait()

    def done(self) -> None:
        self._next += 1
        event = self._waiting.pop(self._next, None)
        if event is not None:
            event.set()


async def _consume_all(chunks: list[Chunk], consume: Callable[[int, Buffer | FleeceError], Awaitable[None]]) -> None:
    async def some() -> None:
        while chunks:
            await consume(*chunks.pop())

    chunks.reverse()
    async with open_nursery() as nursery:
        for _ in range(min(CONSUMERS, len(chunks))):
            nursery.start_soon(some)


class _Batches:
    """Deals `numbers` out in batches that are read together; several tasks draw from it."""

    def __init__(
        self, reader: Reader, archive: Archive, numbers: Iterable[int], size: int, lease: Lease, *, ordered: bool
    ) -> None:
        self._reader, self._archive, self._numbers = reader, archive, iter(numbers)
        self._size, self._lease, self._ordered = size, lease, ordered
        self._window: list[int] = []
        self._place = 0
        self._lock = trio.Lock()

    async def next(self) -> tuple[int, list[int], list[memoryview]]:
        """Place, chunk numbers and buffers of the next batch; the numbers are empty at the end."""
        async with self._lock:
            if not self._window:
                self._window = list(islice(self._numbers, self._size if self._ordered else ORDER_WINDOW))
                if not self._ordered and len(self._window) > self._size:
                    digests = [self._archive.index.digest(number) for number in self._window]
                    order = await in_io_thread(self._reader.disk_order, digests)
                    self._window = [self._window[position] for position in order]
            place, batch = self._place, self._window[: self._size]
            del self._window[: self._size]
            self._place += 1
            # Under the lock, so that the batch whose turn comes first has its buffers first.
            return place, batch, await self._lease.take_many(len(batch))


async def _read_blobs(reader: Reader, digests: Sequence[bytes]) -> list[Blob | FleeceError]:
    try:
        return list(await reader.read_chunks(digests))
    except FleeceError as error:
        if len(digests) == 1:
            return [error]
    # One of them is bad; which one tells only asking for each.
    blobs: list[Blob | FleeceError] = []
    for digest in digests:
        try:
            blobs.append(await reader.read_chunk(digest))
        except FleeceError as error:
            blobs.append(error)
    return blobs


def _placed(error: FleeceError, archive: Archive, number: int) -> FleeceError:
    """The same error, naming snapshot, archive, offset and digest."""
    placed = type(error)("read", archive.chunk_where(number), error.why, error.hint)
    placed.__cause__ = error
    return placed
