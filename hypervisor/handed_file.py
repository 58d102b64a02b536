"""A disk that another process hands over as an open file, with the regions that are to be read.

So the hypervisor of Proxmox VE does for backup providers that cannot speak NBD (mechanism `file-handle`): the file is
an NBD export behind `nbdfuse`. Here it is opened once more by that process's table of descriptors. Only whole chunks
inside the regions are read, each part is given up (a hole is punched) once it is stored.
"""

import errno
import mmap
import os
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from core.buffers import WritableBuffer
from core.disks import Extent, ExtentState, ReadPlan
from core.errors import SourceError, os_reason
from core.limits import in_io_thread
from hypervisor.errors import FleecingError, SnapshotBrokenError
from hypervisor.extents import CHUNK_SIZE, ExtentBuilder
from hypervisor.holes import punch_hole
from hypervisor.image_files import size_of

#: Bytes of one read: what `nbdfuse` and a block device take in one request or a few.
_PIECE: Final = 1 << 20
#: What direct reads have to be aligned to, on any device.
_ALIGNMENT: Final = 4096


class HandedFile:
    """A `DiskSource`; made by `handed_file`."""

    def __init__(
        self, fd: int, name: str, size: int, plan: ReadPlan, regions: Sequence[Extent], *, writable: bool
    ) -> None:
        self._fd = fd
        self.name: Final = name  #: the archive's
        self.size: Final = size  #: bytes
        self.plan: Final = plan  #: what `extents` is based on
        self._regions = regions
        self._writable = writable
        #: All of the disk was wanted, and could not be had.
        self.distrusted = False

    async def extents(self, *, incremental: bool = True) -> Sequence[Extent]:
        """What was handed over, by whole chunks; the rest is CLEAN.

        Raises:
            FleecingError: all is wanted, and only what changed was handed over.
        """
        if self.plan.base is not None and not incremental:
            self.distrusted = True
            raise FleecingError(
                "read all of disk",
                self.name,
                "only what changed since the previous backup can be read, and that backup is of no use",
                "try again: the next backup reads everything",
            )
        return self._regions

    async def read_into(self, offset: int, buffer: WritableBuffer) -> None:
        """Fill `buffer` from `offset` on; cancelled or failed, its content is undefined.

        Raises:
            SnapshotBrokenError: the range can be read no longer.
            SourceError: it cannot be read.
        """
        await in_io_thread(self._read, offset, memoryview(buffer).cast("B"))

    async def discard(self, offset: int, length: int) -> None:
        """Give the range up; only space is at stake, so that nothing comes of a failure."""
        if self._writable:
            self._writable = await in_io_thread(punch_hole, self._fd, offset, length)

    def _read(self, offset: int, view: memoryview) -> None:
        # Direct reads want aligned memory, which the caller's need not be.
        with mmap.mmap(-1, _PIECE) as aligned, memoryview(aligned) as piece:
            position = 0
            while position < len(view):
                start = (offset + position) // _ALIGNMENT * _ALIGNMENT
                ahead = offset + position - start
                want = min(len(view) - position, _PIECE - ahead)
                asked = min(_PIECE, -(-(ahead + want) // _ALIGNMENT) * _ALIGNMENT)
                count = self._preadv(piece[:asked], start) - ahead
                if count <= 0:
                    raise SourceError("read disk", self.name, f"it ends at {start}, and should have {self.size} bytes")
                count = min(count, want)
                view[position : position + count] = piece[ahead : ahead + count]
                position += count

    def _preadv(self, piece: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._fd, [piece], offset)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EINVAL):
                raise SnapshotBrokenError(
                    "read disk",
                    self.name,
                    f"its frozen view broke, or its storage fails ({os_reason(error)} at {offset})",
                    "the guest is not affected; look at the fleecing storage's space and speed",
                ) from error
            raise SourceError("read disk", self.name, f"{os_reason(error)} at {offset}") from error


def regions_to_read(name: str, size: int, regions: Sequence[tuple[int, int]], *, only: bool) -> list[Extent]:
    """What was handed over as extents of whole chunks: DATA in the regions, CLEAN or (without `only`) DATA elsewhere.

    Raises:
        FleecingError: they are not in order or outside of the disk; with `only` also if they are no whole chunks, since
            nothing beside them can be read.
    """
    extents = ExtentBuilder(size)
    state = ExtentState.CLEAN if only else ExtentState.DATA
    for offset, length in regions:
        end = offset + length
        if length <= 0 or offset < extents.offset or end > size:
            raise FleecingError("read disk", name, f"its region {offset}..{end} is out of order or outside of the disk")
        if only and (offset % CHUNK_SIZE or (end % CHUNK_SIZE and end != size)):
            raise FleecingError(
                "read disk", name, f"its region {offset}..{end} is no whole number of chunks of {CHUNK_SIZE} bytes"
            )
        extents.add(offset - extents.offset, state)
        extents.add(length, ExtentState.DATA)
    extents.add(size - extents.offset, state)
    return extents.finish()


@asynccontextmanager
async def handed_file(
    process: int, fd: int, status: tuple[int, int], *, name: str, size: int, plan: ReadPlan, regions: Sequence[Extent]
) -> AsyncIterator[HandedFile]:
    """The file that `process` has open as `fd`, opened once more while the block runs.

    Args:
        process: the process that hands it over; it must keep it open.
        fd: its descriptor.
        status: `st_dev` and `st_ino` that it found.
        name: of the archive.
        size: bytes.
        plan: full, or what the regions count from.
        regions: as `regions_to_read` gives them.

    Raises:
        FleecingError: it is another file, no disk, or has another size.
        SourceError: it cannot be opened.
    """
    descriptor, writable = await in_io_thread(_open, process, fd, name)
    try:
        found = os.fstat(descriptor)
        if (found.st_dev, found.st_ino) != status or not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            raise FleecingError("back up disk", name, f"descriptor {fd} is not the disk that was handed over")
        there = await in_io_thread(size_of, descriptor)
        if there != size:
            raise FleecingError("back up disk", name, f"its size changed from {size} to {there} B at this moment")
        yield HandedFile(descriptor, name, size, plan, regions, writable=writable)
    finally:
        os.close(descriptor)


def _open(process: int, fd: int, name: str) -> tuple[int, bool]:
    """The descriptor, and whether it can be written: never more than the one that was handed over.

    What cannot be read past the page cache is read through it.
    """
    try:
        access = _flags(Path(f"/proc/{process}/fdinfo/{fd}").read_text()) & os.O_ACCMODE
        if access == os.O_WRONLY:
            raise SourceError("open disk", name, f"descriptor {fd} is open for writing only")
        flags = access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        path = f"/proc/{process}/fd/{fd}"
        try:
            return os.open(path, flags | os.O_DIRECT), access == os.O_RDWR
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        return os.open(path, flags), access == os.O_RDWR
    except OSError as error:
        raise SourceError("open disk", name, os_reason(error)) from error


def _flags(information: str) -> int:
    """The flags of a descriptor by its `fdinfo`; those of one that is only for reading if there are none."""
    for line in information.splitlines():
        key, _, value = line.partition(":")
        if key == "flags":
            return int(value, 8)
    return os.O_RDONLY
