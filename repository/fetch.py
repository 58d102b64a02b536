"""How chunks flow out of a repository: read with read-ahead, checked in batches, handed on.

    reader  ->  CRC, decrypt, decompress  ->  digests in batches  ->  consumer

Where chunks come by a few quick system calls, the worker that decodes a chunk reads it itself. From elsewhere more are
asked for at a time the longer the way is. Restore, verify and the mount's read-ahead all read this way. The number of
chunks on their way has a limit, so memory is bounded whatever the archive's size.
"""

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Final

import trio
from trio.lowlevel import ParkingLot

from core.buffers import Buffer
from core.errors import FleeceError
from core.limits import cpu_count, in_cpu_thread, in_io_thread
from core.nursery import open_nursery
from datastore.blob import Blob
from datastore.codec import ChunkCodec
from datastore.s3.errors import S3BackendError, S3BudgetError, S3Error, S3UnavailableError
from repository.buffers import Lease, batch_size, shared_pool
from repository.interface import BlockingReads, Reader
from repository.locate import Archive
from repository.remote.errors import RemoteUnavailableError

#: Chunks on their way at most. A buffer has 4 MiB, and until it is decoded there is the blob beside it.
MAX_CHUNKS: Final = 40
#: Chunks that are asked for at a time at first, and at most.
READERS: Final = 12
MAX_READERS: Final = 32
#: Of the quickest answer's time: as long as answers take less than this on average, nothing of what was asked for waits
#: for its turn, and more may be.
UNHURRIED: Final = 1.5
#: Chunks handed over together to decoders that read: enough to make it cheap; and by how many tasks.
DEALT_AT_ONCE: Final = 4
DEALERS: Final = 3
#: Numbers of chunks that are sorted into disk order together.
ORDER_WINDOW: Final = 256
#: Chunks consumed at the same time if the order does not matter.
CONSUMERS: Final = 4
#: Seconds an incomplete batch waits for company: less than hashing a chunk alone takes where batches matter.
LINGER_S: Final = 0.01
#: Seconds that reading a chunk in a worker thread may take on average (half a millisecond from the page cache). A
#: slower store waits for a device, and then more reads in flight are better.
SLOW_READ_S: Final = 0.02

Chunk = tuple[int, Buffer | FleeceError]  # number in the index; plain data, or why there is none


