"""Random access to a file archive: names are found in the tables at the directories' ends.

Layout: docs/formats.md, "File archives". An archive may be forged. Whatever a table says is checked against the range
of its directory, which lies within that of its parent: there are no cycles, and no directory is listed twice.

Nothing changes in here before a read has succeeded: a reader may raise (a chunk that is not at hand, say), and the
caller asks again later.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, TypeAlias, TypeVar

from core.errors import FormatError, NotFoundError, UsageError
from pxar.entries import Head, read_head, read_name
from pxar.format import (
    ENTRY_V1_SIZE,
    GOODBYE,
    GOODBYE_TAIL_MARKER,
    HEADER,
    HEADER_SIZE,
    MIN_CHILD_SIZE,
    PAYLOAD,
    Kind,
    Short,
    bad,
    read_beginning,
    shown,
)
from pxar.goodbye import MAX_EQUAL, ROW, ROW_SIZE, find, hash_name
from pxar.metadata import Metadata, Stat, parse_metadata, parse_stat
from pxar.sinks import ReferenceBytes

#: Bytes that are read for one entry; nearly all are shorter.
_ENTRY_READ: Final = 4096
#: Bytes that are read at once for neighbours of one directory.
_BLOCK: Final = 64 << 10
#: Up to so many bytes of an entry behind which nothing can be read just those are read that it has.
_EXACT: Final = 1024
#: Errors of what stands at one place; all others concern every read.
_UNREADABLE: Final = (FormatError, NotFoundError)
#: Bytes of an entry that a node keeps; longer metadata are read again when they are asked for.
_KEPT: Final = 512

_T = TypeVar("_T")
Node: TypeAlias = "Directory | FileNode | Symlink | Device | Special | Hardlink"


class _Node:
    """What all have: a name and a place. `root.name` is empty."""

    __slots__ = ("_accessor", "_head", "_limit", "_raw", "filename_position", "name", "position")

    def __init__(
        self, accessor: "ArchiveAccessor", name: bytes, filename_position: int, position: int, limit: int, head: Head,
        raw: bytes | None,
    ) -> None:  # fmt: skip
        self._accessor = accessor
        self.name = name
        self.filename_position = filename_position  #: of the FILENAME item in the archive; of the root, its ENTRY
        self.position = position  #: of the ENTRY or HARDLINK item
        self._limit = limit  #: no byte of it lies here or behind
        self._head = head  #: indices count from `position`
        self._raw = raw

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self._head.kind

    @property
    def where(self) -> str:
        """The archive, for messages."""
        return self._accessor.where

    @property
    def id(self) -> int:
        """A number that no other entry of the archive has."""
        return self.position | 1 << 63

    @property
    def behind(self) -> int:
        """Where, in the archive, it ends at the earliest."""
        return self.position + self._head.size


class _Entry(_Node):
    """What has metadata."""

    __slots__ = ()

    @property
    def meta(self) -> bytes:
        """The metadata as they stand in the archive: the ENTRY item and the attributes."""
        size = self._head.meta_size
        if self._raw is not None:
            return self._raw[:size]
        return self._accessor._read(self.position, size)

    @property
    def metadata(self) -> Metadata:
        """The metadata, parsed anew each time."""
        return parse_metadata(self.meta, where=self._accessor.where, base=self.position)[0]

    @property
    def stat(self) -> Stat:
        """The metadata without attributes, parsed anew each time."""
        data = self.meta if self._raw is None else self._raw
        return parse_stat(data, where=self._accessor.where, base=self.position)


class FileNode(_Entry):
    """A regular file."""

    __slots__ = ()

    @property
    def size(self) -> int:
        """Bytes of its content."""
        return self._head.second

    @property
    def payload_position(self) -> int | None:
        """Where its PAYLOAD lies in the payload stream; None if the content is in the archive itself."""
        return None if self._head.first < 0 else self._head.first

    @property
    def behind(self) -> int:
        """See `_Node.behind`; the content counts if it is here."""
        end = self.position + self._head.size
        return end + self._head.second if self._head.first < 0 else end


class Symlink(_Entry):
    """A symbolic link."""

    __slots__ = ()

    @property
    def target(self) -> bytes:
        """Where it leads, as it was stored."""
        return self._head.target


class Device(_Entry):
    """A block or character device."""

    __slots__ = ()

    @property
    def major(self) -> int:
        """The device's major number."""
        return self._head.first

    @property
    def minor(self) -> int:
        """The device's minor number."""
        return self._head.second


class Special(_Entry):
    """A FIFO or a socket."""

    __slots__ = ()


