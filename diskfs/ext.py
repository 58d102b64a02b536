"""ext2, ext3 and ext4, by the structures of dissect.extfs.

Directories, extents and block lists are read here, inodes in `ext_inodes.py`: the library (3.15) drops the last inode
of a file system, puts extents that were allocated but never written where holes before them were not counted, and
follows extents that lead to themselves. What the journal holds and was not written to its place yet is read from there
(`ext_journal.py`), as a disk is backed up while its file system is mounted.
"""

import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from struct import Struct, pack, unpack_from
from typing import Final

from diskfs.blocks import Blocks
from diskfs.entries import Entry, Id, Run
from diskfs.errors import DiskFsError, NotReadError
from diskfs.ext_inodes import Inode, Super, value_of
from diskfs.ext_journal import has_fast_commits, with_journal
from diskfs.filesystem import MAX_DIRECTORY, UNWRITTEN, RunList, content

_ROOT: Final = 2
_EXTENTS: Final = 0x80000
_INLINE: Final = 0x10000000
_ENCRYPTED: Final = 0x800
_MAX_TARGET: Final = 4096
_EXTENT_HEADER: Final = Struct("<HHHHI")  # magic, entries, room, depth, generation
_EXTENT: Final = Struct("<IHHI")  # first block, length, place: high, low
_INDEX: Final = Struct("<IIHH")  # first block, place: low, high
_EXTENT_MAGIC: Final = 0xF30A
_MAX_DEPTH: Final = 5
#: An extent longer than this was never written.
_WRITTEN: Final = 0x8000
_DIRENT: Final = Struct("<IHBB")  # inode, length, length of the name, type
_DIRENT_OLD: Final = Struct("<IHH")


