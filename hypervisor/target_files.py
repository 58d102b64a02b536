"""Files and devices that images are restored to: opened, held, and after a failure as they were.

`hypervisor.targets` writes into them.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from core.buffers import Buffer
from core.errors import TargetError, os_reason
from core.units import MIB, format_size
from hypervisor.image_files import check_kind, lock_for_writing, open_error, refuse_users, size_of

#: Bytes at both ends of a device that must be zero, or `force` is needed: partition tables and file systems are there.
GUARD_SIZE: Final = MIB
ZEROS: Final = bytes(MIB)
_FORCE_HINT: Final = "use --force to overwrite it"


class TargetFile:
    """An open file or device, and what it was before."""

    def __init__(self, fd: int, path: Path, *, made: bool, old_size: int, is_device: bool) -> None:
        self.fd, self.path, self.made, self.old_size, self.is_device = fd, path, made, old_size, is_device

    @classmethod
    def open(cls, path: Path, force: bool) -> "TargetFile":
        """Open or make `path` for writing; content needs `force`.

        Raises:
            TargetError, DiskInUseError: as `open_target`.
        """
        where = str(path)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return cls._open_old(path, where, force)
        except OSError as error:
            raise open_error(error, "make", where, TargetError) from error
        file = cls(fd, path, made=True, old_size=0, is_device=False)
        try:
            lock_for_writing(fd, where)
        except BaseException:
            file.discard(emptied=True)
            file.close()
            raise
        return file

    @classmethod
    def _open_old(cls, path: Path, where: str, force: bool) -> "TargetFile":
        try:
            is_device = check_kind(path.stat().st_mode, "write to", where, TargetError)
            # O_EXCL without O_CREAT: fails on a device that is mounted or otherwise held.
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (os.O_EXCL if is_device else 0)
            fd = os.open(path, flags)
        except OSError as error:
            raise open_error(error, "write to", where, TargetError) from error
        try:
            if check_kind(os.fstat(fd).st_mode, "write to", where, TargetError) is not is_device:
                raise TargetError("write to", where, "it was replaced meanwhile")
            old_size = size_of(fd)
            lock_for_writing(fd, where)
            refuse_users(fd, "write to", where)
            if not is_device and old_size and not force:
                raise TargetError("restore to", where, f"the file exists with {old_size} bytes", _FORCE_HINT)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, made=False, old_size=old_size, is_device=is_device)

    def prepare(self, size: int, force: bool) -> None:
        """Give a file room for `size` bytes, without allocating; check a device.

        A file that is too long is cut when the restore has succeeded, not before: a restore that fails before its
        first byte leaves it as it was.
        """
        if not self.is_device:
            if self.old_size < size:
                self.resize(size)
            return
        if self.old_size < size:
            raise too_small(str(self.path), self.old_size, size)
        if force:
            return
        for offset in guards(self.old_size):
            try:
                start = os.pread(self.fd, GUARD_SIZE, offset)
            except OSError as error:
                raise TargetError("read", str(self.path), os_reason(error)) from error
            refuse_content(str(self.path), start, offset)

    def resize(self, size: int) -> None:
        """Set the file's length."""
        try:
            if size_of(self.fd) != size:
                os.ftruncate(self.fd, size)
        except OSError as error:
            why = f"it cannot have {size} bytes: {os_reason(error)}"
            raise TargetError("write to", str(self.path), why, space_hint(error)) from error

    def keep(self) -> None:
        """Make the file's length, and a new file's name, durable."""
        try:
            if not self.is_device:
                os.fsync(self.fd)
            if self.made:
                folder = os.open(self.path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise TargetError("write to", str(self.path), os_reason(error), space_hint(error)) from error

    def discard(self, *, emptied: bool, untouched: bool = False) -> None:
        """After a failure: remove the file if this run made it; else give it its old length where that is harmless."""
        if self.is_device:
            return
        with suppress(OSError):  # the failure that brought us here is the one to report
            if self.made:
                if os.path.samestat(os.fstat(self.fd), self.path.lstat()):
                    self.path.unlink()
            elif emptied or self.old_size == 0:
                os.ftruncate(self.fd, 0)
            elif untouched:
                os.ftruncate(self.fd, self.old_size)

    def close(self) -> None:
        """Give it up, and its lock."""
        os.close(self.fd)


def look_at(path: Path, size: int, *, force: bool) -> None:
    """Refuse a file or device as `targets.open_target` would, and leave it as it is. Blocks.

    Raises:
        TargetError, DiskInUseError: as `open_target`.
    """
    file = TargetFile.open(path, force)
    try:
        if file.is_device:
            file.prepare(size, force)
    finally:
        if file.made:
            file.discard(emptied=True)
        file.close()


def guards(size: int) -> tuple[int, ...]:
    """Offsets of the parts at both ends that must be zero."""
    return (0,) if size <= GUARD_SIZE else (0, max(GUARD_SIZE, size - GUARD_SIZE))


def refuse_content(where: str, data: Buffer, offset: int) -> None:
    """Raises TargetError if `data`, what stands at `offset`, is not zero; at most 1 MiB."""
    if data != ZEROS[: len(data)]:
        place = "first" if offset == 0 else "last"
        raise TargetError("restore to", where, f"its {place} MiB is not zero, so it is in use or was", _FORCE_HINT)


def too_small(where: str, has: int, needs: int) -> TargetError:
    """The error for a target of `has` bytes where `needs` are needed."""
    why = f"it has {has} bytes ({format_size(has)}), the image has {needs} ({format_size(needs)})"
    return TargetError("restore to", where, why, "choose a larger one")


def space_hint(error: OSError) -> str:
    """What to do about a write that failed for lack of space; else empty."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or choose another place"
    if error.errno == errno.EFBIG:
        return "the file system has no files of that size; choose another place"
    return ""
