"""btrfs, by the trees of dissect.btrfs. The root is that of the file system's top-level subvolume.

Subvolumes and snapshots are directories where they lie, as the kernel shows them: one that is mentioned in a snapshot
of what it lies in is an empty directory there, so that a walk ends. Packed content is unpacked here, within bounds.
"""

import stat
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from struct import Struct, unpack_from
from typing import Any, Final

from dissect.btrfs.btrfs import Btrfs
from dissect.btrfs.c_btrfs import BTRFS_BLOCK_GROUP_PROFILE_MASK, c_btrfs
from dissect.btrfs.stream import decode_extent

from diskfs.blocks import Blocks
from diskfs.entries import Entry, Id, Run
from diskfs.errors import DiskFsError
from diskfs.filesystem import MAX_RUNS, UNWRITTEN, RunList

_S: Final = 1_000_000_000
_TOP: Final = 5
_FIRST: Final = 256
_INODE, _INODE_REF, _XATTR, _DIR_INDEX, _EXTENT, _ROOT_ITEM, _ROOT_REF = 1, 12, 24, 96, 108, 132, 156
#: An empty directory in place of a subvolume that is none of this one.
_NOWHERE: Final = 2
_DIR_ITEM: Final = Struct("<QBQQHHB")  # location: object, type, offset; transaction; bytes of data, of the name; type
_EXTENT_HEAD: Final = Struct("<QQBBHB")  # generation, bytes in memory, packing, encryption, other, form
_EXTENT_BODY: Final = Struct("<QQQQ")  # address, bytes there, offset in it, bytes of the file
_ROOT_REF_ITEM: Final = Struct("<QQH")  # inode of the directory, sequence, bytes of the name
_INLINE, _REGULAR, _PREALLOCATED = 0, 1, 2
_ZLIB, _LZO, _ZSTD = 1, 2, 3
#: Bytes of a packed extent when unpacked; the kernel packs 128 KiB at a time.
_MAX_EXTENT: Final = 1 << 20
_MAX_TARGET: Final = 4096
#: Block groups whose first copy lies in one piece: single, DUP, RAID 1 in all its forms.
_RAID0, _RAID10, _RAID5, _RAID6 = 1 << 3, 1 << 6, 1 << 7, 1 << 8


