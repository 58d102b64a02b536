"""One snapshot open for reading, and the contents of its files."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Protocol
from weakref import WeakValueDictionary

import trio

from core.buffers import Buffer
from core.limits import in_cpu_thread
from datastore.codec import ChunkCodec, CryptKey, format_fingerprint
from datastore.index import ArchiveIndex
from datastore.manifest import Manifest
from datastore.names import CLIENT_LOG_NAME, ArchiveKind, Snapshot, archive_kind
from diskfs.client import LookedInto
from fusefs.opened_archive import OpenArchive, open_archive
from fusefs.running_images import RunningImages
from repository.archive import ArchiveReader, ChunkCache, open_archive_reader
from repository.disks import SnapshotDisks
from repository.interface import Reader, Repository
from repository.locate import load_readable, signature_doubt
from repository.restore import restore_blob, restore_log

#: Bytes up to which a decoded small file, or an image's index (1 MiB for 128 GiB), is kept while its snapshot is open;
#: a larger one only while a handle uses it.
KEPT: Final = 1 << 20
#: Bytes in one block of `st_blocks`.
BLOCK: Final = 512
_LOG = logging.getLogger(__name__)


class Content(Protocol):
    """The bytes of one file; for any number of tasks at once."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def blocks(self) -> int:
        """512-byte blocks that hold data, for `st_blocks`."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that it takes in memory, chunks left out."""
        ...

    def read_cached(self, offset: int, length: int) -> Buffer | None:
        """As `read` if it needs no waiting, else None."""
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """Bytes from `offset` on, `length` of them or up to the end.

        Raises:
            FleeceError: this range cannot be read.
        """
        ...


