"""Puts entries of the file system into an archive: contents, further names of files, the catalog beside it."""

import os
from collections.abc import Callable
from stat import S_IFBLK, S_IFCHR, S_IFIFO, S_IFLNK, S_IFSOCK
from struct import Struct
from typing import Final, NamedTuple, TypeAlias

from core.errors import os_reason
from pxar.create_report import CreateReport, Progress, Trouble
from pxar.encoder import ArchiveEncoder
from pxar.errors import EncodeError
from pxar.filesystem import Opened, Scanned
from pxar.folders import Folder
from pxar.format import KIND_OF_MODE, MAX_NAME
from pxar.sinks import CatalogSink

#: Bytes read at a time. PBS's client reads as much, and where payload streams are cut depends on it.
PIECE: Final = 4 << 20
FORMAT: Final = 0o170000  #: of a mode: the type
FILE: Final = 0o100000
FOLDER: Final = 0o040000
#: In encoded metadata: seconds and nanoseconds of the last change.
_MTIME: Final = Struct("<qI")
_MTIME_OFFSET: Final = 40


#: Device and inode of a file.
Key: TypeAlias = tuple[int, int]


class FirstName(NamedTuple):
    """The name under which a file with several names was met first, and what it was like."""

    path: bytes
    size: int
    mtime_ns: int


class EntryWriter:
    """Encodes entries in archive order and counts them.

    A file that cannot be read to its end is left out of a split archive (what was read of it stays in the payload
    stream, where nothing refers to it). In a self-contained one its size has been announced, so zeros fill it up.
    """

    def __init__(
        self,
        encoder: ArchiveEncoder,
        report: CreateReport,
        is_at: Callable[[bytes, Key], bool],
        *,
        split: bool,
        catalog: CatalogSink | None = None,
        progress: Progress | None = None,
        measure: "Measuring | None" = None,
    ) -> None:
        """`is_at`: whether a file lies at a path of the source now.

        `measure`: contents are not read, only counted there (it is the encoder's content sink).
        """
        self.encoder: Final = encoder
        self.report: Final = report
        self._split = split
        self._content = encoder.content
        self._catalog = catalog
        self._progress = progress
        self._measure = measure
        self._is_at = is_at
        #: First names of files that have several, and their positions in the archive.
        self._links: dict[Key, tuple[FirstName, int]] = {}
        #: A byte behind the announced end, to see whether there is one.
        self._behind = bytearray(1)

    def start_folder(self, name: bytes, meta: bytes) -> None:
        """Go into a folder."""
        self.encoder.directory(name, meta)
        self.report.folders += 1
        if self._catalog is not None:
            self._catalog.start_directory(name)

    def end_folder(self) -> None:
        """Leave it."""
        self.encoder.end_directory()
        if self._catalog is not None:
            self._catalog.end_directory()

    def linked(self, key: Key) -> bool:
        """Whether the file (device, inode) is in the archive under another name."""
        return key in self._links

    def is_further(self, found: Scanned | Opened) -> bool:
        """Whether a file is in the archive under another name, as far as can be told now that it is `found`."""
        known = self._links.get((found[3], found[4]))
        return known is not None and self.is_same(known[0], found)

    def is_same(self, first: FirstName, found: Scanned | Opened) -> bool:
        """Whether the file that was `first` is the one that is `found` to have its inode.

        File systems give an inode to a new file as soon as the old one is gone, which a long backup lives to see.
        """
        if (first.size, first.mtime_ns) == (found[2], _mtime_ns(found[1])):
            return True
        return self._is_at(first.path, (found[3], found[4]))

    def link(self, name: bytes, key: Key) -> None:
        """A further name of a file that is `linked`."""
        first, position = self._links[key]
        self.encoder.hardlink(name, first.path, position)
        self.report.hardlinks += 1
        if self._catalog is not None:
            self._catalog.entry(b"h", name)

    def remember(self, key: Key, first: FirstName, position: int) -> None:
        """The file (device, inode) was written at `position`; its further names become links to this one."""
        if len(first.path) <= MAX_NAME:
            self._links[key] = first, position

    def file(self, folder: Folder, name: bytes, found: Opened) -> bool:
        """A regular file that is open, or a link if it is in the archive already; closes it in any case.

        Returns:
            False if it was left out.
        """
        _, meta, size, dev, ino, nlink, _, _, _, fd = found
        try:
            if nlink > 1 and self.is_further(found):
                self.link(name, (dev, ino))
                return True
            position = self.encoder.begin_file(name, meta, size)
            if size:
                try:
                    self._copy(fd, folder, name, size, meta)
                except OSError as error:
                    if self._split:
                        self.encoder.abandon_file()
                        self.report.warn(Trouble.UNREADABLE, folder.path_of(name), os_reason(error))
                        return False
                    self._fill_up(folder.path_of(name), size, error)
            self.encoder.end_file()
            if nlink > 1:
                self.remember((dev, ino), first_name(folder, name, size, meta), position)
        finally:
            os.close(fd)
        report = self.report
        report.files += 1
        report.size += size
        report.changed_files += 1
        report.changed_size += size + 16
        if self._catalog is not None:
            self._catalog.file(name, size, _MTIME.unpack_from(meta, _MTIME_OFFSET)[0])
        return True

    def other(self, folder: Folder, name: bytes, found: Scanned | Opened) -> None:
        """A symlink, device, FIFO or socket."""
        mode, meta, target, rdev = found[0], found[1], found[7], found[6]
        kind = mode & FORMAT
        try:
            if kind == S_IFLNK:
                self.encoder.symlink(name, meta, target or b"")
            elif kind in (S_IFBLK, S_IFCHR):
                self.encoder.device(name, meta, os.major(rdev), os.minor(rdev))
            elif kind in (S_IFIFO, S_IFSOCK):
                self.encoder.special(name, meta)
            else:
                self.report.warn(Trouble.UNSTORABLE, folder.path_of(name), f"type {kind:#o} is not known")
                return
        except EncodeError as error:  # an empty target, which some file systems have
            self.report.warn(Trouble.UNSTORABLE, folder.path_of(name), error.why)
            return
        self.report.others += 1
        if self._catalog is not None:
            self._catalog.entry(KIND_OF_MODE[kind].value, name)

    def made(self, name: bytes, meta: bytes, content: bytes) -> None:
        """A file of the root that Fleece made; `meta` with mtime 0."""
        self.encoder.begin_file(name, meta, len(content))
        self._content.write(content)
        self.encoder.end_file()
        if self._catalog is not None:
            self._catalog.file(name, len(content), 0)

    def _copy(self, fd: int, folder: Folder, name: bytes, size: int, meta: bytes) -> None:
        """The content of an open file, `size` bytes whatever became of it meanwhile."""
        report = self.report
        if self._measure is not None:
            self._measure.skip(size)
            report.read += size
            return
        content, behind = self._content, self._behind
        left = size
        ended = False
        while left:
            wanted = min(PIECE, left)
            room = content.reserve(wanted)
            left -= wanted
            got = 0
            while not ended and got < wanted:
                rest = room[got:] if got else room
                count = os.readv(fd, (rest, behind) if not left else (rest,))
                got += count
                ended = not count
            if got < wanted:
                room[got:] = bytes(wanted - got)
            content.commit(wanted)
            report.read += min(got, wanted)
            if left and self._progress is not None:
                self._progress(report)
        if ended:
            report.warn(Trouble.SHRUNK, folder.path_of(name))
        elif got > wanted:
            report.warn(Trouble.GROWN, folder.path_of(name))
        elif size > PIECE and os.fstat(fd).st_mtime_ns != _mtime_ns(meta):
            report.warn(Trouble.CHANGED, folder.path_of(name))

    def _fill_up(self, path: bytes, size: int, error: OSError) -> None:
        """A self-contained archive has the beginning of a file already, and cannot leave it out any more."""
        missing = left = self.encoder.missing
        while left:
            count = min(PIECE, left)
            self._content.reserve(count)[:count] = bytes(count)
            self._content.commit(count)
            left -= count
        why = f"{os_reason(error)} at or behind byte {size - missing} of {size}"
        self.report.warn(Trouble.UNREADABLE_REST, path, why)


