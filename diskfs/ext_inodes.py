"""Inodes of ext2, ext3 and ext4, where they lie, and their extended attributes.

Read here: dissect.extfs (3.15) takes every inode for one of 256 bytes, of larger ones it finds no attribute or a wrong
one, and knows neither `meta_bg` nor `bigalloc`. Source: Linux Documentation/filesystems/ext4 (layout), fs/ext4/super.c
and inode.c (behaviour).
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from struct import Struct, unpack_from
from typing import Final, NamedTuple

from dissect.extfs.c_ext import c_ext

from diskfs.blocks import Blocks
from diskfs.errors import DiskFsError, NotReadError

_S: Final = 1_000_000_000
_SUPER_AT: Final = 1024
_MAGIC: Final = 0xEF53
_JOURNAL: Final = 0x4  # compatible: there is a journal
_SPARSE_SUPER2: Final = 0x200
_SPARSE_SUPER: Final = 0x1  # read-only compatible
_FILE_TYPES, _RECOVER, _META_BG, _EXTENTS, _64BIT, _LARGE_DIR = 0x2, 0x4, 0x10, 0x40, 0x80, 0x4000
#: Features that change where things lie, and that are not known here.
_UNSUPPORTED: Final = {0x1: "compression", 0x8: "being the journal of another one"}
#: Those that are known, or change nothing for who reads: also mmp, flex_bg, ea_inode, csum_seed, inline_data, encrypt,
#: casefold.
_KNOWN: Final = (
    _FILE_TYPES | _RECOVER | _META_BG | _EXTENTS | _64BIT | _LARGE_DIR
    | 0x100 | 0x200 | 0x400 | 0x2000 | 0x8000 | 0x10000 | 0x20000
)  # fmt: skip
_UNMOUNTED, _ERRORS = 0x1, 0x2  # states
_INODE: Final = Struct(
    "<H"    #   0  mode
    "H"     #   2  owner, low
    "I"     #   4  size, low
    "8x"
    "i"     #  16  time of modification
    "4x"
    "H"     #  24  group, low
    "H"     #  26  names
    "4x"
    "I"     #  32  flags
    "4x"
    "60s"   #  40  extents, or numbers of blocks, or content
    "4x"
    "I"     # 104  block of attributes, low
    "I"     # 108  size, high
    "4x"
    "2x"
    "H"     # 118  block of attributes, high
    "H"     # 120  owner, high
    "H"     # 122  group, high
    "4x"
)  # fmt: skip
_ATTRIBUTE: Final = Struct("<BBHII4x")  # bytes of the name, prefix, place, inode and size of the value
_ATTRIBUTES_MAGIC: Final = b"\x00\x00\x02\xea"
_BLOCK_HEADER: Final = 32
_PREFIXES: Final = {
    1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.", 6: b"security.",
    7: b"system.",
}  # fmt: skip
_MAX_VALUE: Final = 64 << 10
_IS_VALUE: Final = 0x200000
_REGULAR: Final = 0o100000


class Inode(NamedTuple):
    """What an inode says, and its attributes as they lie in it."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int  #: bytes
    mtime_ns: int
    links: int
    flags: int
    block: bytes  #: 60 bytes: extents, numbers of blocks, or content
    attributes_at: int  #: block with further attributes; 0: none
    attributes: bytes  #: behind their magic; empty if there are none


class Attribute(NamedTuple):
    """An extended attribute; `inode` is not 0 if that has the value."""

    name: bytes
    value: bytes
    inode: int
    size: int