class Hardlink(_Node):
    """A further name of a file that comes before it in the archive."""

    __slots__ = ()

    @property
    def target_path(self) -> bytes:
        """The file's path from the root, as it was stored: nobody has checked where it leads."""
        return self._head.target

    def follow(self) -> FileNode:
        """The file itself, under the name that stands there.

        Raises:
            ArchiveError: there is none.
        """
        accessor, target = self._accessor, self.filename_position - self._head.first
        if target < accessor.root.position + ENTRY_V1_SIZE:
            raise bad(accessor.where, self.position, "a hard link leads out of the archive")
        node = accessor._node(target, self.filename_position, self.filename_position + HEADER_SIZE)
        if not isinstance(node, FileNode):
            raise bad(accessor.where, self.position, "a hard link leads to something that is no file")
        return node


class Directory(_Entry):
    """A directory. Its table is read with the first question, and kept."""

    __slots__ = ("_rows",)

    def __init__(
        self, accessor: "ArchiveAccessor", name: bytes, filename_position: int, position: int, limit: int, head: Head,
        raw: bytes | None,
    ) -> None:  # fmt: skip
        super().__init__(accessor, name, filename_position, position, limit, head, raw)
        self._rows: tuple[int, bytes] | None = None

    @property
    def id(self) -> int:
        """A number that no other entry of the archive has: where it ends."""
        return self._limit

    @property
    def end(self) -> int:
        """Where its table, and with it the directory, ends in the archive."""
        return self._limit

    @property
    def table(self) -> tuple[int, bytes]:
        """Position of the GOODBYE item, and its rows (`goodbye.ROW`) in tree order, without the tail.

        Raises:
            ArchiveError: there is none that fits this directory.
        """
        if self._rows is None:
            self._rows = self._accessor._table(self)
        return self._rows

    def __len__(self) -> int:
        """Number of children."""
        return len(self.table[1]) // ROW_SIZE

    def __bool__(self) -> bool:
        """True, also of an empty directory."""
        return True

    def lookup(self, name: bytes) -> "Node | None":
        """The child of this name; None if there is none.

        Raises:
            ArchiveError: the table leads out of the directory, or to something that is no entry; or more than
                `MAX_EQUAL` names have the hash of this one.
        """
        end, rows = self.table
        slots = find(rows, hash_name(name))
        if len(slots) > MAX_EQUAL:
            raise bad(self.where, end, f"more than {MAX_EQUAL} names have the hash of {shown(name)}")
        for slot in slots:
            start, limit = self._place(end, *ROW.unpack_from(rows, slot * ROW_SIZE))
            node = self._accessor._node(start, limit, end + HEADER_SIZE, name)
            if node is not None:
                return node
        return None

    @property
    def first(self) -> int:
        """Where, in the archive, its first child may begin."""
        return self.position + self._head.size

    def child_at(self, start: int, limit: int) -> "Node":
        """The child whose FILENAME is at `start`; no byte of it lies at `limit` or behind.

        Raises:
            ArchiveError: there is none.
        """
        node = self._accessor._node(start, limit, self.table[0] + HEADER_SIZE)
        assert node is not None
        return node

    def stream(self) -> Iterator["Node"]:
        """The children in archive order, which for all known writers is that of their names; read block by block.

        Raises:
            ArchiveError: as `lookup`, and where children overlap. After this or any other error start anew.
        """
        return self._stream(None)

    def readable(self, lost: Callable[[FormatError | NotFoundError], object]) -> Iterator["Node"]:
        """As `stream`, but a child that cannot be read is passed over, once `lost` was called with the reason.

        Raises:
            ArchiveError: the table cannot be read, or children overlap.
        """
        return self._stream(lost)

    def _stream(self, lost: Callable[[FormatError | NotFoundError], object] | None) -> Iterator["Node"]:
        accessor = self._accessor
        end, rows = self.table
        places = sorted(self._place(end, *row) for row in ROW.iter_unpack(rows))
        stop = end + HEADER_SIZE
        data = b""
        base = known = behind = 0
        for index, (start, limit) in enumerate(places):
            if start < behind:
                raise bad(accessor.where, start, "two entries of one directory overlap")
            try:
                if known < stop and start + _ENTRY_READ > known:
                    data = accessor._read(start, _block(places, index, stop))
                    base, known = start, start + len(data)
                try:
                    node = accessor._parsed(data, start - base, base, limit)
                except Short:
                    node = accessor._node(start, limit, stop)
            except _UNREADABLE as error:
                if lost is None:
                    raise
                base = known = 0
                try:
                    # What is damaged may be one of its neighbours, or its content.
                    node = accessor._node(start, limit, stop, exact=True)
                except _UNREADABLE:
                    lost(error)
                    continue
            assert node is not None
            behind = node.behind
            yield node

    def children(self) -> list["Node"]:
        """The children, sorted by the bytes of their names.

        Raises:
            ArchiveError: as `stream`, and where two have one name.
        """
        nodes = sorted(self.stream(), key=_name)
        before = None
        for node in nodes:
            if node.name == before:
                raise bad(self._accessor.where, node.filename_position, f"a second entry named {shown(node.name)}")
            before = node.name
        return nodes

    def names(self) -> list[bytes]:
        """The children's names, sorted by their bytes.

        Raises:
            ArchiveError: as `children`.
        """
        return [node.name for node in self.children()]

    @property
    def behind(self) -> int:
        """See `_Node.behind`; the children count."""
        return max(self._limit, self.position + self._head.size + HEADER_SIZE + ROW_SIZE)

    def _place(self, end: int, _: int, offset: int, size: int) -> tuple[int, int]:
        """Where a child begins, and what it cannot reach beyond; `end` is where the table begins."""
        start = end - offset
        if start < self.position + self._head.size or offset < MIN_CHILD_SIZE:
            raise bad(self._accessor.where, end, f"the table of {shown(self.name)} leads out of the directory")
        # Of a file in a split archive the size may count the content, which lies elsewhere.
        return start, min(start + size, end)