class Measuring:
    """A payload sink that keeps nothing, for a run that only counts."""

    def __init__(self) -> None:
        self._position = 0
        self._scratch = memoryview(b"")

    @property
    def position(self) -> int:
        """Bytes of the stream so far."""
        return self._position

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Count `data`."""
        self._position += len(data)

    def reserve(self, size: int) -> memoryview:
        """Room that is thrown away."""
        if len(self._scratch) < size:
            self._scratch = memoryview(bytearray(size))
        return self._scratch[:size]

    def commit(self, size: int) -> None:
        """Count it."""
        self._position += size

    def skip(self, size: int) -> None:
        """Count `size` bytes of content, any number."""
        self._position += size

    def suggest(self) -> None:
        """Nothing is cut."""

    def inject(self, chunks: object) -> None:
        """Count the chunks."""
        for chunk in chunks:  # type: ignore[attr-defined]
            self._position += chunk.size


def first_name(folder: Folder, name: bytes, size: int, meta: bytes) -> FirstName:
    """The name of a file of `size` bytes with these metadata."""
    return FirstName(folder.path_of(name), size, _mtime_ns(meta))


def _mtime_ns(meta: bytes) -> int:
    seconds, nanoseconds = _MTIME.unpack_from(meta, _MTIME_OFFSET)
    return int(seconds) * 10**9 + int(nanoseconds)
