"""The disk images of one snapshot, each opened when somebody looks into it."""

from collections.abc import Sequence
from typing import Final

import trio

from core.errors import NotFoundError, UsageError
from datastore.codec import ChunkCodec
from datastore.manifest import Manifest
from datastore.names import ArchiveKind, archive_kind, strip_archive_type
from repository.archive import ArchiveReader, ChunkCache, open_archive_reader
from repository.interface import Reader


class SnapshotDisks:
    """The disks of the snapshot that `reader` reads, numbered in the manifest's order, through a cache of chunks."""

    def __init__(self, reader: Reader, codec: ChunkCodec, manifest: Manifest, cache: ChunkCache) -> None:
        files = disk_files(manifest)
        self.names: Final[Sequence[str]] = [strip_archive_type(file) for file in files]  #: `drive-scsi0.img`
        self.sizes: Final[Sequence[int]] = [manifest.file(file).size for file in files]  #: bytes
        self._files = files
        self._opener = reader, codec, manifest, cache
        self._opened: dict[int, ArchiveReader] = {}
        self._lock = trio.Lock()

    def number(self, text: str) -> int:
        """The number of the disk that a person calls `text`, with or without its type.

        Raises:
            NotFoundError: there is no such archive.
            UsageError: it is no disk image.
        """
        manifest = self._opener[2]
        for number, file in enumerate(self._files):
            if text in (file, self.names[number]):
                return number
        where = f"{manifest.snapshot} {text}"
        if any(text in (file.filename, strip_archive_type(file.filename)) for file in manifest.files):
            raise UsageError("look into", where, "it is neither an archive of files nor a disk image")
        have = ", ".join(self.names)
        raise NotFoundError(
            "look into", where, "the snapshot has no such archive", f"its disks are {have}" if have else ""
        )

    async def open(self, number: int) -> ArchiveReader:
        """Disk `number`.

        Raises:
            NotFoundError, FormatError, KeyNeededError: as `locate.open_archive`.
        """
        async with self._lock:
            reader = self._opened.get(number)
            if reader is None:
                source, codec, manifest, cache = self._opener
                reader = await open_archive_reader(source, codec, manifest, self._files[number], cache)
                self._opened[number] = reader
            return reader


def disk_files(manifest: Manifest) -> list[str]:
    """Full file names of the disk images of a snapshot."""
    return [file.filename for file in manifest.files if archive_kind(file.filename) is ArchiveKind.FIXED]
