"""What an archive knows of a file beside its name and content: the ENTRY item and its attributes.

Layout: docs/formats.md, "File archives". Between the walk, the encoder and change detection metadata travel *encoded*,
as the bytes that stand in the archive; this module makes and reads them.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from core.buffers import Buffer
from pxar.errors import EncodeError
from pxar.format import (
    ACL_DEFAULT,
    ACL_DEFAULT_GROUP,
    ACL_DEFAULT_USER,
    ACL_GROUP,
    ACL_GROUP_OBJ,
    ACL_USER,
    ENTRY,
    ENTRY_CONTENT,
    ENTRY_SIZE,
    ENTRY_V1,
    ENTRY_V1_CONTENT,
    ENTRY_V1_SIZE,
    FCAPS,
    HEADER,
    HEADER_SIZE,
    MAX_METADATA,
    MAX_XATTR,
    PAIR_ITEM,
    PAIR_SIZE,
    QUOTA_PROJID,
    U64,
    XATTR,
    Short,
    bad,
    item_name,
)

#: A default ACL that lacks one of its four basic entries has this in its place.
NO_PERMISSIONS: Final = (1 << 64) - 1

#: Attributes of one entry. Linux has names of 64 KiB, and two ACLs of as much: half of this.
MAX_ATTRIBUTES: Final = 1 << 16

_DEFAULT_ACL: Final = struct.Struct("<QQQQ")
_SINGLE_SIZE: Final = HEADER_SIZE + U64.size
_NANOSECONDS: Final = 10**9
#: Item sizes of the attributes that have one size only.
_FIXED_SIZES: Final = {
    ACL_USER: PAIR_SIZE,
    ACL_GROUP: PAIR_SIZE,
    ACL_GROUP_OBJ: _SINGLE_SIZE,
    ACL_DEFAULT: HEADER_SIZE + _DEFAULT_ACL.size,
    ACL_DEFAULT_USER: PAIR_SIZE,
    ACL_DEFAULT_GROUP: PAIR_SIZE,
    QUOTA_PROJID: _SINGLE_SIZE,
}
_ONCE: Final = frozenset({ACL_GROUP_OBJ, ACL_DEFAULT, FCAPS, QUOTA_PROJID})
_ATTRIBUTES: Final = frozenset({XATTR, FCAPS, *_FIXED_SIZES})


@dataclass(frozen=True, slots=True)
class Stat:
    """The ENTRY item."""

    mode: int  #: `st_mode`: type and permission bits
    flags: int = 0  #: inode attributes, docs/formats.md has the bits
    uid: int = 0
    gid: int = 0
    mtime_s: int = 0  #: Unix seconds, rounded down, also before 1970
    mtime_ns: int = 0  #: 0 to 999999999, counted upwards from `mtime_s`


class DefaultAcl(NamedTuple):
    """The four basic entries of a directory's default ACL; one that is missing is `NO_PERMISSIONS`."""

    user_obj: int
    group_obj: int
    other: int
    mask: int


