"""Random access to an archive: what the mount reads through.

An `ArchiveReader` answers ranges from chunks that lie decoded in a `ChunkCache`, which all archives of a mount share
and which is bounded in bytes. A chunk that several readers want is read once. Who reads one chunk after the other is
read ahead for, in batches that grow while he goes on; not while he goes over what was used before, where it would only
drive out what he comes back to. From afar, who begins a file with a long read is taken for one of them at once.
"""

import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from core.buffers import Buffer
from core.errors import FleeceError, FormatError
from core.nursery import open_nursery
from datastore.codec import ChunkCodec
from datastore.manifest import Manifest
from datastore.s3.counters import Work, counted_as
from repository.buffers import batch_size
from repository.fetch import read_batch
from repository.interface import FIXED_CHUNK_SIZE, BlockingReads, Reader
from repository.locate import Archive, open_archive

#: Bytes of decoded chunks kept by default: 32 chunks of a disk image.
DEFAULT_CACHE_SIZE: Final = 128 << 20
#: Places in one archive that are followed as sequential readers; the one not seen longest goes first.
_STREAMS: Final = 16
#: Chunks read ahead at most from a bucket or server, whose answers take a while: one batch of requests is under way
#: while the answers of another are worked on.
_FAR_WINDOW: Final = 16
#: Chunks that are asked for at once where a file is begun with a long read, from afar: if one came alone, two round
#: trips would pass before as many requests are under way as may be.
_FAR_START: Final = 4
#: Bytes from which on a read is long: the kernel makes it of reads of 256 KiB or more. What looks for a signature or a
#: partition table reads less at the beginning of a file.
_LONG_READ: Final = 512 << 10
#: Part of the cache that read-ahead may fill before it is asked for.
_READ_AHEAD_SHARE: Final = 2
_LOG = logging.getLogger(__name__)


class ChunkCache:
    """Decoded chunks by digest, the least recently used ones dropped first; made by `open_cache`."""

    def __init__(self, capacity: int, nursery: trio.Nursery) -> None:
        self.capacity: Final = capacity
        self._nursery = nursery
        self._chunks: OrderedDict[bytes, Buffer] = OrderedDict()
        self.size = 0  #: bytes held
        self.hits = 0
        self.misses = 0
        #: Chunks being read, by digest; the event is set when the reading is over, however it ended.
        self._in_flight: dict[bytes, trio.Event] = {}
        #: Bytes being read ahead.
        self._ahead = 0
        #: Chunks here that were read ahead and not asked for yet.
        self._fresh: set[bytes] = set()

    def get(self, digest: bytes) -> Buffer | None:
        """The decoded chunk `digest` if it is here; never waits."""
        chunk = self._chunks.get(digest)
        if chunk is not None:
            self._chunks.move_to_end(digest)
        return chunk

    def first_use(self, digest: bytes) -> bool:
        """True for a chunk that was read ahead and is asked for now for the first time."""
        if digest in self._fresh:
            self._fresh.discard(digest)
            return True
        return False

    def _put(self, digest: bytes, chunk: Buffer) -> None:
        if digest in self._chunks:
            return
        self._chunks[digest] = chunk
        self.size += len(chunk)
        while self.size > self.capacity and len(self._chunks) > 1:
            name, dropped = self._chunks.popitem(last=False)
            self.size -= len(dropped)
            self._fresh.discard(name)

    async def load(self, reader: "ArchiveReader", number: int) -> Buffer:
        """Chunk `number` of the archive of `reader`, from here or read now; several callers cause one read.

        Raises:
            FleeceError: it cannot be read; the next call tries again.
        """
        digest = reader.archive.index.digest(number)
        while True:
            chunk = self.get(digest)
            if chunk is not None:
                self._fresh.discard(digest)
                return chunk
            pending = self._in_flight.get(digest)
            if pending is None:
                self.misses += 1
                results = await self._read(reader, [number])
                if isinstance(results[0], FleeceError):
                    raise results[0]
                return results[0]
            await pending.wait()

    async def _read(self, reader: "ArchiveReader", numbers: Sequence[int]) -> list[Buffer | FleeceError]:
        """Read chunks that nobody is reading yet."""
        done = trio.Event()
        digests = [reader.archive.index.digest(number) for number in numbers]
        for digest in digests:
            self._in_flight[digest] = done
        try:
            chunks = await read_batch(reader.reader, reader.codec, reader.archive, numbers)
            results = [data for _, data in chunks]
            for digest, data in zip(digests, results, strict=True):
                if not isinstance(data, FleeceError):
                    self._put(digest, data)
            return results
        finally:
            for digest in digests:
                self._in_flight.pop(digest, None)
            done.set()

    def read_ahead(self, reader: "ArchiveReader", numbers: range) -> int:
        """Begin to read those of `numbers` that are neither here nor being read, as far as the cache has room.

        Returns:
            the first of them that there was no room for; the end of `numbers` if there was.
        """
        wanted = []
        seen = set()
        stopped = numbers.stop
        for number in numbers:
            digest = reader.archive.index.digest(number)
            if digest in self._chunks or digest in self._in_flight or digest in seen or reader.is_zero(number):
                continue
            length = reader.archive.index.span(number)[1]
            if self._ahead + length > self.capacity // _READ_AHEAD_SHARE:
                stopped = number
                break
            seen.add(digest)
            self._ahead += length
            wanted.append(number)
        if not wanted:
            return stopped
        if not reader.is_far:
            self._nursery.start_soon(self._read_ahead, reader, wanted)
            return stopped
        # From afar: what came is not to wait for what is still on its way, and its place in the cache goes to the next.
        for number in wanted:
            self._nursery.start_soon(self._read_ahead, reader, [number])
        return stopped

    async def _read_ahead(self, reader: "ArchiveReader", numbers: Sequence[int]) -> None:
        try:
            # What cannot be read is reported to whoever asks for it.
            with counted_as(Work.PREFETCH):
                await self._read(reader, numbers)
            digests = (reader.archive.index.digest(number) for number in numbers)
            self._fresh.update(digest for digest in digests if digest in self._chunks)
        except Exception as error:
            # Nor may a fault of ours end the other archives' use.
            if not isinstance(error, FleeceError):
                _LOG.warning("reading ahead in %s failed", reader.archive.where, exc_info=error)
        finally:
            self._ahead -= sum(reader.archive.index.span(number)[1] for number in numbers)


