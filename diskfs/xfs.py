"""XFS, by the structures of dissect.xfs.

Directories and extents are read here: the library (3.13) takes a directory's blocks for those of the file system, where
they may be larger, and shows what lay on the disk before where an extent was allocated and never written. What the log
holds and was not written to its place yet is read from there (`xfs_log.py`), as a disk is backed up while its file
system is mounted.
"""

import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from struct import Struct, unpack_from
from typing import Any, Final

from dissect.xfs.c_xfs import c_xfs
from dissect.xfs.xfs import XFS

from diskfs.blocks import Blocks
from diskfs.entries import Entry, Id, Run
from diskfs.errors import DiskFsError, NotReadError
from diskfs.filesystem import MAX_DIRECTORY, UNWRITTEN, RunList, content
from diskfs.xfs_attributes import AttributeBlocks, short_attributes
from diskfs.xfs_extents import Extent, ExtentTree, listed
from diskfs.xfs_log import Geometry, with_log

_S: Final = 1_000_000_000
_DEVICE, _LOCAL, _EXTENTS, _TREE = 0, 1, 2, 3
#: Where the blocks with names end in a directory; hashes and free space follow.
_LEAF_OFFSET: Final = 32 << 30
_MAX_TARGET: Final = 1024
_SYMLINK_MAGIC: Final = b"XSLM"
_SYMLINK_HEADER: Final = 56
_DATA_MAGICS: Final = {b"XDB3": (64, True), b"XDD3": (64, False), b"XD2B": (16, True), b"XD2D": (16, False)}
_UNUSED: Final = b"\xff\xff"
_TAIL: Final = Struct(">II")  # rows of the hash table at the end of a single block, and how many of them are stale
_SHORT_HEADER: Final = Struct(">BB")
_MAX_INODE_BITS: Final = 56
#: Features that are known, or change nothing for who reads: types in directories, sparse inodes, another UUID, big
#: times, repair needed, big counters, exchanged ranges, parents, a directory of metadata.
_KNOWN: Final = 0x1FF
_REALTIME: Final = 0x1


