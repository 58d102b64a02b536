"""How chunks flow from disks into a backup session.

    source  ->  buffers of 4 MiB  ->  zero test, digests in batches  ->  compress, encrypt, CRC  ->  session  ->  index

Two readers per disk fill buffers of the shared pool; as many workers as cores hash what is there, in batches where that
is quicker, and encode what the session does not know; up to 16 encoded chunks are on their way to the session at a
time. A stage that is behind stops the one before it, so memory is bounded by the pool and those 16 chunks.

A batch is one job of a worker thread, from the zero test to the last encoded chunk. In the middle it asks the event
loop which digests are new; encoded chunks leave it one by one, and idle threads help with encoding. Where the store
takes chunks by a few quick system calls, the worker stores them itself.
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import trio
from trio.lowlevel import ParkingLot

from core.disks import DiskSource, ExtentState
from core.limits import cpu_count, in_cpu_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.blob import Blob, BlobKind
from datastore.codec import ChunkCodec
from datastore.index import ArchiveIndex
from datastore.interface import PutResult
from repository.buffers import Lease, batch_size
from repository.interface import FIXED_CHUNK_SIZE, BackupSession, BlockingPuts
from repository.planning import ChunkMap, Run
from repository.report import ArchiveReport
from repository.throttle import Throttle

#: Reads in flight per disk: two keep two NBD connections busy, more only push each other out of the cache.
READS_IN_FLIGHT: Final = 2
#: Encoded chunks on their way to the session. One at a time is at most 28 MB/s at 150 ms round trip.
PUTS_IN_FLIGHT: Final = 16
#: Seconds an incomplete batch waits for company: less than hashing a chunk alone takes where batches matter.
LINGER_S: Final = 0.01
#: Seconds that a put in a worker thread may take on average. A slower store waits for a device, and then many puts in
#: flight are better.
SLOW_PUT_S: Final = 0.02
#: Index entries handed over at a time.
ENTRIES_AT_ONCE: Final = 4096
#: Bytes discarded by one call at most.
MAX_DISCARD: Final = 1 << 30
_ZEROS: Final = bytearray(FIXED_CHUNK_SIZE)
_DIGEST: Final = 32


@dataclass(slots=True)
class UploadStats:
    """`chunk_upload_stats` of the manifest, summed over the session."""

    count: int = 0  #: chunks handed to the session
    size: int = 0  #: their plain bytes, and the encoded bytes of small files
    compressed_size: int = 0  #: bytes they take in the store
    duplicates: int = 0  #: chunks that were there already

    def to_json(self) -> dict[str, int]:
        """The value as the manifest has it."""
        return {
            "count": self.count,
            "size": self.size,
            "compressed_size": self.compressed_size,
            "duplicates": self.duplicates,
        }


class DiskBackup:
    """One disk while it is stored."""

    def __init__(
        self,
        source: DiskSource,
        filename: str,
        writer: int,
        chunks: ChunkMap,
        base: ArchiveIndex | None,
        report: ArchiveReport,
    ) -> None:
        self.source: Final = source
        self.filename: Final = filename
        self.writer: Final = writer  #: of the session
        self.chunks: Final = chunks
        self.base: Final = base  #: CLEAN chunks are as in here, and the session has prefilled the index with it
        self.report: Final = report
        #: All digests as the index will have them; its checksum is made from these.
        self.digests: Final = bytearray(base.digests) if base is not None else bytearray(_DIGEST * chunks.count)
        self.csum = b""  #: of the index, once it is closed
        self.numbers: Final = _numbers(chunks)  #: of the chunks that no reader has taken yet
        #: Chunks to be read that are not stored yet.
        self.missing = chunks.chunks(ExtentState.DATA)
        #: Chunks that were stored since the keeper last looked.
        self.settled: list[int] = []
        self.keeper: Final = ParkingLot()
        self.task: Task | None = None

    def span(self, number: int) -> tuple[int, int]:
        """Offset and length of chunk `number`."""
        offset = number * FIXED_CHUNK_SIZE
        return offset, min(FIXED_CHUNK_SIZE, self.chunks.size - offset)

    def digest(self, number: int) -> bytes:
        """Digest of chunk `number` as far as it is known."""
        return bytes(self.digests[_DIGEST * number : _DIGEST * (number + 1)])


def _numbers(chunks: ChunkMap) -> Iterator[int]:
    for run in chunks.runs:
        if run.state is ExtentState.DATA:
            yield from range(run.first, run.last)


@dataclass(slots=True, eq=False)
class _Chunk:
    """One chunk on its way."""

    disk: DiskBackup
    number: int  #: -1 for a zero chunk that was not read
    data: memoryview
    buffer: memoryview | None  #: of the pool, None once given back
    since: float  #: when it was read, on trio's clock
    digest: bytes = b""


class Pipeline:
    """Stores disks side by side; for one `run`."""

    def __init__(
        self,
        session: BackupSession,
        codec: ChunkCodec,
        progress: Progress,
        lease: Lease,
        throttle: Throttle | None,
        stats: UploadStats,
    ) -> None:
        self._session = session
        self._codec = codec
        self._progress = progress
        self._lease = lease
        self._throttle = throttle
        self._stats = stats
        self._batch = batch_size()
        #: Chunks that may wait to be hashed. More would only leave the cache before their turn.
        self._ahead = max(self._batch, 2 * READS_IN_FLIGHT)
        self._read: deque[_Chunk] = deque()
        self._readers = ParkingLot()
        self._workers = ParkingLot()
        self._reading = 0  # disks of which not everything is read
        # Touched by worker threads too: the ends of a deque are safe to use from any thread.
        self._to_encode: deque[_Chunk] = deque()
        self._permits: deque[None] = deque([None] * PUTS_IN_FLIGHT)
        self._encoded: deque[tuple[_Chunk, Blob]] = deque()
        self._putters = ParkingLot()
        self._blocking: BlockingPuts | None = None  # set while workers store chunks themselves
        if isinstance(session, BlockingPuts) and session.puts_block_briefly:
            self._blocking = session
        self._put_s = 0.0  # seconds of a put in a worker thread, an average that forgets
        #: Chunks that are being encoded or put, each with the others of the same digest that wait for it.
        self._in_flight: dict[bytes, list[_Chunk]] = {}

    async def run(self, disks: Sequence[DiskBackup]) -> None:
        """Store `disks` and close their indexes."""
        self._token = trio.lowlevel.current_trio_token()
        self._reading = len(disks)
        async with open_nursery() as crew:
            for _ in range(cpu_count()):
                crew.start_soon(self._work)
            for _ in range(PUTS_IN_FLIGHT):
                crew.start_soon(self._put)
            async with open_nursery() as nursery:
                for disk in disks:
                    nursery.start_soon(self._store, disk)
            # Everything is stored, so the crew is idle.
            crew.cancel_scope.cancel()

    async def _store(self, disk: DiskBackup) -> None:
        chunks, report = disk.chunks, disk.report
        with self._progress.task(report.name, chunks.length(ExtentState.DATA)) as disk.task:
            async with open_nursery() as nursery:
                nursery.start_soon(self._read_disk, disk)
                nursery.start_soon(self._keep, disk)
            disk.csum = await in_cpu_thread(lambda: hashlib.sha256(disk.digests).digest())
            await self._session.close_index(disk.writer, chunks.count, chunks.size, disk.csum)
        report.reused = report.size - report.new

    # --- reading -----------------------------------------------------------------------------------------------------

    async def _read_disk(self, disk: DiskBackup) -> None:
        async with open_nursery() as nursery:
            for _ in range(READS_IN_FLIGHT):
                nursery.start_soon(self._read_chunks, disk)
        self._reading -= 1
        if not self._reading:
            self._workers.unpark_all()  # nothing will join what waits for company

    async def _read_chunks(self, disk: DiskBackup) -> None:
        for number in disk.numbers:
            offset, length = disk.span(number)
            while len(self._read) >= self._ahead:
                await self._readers.park()
            if self._throttle is not None:
                await self._throttle.take(length)
            buffer = await self._lease.take()
            data = buffer[:length]
            await disk.source.read_into(offset, data)
            disk.report.read += length
            self._read.append(_Chunk(disk, number, data, buffer, trio.current_time()))
            self._workers.unpark()

    # --- hashing and encoding ----------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await in_cpu_thread(self._crunch, await self._next_batch())

    async def _next_batch(self) -> list[_Chunk]:
        """Chunks to be hashed together; none if there is something to encode."""
        while True:
            if self._to_encode and self._permits:
                return []
            deadline = self._read[0].since + LINGER_S if self._read else float("inf")
            full = len(self._read) >= self._batch or not self._reading or self._lease.pool.exhausted
            if self._read and (full or trio.current_time() >= deadline):
                batch = [self._read.popleft() for _ in range(min(self._batch, len(self._read)))]
                self._readers.unpark(count=len(batch))
                return batch
            with trio.move_on_at(deadline):
                await self._workers.park()

    def _crunch(self, batch: list[_Chunk]) -> None:
        """In a worker thread: hash `batch`, then encode until nothing is left or enough is on its way."""
        if batch:
            filled = []
            for chunk in batch:
                # Ends at the first difference, so it costs nothing for what is not zero (45 GB/s for what is).
                if len(chunk.data) == FIXED_CHUNK_SIZE and _ZEROS.startswith(chunk.data):
                    chunk.digest = self._codec.zero_digest()
                else:
                    filled.append(chunk)
            for chunk, digest in zip(filled, self._codec.digest_many([chunk.data for chunk in filled]), strict=True):
                chunk.digest = digest
            trio.from_thread.run_sync(self._claim, batch)
        while True:
            try:
                self._permits.pop()
            except IndexError:
                return
            try:
                chunk = self._to_encode.popleft()
            except IndexError:
                self._permits.append(None)
                return
            blob = self._codec.encode(chunk.data)
            if self._blocking is None:
                self._token.run_sync_soon(self._hand_over, chunk, blob)
            else:
                self._put_here(self._blocking, chunk, blob)

    def _put_here(self, session: BlockingPuts, chunk: _Chunk, blob: Blob) -> None:
        """In a worker thread: store what it has just encoded."""
        start = time.monotonic()
        result = session.put_chunk_blocking(chunk.disk.writer, chunk.digest, len(chunk.data), blob)
        self._put_s += 0.1 * (time.monotonic() - start - self._put_s)
        if self._put_s > SLOW_PUT_S:
            self._blocking = None
        self._token.run_sync_soon(self._was_put, session, chunk, result)

    def _claim(self, batch: Sequence[_Chunk]) -> None:
        """Sort out what the session knows or will know soon; the rest is to be encoded."""
        for chunk in batch:
            if self._session.knows(chunk.digest):
                self._settle(chunk)
            elif (waiting := self._in_flight.get(chunk.digest)) is not None:
                self._give_back(chunk)
                waiting.append(chunk)
            else:
                self._in_flight[chunk.digest] = []
                self._to_encode.append(chunk)
        # One thread is at it already; others that have nothing to do may help.
        self._workers.unpark(count=max(0, len(self._to_encode) - 1))

    def _hand_over(self, chunk: _Chunk, blob: Blob) -> None:
        if blob.kind is not BlobKind.PLAIN:  # a plain blob refers to the buffer
            self._give_back(chunk)
        self._encoded.append((chunk, blob))
        self._putters.unpark()

    def _give_back(self, chunk: _Chunk) -> None:
        if chunk.buffer is not None:
            self._lease.give(chunk.buffer)
            chunk.buffer = None

    # --- storing -----------------------------------------------------------------------------------------------------

    async def _put(self) -> None:
        while True:
            while not self._encoded:
                await self._putters.park()
            chunk, blob = self._encoded.popleft()
            result = await self._session.put_chunk(chunk.disk.writer, chunk.digest, len(chunk.data), blob)
            del blob
            self._stored(chunk, result)

    def _was_put(self, session: BlockingPuts, chunk: _Chunk, result: PutResult) -> None:
        session.chunk_was_put(chunk.digest, len(chunk.data))
        self._stored(chunk, result)

    def _stored(self, chunk: _Chunk, result: PutResult) -> None:
        """The session has taken the chunk."""
        self._permits.append(None)
        if self._to_encode:
            self._workers.unpark()
        length = len(chunk.data)
        self._stats.count += 1
        self._stats.size += length
        self._stats.compressed_size += result.stored
        if result.duplicate:
            self._stats.duplicates += 1
        else:
            report = chunk.disk.report
            report.new += length
            report.stored += result.stored
            report.chunks_new += 1
        for same in (chunk, *self._in_flight.pop(chunk.digest)):
            self._settle(same)

    def _settle(self, chunk: _Chunk) -> None:
        """The session has the chunk."""
        self._give_back(chunk)
        disk, number = chunk.disk, chunk.number
        if number >= 0:
            disk.digests[_DIGEST * number : _DIGEST * (number + 1)] = chunk.digest
            disk.settled.append(number)
            disk.missing -= 1
            if disk.task is not None:
                disk.task.advance(len(chunk.data))
        disk.keeper.unpark()

    async def _keep(self, disk: DiskBackup) -> None:
        """Hand index entries over and discard what is stored, until the disk is done."""
        for run in disk.chunks.runs:
            if run.state is ExtentState.ZERO:
                await self._store_zeros(disk, run)
        while disk.missing or disk.settled:
            if not disk.settled:
                await disk.keeper.park()
                continue
            numbers = sorted(disk.settled)
            disk.settled.clear()
            for first, last in _ranges(numbers):
                await self._append(disk, first, last)
                await self._discard(disk, first, last)

    async def _store_zeros(self, disk: DiskBackup, run: Run) -> None:
        """Chunks that are known to be zero without reading them."""
        digest = self._codec.zero_digest()
        area = slice(_DIGEST * run.first, _DIGEST * run.last)
        zeros = digest * (run.last - run.first)
        if disk.base is None or disk.digests[area] != zeros:
            if not self._session.knows(digest):
                self._claim([_Chunk(disk, -1, memoryview(_ZEROS), None, trio.current_time(), digest)])
                self._workers.unpark()
            while not self._session.knows(digest):
                await disk.keeper.park()
            disk.digests[area] = zeros
            await self._append(disk, run.first, run.last)
        await self._discard(disk, run.first, run.last)

    async def _append(self, disk: DiskBackup, first: int, last: int) -> None:
        for start in range(first, last, ENTRIES_AT_ONCE):
            numbers = range(start, min(start + ENTRIES_AT_ONCE, last))
            entries = [(number * FIXED_CHUNK_SIZE, disk.digest(number)) for number in numbers]
            await self._session.append(disk.writer, entries)

    async def _discard(self, disk: DiskBackup, first: int, last: int) -> None:
        end = min(last * FIXED_CHUNK_SIZE, disk.chunks.size)
        for offset in range(first * FIXED_CHUNK_SIZE, end, MAX_DISCARD):
            await disk.source.discard(offset, min(MAX_DISCARD, end - offset))


def _ranges(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Sorted `numbers` as ranges `first` .. `last - 1`."""
    first = last = -1
    for number in numbers:
        if number != last:
            if last > first:
                yield first, last
            first = number
        last = number + 1
    if last > first:
        yield first, last
