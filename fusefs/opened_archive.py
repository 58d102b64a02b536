"""A file archive that is open: questions about its folders and entries, answered from its chunks.

Everything but `open_archive` and `OpenArchive.settle` is synchronous, and may raise `NeedChunk`.
"""

from collections import OrderedDict
from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple, TypeVar

import trio

from core.errors import FleeceError, FormatError
from core.limits import in_cpu_thread
from fusefs.archive_bytes import ChunkBytes, account, settle
from fusefs.posix_acl import ACCESS, DEFAULT, access_acl, default_acl
from pxar.accessor import ArchiveAccessor, Device, Directory, FileNode, Special, Symlink
from pxar.format import FILENAME, HARDLINK, HEADER, HEADER_SIZE, MAX_NAME, U64
from pxar.listing import Listing, Row, row_of
from repository.archive import ArchiveReader

T = TypeVar("T")

#: Bytes of the largest archive (of a split one, its metadata): 64 TiB. Places in it are parts of inode numbers.
MAX_ARCHIVE: Final = 1 << 46
#: Bytes of folders' tables that are kept for each archive; one folder may be larger.
KEPT_TABLES: Final = 8 << 20
#: Archives that keep tables and chunks beside the cache: those used last.
KEPT_ARCHIVES: Final = 4
#: Files with several names that are counted; of more than these each archive shows the names seen so far.
MAX_LINKED: Final = 200_000
#: Bytes of a self-contained archive up to which it is searched for hard links.
MAX_SEARCHED: Final = 32 << 20
#: The same for the metadata of a split archive.
MAX_SEARCHED_SPLIT: Final = 1 << 30

_CAPABILITY: Final = b"security.capability"
_LINK: Final = Struct("<QQQ")  #: HARDLINK: type, size, distance back to the FILENAME of its file
_HARDLINK: Final = U64.pack(HARDLINK)
_FILENAME: Final = U64.pack(FILENAME)
#: Bytes of the largest FILENAME, of the largest HARDLINK, and what must be seen together.
_BEFORE: Final = HEADER_SIZE + MAX_NAME + 1
_BEHIND: Final = _LINK.size + MAX_NAME + 1
_OVERLAP: Final = _BEFORE + _BEHIND


class Spot(NamedTuple):
    """Where an entry lies in its archive; for the root both are 0."""

    position: int  #: of its ENTRY
    end: int  #: of a directory: where its table ends; 0 for all others

    @property
    def is_directory(self) -> bool:
        """Whether it can be listed."""
        return bool(self.end) or not self.position


ROOT: Final = Spot(0, 0)


class Links:
    """How many further names the files of an archive have."""

    def __init__(self) -> None:
        self.complete = False  #: all were noted
        self.counted: Final = trio.Event()  #: set when the search for them is over, however it ended
        self._further: dict[int, int] = {}
        self._seen: set[int] = set()

    def names(self, position: int) -> int:
        """Names of the file whose ENTRY is at `position`, as far as they are known."""
        return 1 + self._further.get(position, 0)

    def note(self, link: int, position: int) -> None:
        """A hard link at `link` leads to the file at `position`; more than `MAX_LINKED` are not noted."""
        if not self.complete and link not in self._seen and len(self._seen) < MAX_LINKED:
            self._seen.add(link)
            self._further[position] = self._further.get(position, 0) + 1

    @property
    def full(self) -> bool:
        """True if there are too many to be counted."""
        return len(self._seen) >= MAX_LINKED