@dataclass(frozen=True, slots=True)
class Acl:
    """POSIX ACLs, without what `mode` says already. Pairs are (uid or gid, permissions: 4 read, 2 write, 1 execute)."""

    users: tuple[tuple[int, int], ...] = ()
    groups: tuple[tuple[int, int], ...] = ()
    group_obj: int | None = None  #: only with a mask; the group bits of `mode` are the mask then
    default: DefaultAcl | None = None
    default_users: tuple[tuple[int, int], ...] = ()
    default_groups: tuple[tuple[int, int], ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any ACL."""
        return self != _NO_ACL


_NO_ACL: Final = Acl()


@dataclass(frozen=True, slots=True)
class Metadata:
    """All of it."""

    stat: Stat
    xattrs: tuple[tuple[bytes, bytes], ...] = ()  #: full name with its namespace, value
    acl: Acl = _NO_ACL
    fcaps: bytes | None = None  #: value of `security.capability`
    projid: int | None = None

    @classmethod
    def parse(cls, data: Buffer, *, where: str = "metadata") -> Self:
        """The metadata that fill `data` exactly.

        Raises:
            ArchiveError: they do not.
        """
        metadata, end = parse_metadata(data, where=where)
        if end != len(data):
            raise bad(where, end, "something else follows the metadata")
        assert isinstance(metadata, cls)
        return metadata


def encode_metadata(metadata: Metadata) -> bytes:
    """ENTRY and attribute items, in the order in which archives have them.

    Raises:
        EncodeError: a number, name or value that does not fit.
    """
    stat, acl = metadata.stat, metadata.acl
    if not 0 <= stat.mtime_ns < _NANOSECONDS:
        raise EncodeError("encode", "metadata", f"{stat.mtime_ns} nanoseconds are no part of a second")
    try:
        parts = [
            HEADER.pack(ENTRY, ENTRY_SIZE),
            ENTRY_CONTENT.pack(stat.mode, stat.flags, stat.uid, stat.gid, stat.mtime_s, stat.mtime_ns, 0),
        ]
        for name, value in metadata.xattrs:
            if b"\0" in name:
                raise EncodeError("encode", "metadata", "the name of an extended attribute has a NUL in it")
            parts.append(_sized(XATTR, b"%b\0%b" % (name, value)))
        parts += _acl_items(acl)
        if metadata.fcaps is not None:
            parts.append(_sized(FCAPS, metadata.fcaps))
        if metadata.projid is not None:
            parts.append(HEADER.pack(QUOTA_PROJID, _SINGLE_SIZE) + U64.pack(metadata.projid))
    except struct.error as error:
        raise EncodeError("encode", "metadata", f"a number does not fit: {error}") from None
    data = b"".join(parts)
    if len(data) > MAX_METADATA:
        raise EncodeError("encode", "metadata", f"{len(data)} bytes, the limit is {MAX_METADATA}")
    return data


def _acl_items(acl: Acl) -> Iterator[bytes]:
    yield from (PAIR_ITEM.pack(ACL_USER, PAIR_SIZE, *pair) for pair in acl.users)
    yield from (PAIR_ITEM.pack(ACL_GROUP, PAIR_SIZE, *pair) for pair in acl.groups)
    if acl.group_obj is not None:
        yield HEADER.pack(ACL_GROUP_OBJ, _SINGLE_SIZE) + U64.pack(acl.group_obj)
    if acl.default is not None:
        yield HEADER.pack(ACL_DEFAULT, _FIXED_SIZES[ACL_DEFAULT]) + _DEFAULT_ACL.pack(*acl.default)
    yield from (PAIR_ITEM.pack(ACL_DEFAULT_USER, PAIR_SIZE, *pair) for pair in acl.default_users)
    yield from (PAIR_ITEM.pack(ACL_DEFAULT_GROUP, PAIR_SIZE, *pair) for pair in acl.default_groups)


def _sized(kind: int, content: bytes) -> bytes:
    if len(content) > MAX_XATTR:
        raise EncodeError("encode", "metadata", f"{item_name(kind)} of {len(content)} bytes, the limit is {MAX_XATTR}")
    return HEADER.pack(kind, HEADER_SIZE + len(content)) + content


def parse_metadata(data: Buffer, offset: int = 0, *, where: str = "archive", base: int = 0) -> tuple[Metadata, int]:
    """The metadata whose ENTRY stands at `data[offset]`, and the index behind the last attribute.

    `data` must hold them whole. In errors `base` is added to indices, and `where` is the name of the archive.

    Raises:
        ArchiveError: not an ENTRY, cut off, beyond a limit, twice what may be there once.
    """
    try:
        stat = parse_stat(data, offset, where=where, base=base)
        end = offset + HEADER.unpack_from(data, offset)[1]
        xattrs: list[tuple[bytes, bytes]] = []
        lists: dict[int, list[tuple[int, int]]] = {}
        single: dict[int, int] = {}
        default = fcaps = None
        for kind, start, attribute_end in _attributes(data, end, where, base, offset):
            end = attribute_end
            if kind == XATTR:
                name, _, value = bytes(data[start:end]).partition(b"\0")
                xattrs.append((name, value))
            elif kind == FCAPS:
                fcaps = bytes(data[start:end])
            elif kind == ACL_DEFAULT:
                default = DefaultAcl._make(_DEFAULT_ACL.unpack_from(data, start))
            elif kind in (ACL_GROUP_OBJ, QUOTA_PROJID):
                (single[kind],) = U64.unpack_from(data, start)
            else:
                lists.setdefault(kind, []).append(HEADER.unpack_from(data, start))
    except Short as short:
        raise bad(where, base + offset, f"metadata are cut off, {short.needed - len(data)} bytes are missing") from None
    acl = _NO_ACL
    if lists or default is not None or ACL_GROUP_OBJ in single:
        acl = Acl(
            users=tuple(lists.get(ACL_USER, ())),
            groups=tuple(lists.get(ACL_GROUP, ())),
            group_obj=single.get(ACL_GROUP_OBJ),
            default=default,
            default_users=tuple(lists.get(ACL_DEFAULT_USER, ())),
            default_groups=tuple(lists.get(ACL_DEFAULT_GROUP, ())),
        )
    return Metadata(stat, tuple(xattrs), acl, fcaps, single.get(QUOTA_PROJID)), end


def parse_stat(data: Buffer, offset: int = 0, *, where: str = "archive", base: int = 0) -> Stat:
    """The ENTRY or ENTRY_V1 item at `data[offset]`.

    Raises:
        ArchiveError: it is none, or holds what no file has.
        Short: `data` end within it.
    """
    size = _entry_size(data, offset, where, base)
    if size == ENTRY_SIZE:
        mode, flags, uid, gid, mtime_s, mtime_ns, _ = ENTRY_CONTENT.unpack_from(data, offset + HEADER_SIZE)
        if mtime_ns >= _NANOSECONDS:
            raise bad(where, base + offset, f"{mtime_ns} nanoseconds are no part of a second")
    else:
        mode, flags, uid, gid, mtime = ENTRY_V1_CONTENT.unpack_from(data, offset + HEADER_SIZE)
        mtime_s, mtime_ns = divmod(mtime, _NANOSECONDS)
    return Stat(mode, flags, uid, gid, mtime_s, mtime_ns)


def metadata_end(data: Buffer, offset: int, *, where: str = "archive", base: int = 0) -> int:
    """Index behind the last attribute of the ENTRY at `data[offset]`: of the next item's header, or the end of `data`.

    Everything between is checked.

    Raises:
        ArchiveError: as `parse_metadata`.
        Short: `data` end within an item.
    """
    end = offset + _entry_size(data, offset, where, base)
    if len(data) >= end + 8 and U64.unpack_from(data, end)[0] not in _ATTRIBUTES:  # most files have none
        return end
    for _, _, attribute_end in _attributes(data, end, where, base, offset):
        end = attribute_end
    return end


def _entry_size(data: Buffer, offset: int, where: str, base: int) -> int:
    if len(data) < offset + HEADER_SIZE:
        raise Short(offset + HEADER_SIZE)
    kind, size = HEADER.unpack_from(data, offset)
    if kind == ENTRY:
        wanted = ENTRY_SIZE
    elif kind == ENTRY_V1:
        wanted = ENTRY_V1_SIZE
    else:
        raise bad(where, base + offset, f"{item_name(kind)} where an ENTRY must be")
    if size != wanted:
        raise bad(where, base + offset, f"{item_name(kind)} of {size} bytes, it has {wanted}")
    if len(data) < offset + wanted:
        raise Short(offset + wanted)
    return wanted


def _attributes(data: Buffer, offset: int, where: str, base: int, first: int) -> Iterator[tuple[int, int, int]]:
    """(type, begin, end of the content) of each attribute from index `offset` on."""
    seen: set[int] = set()
    available = len(data)
    count = 0
    while offset < available:
        if available < offset + HEADER_SIZE:
            raise Short(offset + HEADER_SIZE)
        kind, size = HEADER.unpack_from(data, offset)
        if kind not in _ATTRIBUTES:
            return
        position = base + offset
        count += 1
        if count > MAX_ATTRIBUTES:
            raise bad(where, position, f"more than {MAX_ATTRIBUTES} attributes of one entry")
        fixed = _FIXED_SIZES.get(kind)
        if fixed is not None and size != fixed:
            raise bad(where, position, f"{item_name(kind)} of {size} bytes, it has {fixed}")
        if not HEADER_SIZE <= size <= HEADER_SIZE + MAX_XATTR:
            raise bad(where, position, f"{item_name(kind)} of {size} bytes, the limit is {HEADER_SIZE + MAX_XATTR}")
        if kind in _ONCE:
            if kind in seen:
                raise bad(where, position, f"a second {item_name(kind)} of one entry")
            seen.add(kind)
        start, offset = offset + HEADER_SIZE, offset + size
        if offset - first > MAX_METADATA:
            raise bad(where, position, f"more than {MAX_METADATA} bytes of metadata for one entry")
        if available < offset:
            raise Short(offset)
        if kind == XATTR and b"\0" not in bytes(data[start:offset]):
            raise bad(where, position, "an XATTR without the NUL behind its name")
        yield kind, start, offset
