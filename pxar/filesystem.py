"""Files of a file system as an archive sees them: names, metadata, and how metadata are set again.

The calls for a backup (`list_folder`, `scan`, `open_entry`, `describe`) are in C (`_metadata.c`), for many names at
once: an ordinary file costs openat, fstat, flistxattr, two ioctls and close, 4 to 5 µs with a warm cache
(`bench/metadata.py`). `filesystem_python.py` has the same calls in readable form and serves where C was not built.

Nothing follows a symlink, and nothing waits for what has taken a file's place: FIFOs, sockets and devices are never
opened, and a file that turned into one since it was listed is opened with O_NONBLOCK and closed again.
"""

import errno
import fcntl
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeAlias

from pxar.features import (
    CHATTR_BITS,
    CHATTR_FLAGS,
    DEFAULT,
    FAT_BITS,
    FAT_FLAGS,
    INITIAL_FLAGS,
    Features,
    is_virtual,
    supported_features,
)
from pxar.metadata import NO_PERMISSIONS, Acl

try:
    from pxar import _metadata as _reader
except ImportError:  # no compiler where it was installed
    from pxar import filesystem_python as _reader  # type: ignore[no-redef]

__all__ = [
    "CHATTR_FLAGS",
    "DEFAULT",
    "FAT_FLAGS",
    "INITIAL_FLAGS",
    "UNKNOWN_TYPE",
    "UNSUPPORTED",
    "AclValues",
    "Features",
    "Opened",
    "Scanned",
    "Seen",
    "acl_values",
    "describe",
    "filesystem_type",
    "is_virtual",
    "list_folder",
    "open_entry",
    "scan",
    "scan_tree",
    "set_flags",
    "set_projid",
    "supported_features",
]

#: What is found out about an entry: mode (`st_mode`), meta (its ENTRY and attribute items), size, dev, ino, nlink,
#: rdev, target (of a symlink, else None), warning (0, or E2BIG: extended attributes were left out). The numbers are
#: those of one fstat of the opened file, to which the attributes belong too.
Scanned: TypeAlias = tuple[int, bytes, int, int, int, int, int, bytes | None, int]
#: The same, and an open file descriptor.
Opened: TypeAlias = tuple[int, bytes, int, int, int, int, int, bytes | None, int, int]
#: A folder that `scan_tree` read: the number of the one it lies in (-1: the start), its name, what it is or why it was
#: not read (errno), its names and their `d_type`s, what they are (None for folders), whether the folders in it follow.
Seen: TypeAlias = tuple[int, bytes, Scanned | int, list[bytes], bytes, list[Scanned | int | None], bool]

#: `DT_UNKNOWN`: the listing does not say what an entry is.
UNKNOWN_TYPE: Final = 0
#: What file systems answer to an ioctl on flags or projects that they do not know.
UNSUPPORTED: Final = frozenset({errno.ENOTTY, errno.ENOSYS, errno.EBADF, errno.EOPNOTSUPP, errno.EINVAL})

_GETFLAGS: Final = 0x8008_6601
_SETFLAGS: Final = 0x4008_6602
_FAT_GET_ATTRIBUTES: Final = 0x8004_7210
_FAT_SET_ATTRIBUTES: Final = 0x4004_7211
_FSGETXATTR: Final = 0x801C_581F
_FSSETXATTR: Final = 0x401C_5820
_U32: Final = struct.Struct("=I")
_FSXATTR: Final = struct.Struct("=IIII12s")  # flags, extent size, extents, project, more

_ACL_VERSION: Final = struct.pack("<I", 2)
_ACL_ENTRY: Final = struct.Struct("<HHI")  # tag, permissions, uid or gid
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 0x10, 0x20
_NO_ID: Final = 0xFFFF_FFFF


def list_folder(fd: int) -> tuple[list[bytes], bytes]:
    """Names in the folder `fd` (open for reading), sorted as bytes, and the `d_type` of each as a byte of one string.

    Without `.` and `..`. The whole folder is read, wherever `fd` stands.

    Raises:
        OSError: it cannot be read, or is none.
    """
    return _reader.list_folder(fd)


def scan(
    dir_fd: int, names: Sequence[bytes], features: int, *, types: bytes | None = None, skip_e2big: bool = False
) -> list[Scanned | int]:
    """Metadata of `names`, entries of the folder `dir_fd`, in order.

    `types` are their `d_type`s as `list_folder` gave them (a hint; what is wrong in it costs time only); without them
    each name costs another stat. `features` says what to read: XATTRS, ACL, FCAPS, QUOTA_PROJID, and any of FAT_FLAGS;
    chattr flags are always read. One call runs without the GIL and without looking at signals: hand over a thousand
    names, not a million. `skip_e2big`: extended attributes that are too large to be read are left out with a warning,
    and those behind them.

    In the place of an entry that could not be read stands a number: above zero the errno of finding or opening it,
    below zero minus the errno of reading its attributes. ESTALE is also what an entry gets that kept changing its type.

    Raises:
        ValueError: a name is empty or has a slash or a NUL; `types` has another length.
    """
    return _reader.scan(dir_fd, names, features, types, skip_e2big)


