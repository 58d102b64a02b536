"""Disk sources that are no running VM: image files, block devices, and exports of other NBD servers.

A raw file or device is read directly and its content is never probed; a qcow2 file goes through a `qemu-nbd` of our
own. None of them has a dirty bitmap, so all of them are read as a whole, except for holes.
"""

import errno
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from core.buffers import WritableBuffer
from core.disks import Extent, ExtentState, ReadPlan
from core.errors import SourceError, os_reason
from core.limits import in_io_thread
from hypervisor.extents import CHUNK_SIZE, ExtentBuilder
from hypervisor.image_files import (
    MAGIC_SIZE,
    check_kind,
    foreign_magic,
    image_format,
    lock_for_reading,
    mounted_on,
    open_error,
    size_of,
)
from hypervisor.nbd_client import TIMEOUT_S, NbdAddress, NbdPool, is_nbd_uri, open_nbd
from hypervisor.qemu_tools import serve_image

ALLOCATION: Final = "base:allocation"
#: Flag of `base:allocation`: reads as zeros.
_STATE_ZERO: Final = 2


class FileSource:
    """A raw image file or a block device, read as it is; made by `open_source`.

    `warnings` has a line for each thing a person should know; reading and closing may add to it.
    """

    def __init__(self, fd: int, path: Path, name: str, size: int, reason: str) -> None:
        self._fd, self._path = fd, path
        self.name: Final = name  #: the archive's
        self.size: Final = size  #: bytes when it was opened
        self.plan: Final = ReadPlan(base=None, reason=reason)  #: a full read
        self.warnings: list[str] = []

    async def extents(self, *, incremental: bool = True) -> Sequence[Extent]:
        """The file's holes as ZERO, by whole chunks; a block device is all DATA.

        Raises:
            SourceError: the file system fails, or the file became shorter.
        """
        return await in_io_thread(self._map)

    async def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill `buffer` from `offset` on; cancellation waits for the read.

        Raises:
            SourceError: an I/O error, or the file became shorter.
        """
        await in_io_thread(self._read, offset, memoryview(buffer).cast("B"))

    async def discard(self, offset: int, length: int) -> None:
        """Nothing to do."""

    def _read(self, offset: int, view: memoryview) -> None:
        # No fadvise: with requests of 4 MiB the kernel's read-ahead is as quick without (measured warm and cold), and
        # throwing pages away would throw away those of others.
        position = offset
        end = offset + len(view)
        while position < end:
            try:
                count = os.preadv(self._fd, [view[position - offset :]], position)
            except OSError as error:
                raise SourceError("read", str(self._path), f"{os_reason(error)} at {position}") from error
            if count == 0:
                raise self._shorter()
            position += count

    def _map(self) -> list[Extent]:
        extents = ExtentBuilder(self.size)
        end = self.size
        while (position := extents.offset) < end:
            data = self._seek(position, os.SEEK_DATA)
            if data > position:
                extents.add(data - position, ExtentState.ZERO)
            if data >= end:
                break
            # What follows in the chunk where the data ends does not matter: the chunk is read as a whole.
            hole = self._seek(data, os.SEEK_HOLE)
            until = -(-max(hole, data + 1) // CHUNK_SIZE) * CHUNK_SIZE
            extents.add(until - data, ExtentState.DATA)
        return extents.finish()

    def _seek(self, position: int, whence: int) -> int:
        try:
            found = os.lseek(self._fd, position, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # Nothing but a hole to the end, or the end lies before `position`.
                if size_of(self._fd) < self.size:
                    raise self._shorter() from error
                return self.size
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                # No map here (a block device, an old file system): everything is data.
                return position if whence == os.SEEK_DATA else self.size
            raise SourceError("find the holes of", str(self._path), os_reason(error)) from error
        return min(found, self.size)

    def _shorter(self) -> SourceError:
        now = size_of(self._fd)
        return SourceError("read", str(self._path), f"it became shorter while it was read: {now} of {self.size} bytes")


class NbdSource:
    """An NBD export that is read as a whole; made by `open_source`."""

    def __init__(self, pool: NbdPool, name: str, reason: str, *, has_map: bool) -> None:
        self._pool, self._has_map = pool, has_map
        self.name: Final = name  #: the archive's
        self.size: Final = pool.size  #: bytes that the server announced
        self.plan: Final = ReadPlan(base=None, reason=reason)  #: a full read
        self.warnings: list[str] = []

    async def extents(self, *, incremental: bool = True) -> Sequence[Extent]:
        """What the server says reads as zeros is ZERO, by whole chunks; all DATA if it cannot tell.

        Raises:
            SourceError: the server fails, or its map makes no sense.
        """
        extents = ExtentBuilder(self.size)
        if self._has_map:

            def add(_offset: int, length: int, flags: int) -> None:
                extents.add(length, ExtentState.ZERO if flags & _STATE_ZERO else ExtentState.DATA)

            await self._pool.each_status(0, self.size, ALLOCATION, add)
        return extents.finish()

    async def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill `buffer` from `offset` on.

        Raises:
            SourceError: the server fails, is gone, or does not answer.
        """
        await self._pool.read_into(offset, buffer)

    async def discard(self, offset: int, length: int) -> None:
        """Nothing to do: what is read belongs to somebody else."""