async def read_batch(reader: Reader, codec: ChunkCodec, archive: Archive, numbers: Sequence[int]) -> list[Chunk]:
    """Read and check chunks in one go; each gives its plain data, to be kept, or the error that only it has.

    An error of the reader as a whole (no connection any more) comes with every chunk that it hit.
    """
    index = archive.index
    digests = [index.digest(number) for number in numbers]
    blobs: Sequence[Blob | FleeceError | Callable[[], Blob]]
    if isinstance(reader, BlockingReads) and reader.reads_block_briefly:
        blobs = [partial(reader.read_chunk_blocking, digest) for digest in digests]
    else:
        blobs = await _read_blobs(reader, digests)
    jobs = [
        (blob, digest, index.span(number)[1])
        for blob, digest, number in zip(blobs, digests, numbers, strict=True)
        if not isinstance(blob, FleeceError)
    ]
    mode = archive.entry.crypt_mode
    decoded = iter(await in_cpu_thread(lambda: codec.decode_many(jobs, crypt_mode=mode, where=archive.where)))
    results = [blob if isinstance(blob, FleeceError) else next(decoded) for blob in blobs]
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
        consume: called for several chunks at a time, or one after the other in the given order if `ordered`. The data
            must not be kept: its memory is used again.
        ordered: also gives up reading in disk order.

    Raises:
        FleeceError: what `consume` raises; the rest is given up.

    Cancelled, no call of `consume` is left running.
    """
    with shared_pool().lease() as lease:
        await _Fetch(reader, codec, archive, numbers, consume, lease, ordered=ordered).run()


@dataclass(slots=True, eq=False)
class _Wanted:
    """One chunk on its way."""

    place: int  #: in the order of the output
    number: int  #: in the index
    buffer: memoryview  #: to decode into; also the right to be on the way
    since: float = 0.0  #: when it was read, on trio's clock
    blob: Blob | FleeceError | None = None  #: None if the decoder shall read it
    result: Buffer | FleeceError = b""


class Way:
    """How many chunks should be on their way here at a time, by the time that answers take.

    As long as the line has room, an answer takes the round trip and its own length, whatever else is asked for; from
    then on it takes longer with each further question, and nothing is won.
    """

    def __init__(self) -> None:
        self.width = READERS  #: chunks
        self._quickest_s = math.inf
        self._answers_s: list[float] = []  # since `width` was last thought about

    def answered(self, seconds: float) -> None:
        """An answer has come, so many seconds after its question."""
        self._quickest_s = min(self._quickest_s, seconds)
        self._answers_s.append(seconds)
        if len(self._answers_s) < self.width:
            return
        average_s = sum(self._answers_s) / len(self._answers_s)
        self._answers_s.clear()
        if average_s < UNHURRIED * self._quickest_s:
            self.width = min(MAX_READERS, self.width + self.width // 4)


class _Fetch:
    """Three crews with deques between them: readers, decoders, consumers. For one `run`.

    A chunk takes its buffer before it is read and keeps it until it is consumed, so the buffers bound everything. They
    are taken in the order of the output: the chunk whose turn is next always has one, so nobody waits for ever.
    """

    def __init__(
        self,
        reader: Reader,
        codec: ChunkCodec,
        archive: Archive,
        numbers: Iterable[int],
        consume: Callable[[int, Buffer | FleeceError], Awaitable[None]],
        lease: Lease,
        *,
        ordered: bool,
    ) -> None:
        self._reader, self._codec, self._archive = reader, codec, archive
        self._numbers, self._consume, self._lease, self._ordered = iter(numbers), consume, lease, ordered
        self._batch = batch_size()
        self._slots = trio.Semaphore(min(MAX_CHUNKS, lease.pool.count))
        self._window: list[int] = []
        self._place = 0
        self._dealing = trio.Lock()
        self._blocking: BlockingReads | None = None  # set while decoders read chunks themselves
        if isinstance(reader, BlockingReads) and reader.reads_block_briefly:
            self._blocking = reader
        self._read_s = 0.0  # seconds of a read in a worker thread, an average that forgets
        self._reading = 0  # tasks that read
        self._dealt = False  # all chunks
        self._way = Way()
        self._decoding = cpu_count()
        self._read: deque[_Wanted] = deque()
        self._decoders = ParkingLot()
        #: Decoded chunks by place; the ones to be consumed next are found by `_next` if the order matters.
        self._decoded: dict[int, _Wanted] = {}
        self._next = 0
        self._consumers = ParkingLot()

    async def run(self) -> None:
        """Read and consume everything."""
        async with open_nursery() as nursery:
            self._more_readers(nursery, DEALERS if self._blocking else READERS)
            for _ in range(cpu_count()):
                nursery.start_soon(self._decode_chunks)
            for _ in range(1 if self._ordered else CONSUMERS):
                nursery.start_soon(self._consume_chunks)

    # --- reading -----------------------------------------------------------------------------------------------------

    def _more_readers(self, nursery: trio.Nursery, count: int) -> None:
        for _ in range(count):
            self._reading += 1
            nursery.start_soon(self._read_chunks, nursery)

    async def _read_chunks(self, nursery: trio.Nursery) -> None:
        while chunks := await self._deal():
            if self._blocking is None:
                start = trio.current_time()
                digests = [self._archive.index.digest(chunk.number) for chunk in chunks]
                for chunk, blob in zip(chunks, await _read_blobs(self._reader, digests), strict=True):
                    chunk.blob = blob
                self._way.answered(trio.current_time() - start)
                if not self._dealt:
                    self._more_readers(nursery, self._way.width - self._reading)
            now = trio.current_time()
            for chunk in chunks:
                if isinstance(chunk.blob, FleeceError):
                    chunk.result = _placed(chunk.blob, self._archive, chunk.number)
                    self._hand_over(chunk)
                else:
                    chunk.since = now
                    self._read.append(chunk)
            self._decoders.unpark()
        self._dealt = True
        self._reading -= 1
        if not self._reading:
            self._decoders.unpark_all()  # nothing will join what waits for company

    async def _deal(self) -> list[_Wanted]:
        """The chunks to be read together next, each with its buffer; none at the end."""
        async with self._dealing:
            if not self._window:
                self._window = list(islice(self._numbers, ORDER_WINDOW))
                if not self._ordered and len(self._window) > 1:
                    digests = [self._archive.index.digest(number) for number in self._window]
                    order = await in_io_thread(self._reader.disk_order, digests)
                    self._window = [self._window[position] for position in order]
            chunks: list[_Wanted] = []
            for number in self._window[: DEALT_AT_ONCE if self._blocking else 1]:
                # Waits for the first buffer only: what holds some must not wait for more.
                if chunks and (not self._slots.value or self._lease.pool.exhausted):
                    break
                await self._slots.acquire()
                chunks.append(_Wanted(self._place, number, await self._lease.take()))
                self._place += 1
            del self._window[: len(chunks)]
            return chunks

    # --- checking ----------------------------------------------------------------------------------------------------

    async def _decode_chunks(self) -> None:
        while batch := await self._next_batch():
            await in_cpu_thread(self._decode, batch)
            for chunk in batch:
                self._hand_over(chunk)
        self._decoding -= 1
        if not self._decoding:
            self._consumers.unpark_all()

    async def _next_batch(self) -> list[_Wanted]:
        """Chunks to be hashed together; none at the end."""
        while self._read or self._reading:
            deadline = self._read[0].since + LINGER_S if self._read else float("inf")
            full = len(self._read) >= self._batch or not self._reading
            if self._read and (full or trio.current_time() >= deadline):
                return [self._read.popleft() for _ in range(min(self._batch, len(self._read)))]
            with trio.move_on_at(deadline):
                await self._decoders.park()
        return []

    def _decode(self, batch: Sequence[_Wanted]) -> None:
        """In a worker thread."""
        index = self._archive.index
        jobs: list[tuple[Blob | Callable[[], Blob], bytes, int]] = []
        for chunk in batch:
            digest = index.digest(chunk.number)
            blob = chunk.blob if isinstance(chunk.blob, Blob) else partial(self._read_here, digest)
            jobs.append((blob, digest, index.span(chunk.number)[1]))
            chunk.blob = None
        results = self._codec.decode_many(
            jobs,
            crypt_mode=self._archive.entry.crypt_mode,
            where=self._archive.where,
            buffers=[chunk.buffer for chunk in batch],
        )
        for chunk, result in zip(batch, results, strict=True):
            chunk.result = _placed(result, self._archive, chunk.number) if isinstance(result, FleeceError) else result

    def _read_here(self, digest: bytes) -> Blob:
        """In a worker thread."""
        reader = self._reader
        assert isinstance(reader, BlockingReads)
        start = time.monotonic()
        blob = reader.read_chunk_blocking(digest)
        self._read_s += 0.2 * (time.monotonic() - start - self._read_s)
        if self._read_s > SLOW_READ_S:
            self._blocking = None
        return blob

    # --- consuming ---------------------------------------------------------------------------------------------------

    def _hand_over(self, chunk: _Wanted) -> None:
        self._decoded[chunk.place] = chunk
        self._consumers.unpark()

    async def _consume_chunks(self) -> None:
        while True:
            chunk = self._next_decoded()
            if chunk is not None:
                await self._consume(chunk.number, chunk.result)
                self._lease.give(chunk.buffer)
                self._slots.release()
            elif self._decoding:
                await self._consumers.park()
            else:
                return

    def _next_decoded(self) -> _Wanted | None:
        if self._ordered:
            chunk = self._decoded.pop(self._next, None)
            self._next += chunk is not None
            return chunk
        return self._decoded.pop(next(iter(self._decoded))) if self._decoded else None


async def _read_blobs(reader: Reader, digests: Sequence[bytes]) -> list[Blob | FleeceError]:
    try:
        return list(await reader.read_chunks(digests))
    except FleeceError as error:
        if len(digests) == 1:
            return [error]
        if isinstance(error, S3BackendError | S3BudgetError | S3UnavailableError | RemoteUnavailableError):
            return [error] * len(digests)  # it was tried for long enough, and no chunk is at fault
    # One of them is bad; which one tells only asking for each.
    blobs: list[Blob | FleeceError] = []
    for digest in digests:
        try:
            blobs.append(await reader.read_chunk(digest))
        except FleeceError as error:
            blobs.append(error)
    return blobs


def _placed(error: FleeceError, archive: Archive, number: int) -> FleeceError:
    """The same error, naming snapshot, archive, offset and digest; and where chunks come from, if that is a bucket."""
    why = f"{error.where.partition('/')[0]}: {error.why}" if isinstance(error, S3Error) else error.why
    placed = type(error)("read", archive.chunk_where(number), why, error.hint)
    placed.__cause__ = error
    return placed