class OpenArchive:
    """An archive of an open snapshot; made by `open_archive`."""

    def __init__(self, archive: ChunkBytes, payload: ChunkBytes | None, accessor: ArchiveAccessor) -> None:
        self.archive, self.payload, self._accessor = archive, payload, accessor
        self._streams: Final = (archive,) if payload is None else (archive, payload)
        self._listings: OrderedDict[Spot, Listing] = OrderedDict()
        self._memory = 0

    @property
    def csums(self) -> tuple[bytes, ...]:
        """Checksums of the indexes: archives with the same have the same content."""
        return tuple(stream.reader.archive.entry.csum for stream in self._streams)

    @property
    def memory(self) -> int:
        """Bytes that the indexes take."""
        return sum(len(stream.reader.archive.index.digests) for stream in self._streams)

    async def settle(self, question: Callable[["OpenArchive"], T]) -> T:
        """The answer to `question`; chunks that it needs are fetched.

        Raises:
            FleeceError: a chunk cannot be read, or the archive is not sound where it was looked at.
        """
        return await settle(lambda: question(self), *self._streams)

    def drop(self) -> None:
        """Keep neither tables nor chunks."""
        self._listings.clear()
        self._memory = 0
        for stream in self._streams:
            stream.drop()

    def listing(self, spot: Spot) -> Listing:
        """The directory at `spot`."""
        listing = self._listings.get(spot)
        if listing is not None:
            self._listings.move_to_end(spot)
            return listing
        listing = Listing(self._directory(spot), self.archive)
        self._listings[spot] = listing
        self._memory += listing.memory
        while self._memory > KEPT_TABLES and len(self._listings) > 1:
            self._memory -= self._listings.popitem(last=False)[1].memory
        return listing

    def child(self, spot: Spot, name: bytes, links: Links) -> Row | None:
        """The entry called `name` in the directory at `spot`; None if there is none."""
        node = self.listing(spot).directory.lookup(name)
        return None if node is None else row_of(node, links.note)

    def row(self, spot: Spot) -> Row:
        """What `stat` shows of the entry at `spot`."""
        return row_of(self._node(spot))

    def target(self, spot: Spot) -> bytes | None:
        """Where the symlink at `spot` leads; None if it is something else."""
        node = self._node(spot)
        return node.target if isinstance(node, Symlink) else None

    def attributes(self, spot: Spot) -> dict[bytes, bytes]:
        """The extended attributes of the entry at `spot`."""
        metadata = self._node(spot).metadata
        found = dict(metadata.xattrs)
        if metadata.fcaps is not None:
            found[_CAPABILITY] = metadata.fcaps
        access = access_acl(metadata.acl, metadata.stat.mode)
        if access is not None:
            found[ACCESS] = access
        default = default_acl(metadata.acl)
        if default is not None and spot.is_directory:
            found[DEFAULT] = default
        return found

    def content(self, spot: Spot) -> tuple[ArchiveReader, int, int] | None:
        """Where the content of the file at `spot` lies: reader, offset, size; None if it is no file.

        In a split archive it is made sure that the payload stream has it there.
        """
        node = self._node(spot)
        if not isinstance(node, FileNode):
            return None
        stream, offset, size = self._accessor.open_content(node)
        assert isinstance(stream, ChunkBytes)
        return stream.reader, offset, size

    async def count_links(self, links: Links) -> None:
        """Search the whole archive for hard links, if it is not too large, and note them.

        One that cannot be read to the end is left as it is: what is missing comes to light where it is looked at.
        """
        limit = MAX_SEARCHED if self.payload is None else MAX_SEARCHED_SPLIT
        reader = self.archive.reader
        base, data, looked_at = 0, b"", 0
        try:
            if self.archive.size > limit:
                return
            for number in range(reader.archive.index.count):
                base += max(0, len(data) - _OVERLAP)
                data = data[-_OVERLAP:]
                data += await reader.chunk(number)
                account(len(data))
                found, candidates = await in_cpu_thread(_find_links, data, base)
                looked_at += candidates
                for link in found:  # what is close to the end comes again with the next chunk, and does no harm
                    links.note(*link)
                if links.full or looked_at > 2 * MAX_LINKED:
                    return
            links.complete = True
        except FleeceError:
            return
        finally:
            links.counted.set()

    def _directory(self, spot: Spot) -> Directory:
        return self._accessor.root if spot == ROOT else self._accessor.directory_at(spot.position, spot.end)

    def _node(self, spot: Spot) -> "Directory | FileNode | Symlink | Device | Special":
        return self._directory(spot) if spot.is_directory else self._accessor.entry_at(spot.position)


class RecentArchives:
    """The open archives that were used last: only these keep tables and chunks beside the cache."""

    def __init__(self) -> None:
        self._archives: OrderedDict[OpenArchive, None] = OrderedDict()
        self._last: OpenArchive | None = None

    def use(self, archive: OpenArchive) -> None:
        """`archive` is used now."""
        if archive is self._last:
            return
        self._last = archive
        self._archives[archive] = None
        self._archives.move_to_end(archive)
        if len(self._archives) > KEPT_ARCHIVES:
            self._archives.popitem(last=False)[0].drop()


async def open_archive(archive: ArchiveReader, payload: ArchiveReader | None) -> OpenArchive:
    """The file archive in these streams.

    Raises:
        FleeceError: it cannot be read, or no file archive begins and ends like this.
    """
    if archive.size >= MAX_ARCHIVE:
        raise FormatError("read archive", archive.archive.where, f"{archive.size} bytes, {MAX_ARCHIVE} are the limit")
    first, second = ChunkBytes(archive), None if payload is None else ChunkBytes(payload)
    accessor = await settle(lambda: ArchiveAccessor(first, second, where=archive.archive.where), first)
    return OpenArchive(first, second, accessor)


def _find_links(data: bytes, base: int) -> tuple[list[tuple[int, int]], int]:
    """Positions of the hard links in `data`, each with that of its file; and how often it looked closely."""
    found = []
    looked_at = 0
    at = data.find(_HARDLINK)
    while at >= 0 and looked_at <= 2 * MAX_LINKED:
        looked_at += 1
        if at + _LINK.size <= len(data):
            _, size, distance = _LINK.unpack_from(data, at)
            begin = _name_before(data, at)
            if begin is not None and _LINK.size + 1 < size <= _BEHIND and at + size <= len(data):
                # Its file's ENTRY lies behind the name, which the path ends with.
                name = data[at + _LINK.size : at + size - 1].rpartition(b"/")[2]
                found.append((base + at, base + begin - distance + HEADER_SIZE + len(name) + 1))
        at = data.find(_HARDLINK, at + 8)
    return found, looked_at


def _name_before(data: bytes, end: int) -> int | None:
    """Index of the FILENAME that ends at `end`."""
    lowest = max(0, end - _BEFORE)
    at = data.rfind(_FILENAME, lowest, end)
    for _ in range(2):  # a name may hold what looks like one
        if at < 0:
            return None
        if at + HEADER_SIZE <= end and at + HEADER.unpack_from(data, at)[1] == end:
            return at
        at = data.rfind(_FILENAME, lowest, at + 7)
    return None