class XfsFileSystem:
    """See `filesystem.FileSystem`."""

    kind: Final = "xfs"

    def __init__(self, blocks: Blocks) -> None:
        head = blocks.exactly(0, 512)
        size, inode_size = unpack_from(">I", head, 4)[0], unpack_from(">H", head, 104)[0]
        agblklog, inopblog, dirblklog = head[124], head[123], head[192]
        if (
            not 512 <= size <= 1 << 16
            or size & (size - 1)
            or not 256 <= inode_size <= min(size, 2048)
            or agblklog + inopblog > _MAX_INODE_BITS
            or size << dirblklog > 1 << 16
        ):
            raise DiskFsError("read", "xfs", "its superblock is damaged")
        self.notes: Sequence[str] = ()
        if unpack_from(">H", head, 100)[0] & 15 == 5 and (unknown := unpack_from(">I", head, 216)[0] & ~_KNOWN):
            raise NotReadError("read", "xfs", f"it has a feature that is not known here: {unknown:#x}")
        blocks = self._with_log(blocks, size, head)
        self._blocks = blocks
        self._fs = XFS(blocks)
        self.label: Final[str] = self._fs.name
        self.root: Final[Id] = (int(self._fs.sb.sb_rootino), 0)
        self._size: int = size
        self._directory_size: int = size << dirblklog
        self._has_types = bool(self._fs._has_ftype)
        self._trees = ExtentTree(blocks, size, self._position, has_crc=bool(self._fs._has_crc))
        self._inode = lru_cache(4096)(self._read_inode)

    def entry(self, id: Id) -> Entry:
        """See `FileSystem.entry`."""
        found = self._inode(id[0])
        inode = found.inode
        mode = int(inode.di_mode)
        kind = stat.S_IFMT(mode)
        size, target, rdev = 0, None, None
        if kind == stat.S_IFREG:
            size = int(found.size)
        elif kind == stat.S_IFLNK:
            target = self._target(found)
            size = len(target)
        elif kind in (stat.S_IFBLK, stat.S_IFCHR):
            (number,) = unpack_from(">I", found.datafork().read(4))
            rdev = number >> 18 & 0x3FFF, number & 0x3FFFF
        links = int(inode.di_nlink) if inode.di_version > 1 else int(inode.di_onlink)
        return Entry(
            id, mode, int(inode.di_uid), int(inode.di_gid), size, self._time(found), links, rdev, target,
            inode.di_forkoff > 0,
        )  # fmt: skip

    def names(self, id: Id) -> Iterator[tuple[bytes, Id]]:
        """See `FileSystem.names`."""
        found = self._inode(id[0])
        if stat.S_IFMT(found.inode.di_mode) != stat.S_IFDIR:
            raise DiskFsError("list", f"inode {id[0]}", "it is no directory")
        if int(found.inode.di_format) == _LOCAL:
            yield from self._short(found)
            return
        size, total = self._directory_size, 0
        runs = RunList(self._blocks, _LEAF_OFFSET)
        for offset, position, length, _ in self._extents(found):
            runs.add(offset, length, position)
            total += length
            if total > MAX_DIRECTORY:
                raise DiskFsError("list", f"inode {id[0]}", f"a directory of more than {MAX_DIRECTORY} bytes")
        # A directory's block may lie in several extents.
        held, end = bytearray(), 0
        for offset, position, length, _ in self._extents(found):
            if offset >= _LEAF_OFFSET:
                break
            if held and offset != end:
                raise DiskFsError("list", f"inode {id[0]}", "a block of the directory is missing")
            for at in range(0, length, 1 << 16):
                held += self._blocks.exactly(position + at, min(1 << 16, length - at))
                while len(held) >= size:
                    yield from self._entries(bytes(held[:size]), id)
                    del held[:size]
            end = offset + length

    def runs(self, id: Id) -> list[Run] | None:
        """See `FileSystem.runs`."""
        found = self._inode(id[0])
        if int(found.inode.di_format) == _LOCAL:
            return None
        if int(found.inode.di_flags) & _REALTIME:
            raise DiskFsError("read", f"inode {id[0]}", "its content lies on the realtime device, which is not read")
        runs = RunList(self._blocks, int(found.size))
        for offset, position, length, unwritten in self._extents(found):
            if not unwritten:
                runs.add(offset, length, position)
        return runs.runs

    def read(self, id: Id, offset: int, length: int) -> bytes:
        """See `FileSystem.read`."""
        found = self._inode(id[0])
        data: bytes = found.datafork().read(int(found.size))
        return data[offset : offset + length]

    def xattrs(self, id: Id) -> Iterator[tuple[bytes, bytes]]:
        """See `FileSystem.xattrs`."""
        found = self._inode(id[0])
        inode = found.inode
        if not inode.di_forkoff:
            return
        form, fork = int(inode.di_aformat), found.attrfork()
        data = fork.read(fork.size)
        if form == _LOCAL:
            yield from short_attributes(data)
        elif form in (_EXTENTS, _TREE):
            found_at = listed(data, int(found.attr_extents)) if form == _EXTENTS else self._trees.extents(data)
            blocks = AttributeBlocks(self._blocks, self._size, (self._in_bytes(one)[:3] for one in found_at))
            yield from blocks.attributes()

    def _with_log(self, blocks: Blocks, size: int, head: bytes) -> Blocks:
        """The volume with what its log holds; without it, and a note that says so, if that cannot be read."""
        (first,), (count,) = unpack_from(">Q", head, 48), unpack_from(">I", head, 96)
        ag_blocks, shift = unpack_from(">I", head, 84)[0], head[124]
        place = ((first >> shift) * ag_blocks + (first & (1 << shift) - 1)) * size
        has_crc = unpack_from(">H", head, 100)[0] & 15 == 5
        try:
            if not first:
                raise DiskFsError("read", "log", "it lies on another disk")
            found, moves = with_log(blocks, Geometry(place, count * size, unpack_from(">H", head, 104)[0], has_crc))
        except DiskFsError as error:
            why = error.why
        except MemoryError:
            why = "it takes too much memory"
        else:
            if moves:
                self.notes = (f"pieces of files were just being moved, as copies on write do: {UNWRITTEN}",)
            return found
        self.notes = (f"its log is not read ({why}): {UNWRITTEN}",)
        return blocks

    def _read_inode(self, number: int) -> Any:
        found = self._fs.get_inode(number)
        found.inode  # noqa: B018 - read now, and refused now
        return found

    def _time(self, found: Any) -> int:
        value = int(found.inode.di_mtime)
        if found._has_bigtime():
            return value - (1 << 31) * _S
        seconds = value >> 32
        return (seconds - (1 << 32) if seconds & 1 << 31 else seconds) * _S + min(value & 0xFFFFFFFF, _S - 1)

    def _target(self, found: Any) -> bytes:
        size = int(found.size)
        if size > _MAX_TARGET:
            raise DiskFsError("read", f"inode {found.inum}", f"a symlink of {size} bytes")
        if int(found.inode.di_format) == _LOCAL:
            return bytes(found.datafork().read(size))
        extents = [(offset, length, position) for offset, position, length, _ in self._extents(found)]
        if not self._fs._has_crc:
            return b"".join(content(self._blocks, extents, size))
        # Each extent, not each block, begins with a header that says how much follows.
        data = b""
        for _, length, position in extents:
            if len(data) >= size:
                break
            block = self._blocks.exactly(position, min(length, 1 << 16))
            if block[:4] != _SYMLINK_MAGIC:
                raise DiskFsError("read", f"inode {found.inum}", "the target of a symlink is damaged")
            count = int(unpack_from(">I", block, 8)[0])
            data += block[_SYMLINK_HEADER : _SYMLINK_HEADER + count]
        return data[:size]

    def _extents(self, found: Any) -> Iterator[tuple[int, int, int, bool]]:
        """Offset, position and length in bytes of each extent, and whether it was never written."""
        form = int(found.inode.di_format)
        if form not in (_EXTENTS, _TREE):
            raise DiskFsError("read", f"inode {found.inum}", f"its content has form {form}")
        fork = found.datafork()
        data: bytes = fork.read(fork.size)
        found_at = listed(data, int(found.data_extents)) if form == _EXTENTS else self._trees.extents(data)
        return (self._in_bytes(one) for one in found_at)

    def _in_bytes(self, extent: Extent) -> tuple[int, int, int, bool]:
        offset, block, count, unwritten = extent
        return offset * self._size, self._position(block), count * self._size, unwritten

    def _position(self, block: int) -> int:
        shift = int(self._fs.sb.sb_agblklog)
        number: int = (block >> shift) * int(self._fs.sb.sb_agblocks) + (block & (1 << shift) - 1)
        return number * self._size

    def _short(self, found: Any) -> Iterator[tuple[bytes, Id]]:
        data: bytes = found.datafork().read(int(found.size))
        count, wide = _SHORT_HEADER.unpack_from(data)
        width = 8 if wide else 4
        at = 2 + width
        for _ in range(count):
            length = data[at]
            name = data[at + 3 : at + 3 + length]
            at += 3 + length + (1 if self._has_types else 0)
            if at + width > len(data):
                raise DiskFsError("list", f"inode {found.inum}", "an entry is damaged")
            yield name, (int.from_bytes(data[at : at + width], "big"), 0)
            at += width

    def _entries(self, block: bytes, id: Id) -> Iterator[tuple[bytes, Id]]:
        """The entries in one block of a directory."""
        magic = _DATA_MAGICS.get(block[:4])
        if magic is None:
            raise DiskFsError("list", f"inode {id[0]}", "a block of the directory is damaged")
        at, is_single = magic
        end = len(block)
        if is_single:
            rows, _ = _TAIL.unpack_from(block, end - _TAIL.size)
            end -= _TAIL.size + 8 * rows
        while at + 11 <= end:
            if block[at : at + 2] == _UNUSED:
                length = int.from_bytes(block[at + 2 : at + 4], "big")
                if length < 8 or length % 8:
                    raise DiskFsError("list", f"inode {id[0]}", "free space in the directory is damaged")
                at += length
                continue
            inode, length = int.from_bytes(block[at : at + 8], "big"), block[at + 8]
            yield block[at + 9 : at + 9 + length], (inode, 0)
            at += -(-(9 + length + (1 if self._has_types else 0) + 2) // 8) * 8


assert c_xfs.endian == ">"
