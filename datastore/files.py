"""File system calls of a local datastore: owners, modes, atomic replacement, durability.

Modes and owners: docs/formats.md, "Layout". Everything Fleece creates in a store gets its mode set explicitly, never by
umask, and, when it runs as root, the owner and group of the store's folder.
"""

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Final

from core.buffers import Buffer
from core.errors import os_reason
from datastore.errors import StoreError

FILE_MODE: Final = 0o644
FOLDER_MODE: Final = 0o755

_UTIME_NOW: Final = 0x3FFFFFFF
_UTIME_OMIT: Final = 0x3FFFFFFE
_AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
#: What a file system without `O_TMPFILE` answers (EISDIR: a kernel that does not know the flag).
_NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_TOUCH: Final = (_Timespec * 2)(_Timespec(0, _UTIME_NOW), _Timespec(0, _UTIME_OMIT))
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


class SyncLevel(Enum):
    """How much a finished backup survives a power cut."""

    NONE = "none"  #: nothing is promised
    FILE = "file"  #: every file and folder is fsynced
    FILESYSTEM = "filesystem"  #: one syncfs before the manifest appears


class Owner:
    """Gives what Fleece creates to the store's owner; does nothing unless the process runs as root."""

    def __init__(self, uid: int, gid: int) -> None:
        self.uid, self.gid = uid, gid
        self._active = os.geteuid() == 0

    @classmethod
    def of(cls, base: Path) -> "Owner":
        """The owner and group of the folder `base`."""
        found = base.stat()
        return cls(found.st_uid, found.st_gid)

    def own(self, target: int | Path) -> None:
        """Give the open file or the path `target` to the owner."""
        if self._active:
            os.chown(target, self.uid, self.gid, follow_symlinks=not isinstance(target, Path))


@contextmanager
def store_errors(what: str, where: str | Path) -> Iterator[None]:
    """Translate `OSError` to `StoreError`; who gives a missing file a meaning catches it inside the block."""
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "prune snapshots and collect garbage, or enlarge the file system"
        elif error.errno in (errno.EACCES, errno.EPERM):
            hint = "run as root or as the owner of the datastore"
        raise StoreError(what, str(where), os_reason(error), hint) from error


def touch(path: str | Path) -> None:
    """Set the access time to now and leave the modification time, without following links.

    Raises:
        OSError: not there, or not ours.
    """
    if _LIBC.utimensat(_AT_FDCWD, os.fsencode(path), _TOUCH, _AT_SYMLINK_NOFOLLOW) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))


def touch_in(folder: int, path: bytes) -> bool:
    """As `touch`, for a path relative to the open folder `folder`; False if it is not there.

    Raises:
        OSError: not ours.
    """
    if _LIBC.utimensat(folder, path, _TOUCH, _AT_SYMLINK_NOFOLLOW) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.ENOENT:
        return False
    raise OSError(code, os.strerror(code), os.fsdecode(path))


def sync_filesystem(target: Path | int) -> None:
    """Write everything of the file system that holds the path or open folder `target` to the disk.

    The kernel tells each descriptor once of writes that have failed since it was opened. A path is opened now, and what
    somebody else was told before is not told again.

    Raises:
        OSError: a write failed.
    """
    fd = target if isinstance(target, int) else open_folder(target)
    try:
        if _LIBC.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), None if isinstance(target, int) else str(target))
    finally:
        if fd != target:
            os.close(fd)


def open_folder(path: Path) -> int:
    """Open the folder `path`, for `sync_filesystem`."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def sync_path(path: Path) -> None:
    """fsync the file or folder `path`."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, parts: Sequence[Buffer]) -> None:
    """Write all of `parts` one after the other."""
    views = [memoryview(part) for part in parts if len(part)]
    while views:
        written = os.writev(fd, views)
        while views and written >= len(views[0]):
            written -= len(views[0])
            views.pop(0)
        if written:
            views[0] = views[0][written:]


def read_file(path: str | Path, *, limit: int) -> bytes:
    """The whole regular file `path`, not following a link.

    Raises:
        FileNotFoundError: not there.
        OSError: unreadable, not a regular file, or (EFBIG) longer than `limit` bytes.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if found.st_size > limit:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, at most {limit} are possible", str(path))
        data = os.read(fd, found.st_size)
        while len(data) < found.st_size:
            piece = os.read(fd, found.st_size - len(data))
            if not piece:
                break
            data += piece
        return data
    finally:
        os.close(fd)


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no listing takes for a file of the store: the last extension is replaced."""
    return path.with_name(f"{path.name.rpartition('.')[0] or path.name}.tmp_{secrets.token_urlsafe(6)[:6]}")


