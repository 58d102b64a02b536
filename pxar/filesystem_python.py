"""What `_metadata.c` does, name by name: its oracle in tests, and what serves where it was not built.

`filesystem.py` is the only caller and says what the results are. The order of items, which extended attributes are
stored and which errors are passed over: docs/formats.md, "File metadata".
"""

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pxar.features import FAT_FLAGS, Features, stored_flags
from pxar.format import MAX_XATTR
from pxar.metadata import NO_PERMISSIONS, Acl, DefaultAcl, Metadata, Stat, encode_metadata

if TYPE_CHECKING:
    from pxar.filesystem import Opened, Scanned, Seen

_UNKNOWN, _DIRECTORY, _REGULAR = 0, 4, 8  # d_type
#: How often an entry may change its type under us before it is left alone.
_ATTEMPTS: Final = 4
#: Folders that `scan_tree` has open at the same time.
_DEPTH: Final = 32
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_HANDLE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

_GETFLAGS: Final = 0x8008_6601
_FAT_GET_ATTRIBUTES: Final = 0x8004_7210
_FSGETXATTR: Final = 0x801C_581F
_PROJECT_OFFSET: Final = 12
_UNSUPPORTED: Final = frozenset({errno.ENOTTY, errno.ENOSYS, errno.EBADF, errno.EOPNOTSUPP, errno.EINVAL})

_XATTR_SKIPPED: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.EBADF})
_NAME_LIMIT: Final = 255
_XATTRS_LIMIT: Final = 60 << 20
_FCAPS_NAME: Final = b"security.capability"
_ACCESS_NAME: Final = b"system.posix_acl_access"
_DEFAULT_NAME: Final = b"system.posix_acl_default"

_ACL_ENTRY: Final = struct.Struct("<HHI")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 0x10, 0x20


def list_folder(fd: int) -> tuple[list[bytes], bytes]:
    """See `filesystem.list_folder`."""
    os.lseek(fd, 0, os.SEEK_SET)
    found = []
    with os.scandir(fd) as entries:
        for entry in entries:
            # scandir knows the d_type but says only this much of it; a name that has gone is neither.
            kind = _DIRECTORY if entry.is_dir(follow_symlinks=False) else _UNKNOWN
            found.append((os.fsencode(entry.name), _REGULAR if entry.is_file(follow_symlinks=False) else kind))
    # A name that is removed and made again while the folder is read may be listed twice.
    kinds = dict(found)
    names = sorted(kinds)
    return names, bytes(map(kinds.__getitem__, names))


