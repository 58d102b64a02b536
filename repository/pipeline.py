"""How chunks flow into a backup session, wherever they come from.

    producer  ->  zero test, digests in batches  ->  compress, encrypt, CRC  ->  session  ->  back to the producer

Producers (`disk_backup`, `stream_backup`) hand over chunks in memory of theirs; as many workers as cores hash what is
there, in batches where that is quicker, and encode what the session does not know; up to 16 encoded chunks are on their
way to the session at a time. Whoever made a chunk learns when its memory is free and when the session has it, and
writes the index. A stage that is behind stops the one before it, so memory is bounded by what producers have and those
16 chunks.

A batch is one job of a worker thread, from the zero test to the last encoded chunk. In the middle it asks the event
loop which digests are new; encoded chunks leave it one by one, and idle threads help with encoding. Where the store
takes chunks by a few quick system calls, the worker stores them itself.
"""

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import trio
from trio.lowlevel import ParkingLot

from core.limits import cpu_count, in_cpu_thread
from core.nursery import open_nursery
from datastore.blob import Blob, BlobKind
from datastore.codec import ChunkCodec
from datastore.interface import PutResult
from repository.buffers import batch_size
from repository.interface import FIXED_CHUNK_SIZE, BackupSession, BlockingPuts, PutsAtOnce
from repository.report import ArchiveReport

#: Encoded chunks on their way to the session, unless it wants another number. One at a time is at most 28 MB/s at
#: 150 ms round trip.
PUTS_IN_FLIGHT: Final = 16
#: Seconds an incomplete batch waits for company: less than hashing a chunk alone takes where batches matter.
LINGER_S: Final = 0.01
#: Chunks that are hashed alone before the best number is asked for.
ONE_BY_ONE: Final = 8
#: Seconds that a put in a worker thread may take on average. A slower store waits for a device, and then many puts in
#: flight are better.
SLOW_PUT_S: Final = 0.02
#: A chunk of zeros.
ZEROS: Final = bytearray(FIXED_CHUNK_SIZE)


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


class Producer(Protocol):
    """The archive that chunks belong to."""

    @property
    def writer(self) -> int:
        """Its index in the session."""
        ...

    @property
    def report(self) -> ArchiveReport:
        """Where what is new is counted."""
        ...

    def settled(self, chunk: "Chunk") -> None:
        """In the event loop: the session has `chunk`; its digest may be put into the index."""
        ...


@dataclass(slots=True, eq=False)
class Chunk:
    """One chunk on its way."""

    producer: Producer
    number: int  #: of the producer, who gets it back
    data: memoryview
    free: Callable[[], None] | None  #: called once, in the event loop, when `data` is not needed any more
    since: float  #: when it was handed over, on trio's clock
    digest: bytes = b""