@asynccontextmanager
async def open_source(
    spec: str,
    name: str,
    *,
    format: str | None = None,
    force: bool = False,
    timeout_s: float = TIMEOUT_S,
    reason: str | None = None,
) -> AsyncIterator[FileSource | NbdSource]:
    """The disk that `spec` names, as archive `name`: an image file, a block device, or an NBD URI.

    A file is qcow2 if `format` says so, or without one if its name ends in `.qcow2`; anything else is raw. An image
    that a VM uses is refused unless `force` is given; while the source is open no VM can start on it. The source's
    `warnings` are complete when the block has ended. `reason` is why all is read; None: what kind of source it is.

    Raises:
        SourceError: not there, empty, no disk, or unreadable.
        DiskInUseError: somebody has the image open for writing.
        UsageError: a format or URI that is not supported.
    """
    async with AsyncExitStack() as stack:
        source: FileSource | NbdSource
        if is_nbd_uri(spec):
            address = NbdAddress.parse(spec)
            source = await _open_nbd(
                stack, address, name, reason or "an NBD export has no dirty bitmap of ours", timeout_s
            )
        elif image_format(Path(spec), format) == "raw":
            source = await stack.enter_async_context(_open_raw(Path(spec), name, force=force, reason=reason))
        else:
            path = Path(spec)
            fd = await in_io_thread(_open, path)
            try:
                check_kind(os.fstat(fd).st_mode, "read", spec, SourceError)
                warnings = await in_io_thread(_mount_warnings, fd, path)
            finally:
                os.close(fd)
            server = serve_image(path, "qcow2", shared=force, fault=SourceError)
            address = await stack.enter_async_context(server)
            source = await _open_nbd(stack, address, name, reason or "a file has no dirty bitmap", timeout_s)
            source.warnings += warnings
        yield source


async def _open_nbd(stack: AsyncExitStack, address: NbdAddress, name: str, reason: str, timeout_s: float) -> NbdSource:
    pool = await stack.enter_async_context(open_nbd(address, contexts=(ALLOCATION,), timeout_s=timeout_s))
    return NbdSource(pool, name, reason, has_map=pool.has_context(ALLOCATION))


@asynccontextmanager
async def _open_raw(path: Path, name: str, *, force: bool, reason: str | None) -> AsyncIterator[FileSource]:
    fd = await in_io_thread(_open, path)
    try:
        source, before = await in_io_thread(_examine, fd, path, name, force, reason)
        yield source
        after = os.fstat(fd)
        if before is not None and after.st_mtime_ns != before.st_mtime_ns:
            source.warnings.append(f"{path} was changed while it was read: the backup is not of one instant")
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK: opening a named pipe must not wait for somebody to write into it.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise open_error(error, "read", str(path), SourceError) from error


def _examine(
    fd: int, path: Path, name: str, force: bool, reason: str | None
) -> tuple[FileSource, os.stat_result | None]:
    """The source, and the state of the file to compare with at the end (None for a device)."""
    status = os.fstat(fd)
    is_device = check_kind(status.st_mode, "read", str(path), SourceError)
    try:
        size = size_of(fd)
    except OSError as error:
        raise SourceError("find the size of", str(path), os_reason(error)) from error
    if size == 0:
        what = "the device has no medium or no size" if is_device else "the file is empty"
        raise SourceError("back up", str(path), what, "there is nothing to back up")
    if not force:
        lock_for_reading(fd, str(path))
    if is_device:
        # What the cache has may be older than what another host of a shared disk has written.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    kind = "a block device has no dirty bitmap" if is_device else "a file has no dirty bitmap"
    source = FileSource(fd, path, name, size, reason or kind)
    source.warnings += _mount_warnings(fd, path)
    start = bytearray(min(MAGIC_SIZE, size))
    source._read(0, memoryview(start))
    if magic := foreign_magic(bytes(start)):
        source.warnings.append(
            f"{path} is backed up as a raw disk, but starts like a {magic} image; "
            f"if it is one, name its format (for qcow2 also by the name's end .qcow2)"
        )
    return source, None if is_device else status


def _mount_warnings(fd: int, path: Path) -> list[str]:
    status = os.fstat(fd)
    if not check_kind(status.st_mode, "read", str(path), SourceError):
        return []
    places = mounted_on(status.st_rdev)
    if not places:
        return []
    return [f"{path} is mounted for writing on {', '.join(places)}: the backup is not of one instant"]