def filesystem_type(fd: int) -> int:
    """See `filesystem.filesystem_type`."""
    answer = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes, f_type is its first word
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fstatfs(fd, answer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return ctypes.c_long.from_buffer(answer).value & 0xFFFF_FFFF


def scan(
    dir_fd: int, names: Sequence[bytes], features: int, types: bytes | None, skip_e2big: bool, /
) -> "list[Scanned | int]":
    """See `filesystem.scan`."""
    names = tuple(names)
    if types is not None and len(types) != len(names):
        raise ValueError("there is one type per name")
    for name in names:
        _check(name)
    results: list[Scanned | int] = []
    for number, name in enumerate(names):
        opened = open_entry(dir_fd, name, features, types[number] if types else _UNKNOWN, skip_e2big)
        if not isinstance(opened, int):
            os.close(opened[9])
            results.append(opened[:9])
        else:
            results.append(opened)
    return results


def scan_tree(
    dir_fd: int,
    names: Sequence[bytes],
    features: int,
    skip_e2big: bool,
    dev: int,
    limit: int,
    last: bytes,
    helpers: int,
    /,
) -> "tuple[list[Seen], list[tuple[int, int]]]":
    """See `filesystem.scan_tree`; without helpers."""
    if not 1 <= limit <= 1 << 24:
        raise ValueError("the limit of entries is out of range")
    names = tuple(names)
    for name in names:
        _check(name)
    seen: list[Seen] = []
    # Descriptor, number of the folder, and what of its folders is left, as places among its entries.
    open_folders = [(dir_fd, -1, list(range(len(names))))]
    used = 0
    try:
        while open_folders and used < limit:
            fd, parent, left = open_folders[-1]
            if not left:
                open_folders.pop()
                if open_folders:
                    os.close(fd)
                continue
            place = left.pop(0)
            name = names[place] if parent < 0 else seen[parent][3][place]
            used += 1
            opened = open_entry(fd, name, features, _DIRECTORY, skip_e2big)
            if isinstance(opened, int):
                seen.append((parent, name, opened, [], b"", [], False))
                continue
            folder = opened[9]
            entered = False
            try:
                inside, kinds = list_folder(folder)
                if not stat.S_ISDIR(opened[0]) or opened[3] != dev or len(inside) > limit:
                    raise OSError
            except OSError:
                seen.append((parent, name, errno.EAGAIN, [], b"", [], False))
            else:
                used += len(inside)
                found = [
                    None if kind == _DIRECTORY else scan(folder, [entry], features, bytes([kind]), skip_e2big)[0]
                    for entry, kind in zip(inside, kinds, strict=True)
                ]
                entered = last not in inside and len(open_folders) < _DEPTH
                seen.append((parent, name, opened[:9], inside, kinds, found, entered))
            if entered:
                folders = [number for number, kind in enumerate(kinds) if kind == _DIRECTORY]
                open_folders.append((folder, len(seen) - 1, folders))
            else:
                os.close(folder)
        return seen, [
            (number, left[0] if left else len(names if number < 0 else seen[number][3]))
            for _, number, left in open_folders
        ]
    finally:
        for fd, _, _ in open_folders[1:]:
            os.close(fd)


def open_entry(dir_fd: int, name: bytes, features: int, type: int, skip_e2big: bool, /) -> "Opened | int":
    """See `filesystem.open_entry`."""
    _check(name)
    refused = errno.ESTALE
    for _ in range(_ATTEMPTS):
        try:
            if type == _UNKNOWN:
                mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
                type = stat.S_IFMT(mode) >> 12
            fd = _open(dir_fd, name) if type in (_REGULAR, _DIRECTORY) else os.open(name, _HANDLE, dir_fd=dir_fd)
        except OSError as error:
            if type in (_REGULAR, _DIRECTORY) and error.errno in (errno.ELOOP, errno.ENXIO, errno.ENODEV):
                refused, type = error.errno, _UNKNOWN  # a symlink, socket or device now?
                continue
            return error.errno or errno.EIO
        result = _look(fd, features, skip_e2big, can_read=type in (_REGULAR, _DIRECTORY))
        if result is not None and not isinstance(result, int):
            return *result, fd
        os.close(fd)
        if result is not None:
            return result
        type = _UNKNOWN
    return refused


def describe(fd: int, features: int, skip_e2big: bool, /) -> "Scanned | int":
    """See `filesystem.describe`."""
    try:
        status = os.fstat(fd)
    except OSError as error:
        return error.errno or errno.EIO
    if not _can_hold_attributes(status.st_mode):
        return _result(status, encode_metadata(Metadata(_stat(status, 0))), None, 0)
    return _describe(fd, status, features, skip_e2big)


def _check(name: bytes) -> None:
    if not isinstance(name, bytes):
        raise TypeError(f"expected bytes, {name.__class__.__name__} found")
    if b"\0" in name:
        raise ValueError("embedded null byte")
    if not name or b"/" in name:
        raise ValueError("an entry's name is not empty and has no slash")


def _open(dir_fd: int, name: bytes) -> int:
    try:
        return os.open(name, _OPEN | os.O_NOATIME, dir_fd=dir_fd)
    except PermissionError as error:
        if error.errno != errno.EPERM:
            raise
        return os.open(name, _OPEN, dir_fd=dir_fd)  # O_NOATIME is for owners only
    except BlockingIOError:
        # Somebody holds a lease on the file: wait until the kernel has taken it back, but only for a file.
        handle = os.open(name, _HANDLE, dir_fd=dir_fd)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise
            return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        finally:
            os.close(handle)


def _can_hold_attributes(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _look(fd: int, features: int, skip_e2big: bool, *, can_read: bool) -> "Scanned | int | None":
    """The result for an open entry; None if it is of another kind than it was opened as."""
    try:
        status = os.fstat(fd)
        if _can_hold_attributes(status.st_mode) != can_read:
            return None
        if can_read:
            return _describe(fd, status, features, skip_e2big)
        target = os.readlink(b"", dir_fd=fd) if stat.S_ISLNK(status.st_mode) else None
    except OSError as error:
        return error.errno or errno.EIO
    return _result(status, encode_metadata(Metadata(_stat(status, 0))), target, 0)


def _stat(status: os.stat_result, flags: int) -> Stat:
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    # Python shows the largest id as -1.
    uid, gid = status.st_uid & 0xFFFF_FFFF, status.st_gid & 0xFFFF_FFFF
    return Stat(status.st_mode, flags, uid, gid, seconds, nanoseconds)


def _result(status: os.stat_result, meta: bytes, target: bytes | None, warning: int) -> "Scanned":
    return (
        status.st_mode,
        meta,
        status.st_size,
        status.st_dev,
        status.st_ino,
        status.st_nlink,
        status.st_rdev,
        target,
        warning,
    )


def _describe(fd: int, status: os.stat_result, features: int, skip_e2big: bool) -> "Scanned | int":
    try:
        warning = 0
        xattrs: dict[bytes, bytes] = {}
        if features & Features.XATTRS:
            warning, xattrs = _read_xattrs(fd, status, features, skip_e2big)
        fcaps = xattrs.pop(_FCAPS_NAME, None)
        acl = parse_acls(xattrs.pop(_ACCESS_NAME, None), xattrs.pop(_DEFAULT_NAME, None))
        flags = _read_flags(fd, features)
        projid = _read_projid(fd) if features & Features.QUOTA_PROJID else 0
    except OSError as error:
        return -(error.errno or errno.EIO)
    metadata = Metadata(_stat(status, flags), tuple(xattrs.items()), acl, fcaps, projid or None)
    return _result(status, encode_metadata(metadata), None, warning)


def _read_xattrs(fd: int, status: os.stat_result, features: int, skip_e2big: bool) -> tuple[int, dict[bytes, bytes]]:
    """(0, or E2BIG if some are left out; values by name in the kernel's order)."""
    values: dict[bytes, bytes] = {}
    total = 0
    try:
        names = [os.fsencode(name) for name in os.listxattr(fd)]
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return 0, {}
        if error.errno == errno.E2BIG and skip_e2big:
            return errno.E2BIG, {}
        raise
    for name in names:
        if not _is_stored(name, status.st_mode, features):
            continue
        try:
            value = os.getxattr(fd, name)
            total += 16 + len(name) + 1 + len(value)
            if total > _XATTRS_LIMIT or len(name) + 1 + len(value) > MAX_XATTR:
                raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        except OSError as error:
            if error.errno in _XATTR_SKIPPED:
                continue
            if error.errno == errno.E2BIG and skip_e2big:
                return errno.E2BIG, values
            raise
        values[name] = value
    return 0, values


def _is_stored(name: bytes, mode: int, features: int) -> bool:
    if name == _FCAPS_NAME:
        return bool(features & Features.FCAPS)
    if name in (_ACCESS_NAME, _DEFAULT_NAME):
        return bool(features & Features.ACL) and (name == _ACCESS_NAME or stat.S_ISDIR(mode))
    return len(name) <= _NAME_LIMIT and (name.startswith((b"user.", b"trusted.")) or name == b"security.NTACL")


def parse_acls(access: bytes | None, default: bytes | None) -> Acl:
    """The ACLs whose extended attributes have these values, None: there is none.

    Raises:
        OSError: EINVAL, these are none.
    """
    users, groups, basic = _parse_acl(access)
    default_users, default_groups, default_basic = _parse_acl(default)
    return Acl(
        users=users,
        groups=groups,
        group_obj=basic.get(_GROUP_OBJ) if _MASK in basic else None,
        default=DefaultAcl(*(default_basic.get(tag, NO_PERMISSIONS) for tag in (_USER_OBJ, _GROUP_OBJ, _OTHER, _MASK)))
        if default_basic
        else None,
        default_users=default_users,
        default_groups=default_groups,
    )


_Named = tuple[tuple[int, int], ...]


def _parse_acl(value: bytes | None) -> tuple[_Named, _Named, dict[int, int]]:
    """Named users, named groups, and the other entries by their tag."""
    if value is None:
        return (), (), {}
    if len(value) < 4 or (len(value) - 4) % _ACL_ENTRY.size or value[:4] != b"\2\0\0\0":
        raise OSError(errno.EINVAL, "not an ACL")
    users, groups, basic = [], [], {}
    for tag, permissions, identity in _ACL_ENTRY.iter_unpack(value[4:]):
        if tag == _USER:
            users.append((identity, permissions & 7))
        elif tag == _GROUP:
            groups.append((identity, permissions & 7))
        elif tag in (_USER_OBJ, _GROUP_OBJ, _MASK, _OTHER):
            basic[tag] = permissions & 7
        else:
            raise OSError(errno.EINVAL, "not an ACL")
    return tuple(sorted(users)), tuple(sorted(groups)), basic


def _read_flags(fd: int, features: int) -> int:
    chattr = _ask(fd, _GETFLAGS, 4)
    fat = _ask(fd, _FAT_GET_ATTRIBUTES, 4) if features & FAT_FLAGS else bytes(4)
    return stored_flags(int.from_bytes(chattr, "little"), int.from_bytes(fat, "little"))


def _read_projid(fd: int) -> int:
    return int.from_bytes(_ask(fd, _FSGETXATTR, 28)[_PROJECT_OFFSET:][:4], "little")


def _ask(fd: int, request: int, size: int) -> bytes:
    """The answer of an ioctl that writes `size` bytes, zeros where it is unknown."""
    try:
        return fcntl.ioctl(fd, request, bytes(size))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return bytes(size)
        raise
