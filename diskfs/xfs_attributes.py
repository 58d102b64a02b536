"""Extended attributes of XFS: in the inode, or in blocks of their own. Source: Linux fs/xfs/libxfs/xfs_da_format.h."""

from collections.abc import Iterable, Iterator
from struct import Struct, pack, unpack_from
from typing import Final

from diskfs.blocks import Blocks
from diskfs.errors import DiskFsError

_LOCAL, _ROOT, _SECURE, _PARENT, _INCOMPLETE = 0x1, 0x2, 0x4, 0x8, 0x80
_LEAF_V4, _LEAF_V5 = 0xFBEE, 0x3BEE
_HEADER_V4, _HEADER_V5 = 32, 80
_ROW: Final = Struct(">IHBx")  # hash, where its name is, flags
_REMOTE_MAGIC: Final = b"XARM"
_REMOTE_HEADER: Final = 56
_MAX_VALUE: Final = 64 << 10
#: Bytes of all blocks of one inode.
_MAX_BLOCKS: Final = 16 << 20
#: Names that XFS gives ACLs.
_ACLS: Final = {b"SGI_ACL_FILE": b"system.posix_acl_access", b"SGI_ACL_DEFAULT": b"system.posix_acl_default"}


def short_attributes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Those that lie in the inode."""
    count, at = data[2], 4
    for _ in range(count):
        length, size, flags = data[at : at + 3]
        at += 3
        if at + length + size > len(data):
            raise DiskFsError("read", "extended attributes", "one is damaged")
        yield from _named(flags, data[at : at + length], data[at + length : at + length + size])
        at += length + size


class AttributeBlocks:
    """Those in blocks of their own; `extents` are offset, position and length in bytes."""

    def __init__(self, blocks: Blocks, size: int, extents: Iterable[tuple[int, int, int]]) -> None:
        self._size = size
        self._found: dict[int, bytes] = {}
        total = 0
        for offset, position, length in extents:
            total += length
            if total > _MAX_BLOCKS:
                raise DiskFsError("read", "extended attributes", f"more than {_MAX_BLOCKS} bytes")
            for at in range(0, length, size):
                self._found[(offset + at) // size] = blocks.exactly(position + at, size)

    def attributes(self) -> Iterator[tuple[bytes, bytes]]:
        """All of them."""
        for block in self._found.values():
            magic = int.from_bytes(block[8:10], "big")
            if magic in (_LEAF_V4, _LEAF_V5) and block[:4] != _REMOTE_MAGIC:
                yield from self._leaf(block, magic == _LEAF_V5)

    def _leaf(self, block: bytes, is_v5: bool) -> Iterator[tuple[bytes, bytes]]:
        (count,) = unpack_from(">H", block, 56 if is_v5 else 12)
        first = _HEADER_V5 if is_v5 else _HEADER_V4
        for number in range(min(count, (len(block) - first) // _ROW.size)):
            _, at, flags = _ROW.unpack_from(block, first + number * _ROW.size)
            if flags & _INCOMPLETE:
                continue
            if flags & _LOCAL:
                size, length = unpack_from(">HB", block, at)
                name = block[at + 3 : at + 3 + length]
                value = block[at + 3 + length : at + 3 + length + size]
            else:
                number_of, size, length = unpack_from(">IIB", block, at)
                name, value = block[at + 9 : at + 9 + length], self._remote(number_of, size, is_v5)
            yield from _named(flags, name, value)

    def _remote(self, number: int, size: int, is_v5: bool) -> bytes:
        if size > _MAX_VALUE:
            raise DiskFsError("read", "extended attributes", f"one of {size} bytes")
        value = b""
        while len(value) < size:
            block = self._found.get(number, b"")
            if not block or (is_v5 and block[:4] != _REMOTE_MAGIC):
                raise DiskFsError("read", "extended attributes", "a block of one is missing")
            value += block[_REMOTE_HEADER if is_v5 else 0 :]
            number += 1
        return value[:size]


def _named(flags: int, name: bytes, value: bytes) -> Iterator[tuple[bytes, bytes]]:
    if flags & _PARENT:
        return
    if flags & _ROOT and name in _ACLS:
        yield _ACLS[name], _acl(value)
    elif flags & _SECURE:
        yield b"security." + name, value
    else:
        yield (b"trusted." if flags & _ROOT else b"user.") + name, value


def _acl(value: bytes) -> bytes:
    """An ACL as XFS stores it, as the kernel hands it out."""
    (count,) = unpack_from(">I", value)
    rows = [unpack_from(">IIH", value, 4 + 12 * number) for number in range(min(count, (len(value) - 4) // 12))]
    named = (0x02, 0x08)  # users and groups; all others have no number
    return pack("<I", 2) + b"".join(
        pack("<HHI", tag, permissions, number if tag in named else 0xFFFFFFFF) for tag, number, permissions in rows
    )