def make_folder(path: Path, owner: Owner, mode: int = FOLDER_MODE) -> bool:
    """Make the folder `path` with exactly `mode`; False if it is there already. Its parent must exist.

    Raises:
        OSError: no space, no rights, or something else is in its place. A link counts as that: it could lead what root
            writes to anywhere, and listings pass over it.
    """
    try:
        path.mkdir(mode)
    except FileExistsError:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "something that is no folder is in its place", str(path)) from None
        return False
    settle_folder(path, owner, mode)
    return True


def settle_folder(path: str | Path, owner: Owner, mode: int, *, dir_fd: int | None = None) -> None:
    """Give the new folder `path` (relative to the open folder `dir_fd`) its mode and owner.

    By its descriptor: the store's owner can put a link in its place at any time, and root must not follow that.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.fchmod(fd, mode)
        owner.own(fd)
    finally:
        os.close(fd)


def make_folders(base: Path, relative: str, owner: Owner, mode: int = FOLDER_MODE) -> list[Path]:
    """Make `base/relative` and what is missing on the way; returns the folders made, outermost first."""
    made = []
    path = base
    for part in relative.split("/"):
        path = path / part
        if make_folder(path, owner, mode):
            made.append(path)
    return made


def replace_file(
    path: Path,
    parts: Sequence[Buffer],
    owner: Owner,
    *,
    mode: int = FILE_MODE,
    sync: bool = False,
    temporary: Path | None = None,
) -> None:
    """Put a file of `parts` at `path` atomically; a file that is there is replaced.

    Args:
        sync: fsync the file before the rename and the folder after it.
        temporary: where to write first, on the same file system; beside `path` if None.

    An error leaves the old file, and no temporary one.
    """
    temporary = temporary or temporary_path(path)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            os.fchmod(fd, mode)
            owner.own(fd)
            write_all(fd, parts)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)  # noqa: PTH104 - one system call that the crash tests count
    except BaseException:
        unlink_quietly(temporary)
        raise
    if sync:
        sync_path(path.parent)


def create_file(path: Path, data: bytes, owner: Owner) -> bool:
    """Make the file `path` with `data`, whole or not at all; False if it is there already."""
    fd = create_unnamed(path.parent)
    if fd is None:
        temporary = temporary_path(path)
        replace_file(temporary, (data,), owner)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            unlink_quietly(temporary)
        return True
    try:
        os.fchmod(fd, FILE_MODE)
        owner.own(fd)
        write_all(fd, (data,))
        link_unnamed(fd, path)
    except FileExistsError:
        return False
    finally:
        os.close(fd)
    return True


def unlink_quietly(path: Path) -> None:
    """Remove the file `path`; errors do not matter."""
    try:
        os.unlink(path)  # noqa: PTH108 - one system call that the crash tests count
    except OSError:
        return


def create_unnamed(folder: Path) -> int | None:
    """Open a new file without a name in `folder` (`O_TMPFILE`); None if the file system cannot."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        if error.errno in _NO_TMPFILE and folder.is_dir():
            return None
        raise


def link_unnamed(fd: int, path: Path) -> None:
    """Give the file from `create_unnamed` the name `path`.

    Raises:
        FileExistsError: the name is taken.
    """
    # With a folder descriptor Python calls linkat(AT_SYMLINK_FOLLOW), without one link(), which would link the
    # symbolic link in /proc; the descriptor itself is not looked at, since the path is absolute.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def remove_tree(path: Path, *, first: Sequence[str] = ()) -> None:
    """Remove the folder `path` with all it holds, the files `first` before anything else; links are not followed.

    A folder that is not there is fine.
    """
    for name in first:
        unlink_existing(path / name)
    while os.path.lexists(path):
        # What somebody else removes at the same time ends a pass early.
        with suppress(FileNotFoundError):
            shutil.rmtree(path)


def unlink_existing(path: Path | str) -> bool:
    """Remove the file `path`; False if it is not there."""
    try:
        os.unlink(path)  # noqa: PTH108 - one system call that the crash tests count
    except FileNotFoundError:
        return False
    return True
