"""The children of a directory with what `stat` shows of them, read in runs: what a file system answers listings from.

Layout: docs/formats.md, "File archives". Nearly all entries are files and directories without attributes; these are
read here with two looks at the bytes, which takes a quarter of what a node of `accessor.py` does. All others become
nodes.
"""

from array import array
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final, Protocol, TypeAlias

from core.buffers import Buffer
from pxar.accessor import Device, Directory, FileNode, Hardlink, Node, Symlink
from pxar.errors import ArchiveError
from pxar.format import (
    ENTRY,
    ENTRY_SIZE,
    FILENAME,
    GOODBYE,
    HEADER,
    HEADER_SIZE,
    MAX_NAME,
    MIN_CHILD_SIZE,
    PAIR_SIZE,
    PAYLOAD,
    PAYLOAD_REF,
    bad,
    name_fault,
    shown,
)
from pxar.goodbye import ROW, ROW_SIZE

#: Children from which on numpy sorts them; below that its import would take longer.
_MANY: Final = 20_000
#: ENTRY (type, size, content), and the item behind it (type, size, two numbers).
_COMMON: Final = Struct("<QQQ8xIIqI4xQQQQ")
_S: Final = 1_000_000_000
#: `mode >> 12` of those that are read the short way.
_FILE: Final = 8
_DIRECTORY: Final = 4
#: What follows the metadata of a directory.
_BEHIND_DIRECTORY: Final = frozenset({FILENAME, GOODBYE})

#: What `stat` shows of an entry, without its name. `end` is 0 for all but directories, `rdev` for all but devices:
#: position, end, mode, uid, gid, size (bytes), mtime (nanoseconds), (major, minor) of a device
Row: TypeAlias = tuple[int, int, int, int, int, int, int, tuple[int, int] | None]


class Windows(Protocol):
    """A stored stream, looked at in large pieces."""

    def window(self, offset: int) -> tuple[Buffer, int, int]:
        """A piece of the stream that holds byte `offset`, the piece's first byte's offset, and its end."""
        ...


def row_of(node: Node, note_link: Callable[[int, int], None] = lambda link, target: None) -> Row:
    """What `stat` shows of `node`; of a hard link the file that it leads to.

    Args:
        node: any.
        note_link: called for a hard link with its own position and that of the file.

    Raises:
        ArchiveError: a hard link leads nowhere.
    """
    if isinstance(node, Hardlink):
        target = node.follow()
        note_link(node.position, target.position)
        node = target
    stat = node.stat
    size, rdev = 0, None
    if isinstance(node, FileNode):
        size = node.size
    elif isinstance(node, Symlink):
        size = len(node.target)
    elif isinstance(node, Device):
        rdev = node.major, node.minor
    end = node.end if isinstance(node, Directory) else 0
    return node.position, end, stat.mode, stat.uid, stat.gid, size, stat.mtime_s * _S + stat.mtime_ns, rdev


