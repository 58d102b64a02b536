"""The archive of the previous backup, as change detection looks at it: its files, and where their payloads lie.

Only the metadata archive is read, and the index of the payload stream. Folders of both trees are gone through in the
same order, so what comes next in the new one is usually the next entry of the old one: then one comparison of bytes,
within `Reference.data`, tells that a file is unchanged. Anything else is found by its name.
"""

from bisect import bisect_right
from struct import Struct
from typing import Final, NamedTuple

from pxar.accessor import ArchiveAccessor, Directory, FileNode, Hardlink
from pxar.format import HEADER_SIZE
from pxar.metadata import Metadata, parse_metadata
from pxar.sinks import ChunkTable, ReferenceBytes

#: Bytes of the old archive at hand. A folder of fifteen hundred plain files fits.
WINDOW: Final = 256 << 10
_TYPE: Final = 0o170000
_DISTANCE: Final = Struct("<8xQ8x")  #: of a table's row: from the table back to the child


class OldFile(NamedTuple):
    """A regular file of the previous backup."""

    metadata: Metadata
    offset: int  #: of its PAYLOAD header in the payload stream
    size: int  #: of its content


class Reference:
    """The metadata archive of the previous backup, and the index of its payload stream.

    Neither is trusted: what leads out of the archive raises `ArchiveError`, and what a file's metadata and size say
    must be what the file system says. Whether a PAYLOAD stands where they say is not read.
    """

    def __init__(self, archive: ReferenceBytes, chunks: ChunkTable, *, where: str = "previous archive") -> None:
        """`where` is what errors call the archive.

        Raises:
            ArchiveError: it is no archive.
            FleeceError: what reading it raises.
        """
        self.chunks: Final = chunks
        self.where: Final = where
        self._archive = archive
        self._root = ArchiveAccessor(archive, where=where).root
        self.root()
        #: The bytes at hand, and the position of the first.
        self.data = b""
        self.base = 0

    def root(self) -> "OldFolder":
        """The root, to be gone through from its begin."""
        return OldFolder(self, self._root)

    def load(self, position: int) -> None:
        """Have what stands from `position` on at hand."""
        end = self.base + len(self.data)
        if position < self.base or (position + WINDOW // 4 > end and end < self._archive.size):
            self.data = bytes(self._archive.read(position, WINDOW))
            self.base = position


class OldFolder:
    """A folder of the previous backup, gone through front to back.

    Entry `next` is the one that is expected now; `positions` are those of all entries, in the order of the archive.
    """

    __slots__ = ("_directory", "next", "positions", "reference")

    def __init__(self, reference: Reference, directory: Directory) -> None:
        self.reference: Final = reference
        self._directory = directory
        table, rows = directory.table
        start = directory.position
        positions = sorted(table - distance for (distance,) in _DISTANCE.iter_unpack(rows))
        #: A row that leads elsewhere hides the whole folder from the quick comparison; `Directory` checks by itself.
        self.positions: Final = positions if positions and start < positions[0] and positions[-1] < table else []
        self.next = 0

    def folder(self, name: bytes) -> "OldFolder | None":
        """The folder `name` in it, if there was one."""
        node = self._directory.lookup(name)
        if not isinstance(node, Directory):
            return None
        self._went_by(node.filename_position)
        return OldFolder(self.reference, node)

    def file(self, name: bytes) -> OldFile | None:
        """The regular file `name` in it, if there was one, or the one that `name` was another name of.

        None also if its payload would lie behind the end of the payload stream.
        """
        node = self._directory.lookup(name)
        if node is None:
            return None
        self._went_by(node.filename_position)
        if isinstance(node, Hardlink):
            node = node.follow()
        if not isinstance(node, FileNode) or node.payload_position is None:
            return None
        if node.payload_position + HEADER_SIZE + node.size > self.reference.chunks.size:
            return None
        return OldFile(node.metadata, node.payload_position, node.size)

    def _went_by(self, position: int) -> None:
        self.next = bisect_right(self.positions, position)


def unchanged(old: OldFile, meta: bytes, size: int, *, loose: bool) -> bool:
    """Whether a file with the encoded metadata `meta` and `size` bytes has the content that `old` has.

    As PBS decides: type and permissions, flags, owner, modification time, ACLs, capabilities, project, the names of the
    extended attributes, and the size. `loose`: type, modification time and size only, so that a change of owner or
    permissions reads nothing.
    """
    if size != old.size:
        return False
    new, before = parse_metadata(meta)[0], old.metadata
    if loose:
        left, right = new.stat, before.stat
        return (left.mode & _TYPE, left.mtime_s, left.mtime_ns) == (right.mode & _TYPE, right.mtime_s, right.mtime_ns)
    return (
        new.stat == before.stat
        and [name for name, _ in new.xattrs] == [name for name, _ in before.xattrs]
        and new.acl == before.acl
        and new.fcaps == before.fcaps
        and new.projid == before.projid
    )