def _name(node: Node) -> bytes:
    return node.name


def _block(places: list[tuple[int, int]], index: int, stop: int) -> int:
    """How many bytes to read at `places[index]` so that the next ones close to it come along."""
    start = last = places[index][0]
    for near, _ in islice(places, index, None):
        if near - last > _ENTRY_READ or near - start > _BLOCK:
            break
        last = near
    return min(last + _ENTRY_READ, stop) - start


_CLASSES: Final[dict[Kind, type["Directory | FileNode | Symlink | Device | Special | Hardlink"]]] = {
    Kind.DIRECTORY: Directory,
    Kind.FILE: FileNode,
    Kind.SYMLINK: Symlink,
    Kind.HARDLINK: Hardlink,
    Kind.BLOCK: Device,
    Kind.CHARACTER: Device,
    Kind.FIFO: Special,
    Kind.SOCKET: Special,
}


class ArchiveAccessor:
    """An archive, and for the contents of a split one its payload stream; `where` names it in errors.

    Raises:
        ArchiveError: no archive begins and ends like this.
    """

    def __init__(
        self, archive: ReferenceBytes, payload: ReferenceBytes | None = None, *, where: str = "archive"
    ) -> None:
        self.where = where
        self._archive = archive
        self._payload = payload
        size = archive.size
        if size < ENTRY_V1_SIZE + HEADER_SIZE + ROW_SIZE:
            raise bad(where, size, "an archive has more bytes than that")
        beginning = self._growing(0, size, lambda data: read_beginning(data, where=where))
        self.version = beginning.version
        self.prelude = beginning.prelude  #: what the writer noted before the root; None without
        start = beginning.end
        head = self._growing(start, size, lambda data: read_head(data, 0, where=where, base=start))
        if head.kind is not Kind.DIRECTORY:
            raise bad(where, start, "the root is no directory")
        self.root = Directory(self, b"", start, start, size, head, None)

    def lookup(self, path: bytes) -> "Node | None":
        """What lies at `path`, from the root; a leading `/` and `.` in it change nothing. None if there is nothing.

        Raises:
            UsageError: `..` in the path.
            ArchiveError: as `Directory.lookup`.
        """
        node: Node | None = self.root
        for name in path.split(b"/"):
            if name == b"..":
                raise UsageError("look up", shown(path), "'..' leads nowhere in an archive")
            if name in (b"", b"."):
                continue
            if not isinstance(node, Directory):
                return None
            node = node.lookup(name)
        return node

    def entry_at(self, position: int) -> "FileNode | Symlink | Device | Special":
        """The entry, without its name, that was met before and had this `position`.

        Raises:
            ArchiveError: there is none, or it is a directory or a hard link.
        """
        size = self._archive.size
        node = self._growing(position, size, lambda data: self._made(data, 0, position, b"", position, size))
        if isinstance(node, Directory | Hardlink):
            raise bad(self.where, position, "something else lies where an entry was")
        return node

    def directory_at(self, position: int, end: int) -> Directory:
        """The directory, without its name, that was met before and had this `position` and `end`.

        Raises:
            ArchiveError: there is none.
        """
        node = self._growing(position, end, lambda data: self._made(data, 0, position, b"", position, end))
        if not isinstance(node, Directory):
            raise bad(self.where, position, "something else lies where a directory was")
        return node

    def open_content(self, node: Node) -> tuple[ReferenceBytes, int, int]:
        """Where the content of a file, or of what a hard link leads to, lies: stream, offset, size.

        Raises:
            ArchiveError: not within the stream, or something else lies there.
            UsageError: it is no file, or the payload stream was not given.
        """
        if isinstance(node, Hardlink):
            node = node.follow()
        if not isinstance(node, FileNode):
            raise UsageError("read", shown(node.name), "it is no file")
        size, start = node.size, node.payload_position
        if start is None:
            return self._archive, node.position + node._head.size, size
        payload = self._payload
        if payload is None:
            raise UsageError("read", shown(node.name), f"the contents of {self.where} lie in another stream")
        if start + HEADER_SIZE + size > payload.size:
            raise bad(self.where, start, f"{size} bytes of content, the payload stream ends at {payload.size}")
        header = payload.read(start, HEADER_SIZE)
        if len(header) != HEADER_SIZE or HEADER.unpack(header) != (PAYLOAD, HEADER_SIZE + size):
            raise bad(self.where, start, f"no PAYLOAD with {size} bytes in the payload stream for {shown(node.name)}")
        return payload, start + HEADER_SIZE, size

    def _table(self, directory: Directory) -> tuple[int, bytes]:
        first, end = directory.position + directory._head.size, directory.end
        if end - first < HEADER_SIZE + ROW_SIZE:
            raise bad(self.where, end, f"no room for the table of {shown(directory.name)}")
        # One read does for most: 170 children.
        length = min(_ENTRY_READ, end - first)
        data = self._read(end - length, length)
        marker, offset, size = ROW.unpack_from(data, length - ROW_SIZE)
        start = end - size
        if marker != GOODBYE_TAIL_MARKER or start < first or size < HEADER_SIZE + ROW_SIZE:
            raise bad(self.where, end, f"no table at the end of {shown(directory.name)}")
        # The root's leads to the first byte of the archive, whatever stands there.
        if start - offset != directory.position and (directory is not self.root or start != offset):
            raise bad(self.where, end, f"the table there is not that of {shown(directory.name)}")
        count, rest = divmod(size - HEADER_SIZE, ROW_SIZE)
        if rest or (count - 1) * MIN_CHILD_SIZE > start - first:
            raise bad(self.where, start, f"a table of {size} bytes for {start - first} bytes of entries")
        data = self._read(start, size) if size > length else data[length - size :]
        if HEADER.unpack_from(data) != (GOODBYE, size):
            raise bad(self.where, start, "no GOODBYE where a table must begin")
        return start, data[HEADER_SIZE : size - ROW_SIZE]

    def _node(
        self, start: int, limit: int, stop: int, wanted: bytes | None = None, *, exact: bool = False
    ) -> "Node | None":
        """The entry whose FILENAME is at `start`; None if its name is not the one wanted."""
        return self._growing(start, stop, lambda data: self._parsed(data, 0, start, limit, wanted), exact=exact)

    def _parsed(self, data: bytes, offset: int, base: int, limit: int, wanted: bytes | None = None) -> "Node | None":
        """As `_node`, for the FILENAME at `data[offset]`; `base` is the position of `data`."""
        name, at = read_name(data, offset, where=self.where, base=base)
        if wanted is not None and name != wanted:
            return None
        return self._made(data, at, base, name, base + offset, limit)

    def _made(self, data: bytes, at: int, base: int, name: bytes, filename_position: int, limit: int) -> "Node":
        """The entry whose ENTRY or HARDLINK is at `data[at]`."""
        head = read_head(data, at, where=self.where, base=base)
        raw = data[at : at + head.size] if head.size <= _KEPT else None
        node = _CLASSES[head.kind](self, name, filename_position, base + at, limit, head, raw)
        if node.behind > limit:
            raise bad(self.where, filename_position, f"{shown(name)} is larger than its directory's table says")
        return node

    def _growing(self, start: int, stop: int, parse: Callable[[bytes], _T], *, exact: bool = False) -> _T:
        """What `parse` makes of as many bytes from `start` on as it needs; none at `stop` or behind.

        `exact`: if these are few, no others are read.
        """
        length = min(HEADER_SIZE if exact else _ENTRY_READ, stop - start)
        while True:
            data = self._read(start, length)
            try:
                return parse(data)
            except Short as short:
                if length >= stop - start:
                    raise bad(self.where, start, "an entry is cut off") from None
                length = min(short.needed if exact and short.needed <= _EXACT else 2 * length, stop - start)

    def _read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self._archive.size:
            raise bad(self.where, offset, f"{length} bytes, the archive ends at {self._archive.size}")
        data = self._archive.read(offset, length)
        if len(data) != length:
            raise bad(self.where, offset, f"{length} bytes should lie here, {len(data)} came")
        # Slices of bytes cost half of those of a view.
        return bytes(data)