class Super:
    """The superblock, and where inodes lie by it.

    Raises:
        DiskFsError: it is damaged, or has a feature that is not known here.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        sb = self._sb = c_ext.ext4_super_block(blocks.exactly(_SUPER_AT, 1024))
        if sb.s_magic != _MAGIC or sb.s_log_block_size > 6 or not (sb.s_blocks_per_group and sb.s_inodes_per_group):
            raise DiskFsError("read", "ext", "its superblock is damaged")
        incompatible = int(sb.s_feature_incompat)
        unknown = [name for bit, name in _UNSUPPORTED.items() if incompatible & bit]
        if not unknown and incompatible & ~_KNOWN:
            unknown = [f"{incompatible & ~_KNOWN:#x}"]
        if unknown:
            raise NotReadError("read", "ext4", f"it has a feature that is not known here: {', '.join(unknown)}")
        self.block_size: Final[int] = 1024 << sb.s_log_block_size
        self.inode_size: Final[int] = int(sb.s_inode_size) if sb.s_rev_level else 128
        if not 128 <= self.inode_size <= self.block_size:
            raise DiskFsError("read", "ext4", f"blocks of {self.block_size} bytes, inodes of {self.inode_size}")
        self.inodes: Final[int] = int(sb.s_inodes_count)
        self.is_wide: Final = bool(incompatible & _64BIT)
        self._descriptor: int = int(sb.s_desc_size) if self.is_wide else 32
        if not (64 if self.is_wide else 32) <= self._descriptor <= self.block_size:
            raise DiskFsError("read", "ext4", f"descriptors of {self._descriptor} bytes")
        self.has_types: Final = bool(incompatible & _FILE_TYPES)
        self.needs_recovery: Final = bool(incompatible & _RECOVER)
        self.journal: Final[int] = int(sb.s_journal_inum)
        self.label: Final[str] = bytes(sb.s_volume_name).partition(b"\0")[0].decode("utf-8", "replace")
        self._large_directories = bool(incompatible & _LARGE_DIR)
        self.has_journal: Final = bool(sb.s_feature_compat & _JOURNAL)
        self.was_in_use: Final = not sb.s_state & _UNMOUNTED
        self.has_errors: Final = bool(sb.s_state & _ERRORS)
        self.kind: Final = "ext4" if incompatible & _EXTENTS else "ext3" if self.has_journal else "ext2"
        self._table = lru_cache(4096)(self._read_table)

    def inode(self, number: int) -> Inode:
        """Inode `number`.

        Raises:
            DiskFsError: there is none.
        """
        if not 1 <= number <= self.inodes:
            raise DiskFsError("read", f"inode {number}", f"there are {self.inodes}")
        group, index = divmod(number - 1, int(self._sb.s_inodes_per_group))
        size = self.inode_size
        data = self._blocks.exactly(self._table(group) * self.block_size + index * size, size)
        (
            mode, uid, length, mtime, gid, links, flags, block, attributes, length_high, attributes_high, uid_high,
            gid_high,
        ) = _INODE.unpack_from(data)  # fmt: skip
        if mode & 0o170000 == _REGULAR or self._large_directories:
            length |= length_high << 32
        if self.is_wide:
            attributes |= attributes_high << 32
        time, inside = mtime * _S, b""
        if size > 128:
            end = 128 + int.from_bytes(data[128:130], "little")
            if end >= 140:
                # Two more bits of the seconds, and nanoseconds.
                extra = int.from_bytes(data[136:140], "little")
                time += ((extra & 3) << 32) * _S + (extra >> 2 if extra >> 2 < _S else 0)
            if data[end : end + 4] == _ATTRIBUTES_MAGIC:
                inside = data[end + 4 :]
        return Inode(
            number, mode, uid | uid_high << 16, gid | gid_high << 16, length, time, links, flags, block, attributes,
            inside,
        )  # fmt: skip

    def attributes(self, found: Inode) -> Iterator[Attribute]:
        """Extended attributes of an inode, those of its own block among them.

        Raises:
            DiskFsError: they are damaged.
        """
        yield from _attributes(found.attributes, found.attributes)
        if found.attributes_at:
            block = self._blocks.exactly(found.attributes_at * self.block_size, self.block_size)
            if block[:4] != _ATTRIBUTES_MAGIC:
                raise DiskFsError("read", f"inode {found.number}", "its extended attributes are damaged")
            yield from _attributes(block[_BLOCK_HEADER:], block)

    def _read_table(self, group: int) -> int:
        """The first block of inodes of a group."""
        size = self.block_size
        number, slot = divmod(group, size // self._descriptor)
        data = self._blocks.exactly(self._descriptors(number) * size + slot * self._descriptor, self._descriptor)
        table: int = unpack_from("<I", data, 8)[0]
        return table | unpack_from("<I", data, 0x28)[0] << 32 if self.is_wide else table

    def _descriptors(self, number: int) -> int:
        """Block `number` of those with descriptors of groups."""
        sb = self._sb
        if not sb.s_feature_incompat & _META_BG or number < sb.s_first_meta_bg:
            return number + (2 if self.block_size == 1024 else 1)
        # They lie in the first of the groups that they describe, behind a copy of the superblock if it has one.
        group = number * (self.block_size // self._descriptor)
        behind = 1 if self._has_super(group) else 0
        if self.block_size == 1024 and not number and not sb.s_first_data_block:
            behind += 1
        return group * int(sb.s_blocks_per_group) + int(sb.s_first_data_block) + behind

    def _has_super(self, group: int) -> bool:
        if not group:
            return True
        if self._sb.s_feature_compat & _SPARSE_SUPER2:
            return group in unpack_from("<II", self._blocks.exactly(_SUPER_AT + 0x24C, 8))
        if group == 1 or not self._sb.s_feature_ro_compat & _SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))


def value_of(attribute: Attribute, inode: Callable[[int], Inode], read: Callable[[Inode, int], bytes]) -> bytes:
    """The value of an attribute, which may have an inode of its own.

    Raises:
        DiskFsError: that is not what it must be.
    """
    if not attribute.inode:
        return attribute.value
    found = inode(attribute.inode)
    if not found.flags & _IS_VALUE or attribute.size > _MAX_VALUE:
        raise DiskFsError("read", f"inode {attribute.inode}", "it is no extended attribute")
    return read(found, attribute.size)


def _attributes(rows: bytes, values: bytes) -> Iterator[Attribute]:
    at = 0
    while at + 4 <= len(rows) and rows[at : at + 4] != bytes(4):
        if at + _ATTRIBUTE.size > len(rows):
            raise DiskFsError("read", "extended attributes", "a name is cut off")
        length, prefix, place, inode, size = _ATTRIBUTE.unpack_from(rows, at)
        name = rows[at + _ATTRIBUTE.size : at + _ATTRIBUTE.size + length]
        if len(name) < length or (not inode and place + size > len(values)):
            raise DiskFsError("read", "extended attributes", "one is cut off")
        if prefix in _PREFIXES:
            yield Attribute(_PREFIXES[prefix] + name, b"" if inode else values[place : place + size], inode, size)
        at += -(-(_ATTRIBUTE.size + length) // 4) * 4


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1