def scan_tree(
    dir_fd: int,
    names: Sequence[bytes],
    features: int,
    *,
    dev: int,
    limit: int,
    last: bytes,
    skip_e2big: bool = False,
    helpers: int = 0,
) -> tuple[list[Seen], list[tuple[int, int]]]:
    """Folders `names` of the folder `dir_fd` and all below: what is in them, and what `scan` says of all but folders.

    Depth first, each folder before those in it; one `Seen` for each. Those that cannot be read, lie on another device
    than `dev` or have more than `limit` entries say EAGAIN or another errno, and are not entered. Neither are folders
    with an entry called `last`, nor those that lie too deep (32). It ends in front of the first folder after `limit`
    entries or more; so memory is bounded by twice `limit`. One call runs without the GIL, and up to `helpers` (at most
    7) more threads, which end with it, look at what lies in the folders.

    Returns:
        The folders, and what is left: numbers of folders (-1: the start), from the outermost to the innermost, and the
        place in each's names from which on folders have not been read.

    Raises:
        ValueError: as `scan`; `limit` is not from 1 to 2^24.
    """
    return _reader.scan_tree(dir_fd, names, features, skip_e2big, dev, limit, last, helpers)


def open_entry(
    dir_fd: int, name: bytes, features: int, *, type: int = UNKNOWN_TYPE, skip_e2big: bool = False
) -> Opened | int:
    """As `scan` for one name, which stays open; the caller closes the descriptor.

    A regular file or folder is open for reading (with O_NONBLOCK, and O_NOATIME where that is allowed), anything else
    with O_PATH.
    """
    return _reader.open_entry(dir_fd, name, features, type, skip_e2big)


def describe(fd: int, features: int, *, skip_e2big: bool = False) -> Scanned | int:
    """As `scan` for what is open already: a folder or regular file; of anything else only what fstat tells."""
    return _reader.describe(fd, features, skip_e2big)


def filesystem_type(fd: int) -> int:
    """The `f_type` of the file system that holds `fd`, for `supported_features` and `is_virtual`.

    Raises:
        OSError: it does not answer.
    """
    return _reader.filesystem_type(fd)


def set_flags(fd: int, flags: int, mask: int) -> None:
    """Set those inode attributes of an open file or folder that `mask` has, to what `flags` has; others stay.

    Both in the bits of an ENTRY's `flags`. What the file system does not know at all is left alone. IMMUTABLE and
    APPEND forbid every later change, so they come last.

    Raises:
        OSError: it is refused, for example IMMUTABLE without the right to do so.
    """
    for covered, bits, get, put in (
        (CHATTR_FLAGS, CHATTR_BITS, _GETFLAGS, _SETFLAGS),
        (FAT_FLAGS, FAT_BITS, _FAT_GET_ATTRIBUTES, _FAT_SET_ATTRIBUTES),
    ):
        if not mask & covered:
            continue
        with _unless_unsupported():
            (old,) = _U32.unpack(fcntl.ioctl(fd, get, bytes(4)))
            new = old
            for flag, bit in bits.items():
                if mask & flag:
                    new = new | bit if flags & flag else new & ~bit
            if new != old:
                fcntl.ioctl(fd, put, _U32.pack(new))


def set_projid(fd: int, projid: int) -> None:
    """Put an open file or folder into the quota project `projid`.

    Raises:
        OSError: it is refused; errno in `UNSUPPORTED`: the file system has no projects.
    """
    flags, extent_size, extents, _, rest = _FSXATTR.unpack(fcntl.ioctl(fd, _FSGETXATTR, bytes(_FSXATTR.size)))
    fcntl.ioctl(fd, _FSSETXATTR, _FSXATTR.pack(flags, extent_size, extents, projid, rest))


class AclValues(NamedTuple):
    """The two extended attributes that hold an entry's ACLs."""

    access: bytes  #: value of `system.posix_acl_access`
    default: bytes | None  #: value of `system.posix_acl_default`, None if there is no default ACL
    guessed: bool  #: something that ACLs must have was missing and was filled in from the mode


def acl_values(mode: int, acl: Acl) -> AclValues:
    """What to write to restore `acl` on an entry with `mode`; only if there is any (`bool(acl)`).

    The owner's and the others' permissions are those of `mode`. With `acl.group_obj` the group bits of `mode` are the
    mask, else they are the group's; named entries need a mask, which then is the same. A default ACL without its basic
    entries gets those of `mode`.
    """
    owner, group, other = mode >> 6 & 7, mode >> 3 & 7, mode & 7
    guessed = False
    group_obj, mask = acl.group_obj, None
    if group_obj is not None:
        mask = group
    else:
        group_obj = group
        if acl.users or acl.groups:
            mask, guessed = group, True
    access = _acl_value(owner, group_obj, other, mask, acl.users, acl.groups)
    default = None
    if acl.default is not None:
        basic = acl.default
        given = [None if value == NO_PERMISSIONS else value for value in basic]
        filled = [
            instead if value is None else value for value, instead in zip(given, (owner, group, other), strict=False)
        ]
        mask = given[3]
        if mask is None and (acl.default_users or acl.default_groups):
            mask = filled[1]
            guessed = True
        guessed = guessed or None in given[:3]
        default = _acl_value(filled[0], filled[1], filled[2], mask, acl.default_users, acl.default_groups)
    return AclValues(access, default, guessed)


def _acl_value(
    owner: int,
    group: int,
    other: int,
    mask: int | None,
    users: Iterable[tuple[int, int]],
    groups: Iterable[tuple[int, int]],
) -> bytes:
    entries = [(_USER_OBJ, owner, _NO_ID)]
    entries += [(_USER, permissions, uid) for uid, permissions in sorted(users)]
    entries.append((_GROUP_OBJ, group, _NO_ID))
    entries += [(_GROUP, permissions, gid) for gid, permissions in sorted(groups)]
    if mask is not None:
        entries.append((_MASK, mask, _NO_ID))
    entries.append((_OTHER, other, _NO_ID))
    return _ACL_VERSION + b"".join(
        _ACL_ENTRY.pack(tag, permissions & 7, identity & _NO_ID) for tag, permissions, identity in entries
    )


@contextmanager
def _unless_unsupported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