class ExtFileSystem:
    """See `filesystem.FileSystem`."""

    def __init__(self, blocks: Blocks) -> None:
        self.notes: Sequence[str] = ()
        self._super = Super(blocks)
        self._fast_commits = False
        if self._super.needs_recovery:
            size = self._super.block_size
            extents = self._journal_extents(blocks)
            self._fast_commits = has_fast_commits(blocks, size, extents)
            blocks = with_journal(blocks, size, extents)
            self._super = Super(blocks)
        self._blocks = blocks
        self.notes = tuple(self._notes(blocks))
        self.kind: Final = self._super.kind
        self.label: Final[str] = self._super.label
        self.root: Final[Id] = (_ROOT, 0)
        self._size: int = self._super.block_size
        self._inode = lru_cache(4096)(self._super.inode)

    def _notes(self, blocks: Blocks) -> Iterator[str]:
        if self._super.has_errors:
            yield "the guest found errors in it: what is damaged may be missing or wrong"
        if self._super.was_in_use and not self._super.has_journal:
            yield f"it was in use, and has no journal: {UNWRITTEN}"
        if self._fast_commits:
            yield f"the newest changes are in its journal as fast commits, which are not read: {UNWRITTEN}"

    def entry(self, id: Id) -> Entry:
        """See `FileSystem.entry`."""
        found = self._inode(id[0])
        kind = stat.S_IFMT(found.mode)
        size, target, rdev = 0, None, None
        if kind == stat.S_IFREG:
            size = found.size
        elif kind == stat.S_IFLNK:
            target = self._target(found)
            size = len(target)
        elif kind in (stat.S_IFBLK, stat.S_IFCHR):
            rdev = _device(found.block)
        return Entry(
            id, found.mode, found.uid, found.gid, size, found.mtime_ns, found.links, rdev, target,
            bool(found.attributes_at or found.attributes),
        )  # fmt: skip

    def names(self, id: Id) -> Iterator[tuple[bytes, Id]]:
        """See `FileSystem.names`."""
        found = self._inode(id[0])
        if stat.S_IFMT(found.mode) != stat.S_IFDIR:
            raise DiskFsError("list", f"inode {id[0]}", "it is no directory")
        if found.flags & _ENCRYPTED:
            raise DiskFsError("list", f"inode {id[0]}", "its names are encrypted by the guest")
        if found.flags & _INLINE:
            data = self._inline(found)
            yield from self._entries(data[4:60])
            yield from self._entries(data[60:])
            return
        if found.size > MAX_DIRECTORY:
            raise DiskFsError("list", f"inode {id[0]}", f"a directory of {found.size} bytes")
        for block, position in self._mapped(found):
            if position is not None:
                yield from self._entries(self._blocks.exactly(position, self._size), f"inode {id[0]}, block {block}")

    def runs(self, id: Id) -> list[Run] | None:
        """See `FileSystem.runs`."""
        found = self._inode(id[0])
        if found.flags & _ENCRYPTED:
            raise DiskFsError("read", f"inode {id[0]}", "it is encrypted by the guest")
        if found.flags & _INLINE:
            return None
        runs = RunList(self._blocks, found.size)
        for offset, length, position in self._extents(found):
            if position is not None:
                runs.add(offset, length, position)
        return runs.runs

    def read(self, id: Id, offset: int, length: int) -> bytes:
        """See `FileSystem.read`."""
        found = self._inode(id[0])
        return self._inline(found)[: found.size][offset : offset + length]

    def xattrs(self, id: Id) -> Iterator[tuple[bytes, bytes]]:
        """See `FileSystem.xattrs`."""
        found = self._inode(id[0])
        for one in self._super.attributes(found):
            value = value_of(one, self._inode, self._whole)
            if one.name.startswith(b"system.posix_acl_"):
                yield one.name, _acl(value)
            elif one.name != b"system.data":
                yield one.name, value

    def _target(self, found: Inode) -> bytes:
        size = found.size
        if size > _MAX_TARGET:
            raise DiskFsError("read", f"inode {found.number}", f"a symlink of {size} bytes")
        if found.flags & _ENCRYPTED:
            raise DiskFsError("read", f"inode {found.number}", "it is encrypted by the guest")
        if found.flags & _INLINE:
            return self._inline(found)[:size]
        # One that fits in has no block of its own, or only that of its attributes.
        if size < 60 and not found.flags & _EXTENTS:
            return found.block[:size]
        return self._whole(found, size)

    def _whole(self, found: Inode, size: int) -> bytes:
        """The first `size` bytes of something small."""
        if found.flags & _INLINE:
            return self._inline(found)[:size]
        return b"".join(content(self._blocks, self._filled(found), size))

    def _inline(self, found: Inode) -> bytes:
        """Content that lies in the inode: the first 60 bytes in place of its extents, the rest among its attributes."""
        data = found.block
        for one in self._super.attributes(found):
            if one.name == b"system.data":
                data += one.value
        return data

    def _mapped(self, found: Inode) -> Iterator[tuple[int, int | None]]:
        """Number and position of each block of a directory."""
        count = -(-found.size // self._size)
        for offset, length, position in self._extents(found):
            first = offset // self._size
            for number in range(min(length // self._size, count - first)):
                yield first + number, None if position is None else position + number * self._size

    def _filled(self, found: Inode) -> Iterator[tuple[int, int, int | None]]:
        end = 0
        for offset, length, position in self._extents(found):
            if offset > end:
                yield end, offset - end, None
            yield offset, length, position
            end = offset + length

    def _extents(self, found: Inode) -> Iterator[tuple[int, int, int | None]]:
        """Offset, length and position of what is allocated, in order; position None: never written."""
        if found.flags & _EXTENTS:
            yield from self._tree(found.block, None)
        else:
            yield from self._listed(found)

    def _journal_extents(self, blocks: Blocks) -> list[tuple[int, int, int]]:
        self._blocks, self._size = blocks, self._super.block_size
        if not self._super.journal:
            raise NotReadError("read", "journal", "its journal, which has the newest changes, lies on another disk")
        found = self._super.inode(self._super.journal)
        return [(offset, length, position) for offset, length, position in self._extents(found) if position is not None]

    def _tree(self, node: bytes, above: int | None) -> Iterator[tuple[int, int, int | None]]:
        magic, count, _, depth, _ = _EXTENT_HEADER.unpack_from(node)
        if magic != _EXTENT_MAGIC or depth > _MAX_DEPTH or (above is not None and depth != above - 1):
            raise DiskFsError("read", "extents", "a node of the tree is damaged")
        if (count + 1) * _EXTENT.size > len(node):
            raise DiskFsError("read", "extents", f"a node with {count} entries")
        size = self._size
        for at in range(_EXTENT_HEADER.size, (count + 1) * _EXTENT.size, _EXTENT.size):
            if depth:
                _, low, high, _ = _INDEX.unpack_from(node, at)
                yield from self._tree(self._blocks.exactly((low | high << 32) * size, size), depth)
                continue
            first, length, high, low = _EXTENT.unpack_from(node, at)
            if length > _WRITTEN:
                yield first * size, (length - _WRITTEN) * size, None
            else:
                yield first * size, length * size, (low | high << 32) * size

    def _listed(self, found: Inode) -> Iterator[tuple[int, int, int | None]]:
        """The older form: twelve blocks, then blocks with the numbers of blocks."""
        size = self._size
        count = -(-found.size // size)
        start = length = place = 0
        for number, block in self._numbers(found, count):
            if length and block == place + length and number == start + length:
                length += 1
                continue
            if length:
                yield start * size, length * size, place * size
            start, length, place = number, 1, block
        if length:
            yield start * size, length * size, place * size

    def _numbers(self, found: Inode, count: int) -> Iterator[tuple[int, int]]:
        """Number in the file and on the volume of each block that there is."""
        blocks = unpack_from("<15I", found.block)
        for number, block in enumerate(blocks[:12]):
            if number < count and block:
                yield number, block
        first = 12
        for level, block in enumerate(blocks[12:], 1):
            if first >= count:
                return
            yield from self._indirect(block, level, first, count)
            first += (self._size // 4) ** level

    def _indirect(self, block: int, level: int, first: int, count: int) -> Iterator[tuple[int, int]]:
        if not block or first >= count:
            return
        width = self._size // 4
        step = width ** (level - 1)
        data = self._blocks.exactly(block * self._size, self._size)
        for slot, below in enumerate(unpack_from(f"<{width}I", data)):
            number = first + slot * step
            if number >= count:
                return
            if below and level == 1:
                yield number, below
            elif below:
                yield from self._indirect(below, level - 1, number, count)

    def _entries(self, data: bytes, where: str = "directory") -> Iterator[tuple[bytes, Id]]:
        """The entries in one block of a directory."""
        at, old = 0, not self._super.has_types
        inodes = self._super.inodes
        while at + 8 <= len(data):
            if old:
                inode, length, name_length = _DIRENT_OLD.unpack_from(data, at)
            else:
                inode, length, name_length, _ = _DIRENT.unpack_from(data, at)
            if length >= 0xFFFC and len(data) == 1 << 16:
                length = len(data) - at  # 64 KiB do not fit into 16 bits
            if length < 8 or at + length > len(data) or name_length > length - 8:
                raise DiskFsError("list", where, "an entry is damaged")
            if inode > inodes:
                raise DiskFsError("list", where, f"an entry of inode {inode}, there are {inodes}")
            if inode and name_length:
                yield data[at + 8 : at + 8 + name_length], (inode, 0)
            at += length


def _acl(value: bytes) -> bytes:
    """An ACL as ext stores it, without numbers where nobody is named, as the kernel hands it out."""
    found, at = pack("<I", 2), 4
    while at + 4 <= len(value):
        tag, permissions = unpack_from("<HH", value, at)
        at += 4
        number = 0xFFFFFFFF
        if tag in (0x02, 0x08):  # a user, a group
            (number,) = unpack_from("<I", value, at)
            at += 4
        found += pack("<HHI", tag, permissions, number)
    return found


def _device(data: bytes) -> tuple[int, int]:
    old, new = unpack_from("<II", data)
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return (new & 0xFFF00) >> 8, (new & 0xFF) | (new >> 12 & 0xFFF00)