class BtrfsFileSystem:
    """See `filesystem.FileSystem`."""

    kind: Final = "btrfs"
    root: Final[Id] = (_FIRST, _TOP)

    def __init__(self, blocks: Blocks) -> None:
        self.notes: Sequence[str] = ()
        head = blocks.exactly(0x10000, 4096)
        sector, node = unpack_from("<II", head, 0x90)
        if not 512 <= sector <= 1 << 16 or not sector <= node <= 1 << 16:
            raise DiskFsError("read", "btrfs", f"sectors of {sector} bytes, nodes of {node}")
        if any(head[0x60:0x68]):  # a tree of what was flushed since the last commit
            self.notes = (
                f"what was flushed by fsync since its last commit, up to 30 s before, is not read: {UNWRITTEN}",
            )
        self._blocks = blocks
        self._fs = Btrfs(blocks)
        self.label: Final[str] = self._fs.label
        self._item = lru_cache(4096)(self._read_item)
        self._unpacked = lru_cache(8)(self._unpack)
        self._starts = lru_cache(4)(lambda _: array("Q"))

    def entry(self, id: Id) -> Entry:
        """See `FileSystem.entry`."""
        if id[0] == _NOWHERE:
            return Entry(id, stat.S_IFDIR | 0o755, 0, 0, 0, 0, 1)
        inode = self._item(id)
        mode = int(inode.mode)
        kind = stat.S_IFMT(mode)
        size, target, rdev = 0, None, None
        if kind == stat.S_IFREG:
            size = int(inode.size)
        elif kind == stat.S_IFLNK:
            if inode.size > _MAX_TARGET:
                raise DiskFsError("read", f"inode {id[0]}", f"a symlink of {inode.size} bytes")
            target = self.read(id, 0, int(inode.size))
            size = len(target)
        elif kind in (stat.S_IFBLK, stat.S_IFCHR):
            number = int(inode.rdev)
            rdev = number >> 20 & 0xFFF, number & 0xFFFFF
        seconds = int(inode.mtime.sec)
        seconds -= 1 << 64 if seconds >> 63 else 0
        return Entry(
            id, mode, int(inode.uid), int(inode.gid), size, seconds * _S + min(int(inode.mtime.nsec), _S - 1),
            int(inode.nlink), rdev, target, True,
        )  # fmt: skip

    def names(self, id: Id) -> Iterator[tuple[bytes, Id]]:
        """See `FileSystem.names`."""
        if id[0] == _NOWHERE:
            return
        if stat.S_IFMT(int(self._item(id).mode)) != stat.S_IFDIR:
            raise DiskFsError("list", f"inode {id[0]}", "it is no directory")
        for _, data in self._items(id, _DIR_INDEX, 2):
            number, kind, _, _, _, length, _ = _DIR_ITEM.unpack_from(data)
            name = bytes(data[_DIR_ITEM.size : _DIR_ITEM.size + length])
            if kind == _INODE:
                yield name, (number, id[1])
            elif kind == _ROOT_ITEM:
                yield name, self._subvolume(id, number, name)
            else:
                raise DiskFsError("list", f"inode {id[0]}", f"an entry of kind {kind}")

    def runs(self, id: Id) -> list[Run] | None:
        """See `FileSystem.runs`."""
        size = int(self._item(id).size)
        runs = RunList(self._blocks, size)
        for offset, packing, form, body in self._extents(id):
            if form == _INLINE or packing:
                return None
            address, _, skip, length = _EXTENT_BODY.unpack_from(body)
            if form == _PREALLOCATED or not address:
                continue
            for start, part, position in self._places(address + skip, min(length, max(0, size - offset))):
                runs.add(offset + start, part, position)
        return runs.runs

    def read(self, id: Id, offset: int, length: int) -> bytes:
        """See `FileSystem.read`."""
        size = int(self._item(id).size)
        length = max(0, min(length, size - offset))
        buffer = bytearray(length)
        # Where extents begin, as far as they were met: who reads on need not begin at the beginning.
        starts = self._starts(id)
        slot = bisect_right(starts, offset) - 1
        for start, packing, form, body in self._extents(id, starts[slot] if slot >= 0 else 0):
            if start >= offset + length:
                break
            if (not starts or start > starts[-1]) and len(starts) < MAX_RUNS:
                starts.append(start)
            skip = max(0, offset - start)
            if form == _INLINE:
                data = self._unpacked_inline(bytes(body), packing)[skip:]
            else:
                address, stored, inner, count = _EXTENT_BODY.unpack_from(body)
                if form == _PREALLOCATED or not address or skip >= count:
                    continue
                wanted = min(count - skip, offset + length - max(start, offset))
                if packing:
                    whole = self._unpacked(address, stored, packing)
                    data = whole[inner + skip : inner + skip + wanted]
                else:
                    self._fs._logical_fh.seek(address + inner + skip)
                    data = self._fs._logical_fh.read(wanted)
            at = max(start, offset) - offset
            part = min(len(data), length - at)
            buffer[at : at + part] = data[:part]
        return bytes(buffer)

    def xattrs(self, id: Id) -> Iterator[tuple[bytes, bytes]]:
        """See `FileSystem.xattrs`."""
        if id[0] == _NOWHERE:
            return
        for _, data in self._items(id, _XATTR, 0):
            at = 0
            while at + _DIR_ITEM.size <= len(data):  # names with one hash share an item
                *_, value_length, length, _ = _DIR_ITEM.unpack_from(data, at)
                at += _DIR_ITEM.size
                yield bytes(data[at : at + length]), bytes(data[at + length : at + length + value_length])
                at += length + value_length

    def _tree(self, subvolume: int) -> Any:
        return self._fs.open_subvolume(subvolume).tree

    def _read_item(self, id: Id) -> Any:
        number, subvolume = id
        try:
            _, data = self._tree(subvolume).find(number, _INODE)
        except KeyError:
            raise DiskFsError("read", f"inode {number} of subvolume {subvolume}", "it is not there") from None
        return c_btrfs.btrfs_inode_item(data)

    def _items(self, id: Id, kind: int, first: int) -> Iterator[tuple[int, Any]]:
        last = -1
        cursor = self._tree(id[1]).cursor()
        for item, data in cursor.iter(objectid=id[0], type=kind, offset=first, ignore_offset=True):
            offset = int(item.key.offset)
            if offset <= last:
                raise DiskFsError("read", f"inode {id[0]}", "its items are not in order")
            last = offset
            yield offset, data

    def _subvolume(self, id: Id, number: int, name: bytes) -> Id:
        """The root of subvolume `number` if it really lies here, else an empty directory."""
        try:
            _, data = self._fs._root_tree.find(id[1], _ROOT_REF, number)
            inode, _, length = _ROOT_REF_ITEM.unpack_from(data)
            if inode == id[0] and bytes(data[_ROOT_REF_ITEM.size : _ROOT_REF_ITEM.size + length]) == name:
                return int(self._tree(number).root_item.root_dirid), number
        except KeyError:
            pass
        return _NOWHERE, number

    def _extents(self, id: Id, first: int = 0) -> Iterator[tuple[int, int, int, Any]]:
        """Offset in the file, packing, form and the rest of each item from offset `first` on."""
        for start, data in self._items(id, _EXTENT, first):
            _, _, packing, encryption, _, form = _EXTENT_HEAD.unpack_from(data)
            if encryption:
                raise DiskFsError("read", f"inode {id[0]}", "it is encrypted")
            yield start, packing, form, data[_EXTENT_HEAD.size :]

    def _places(self, address: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Offset, length and position on the volume of what lies at `address`."""
        done = 0
        while done < length:
            for chunk in self._fs._logical_fh.chunks:
                if chunk.offset <= address < chunk.offset + chunk.length:
                    break
            else:
                raise DiskFsError("read", "btrfs", f"nothing lies at address {address}")
            if int(chunk.type) & BTRFS_BLOCK_GROUP_PROFILE_MASK & (_RAID0 | _RAID10 | _RAID5 | _RAID6):
                raise DiskFsError("read", "btrfs", "its content is striped over devices")
            part = min(length - done, chunk.offset + chunk.length - address)
            yield done, part, chunk.stripes[0].offset + address - chunk.offset
            done, address = done + part, address + part

    def _unpack(self, address: int, stored: int, packing: int) -> bytes:
        if stored > _MAX_EXTENT:
            raise DiskFsError("read", "btrfs", f"a packed extent of {stored} bytes")
        self._fs._logical_fh.seek(address)
        return self._decoded(self._fs._logical_fh.read(stored), packing)

    def _unpacked_inline(self, data: bytes, packing: int) -> bytes:
        return self._decoded(data, packing) if packing else data

    def _decoded(self, data: bytes, packing: int) -> bytes:
        if packing == _ZLIB:
            return zlib.decompressobj().decompress(data, _MAX_EXTENT)
        if packing == _ZSTD:
            import zstandard

            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as whole:
                return whole.read(_MAX_EXTENT)
        if packing == _LZO:
            return bytes(decode_extent(data, packing, 0, self._fs.sector_size))
        raise DiskFsError("read", "btrfs", f"packing {packing} is not known")
