"""Extents of an inode of XFS: those that lie in it, and those in a tree of their own.

Source: Linux fs/xfs/libxfs/xfs_format.h (layout), Documentation of XFS's on-disk structures.
"""

from collections.abc import Callable, Iterator
from struct import Struct, unpack_from
from typing import Final, NamedTuple

from diskfs.blocks import Blocks
from diskfs.errors import DiskFsError

_EXTENT: Final = Struct(">QQ")  # 1 bit: never written; 54: offset; 52: place; 21: length; in blocks
_NODE: Final = Struct(">4sHH")  # magic, level, rows
_HEADER_V4, _HEADER_V5 = 24, 72
_MAGICS: Final = (b"BMAP", b"BMA3")
_MAX_LEVEL: Final = 9


class Extent(NamedTuple):
    """Blocks of a file or of attributes that lie side by side."""

    offset: int  #: blocks from the beginning
    block: int  #: number as the file system has it: allocation group above, block in it below
    length: int  #: blocks
    is_unwritten: bool  #: allocated, and never written


def listed(fork: bytes, count: int) -> Iterator[Extent]:
    """The `count` extents that lie in an inode.

    Raises:
        DiskFsError: it has no room for them.
    """
    if count * _EXTENT.size > len(fork):
        raise DiskFsError("read", "extents", f"{count} of them in {len(fork)} bytes")
    for at in range(0, count * _EXTENT.size, _EXTENT.size):
        yield _extent(fork, at)


class ExtentTree:
    """Reads trees of extents; `place` says where a block lies, in bytes."""

    def __init__(self, blocks: Blocks, size: int, place: Callable[[int], int], *, has_crc: bool) -> None:
        self._blocks, self._size, self._place = blocks, size, place
        self._header = _HEADER_V5 if has_crc else _HEADER_V4

    def extents(self, fork: bytes) -> Iterator[Extent]:
        """The extents of the tree whose root is `fork`, in order.

        Raises:
            DiskFsError: it is damaged.
        """
        level, count = unpack_from(">HH", fork)
        room = (len(fork) - 4) // 16
        if not 1 <= level <= _MAX_LEVEL or not 1 <= count <= room:
            raise _damaged()
        for below in unpack_from(f">{count}Q", fork, 4 + room * 8):
            yield from self._below(below, level - 1)

    def _below(self, block: int, level: int) -> Iterator[Extent]:
        data = self._blocks.exactly(self._place(block), self._size)
        magic, own_level, count = _NODE.unpack_from(data)
        room = (self._size - self._header) // 16
        if magic not in _MAGICS or own_level != level or not 1 <= count <= room:
            raise _damaged()
        if level:
            for below in unpack_from(f">{count}Q", data, self._header + room * 8):
                yield from self._below(below, level - 1)
        else:
            for number in range(count):
                yield _extent(data, self._header + number * _EXTENT.size)


def _extent(data: bytes, at: int) -> Extent:
    high, low = _EXTENT.unpack_from(data, at)
    offset, block = (high & (1 << 63) - 1) >> 9, (high & 511) << 43 | low >> 21
    return Extent(offset, block, low & (1 << 21) - 1, bool(high >> 63))


def _damaged() -> DiskFsError:
    return DiskFsError("read", "extents", "a node of the tree is damaged")
