"""The streams of a stored file archive, read at any place by a worker thread.

What walks through an archive (restore, listing, comparing, the next backup) is synchronous and runs in one thread; the
chunks come from the event loop's cache, which reads ahead for it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import trio

from core.buffers import Buffer
from core.errors import FormatError, NotFoundError
from datastore.codec import ChunkCodec
from datastore.manifest import Manifest
from datastore.names import strip_archive_type
from repository.archive import ArchiveReader, ChunkCache, open_archive_reader, open_cache
from repository.interface import Reader

#: Bytes of decoded chunks that the streams of one archive share; a chunk has up to 16 MiB.
CACHE_SIZE: Final = 160 << 20


class StoredBytes:
    """A stored stream; `read` belongs to one thread at a time, started by `trio.to_thread`.

    It has the shape of `pxar.sinks.ReferenceBytes`.
    """

    def __init__(self, reader: ArchiveReader) -> None:
        self.size: Final = reader.size  #: bytes
        self._reader = reader
        self._start = self._end = 0  # of the chunk used last
        self._view = memoryview(b"")
        self._bad: tuple[int, FormatError | NotFoundError] | None = None  # chunk that could not be read last, and why

    def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on: `length` of them, or fewer at the end of the stream; a view where that saves a copy.

        Raises:
            FleeceError: a chunk of this range cannot be read.
        """
        if self._start <= offset and offset + length <= self._end:
            return self._view[offset - self._start : offset - self._start + length]
        pieces: list[memoryview] = []
        end = min(offset + length, self.size)
        while offset < end:
            if not self._start <= offset < self._end:
                self._use(offset)
            piece = self._view[offset - self._start : end - self._start]
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _use(self, offset: int) -> None:
        index = self._reader.archive.index
        number = index.find(offset)
        start, size = index.span(number)
        if self._bad is not None and self._bad[0] == number:
            # Who passes over what is damaged may ask for each of the thousands of entries in there.
            raise self._bad[1].with_traceback(None)
        try:
            chunk = trio.from_thread.run(self._reader.chunk, number)
        except (FormatError, NotFoundError) as error:
            self._bad = number, error
            raise
        self._start, self._end, self._view = start, start + size, memoryview(chunk).cast("B")


class ArchiveStreams(NamedTuple):
    """A file archive open for reading."""

    name: str  #: without extension, `root`
    archive: StoredBytes  #: self-contained, or the metadata stream
    payload: StoredBytes | None  #: of a split archive


def archive_stream_names(manifest: Manifest, name: str) -> tuple[str, str | None]:
    """File names of the indexes of the file archive `name` (`root`, `root.pxar`, `root.mpxar.didx` ...).

    Returns:
        the archive's own, and that of the payload of a split one.

    Raises:
        NotFoundError: the manifest lists no such archive.
    """
    stem = strip_archive_type(name)
    for extension in (".pxar", ".mpxar", ".ppxar"):
        stem = stem.removesuffix(extension)
    listed = {file.filename for file in manifest.files}
    if f"{stem}.pxar.didx" in listed:
        return f"{stem}.pxar.didx", None
    if f"{stem}.mpxar.didx" in listed:
        return f"{stem}.mpxar.didx", f"{stem}.ppxar.didx"
    raise NotFoundError("read", f"{manifest.snapshot}/{name}", "the snapshot has no such file archive")


@asynccontextmanager
async def open_streams(
    reader: Reader, codec: ChunkCodec, manifest: Manifest, name: str, *, cache_size: int = CACHE_SIZE
) -> AsyncIterator[ArchiveStreams]:
    """The file archive `name` of the snapshot that `reader` reads, open while the block runs.

    Raises:
        NotFoundError: there is no such archive.
        FormatError, KeyNeededError: as `locate.open_archive`.
    """
    async with open_cache(cache_size) as cache:
        yield await open_streams_in(reader, codec, manifest, name, cache)


async def open_streams_in(
    reader: Reader, codec: ChunkCodec, manifest: Manifest, name: str, cache: ChunkCache
) -> ArchiveStreams:
    """As `open_streams`, with a cache that is there already."""
    archive, payload = archive_stream_names(manifest, name)
    return ArchiveStreams(
        strip_archive_type(archive).rpartition(".")[0],
        StoredBytes(await open_archive_reader(reader, codec, manifest, archive, cache)),
        None if payload is None else StoredBytes(await open_archive_reader(reader, codec, manifest, payload, cache)),
    )
