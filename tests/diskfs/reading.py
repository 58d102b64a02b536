"""Images as the process that reads them sees them, but in the test's own process, and files as sources."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from core.errors import FormatError
from diskfs import worker
from diskfs.entries import Entry, Id
from diskfs.filesystem import FileSystem
from diskfs.image import DiskImage
from diskfs.worker import Listing


def memory_for_this_process() -> int:
    """The worker's limit on its address space, for a child of a test: on top of what the test's process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE") + worker.MAX_MEMORY


class Files:
    """Disk images in files, as the disks of a snapshot; `reads` counts."""

    def __init__(self, *paths: Path) -> None:
        self._data = [path.open("rb") for path in paths]
        self.sizes: Sequence[int] = [path.stat().st_size for path in paths]
        self.reads = 0
        self.broken: range | None = None  #: offsets that cannot be read
        self.changed: dict[int, bytes] = {}  #: other bytes of the first one, by offset

    def fetch(self, disk: int, offset: int, length: int) -> bytes:
        self.reads += 1
        if self.broken is not None and offset < self.broken.stop and offset + length > self.broken.start:
            raise FormatError("read", "chunk", "it is damaged")
        data = os.pread(self._data[disk].fileno(), length, offset)
        inside = [at for at in self.changed if not disk and offset <= at < offset + length]
        if not inside:
            return data
        found = bytearray(data)
        for at in inside:
            piece = self.changed[at][: offset + length - at]
            found[at - offset : at - offset + len(piece)] = piece
        return bytes(found)

    def image(self, number: int = 0) -> DiskImage:
        return DiskImage(self.sizes, number, self.fetch)

    async def open(self, number: int) -> "FileSource":
        return FileSource(self, number)

    def close(self) -> None:
        for file in self._data:
            file.close()


class FileSource:
    """One of them, as `diskfs.client.Source`."""

    def __init__(self, files: Files, number: int) -> None:
        self._files, self._number = files, number
        self.size = files.sizes[number]

    def read_cached(self, offset: int, length: int) -> bytes | None:
        return None

    async def read(self, offset: int, length: int) -> bytes:
        return self._files.fetch(self._number, offset, length)


def walk(system: FileSystem, id: Id | None = None, path: bytes = b"") -> Iterator[tuple[bytes, Entry]]:
    """Everything below a directory."""
    listing = Listing(system, system.root if id is None else id)
    assert not listing.dropped
    for name, below in zip(listing.names, listing.ids, strict=True):
        entry = system.entry(below)
        yield path + b"/" + name, entry
        if entry.is_directory:
            yield from walk(system, below, path + b"/" + name)


def content(files: Files, system: FileSystem, entry: Entry) -> bytes:
    """All of a file, by its runs or unpacked."""
    runs = system.runs(entry.id)
    data = bytearray(entry.size)
    if runs is None:
        for offset in range(0, entry.size, 70_000):
            piece = system.read(entry.id, offset, 70_000)
            data[offset : offset + len(piece)] = piece
        return bytes(data)
    for run in runs:
        data[run.offset : run.offset + run.length] = files.fetch(run.disk, run.position, run.length)
    return bytes(data)
