"""How a disk becomes chunks of a fixed index.

    source  ->  buffers of 4 MiB  ->  `pipeline`  ->  index, and the source is told what it need not keep

Two readers per disk fill buffers of the shared pool, which bounds the memory however many disks there are.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import trio
from trio.lowlevel import ParkingLot

from core.disks import DiskSource, ExtentState
from core.limits import in_cpu_thread
from core.nursery import open_nursery
from core.progress import Progress, Task
from datastore.index import ArchiveIndex
from repository.buffers import Lease
from repository.interface import FIXED_CHUNK_SIZE
from repository.pipeline import ZEROS, Chunk, Pipeline
from repository.planning import ChunkMap, Run
from repository.report import ArchiveReport
from repository.throttle import Throttle

#: Reads in flight per disk: two keep two NBD connections busy, more only push each other out of the cache.
READS_IN_FLIGHT: Final = 2
#: Index entries handed over at a time.
ENTRIES_AT_ONCE: Final = 4096
#: Bytes discarded by one call at most.
MAX_DISCARD: Final = 1 << 30
_DIGEST: Final = 32


class DiskBackup:
    """One disk while it is stored; a `pipeline.Producer`."""

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
        self.new: list[int] = []
        self.keeper: Final = ParkingLot()
        self.task: Task | None = None

    def span(self, number: int) -> tuple[int, int]:
        """Offset and length of chunk `number`."""
        offset = number * FIXED_CHUNK_SIZE
        return offset, min(FIXED_CHUNK_SIZE, self.chunks.size - offset)

    def digest(self, number: int) -> bytes:
        """Digest of chunk `number` as far as it is known."""
        return bytes(self.digests[_DIGEST * number : _DIGEST * (number + 1)])

    def settled(self, chunk: Chunk) -> None:
        """See `pipeline.Producer`; number -1 is the zero chunk that was not read."""
        number = chunk.number
        if number >= 0:
            self.digests[_DIGEST * number : _DIGEST * (number + 1)] = chunk.digest
            self.new.append(number)
            self.missing -= 1
            if self.task is not None:
                self.task.advance(len(chunk.data))
        self.keeper.unpark()


def _numbers(chunks: ChunkMap) -> Iterator[int]:
    for run in chunks.runs:
        if run.state is ExtentState.DATA:
            yield from range(run.first, run.last)


class DiskStorer:
    """Stores disks side by side through a pipeline that is open; for one `run`."""

    def __init__(self, pipeline: Pipeline, progress: Progress, lease: Lease, throttle: Throttle | None) -> None:
        self._pipeline, self._progress, self._lease, self._throttle = pipeline, progress, lease, throttle
        self._session = pipeline.session

    async def run(self, disks: Sequence[DiskBackup]) -> None:
        """Store `disks` and close their indexes."""
        async with open_nursery() as nursery:
            for disk in disks:
                nursery.start_soon(self._store, disk)

    async def _store(self, disk: DiskBackup) -> None:
        chunks, report = disk.chunks, disk.report
        with self._progress.task(report.name, chunks.length(ExtentState.DATA)) as disk.task:
            async with open_nursery() as nursery:
                nursery.start_soon(self._read_disk, disk)
                nursery.start_soon(self._keep, disk)
            disk.csum = await in_cpu_thread(lambda: hashlib.sha256(disk.digests).digest())
            await self._session.close_index(disk.writer, chunks.count, chunks.size, disk.csum)
        report.reused = report.size - report.new

    async def _read_disk(self, disk: DiskBackup) -> None:
        with self._pipeline.producing(lambda: self._lease.pool.exhausted):
            async with open_nursery() as nursery:
                for _ in range(READS_IN_FLIGHT):
                    nursery.start_soon(self._read_chunks, disk)

    async def _read_chunks(self, disk: DiskBackup) -> None:
        for number in disk.numbers:
            offset, length = disk.span(number)
            await self._pipeline.wait_for_turn(2 * READS_IN_FLIGHT)
            if self._throttle is not None:
                await self._throttle.take(length)
            buffer = await self._lease.take()
            data = buffer[:length]
            await disk.source.read_into(offset, data)
            disk.report.read += length
            free = partial(self._lease.give, buffer)
            self._pipeline.hand_over(Chunk(disk, number, data, free, trio.current_time()))

    async def _keep(self, disk: DiskBackup) -> None:
        """Hand index entries over and discard what is stored, until the disk is done."""
        for run in disk.chunks.runs:
            if run.state is ExtentState.ZERO:
                await self._store_zeros(disk, run)
        while disk.missing or disk.new:
            if not disk.new:
                await disk.keeper.park()
                continue
            numbers = sorted(disk.new)
            disk.new.clear()
            for first, last in _ranges(numbers):
                await self._append(disk, first, last)
                await self._discard(disk, first, last)

    async def _store_zeros(self, disk: DiskBackup, run: Run) -> None:
        """Chunks that are known to be zero without reading them."""
        digest = self._pipeline.codec.zero_digest()
        area = slice(_DIGEST * run.first, _DIGEST * run.last)
        zeros = digest * (run.last - run.first)
        if disk.base is None or disk.digests[area] != zeros:
            if not self._session.knows(digest):
                chunk = Chunk(disk, -1, memoryview(ZEROS), None, trio.current_time(), digest)
                self._pipeline.hand_over_hashed(chunk)
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