class Pipeline:
    """Hashes, encodes and stores chunks while `opened`; for one task that opens it and any number of producers."""

    def __init__(self, session: BackupSession, codec: ChunkCodec, stats: UploadStats) -> None:
        self.session: Final = session
        self.codec: Final = codec
        self._stats = stats
        self._handed_over = 0
        self._best_batch = 0  # as soon as it is known
        self._waiting: deque[Chunk] = deque()
        self._producers_waiting = ParkingLot()
        self._workers = ParkingLot()
        self._producing = 0  # producers that will hand over more
        #: Each says whether its producer waits for memory; then no batch waits for company.
        self._starving: list[Callable[[], bool]] = []
        # Touched by worker threads too: the ends of a deque are safe to use from any thread.
        self._to_encode: deque[Chunk] = deque()
        self._puts_at_once = session.puts_at_once if isinstance(session, PutsAtOnce) else PUTS_IN_FLIGHT
        self._permits: deque[None] = deque([None] * self._puts_at_once)
        self._encoded: deque[tuple[Chunk, Blob]] = deque()
        self._putters = ParkingLot()
        self._blocking: BlockingPuts | None = None  # set while workers store chunks themselves
        if isinstance(session, BlockingPuts) and session.puts_block_briefly:
            self._blocking = session
        self._put_s = 0.0  # seconds of a put in a worker thread, an average that forgets
        #: Chunks that are being encoded or put, each with the others of the same digest that wait for it.
        self._in_flight: dict[bytes, list[Chunk]] = {}

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Work while the block runs; at its end everything handed over must be settled.

        An error of the work ends the block with it.
        """
        self._token = trio.lowlevel.current_trio_token()
        async with open_nursery() as crew:
            for _ in range(cpu_count()):
                crew.start_soon(self._work)
            for _ in range(self._puts_at_once):
                crew.start_soon(self._put)
            yield
            crew.cancel_scope.cancel()

    # --- for producers -----------------------------------------------------------------------------------------------

    @contextmanager
    def producing(self, starving: Callable[[], bool]) -> Iterator[None]:
        """While the block runs a producer will hand over more; `starving` is true while it waits for memory."""
        self._producing += 1
        self._starving.append(starving)
        try:
            yield
        finally:
            self._producing -= 1
            self._starving.remove(starving)
            if not self._producing:
                self._workers.unpark_all()  # nothing will join what waits for company

    @property
    def _batch(self) -> int:
        """Chunks to be hashed at a time; one at first: to find out the best number takes as long as a few chunks."""
        if self._handed_over <= ONE_BY_ONE:
            return 1
        if not self._best_batch:
            self._best_batch = batch_size()
        return self._best_batch

    async def wait_for_turn(self, at_least: int) -> None:
        """Wait while there is more than a batch, and `at_least` chunks, to be hashed.

        More would only leave the cache before their turn.
        """
        while len(self._waiting) >= max(self._batch, at_least):
            await self._producers_waiting.park()

    def hand_over(self, chunk: Chunk) -> None:
        """Take a chunk; in the event loop."""
        self._handed_over += 1
        self._waiting.append(chunk)
        self._workers.unpark()

    def hand_over_hashed(self, chunk: Chunk) -> None:
        """As `hand_over`, for a chunk whose digest is known."""
        self._claim([chunk])
        self._workers.unpark()

    # --- hashing and encoding ----------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await in_cpu_thread(self._crunch, await self._next_batch())

    async def _next_batch(self) -> list[Chunk]:
        """Chunks to be hashed together; none if there is something to encode."""
        waiting = self._waiting
        while True:
            if self._to_encode and self._permits:
                return []
            deadline = waiting[0].since + LINGER_S if waiting else float("inf")
            full = len(waiting) >= self._batch or not self._producing or any(starves() for starves in self._starving)
            if waiting and (full or trio.current_time() >= deadline):
                batch = [waiting.popleft() for _ in range(min(self._batch, len(waiting)))]
                self._producers_waiting.unpark(count=len(batch))
                return batch
            with trio.move_on_at(deadline):
                await self._workers.park()

    def _crunch(self, batch: list[Chunk]) -> None:
        """In a worker thread: hash `batch`, then encode until nothing is left or enough is on its way."""
        if batch:
            filled = []
            for chunk in batch:
                # Ends at the first difference, so it costs nothing for what is not zero (45 GB/s for what is).
                if len(chunk.data) == FIXED_CHUNK_SIZE and ZEROS.startswith(chunk.data):
                    chunk.digest = self.codec.zero_digest()
                else:
                    filled.append(chunk)
            for chunk, digest in zip(filled, self.codec.digest_many([chunk.data for chunk in filled]), strict=True):
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
            blob = self.codec.encode(chunk.data)
            if self._blocking is None:
                self._token.run_sync_soon(self._hand_on, chunk, blob)
            else:
                self._put_here(self._blocking, chunk, blob)

    def _put_here(self, session: BlockingPuts, chunk: Chunk, blob: Blob) -> None:
        """In a worker thread: store what it has just encoded."""
        start = time.monotonic()
        result = session.put_chunk_blocking(chunk.producer.writer, chunk.digest, len(chunk.data), blob)
        self._put_s += 0.1 * (time.monotonic() - start - self._put_s)
        if self._put_s > SLOW_PUT_S:
            self._blocking = None
        self._token.run_sync_soon(self._was_put, session, chunk, result)

    def _claim(self, batch: Sequence[Chunk]) -> None:
        """Sort out what the session knows or will know soon; the rest is to be encoded."""
        for chunk in batch:
            if self.session.knows(chunk.digest):
                self._settle(chunk)
            elif (waiting := self._in_flight.get(chunk.digest)) is not None:
                self._free(chunk)
                waiting.append(chunk)
            else:
                self._in_flight[chunk.digest] = []
                self._to_encode.append(chunk)
        # One thread is at it already; others that have nothing to do may help.
        self._workers.unpark(count=max(0, len(self._to_encode) - 1))

    def _hand_on(self, chunk: Chunk, blob: Blob) -> None:
        if blob.kind is not BlobKind.PLAIN:  # a plain blob refers to the chunk's memory
            self._free(chunk)
        self._encoded.append((chunk, blob))
        self._putters.unpark()

    def _free(self, chunk: Chunk) -> None:
        if chunk.free is not None:
            chunk.free()
            chunk.free = None

    # --- storing -----------------------------------------------------------------------------------------------------

    async def _put(self) -> None:
        while True:
            while not self._encoded:
                await self._putters.park()
            chunk, blob = self._encoded.popleft()
            result = await self.session.put_chunk(chunk.producer.writer, chunk.digest, len(chunk.data), blob)
            del blob
            self._stored(chunk, result)

    def _was_put(self, session: BlockingPuts, chunk: Chunk, result: PutResult) -> None:
        session.chunk_was_put(chunk.digest, len(chunk.data))
        self._stored(chunk, result)

    def _stored(self, chunk: Chunk, result: PutResult) -> None:
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
            report = chunk.producer.report
            report.new += length
            report.stored += result.stored
            report.chunks_new += 1
        for same in (chunk, *self._in_flight.pop(chunk.digest)):
            self._settle(same)

    def _settle(self, chunk: Chunk) -> None:
        """The session has the chunk."""
        self._free(chunk)
        chunk.producer.settled(chunk)
