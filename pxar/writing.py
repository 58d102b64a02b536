"""Writes the contents of restored files, many small ones in one call; zeros become holes.

In C (`_writing.c`) the calls run without the GIL, so that they keep a core of their own busy. The Python form below
does the same and serves where C was not built.
"""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from struct import Struct
from typing import Final, NamedTuple

from core.buffers import Buffer
from pxar.format import ENTRY_CONTENT, HEADER_SIZE

try:
    from pxar import _writing
except ImportError:  # no compiler where it was installed
    _writing = None  # type: ignore[assignment]

#: Blocks of zeros of this size become holes.
BLOCK: Final = 4096
#: Bits of `how` for `write_files`.
SET_OWNER: Final = 1
SET_MODE: Final = 2
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
_RESULT: Final = Struct("=Qiiii")
_ZEROS: Final = bytes(BLOCK)
_SET_ID: Final = stat.S_ISUID | stat.S_ISGID
_NANOSECONDS: Final = 10**9


class Written(NamedTuple):
    """What became of one file; the others are errnos, 0 if all went well."""

    ino: int
    created: int  #: of making and filling it; if it is not 0 the file is not there
    owner: int
    mode: int
    time: int


def write_files(
    dir_fd: int, files: list[tuple[bytes, bytes, Buffer]], how: int, mode_mask: int, plain_mode: int
) -> list[Written]:
    """Make new files in the folder `dir_fd`: name, ENTRY item, content of each.

    `how`: SET_OWNER | SET_MODE; the permissions are those of `mode_mask`, without setuid and setgid where the owner is
    not set, or `plain_mode`. What exists stays, with EEXIST in its place.
    """
    if _writing is not None:
        packed = _writing.write_files(dir_fd, files, how, mode_mask, plain_mode)
        return [Written._make(fields) for fields in _RESULT.iter_unpack(packed)]
    return write_files_python(dir_fd, files, how, mode_mask, plain_mode)


def write_sparse(fd: int, data: Buffer, offset: int) -> None:
    """Write `data` at `offset`, where `fd` is empty: blocks of zeros are left out, so set the size afterwards.

    Raises:
        OSError: the errno of the write that failed.
    """
    if _writing is not None:
        _writing.write_sparse(fd, data, offset)
    else:
        write_sparse_python(fd, data, offset)


def write_files_python(
    dir_fd: int, files: list[tuple[bytes, bytes, Buffer]], how: int, mode_mask: int, plain_mode: int
) -> list[Written]:
    """As `write_files`, in Python."""
    return [_write_file(dir_fd, *file, how, mode_mask, plain_mode) for file in files]


def write_sparse_python(fd: int, data: Buffer, offset: int) -> None:
    """As `write_sparse`, in Python."""
    view = memoryview(data)
    start = at = 0
    size = len(view)
    while at < size:
        end = min(at + BLOCK - (offset + at) % BLOCK, size)
        if view[at:end] == _ZEROS[: end - at]:
            _write(fd, view[start:at], offset + start)
            start = end
        at = end
    _write(fd, view[start:], offset + start)


def _write(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _write_file(
    dir_fd: int, name: bytes, entry: bytes, content: Buffer, how: int, mode_mask: int, plain_mode: int
) -> Written:
    mode, _, uid, gid, mtime_s, mtime_ns, _ = ENTRY_CONTENT.unpack_from(entry, HEADER_SIZE)
    try:
        fd = os.open(name, _CREATE, 0o600, dir_fd=dir_fd)
    except OSError as error:
        return Written(0, error.errno or 0, 0, 0, 0)
    try:
        try:
            write_sparse_python(fd, content, 0)
            os.ftruncate(fd, len(content))
            found = os.fstat(fd)
        except OSError as error:
            with suppress(OSError):
                os.unlink(name, dir_fd=dir_fd)
            return Written(0, error.errno or 0, 0, 0, 0)
        is_wanted = how & SET_OWNER and (found.st_uid, found.st_gid) != (uid, gid)
        owner = _errno(os.fchown, fd, uid, gid) if is_wanted else 0
        if how & SET_MODE:
            allowed = mode_mask if how & SET_OWNER and not owner else mode_mask & ~_SET_ID
            permissions = mode & allowed
        else:
            permissions = plain_mode
        changed = _errno(os.fchmod, fd, permissions)
        times = found.st_atime_ns, mtime_s * _NANOSECONDS + mtime_ns
        return Written(found.st_ino, 0, owner, changed, _errno(lambda: os.utime(fd, ns=times)))
    finally:
        os.close(fd)


def _errno(call: Callable[..., object], *arguments: object) -> int:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or 0
    return 0