class BlobContent:
    """A small file, decoded in memory."""

    def __init__(self, data: bytes) -> None:
        self.size: Final = len(data)
        self.memory: Final = len(data)
        self.blocks: Final = -(-len(data) // BLOCK)
        self._data = memoryview(data)

    def read_cached(self, offset: int, length: int) -> Buffer:
        """See `Content.read_cached`."""
        return self._data[offset : offset + length]

    async def read(self, offset: int, length: int) -> Buffer:
        """See `Content.read`."""
        return self._data[offset : offset + length]


class ImageContent:
    """A disk image, read through the chunk cache."""

    def __init__(self, reader: ArchiveReader, blocks: int) -> None:
        self.size: Final = reader.size
        self.memory: Final = len(reader.archive.index.digests)
        self.blocks: Final = blocks
        self.read_cached: Final = reader.read_cached
        self.read: Final = reader.read


class RangeContent:
    """A file in a file archive: `size` bytes from `start` on of one of its streams."""

    def __init__(self, reader: ArchiveReader, start: int, size: int) -> None:
        self.size: Final = size
        self.memory: Final = 0
        self.blocks: Final = -(-size // BLOCK)
        self._reader, self._start = reader, start

    def read_cached(self, offset: int, length: int) -> Buffer | None:
        """See `Content.read_cached`."""
        length = min(length, self.size - offset)
        return self._reader.read_cached(self._start + offset, length) if length > 0 else b""

    async def read(self, offset: int, length: int) -> Buffer:
        """See `Content.read`."""
        length = min(length, self.size - offset)
        within = self._start, self._start + self.size
        return await self._reader.read(self._start + offset, length, within=within) if length > 0 else b""


class OpenSnapshot:
    """A snapshot whose manifest was read and checked; made by `open_snapshot`."""

    def __init__(self, reader: Reader, manifest: Manifest, codec: ChunkCodec, cache: ChunkCache) -> None:
        self.manifest: Final = manifest
        self._reader, self._codec, self._cache = reader, codec, cache
        self._contents: WeakValueDictionary[str, Content] = WeakValueDictionary()
        self._archives: WeakValueDictionary[str, OpenArchive] = WeakValueDictionary()
        self._kept: list[Content | OpenArchive] = []
        self._locks: dict[str, trio.Lock] = {}
        self._disks: SnapshotDisks | None = None
        self._images: dict[str, LookedInto] = {}

    async def content(self, name: str) -> Content:
        """The file `name` (full file name), checked against the manifest; several callers cause one opening.

        Raises:
            NotFoundError: there is no such file.
            FormatError, KeyNeededError: as `repository.locate.open_archive` and `repository.restore.restore_blob`.
        """
        async with self._locks.setdefault(name, trio.Lock()):
            content = self._contents.get(name)
            if content is None:
                if archive_kind(name) is ArchiveKind.BLOB:
                    content = BlobContent(await self._blob(name))
                else:
                    content = await self._image(name)
                self._contents[name] = content
                if content.memory <= KEPT:
                    self._kept.append(content)
            return content

    async def archive(self, name: str, payload: str | None = None) -> OpenArchive:
        """The file archive in the streams `name` and `payload` (full file names); several callers cause one opening.

        Raises:
            NotFoundError: there is no such archive.
            FormatError, KeyNeededError: as `repository.locate.open_archive`; or it is none.
        """
        async with self._locks.setdefault(name, trio.Lock()):
            archive = self._archives.get(name)
            if archive is None:
                first, second = [
                    None if one is None else await open_archive_reader(
                        self._reader, self._codec, self.manifest, one, self._cache
                    )
                    for one in (name, payload)
                ]  # fmt: skip
                assert first is not None
                archive = self._archives[name] = await open_archive(first, second)
                if archive.memory <= KEPT:
                    self._kept.append(archive)
            return archive

    async def image(self, name: str, running: RunningImages) -> LookedInto:
        """What is on the disk image `name` (full file name); `running` bounds how many processes read images.

        Raises:
            NotFoundError: there is no such image.
        """
        image = self._images.get(name)
        if image is None:
            if self._disks is None:
                self._disks = SnapshotDisks(self._reader, self._codec, self.manifest, self._cache)
            number = self._disks.number(name)
            where = f"{self.manifest.snapshot} {self._disks.names[number]}"
            image = self._images[name] = LookedInto(self._disks, number, where)
        await running.use(image)
        return image

    async def aclose(self) -> None:
        """End the processes that read its images."""
        for image in self._images.values():
            await image.aclose()

    async def _image(self, name: str) -> ImageContent:
        reader = await open_archive_reader(self._reader, self._codec, self.manifest, name, self._cache)
        return ImageContent(reader, await in_cpu_thread(data_blocks, reader.archive.index, reader.archive.zero))

    async def _blob(self, name: str) -> bytes:
        if name != CLIENT_LOG_NAME:
            return await restore_blob(self._reader, self._codec, self.manifest, name)
        return await restore_log(self._reader, self._codec)


def data_blocks(index: ArchiveIndex, zero: bytes | None) -> int:
    """512-byte blocks in the chunks of `index` that are not zeros; `zero` is the digest of a full chunk of zeros."""
    import numpy as np

    size = index.size
    if zero is not None:
        words = np.frombuffer(index.digests, dtype="<u8").reshape(-1, 4)
        empty = (words == np.frombuffer(zero, dtype="<u8")).all(axis=1)
        # A shorter last chunk of zeros has another digest, so it counts as data: it was stored.
        size -= int(empty.sum()) * index.span(0)[1]
    return max(0, -(-size // BLOCK))


@asynccontextmanager
async def open_snapshot(
    repo: Repository, key: CryptKey | None, snapshot: Snapshot, cache: ChunkCache, unchecked: set[str] | None = None
) -> AsyncIterator[OpenSnapshot]:
    """Open `snapshot`, holding its shared lock while the block runs.

    With the `key` that the snapshot was made with, the manifest's signature is checked. A snapshot of another key is
    read as far as that goes without; a log line says so, unless `unchecked` has the fingerprint of that key already.

    Raises:
        SnapshotNotFoundError, LockedError: as `Repository.reader`.
        FormatError: the manifest is broken, or its signature wrong or removed.
    """
    async with repo.reader(snapshot) as reader:
        manifest, codec = await load_readable(reader, ChunkCodec(key))
        doubt = signature_doubt(manifest, codec, key)
        other = format_fingerprint(manifest.fingerprint) if manifest.fingerprint is not None else ""
        if doubt is not None and (unchecked is None or other not in unchecked):
            if unchecked is not None:
                unchecked.add(other)
            _LOG.warning("%s", doubt)
        opened = OpenSnapshot(reader, manifest, codec, cache)
        try:
            yield opened
        finally:
            await opened.aclose()