@asynccontextmanager
async def open_cache(capacity: int = DEFAULT_CACHE_SIZE) -> AsyncIterator[ChunkCache]:
    """A cache of at most `capacity` bytes (and one chunk); read-ahead that is under way ends with the block."""
    async with open_nursery() as nursery:
        yield ChunkCache(capacity, nursery)
        nursery.cancel_scope.cancel()


@dataclass(slots=True)
class _Stream:
    """One sequential reader of an archive."""

    chunk: int  #: where it reads now
    window: int = 1  #: chunks to be read ahead next
    ahead: int = 0  #: first chunk that was not asked for yet


@dataclass(slots=True, eq=False)
class ArchiveReader:
    """One archive of an open snapshot; for any number of tasks at once."""

    reader: Reader
    codec: ChunkCodec
    archive: Archive
    cache: ChunkCache
    #: Sequential readers, the one seen last at the end.
    _streams: list[_Stream] = field(default_factory=list)
    #: Offset, end and digest of the chunk that was read last from the cache.
    _last: tuple[int, int, bytes] = (0, -1, b"")

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return self.archive.index.size

    @property
    def is_far(self) -> bool:
        """True if chunks come over a network, so that many requests should be under way."""
        return not (isinstance(self.reader, BlockingReads) and self.reader.reads_block_briefly)

    def is_zero(self, number: int) -> bool:
        """True if chunk `number` is a full chunk of zeros, which is never read."""
        index = self.archive.index
        return index.digest(number) == self.archive.zero and index.span(number)[1] == FIXED_CHUNK_SIZE

    def read_cached(self, offset: int, length: int) -> Buffer | None:
        """As `read`, if it can be answered at once from the cache or from zeros; else None. Never waits or copies.

        The mount answers most requests with it, so it takes the short way where the last read was in the same chunk.
        """
        start, end, digest = self._last
        if start <= offset and length >= 0 and offset + length <= end:
            chunk = self.cache.get(digest)
            if chunk is not None:
                self.cache.hits += 1
                return memoryview(chunk)[offset - start : offset - start + length]
        if not 0 <= offset < offset + length <= self.size:
            length = self._clip(offset, length)
            if not length:
                return b""
        index = self.archive.index
        number = index.find(offset)
        start, size = index.span(number)
        if offset + length > start + size:
            return None
        digest = index.digest(number)
        chunk = self.cache.get(digest)
        if chunk is None:
            return bytes(length) if digest == self.archive.zero and size == FIXED_CHUNK_SIZE else None
        if len(chunk) != size:
            self._check_length(number, chunk)
        self.cache.hits += 1
        self._follow(number, self.cache.first_use(digest))
        self._last = (start, start + size, digest)
        return memoryview(chunk)[offset - start : offset - start + length]

    async def read(self, offset: int, length: int, *, within: tuple[int, int] | None = None) -> bytes:
        """The bytes from `offset` on, `length` of them or up to the end of the archive.

        Args:
            offset: of the first byte.
            length: in bytes.
            within: offset and end of the file of which this is read, as far as that is known; None: the archive's.

        Raises:
            FleeceError: a chunk of this range is bad, missing or unreadable; other ranges are not concerned.
        """
        answer = self.read_cached(offset, length)
        if answer is not None:
            return bytes(answer)
        index = self.archive.index
        end = offset + self._clip(offset, length)
        if length >= _LONG_READ and self.is_far:
            first, last = within or (0, self.size)
            if offset == first:
                self._begin(index.find(offset), index.find(min(last, self.size) - 1))
        pieces: list[Buffer] = []
        while offset < end:
            number = index.find(offset)
            start, size = index.span(number)
            stop = min(end, start + size)
            if self.is_zero(number):
                pieces.append(bytes(stop - offset))
            else:
                chunk = await self.chunk(number)
                pieces.append(memoryview(chunk)[offset - start : stop - start])
            offset = stop
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    async def chunk(self, number: int) -> Buffer:
        """The whole chunk `number`, decoded; what follows is read ahead if chunks are asked for in order.

        Raises:
            FleeceError: it is bad, missing or unreadable.
        """
        if self.is_zero(number):
            return bytes(FIXED_CHUNK_SIZE)
        self._follow(number, True)
        chunk = await self.cache.load(self, number)
        self._check_length(number, chunk)
        return chunk

    def _clip(self, offset: int, length: int) -> int:
        if offset < 0 or length < 0:
            raise ValueError(f"offset {offset}, length {length}")
        return max(0, min(length, self.size - offset))

    def _check_length(self, number: int, chunk: Buffer) -> None:
        # Another archive's index may have brought the chunk in under its own, right length.
        size = self.archive.index.span(number)[1]
        if len(chunk) != size:
            why = f"the chunk has {len(chunk)} bytes, the index says {size}"
            raise FormatError("read", self.archive.chunk_where(number), why)

    def _begin(self, number: int, last: int) -> None:
        """Note that a file, which ends in chunk `last`, is begun in chunk `number`, and read ahead in it."""
        if self.is_zero(number) or self._stream_at(number) is not None:
            return
        stream = self._new_stream(number)
        stream.window = _FAR_START
        end = min(number + _FAR_START, last + 1)
        if end > stream.ahead:
            stream.ahead = self.cache.read_ahead(self, range(stream.ahead, end))

    def _follow(self, number: int, ahead: bool) -> None:
        """Note a read in chunk `number`; with `ahead`, read ahead if it continues one that is known."""
        stream = self._stream_at(number)
        if stream is None:
            self._new_stream(number)
            return
        if number <= stream.chunk:
            return
        stream.chunk = number
        if not ahead:
            stream.ahead = max(stream.ahead, number + 1)
        elif self.is_far:
            # A request for each chunk that was used, so that as many are always under way.
            room = self.cache.capacity // _READ_AHEAD_SHARE // max(1, self.archive.index.span(number)[1])
            stream.window = min(2 * stream.window, _FAR_WINDOW, max(1, room))
            first = max(stream.ahead, number + 1)
            end = min(number + 1 + stream.window, self.archive.index.count)
            stream.ahead = self.cache.read_ahead(self, range(first, end)) if end > first else first
        elif stream.ahead - number <= stream.window // 2 + 1:
            stream.window = min(2 * stream.window, max(batch_size(), 8))
            first = max(stream.ahead, number + 1)
            stream.ahead = min(first + stream.window, self.archive.index.count)
            self.cache.read_ahead(self, range(first, stream.ahead))

    def _stream_at(self, number: int) -> _Stream | None:
        """The stream that a read in chunk `number` continues, from now on the one seen last; None if there is none."""
        streams = self._streams
        for position in range(len(streams) - 1, -1, -1):
            stream = streams[position]
            # The kernel's own read-ahead asks out of order now and then, so a chunk back still counts.
            if stream.chunk - 1 <= number <= stream.chunk + 1:
                if position != len(streams) - 1:
                    streams.append(streams.pop(position))
                return stream
        return None

    def _new_stream(self, number: int) -> _Stream:
        """A stream that begins in chunk `number`."""
        if len(self._streams) >= _STREAMS:
            del self._streams[0]
        stream = _Stream(number, ahead=number + 1)
        self._streams.append(stream)
        return stream


async def open_archive_reader(
    reader: Reader, codec: ChunkCodec, manifest: Manifest, name: str, cache: ChunkCache
) -> ArchiveReader:
    """Open the archive `name` (full file name) of the snapshot that `reader` reads.

    Raises:
        NotFoundError, FormatError, KeyNeededError: as `locate.open_archive`.
    """
    return ArchiveReader(reader, codec, await open_archive(reader, codec, manifest, name), cache)