class Listing:
    """The children of `directory`, numbered in archive order, which for all known writers is that of their names.

    Raises:
        ArchiveError: the directory has no table.
    """

    def __init__(self, directory: Directory, windows: Windows) -> None:
        self.directory: Final = directory
        self._windows = windows
        self._end, self._rows = directory.table
        self._order: Sequence[int] | None = None

    def __len__(self) -> int:
        """Number of children."""
        return len(self._rows) // ROW_SIZE

    @property
    def memory(self) -> int:
        """Bytes that it takes, about."""
        return 1000 + len(self._rows) + 4 * len(self)

    def start(self, number: int) -> int:
        """Where child `number` begins in the archive; a forged table may say anything."""
        if self._order is None:
            self._order = self._sorted()
        _, offset, _ = ROW.unpack_from(self._rows, self._order[number] * ROW_SIZE)
        return int(self._end - offset)

    def rows(
        self, first: int, count: int, behind: int, note_link: Callable[[int, int], None]
    ) -> tuple[list[tuple[bytes, Row]], int]:
        """Names and rows of up to `count` children from number `first` on, and where the last of them ends.

        It may be fewer, at least one: what cannot be read is not passed over.

        Args:
            first: number of the first child.
            count: at most this many.
            behind: where the child before ends, 0 if that is not known.
            note_link: as `row_of`.

        Raises:
            ArchiveError: child `first` is none that belongs here.
            Exception: what reading raises, if it is about child `first`.
        """
        if self._order is None:
            self._order = self._sorted()
        found: list[tuple[bytes, Row]] = []
        try:
            behind = self._read(self._order[first : first + count], behind, found, note_link)
        except _Stopped as stopped:
            if not found:
                raise stopped.cause from None
            behind = stopped.behind
        return found, behind

    def _read(
        self, slots: Sequence[int], behind: int, found: list[tuple[bytes, Row]], note_link: Callable[[int, int], None]
    ) -> int:
        table, lowest, end = self._rows, self.directory.first, self._end
        where = self._windows.window
        row, header, common, append = ROW.unpack_from, HEADER.unpack_from, _COMMON.unpack_from, found.append
        view: Buffer = b""
        low = high = 0
        try:
            for slot in slots:
                _, offset, length = row(table, slot * ROW_SIZE)
                start = end - offset
                if start < lowest or offset < MIN_CHILD_SIZE or start < behind:
                    raise self._misplaced(start, lowest)
                limit = min(start + length, end)
                if not low <= start < high - HEADER_SIZE:
                    view, low, high = where(start)
                at = start - low
                if start + HEADER_SIZE <= high:
                    kind, length = header(view, at)
                    stop = at + length
                    if (
                        kind == FILENAME
                        and HEADER_SIZE + 1 < length <= HEADER_SIZE + 1 + MAX_NAME
                        and low + stop + _COMMON.size <= high
                    ):
                        name = bytes(view[at + HEADER_SIZE : stop - 1])
                        (
                            entry, entry_size, mode, uid, gid, seconds, nanoseconds, item, item_size, _, size
                        ) = common(view, stop)  # fmt: skip
                        position = low + stop
                        plain = (
                            entry == ENTRY
                            and entry_size == ENTRY_SIZE
                            and nanoseconds < _S
                            and not view[stop - 1]
                            and b"/" not in name
                            and b"\0" not in name
                            and (name[0] != 46 or name_fault(name) is None)
                        )
                        if plain and mode >> 12 == _FILE:
                            if item == PAYLOAD_REF and item_size == PAIR_SIZE:
                                last = position + _COMMON.size
                            elif item == PAYLOAD and item_size >= HEADER_SIZE:
                                size = item_size - HEADER_SIZE
                                last = position + ENTRY_SIZE + item_size
                            else:
                                last = limit + 1
                            if last <= limit:
                                behind = last
                                append((name, (position, 0, mode, uid, gid, size, seconds * _S + nanoseconds, None)))
                                continue
                        elif (
                            plain
                            and mode >> 12 == _DIRECTORY
                            and item in _BEHIND_DIRECTORY
                            and position + ENTRY_SIZE + HEADER_SIZE + ROW_SIZE <= limit
                        ):
                            behind = limit
                            append((name, (position, limit, mode, uid, gid, 0, seconds * _S + nanoseconds, None)))
                            continue
                node = self.directory.child_at(start, limit)
                append((node.name, row_of(node, note_link)))
                behind = node.behind
        except Exception as error:
            raise _Stopped(error, behind) from error
        return behind

    def _misplaced(self, start: int, lowest: int) -> ArchiveError:
        why = "leads out of the directory" if start < lowest or start > self._end else "has two entries that overlap"
        return bad(self.directory.where, self._end, f"the table of {shown(self.directory.name)} {why}")

    def _sorted(self) -> Sequence[int]:
        """Slots of the table in archive order: descending by their distance from the table."""
        count = len(self)
        if count < _MANY:
            offsets = Struct(f"<{3 * count}Q").unpack(self._rows)[1::3]
            return array("I", sorted(range(count), key=offsets.__getitem__, reverse=True))
        import numpy as np

        distances = np.frombuffer(self._rows, dtype="<u8").reshape(-1, 3)[:, 1]
        return array("I", distances.argsort(kind="stable")[::-1].astype(np.uint32).tobytes())


class _Stopped(Exception):  # noqa: N818 - carries what is known across
    def __init__(self, cause: Exception, behind: int) -> None:
        super().__init__()
        self.cause, self.behind = cause, behind
